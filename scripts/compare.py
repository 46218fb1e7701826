"""Runs side by side, e.g. GPT-2 against LLaMA 2 against LLaMA 3: python scripts/compare.py runs/a runs/b runs/c [--out DIR].

Loss against tokens, FLOPs and hours, speed, memory and downstream scores, in a table and a figure; also of runs that go on still.
"""

import argparse
import sys

from isoflop.errors import run_command


def main(argv: list[str] | None = None) -> int:
    """Parse first: a mistake costs no import of the libraries behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs; the others are held against the first")
    parser.add_argument("--out", default="runs/comparison", help="where comparison.png, .md and .json go")
    parser.add_argument("--json", action="store_true", help="print the numbers at full precision")
    arguments = parser.parse_args(argv)

    from isoflop.compare.command import compare_command

    return compare_command(arguments.runs, arguments.out, arguments.json)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
