"""Publish a run on the Hugging Face Hub with a model card made from its files.

python scripts/publish.py runs/quickstart --repo-id user/name [--public] [--license apache-2.0] [--checkpoints] [--dry-run]
"""

import argparse
import sys

from isoflop.errors import run_command


def main(argv: list[str] | None = None) -> int:
    """Parse first: a mistake costs no import of the libraries behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, e.g. runs/quickstart")
    parser.add_argument("--repo-id", help="user/name; hub.repo_id of the run's recipe where not given")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, help="of a new repository; else hub.private decides")
    visibility.add_argument("--public", dest="private", action="store_false", help="of a new repository")
    parser.add_argument("--license", help="the model's, by the Hub's identifier: apache-2.0, mit ... (else hub.license)")
    parser.add_argument(
        "--checkpoints", action="store_true", help="push the checkpoints too, each as revision step-N (see hub.push_every)"
    )
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="show the files and the card; ask and send nothing")
    arguments = parser.parse_args(argv)

    from isoflop.publish.command import Request, publish

    return publish(Request(**vars(arguments)))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
