"""`isoflop prepare`: tokenize and pack a recipe's data."""

from __future__ import annotations

from isoflop.cli.parser import Parser
from isoflop.config.loading import load_recipe
from isoflop.utils.errors import UserError
from isoflop.utils.output import log_to_console

DESCRIPTION = """\
Tokenize and pack a recipe's data into windows on disk. The same command
resumes after a kill. On several machines: --shard 0/4 ... --shard 3/4, one
each, then --merge on one.

  isoflop prepare quickstart
"""


def main(arguments: list[str], prog: str) -> int:
    """Read the recipe before the data libraries are imported. Returns the exit code."""
    parser = Parser(prog=prog, description=DESCRIPTION)
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. training.sequence_length=1024")
    parser.add_argument("--workers", metavar="N", type=int, help="processes (default: one per core, part and GiB of memory)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--shard", metavar="I/N", type=shard, help="write the I-th of N shares of the parts, I from 0")
    action.add_argument("--merge", action="store_true", help="join the parts that several machines wrote, without copying them")
    action.add_argument("--verify", action="store_true", help="check every byte of a prepared folder, e.g. after copying it")
    action.add_argument("--inspect", metavar="N", type=int, help="print the first N windows that training reads, decoded")
    given = parser.parse_intermixed_args(arguments)
    recipe = load_recipe(given.recipe, given.overrides)
    log_to_console()

    if given.verify or given.merge:
        from isoflop.prepare.run import merge, verify

        (verify if given.verify else merge)(recipe)
    elif given.inspect is not None:
        from isoflop.prepare.inspect import show_windows

        show_windows(recipe, given.inspect)
    else:
        from isoflop.prepare.run import prepare

        prepare(recipe, num_workers=given.workers, shard=given.shard)
    return 0


def shard(text: str) -> tuple[int, int]:
    """Parse `I/N` into (I, N). Raises `UserError`."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text}: give it as I/N with I from 0 to N - 1, e.g. --shard 0/4")
    return int(index), int(count)
