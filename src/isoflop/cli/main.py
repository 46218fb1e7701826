"""The `isoflop` command: `isoflop VERB ...`. `python -m isoflop VERB ...` and `scripts/VERB.py ...` run the same code."""

from __future__ import annotations

import importlib
import sys

import isoflop
from isoflop.utils.command import run_command
from isoflop.utils.errors import UserError, nearest

VERBS = {
    "plan": "predict loss, memory and time of a recipe; find what a compute budget buys",
    "prepare": "tokenize and pack a recipe's data",
    "pretrain": "train a recipe, or resume it",
    "sweep": "train the small runs that a scaling law is fitted to",
    "fit": "fit scaling laws to a table of runs or to run folders",
    "eval": "evaluate a run or a model with lm-eval",
    "compare": "compare runs: loss against tokens, FLOPs and hours, and scores",
    "publish": "push a run to the Hugging Face Hub with its model card",
    "export": "write a run's model as a GGUF file",
    "recipes": "list and copy the shipped recipes",
}
USAGE = "\n".join([
    "usage: isoflop VERB ...",
    "",
    "Compute-optimal pretraining on the Hugging Face stack.",
    "",
    *(f"  {verb:10}{summary}" for verb, summary in VERBS.items()),
    "",
    "`isoflop VERB --help` lists the options of one, `isoflop --version` prints the version.",
])  # fmt: skip


def main() -> None:
    """Run the command line of this process and exit."""
    run_command(lambda: dispatch(sys.argv[1:]))


def run_script(verb: str) -> None:
    """Run one verb for `scripts/`, with the command line of this process, and exit."""
    run_command(lambda: run_verb(verb, sys.argv[1:], sys.argv[0]))


def dispatch(arguments: list[str]) -> int:
    """Run the verb that the first argument names; returns the exit code."""
    match arguments:
        case [] | ["-h" | "--help" | "help"]:
            print(USAGE)
            return 0
        case ["--version"]:
            print(f"isoflop {isoflop.__version__}")
            return 0
        case [verb, *others] if verb in VERBS:
            return run_verb(verb, others, f"isoflop {verb}")
    raise UserError(f"isoflop {arguments[0]}: no such verb{nearest(arguments[0], list(VERBS))}")


def run_verb(verb: str, arguments: list[str], prog: str) -> int:
    """Import a verb's module and run it; a mistake in its options costs no import of the libraries behind it."""
    code: int = importlib.import_module(f"isoflop.cli.{verb}").main(arguments, prog)
    return code
