"""`isoflop publish`: push a run to the Hugging Face Hub with a model card made from its files."""

from __future__ import annotations

from isoflop.cli.parser import Parser

DESCRIPTION = """\
Push a run to the Hugging Face Hub with a model card made from its files.

  isoflop publish runs/quickstart --repo-id user/name --dry-run
"""


def main(arguments: list[str], prog: str) -> int:
    """Parse before the Hub's client is imported. Returns the exit code."""
    parser = Parser(prog=prog, description=DESCRIPTION)
    parser.add_argument("run", help="a run folder, e.g. runs/quickstart")
    parser.add_argument("--repo-id", metavar="USER/NAME", help="the repository (default: the recipe's hub.repo_id)")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private (default: the recipe's hub.private)"
    )
    visibility.add_argument("--public", dest="private", action="store_false", help="make a new repository public")
    parser.add_argument("--license", metavar="ID", help="the model's license: apache-2.0, mit ... (default: hub.license)")
    parser.add_argument("--checkpoints", action="store_true", help="push the checkpoints too, each as revision step-N")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print the files and the card; send nothing")
    given = parser.parse_args(arguments)

    from isoflop.publish.command import publish_command

    return publish_command(**vars(given))
