"""`isoflop compare`: runs side by side."""

from __future__ import annotations

from isoflop.cli.parser import Parser

DESCRIPTION = """\
Compare runs, finished or still training: loss against tokens, FLOPs and
hours, speed, memory and downstream scores, in a table and a figure.

  isoflop compare runs/gpt2 runs/llama3
"""


def main(arguments: list[str], prog: str) -> int:
    """Parse before matplotlib is imported. Returns the exit code."""
    parser = Parser(prog=prog, description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", help="run folders; the first is what the others are compared with")
    parser.add_argument("--out", default="runs/comparison", metavar="DIR", help="folder of comparison.png, .md and .json")
    parser.add_argument("--json", action="store_true", help="print the numbers at full precision")
    given = parser.parse_args(arguments)

    from isoflop.compare.command import compare_command

    return compare_command(given.runs, given.out, given.json)
