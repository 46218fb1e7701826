"""Tokenize and pack a recipe's data: python scripts/prepare.py recipes/quickstart.yaml [section.key=value ...].

Killed, it goes on with the same command. Several machines: --shard 0/4 ... --shard 3/4, one each, then --merge on one.
"""

import argparse
import sys

from isoflop.errors import UserError, run_command
from isoflop.recipe_file import load_recipe


def main(argv: list[str] | None = None) -> int:
    """Read the recipe first: a mistake in it costs no import of the libraries behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file of recipes/")
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. training.sequence_length=1024")
    parser.add_argument("--workers", type=int, help="processes; where not given, up to one for each core, part and GiB")
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--shard", metavar="I/N", type=share, help="write the I-th of N shares of the parts (I from 0)")
    doing.add_argument("--merge", action="store_true", help="join the parts that several machines wrote, without copying them")
    doing.add_argument("--verify", action="store_true", help="check every byte of a prepared folder, e.g. after copying it")
    doing.add_argument("--inspect", metavar="N", type=int, help="show the first N windows that training sees, decoded")
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)

    if arguments.verify or arguments.merge:
        from isoflop.prepare.command import merge, verify

        (verify if arguments.verify else merge)(recipe)
    elif arguments.inspect is not None:
        from isoflop.prepare.inspection import show_windows

        show_windows(recipe, arguments.inspect)
    else:
        from isoflop.prepare.command import prepare

        prepare(recipe, arguments.workers, arguments.shard)
    return 0


def share(text: str) -> tuple[int, int]:
    """`I/N` as (I, N)."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text}: give it as I/N with I from 0 to N - 1, e.g. --shard 0/4")
    return int(index), int(count)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
