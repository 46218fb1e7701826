"""What `plan` can be asked: the options, which question takes which, and what values they may have."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Literal, NoReturn

from isoflop import hardware
from isoflop.errors import UserError
from isoflop.families import FAMILIES
from isoflop.scaling.laws import DEFAULT_LAW, PUBLISHED

Mode = Literal["recipe", "compare", "models", "model", "budget", "target"]
HARDWARE = {"gpus", "gpu", "mfu", "peak_tflops", "price"}
# What each question takes; an option that would be ignored is refused.
TAKES: dict[Mode, set[str]] = {
    "recipe": HARDWARE | {"law", "measure"},
    "compare": HARDWARE | {"law"},
    "models": set(),
    "model": HARDWARE | {"law", "write"},
    "budget": HARDWARE
    | {"flops", "days", "dollars", "family", "sequence_length", "law", "constrain_tokens_per_parameter", "write"},
    "target": {"parameters", "width", "aspect", "family", "sequence_length", "law", "write"},
}
# Lowest (exclusive) and highest value of each number: wide, but such that nothing overflows.
BOUNDS = {
    "flops": (0, 1e30), "gpus": (0, 1e6), "days": (0, 1e5), "dollars": (0, 1e12), "price": (1e-6, 1e6), "mfu": (0, 1),
    "peak_tflops": (1e-3, 1e6), "sequence_length": (1, 1e8), "parameters": (0, 1e15), "width": (0, 1e6), "aspect": (0, 1e5),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, as all of a user's are here."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(f"{message}; {self.prog} --help lists every option")


def parser(description: str) -> Parser:
    """Every option of `plan`."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p._negative_number_matcher = re.compile(r"-[\d.]+(e[-+]?\d+)?$")  # -1e21 is a number too, before Python 3.14 as well
    p.add_argument(
        "what", nargs="*", help="a recipe and overrides; `compare` and recipes; `models` and a name; nothing: a budget"
    )
    budget = p.add_argument_group("a budget: --flops, or --gpus --gpu --days, or --dollars --gpu --price")
    budget.add_argument("--flops", type=float, help="training FLOPs")
    budget.add_argument("--gpus", type=int, help="number of GPUs (1 for a budget, 2 for the tables of a recipe)")
    budget.add_argument("--gpu", help=f"kind of GPU: {', '.join(hardware.GPUS)}")
    budget.add_argument("--days", type=float)
    budget.add_argument("--dollars", type=float)
    budget.add_argument("--price", type=float, help="dollars of one GPU for an hour")
    budget.add_argument("--mfu", type=float, help="share of the peak that training reaches, 0 to 1")
    budget.add_argument("--peak-tflops", type=float, help="dense bf16 TFLOP/s of one GPU that is not in the list")
    p.add_argument("--family", help=f"{', '.join(FAMILIES)}, a published model, or a recipe (llama3; for a target gpt2)")
    p.add_argument("--sequence-length", type=int, help="tokens of a window, where not the family's")
    p.add_argument("--law", help=f"{', '.join(PUBLISHED)}, or a file ({DEFAULT_LAW})")
    p.add_argument(
        "--constrain-tokens-per-parameter", type=float, nargs=2, metavar=("LOW", "HIGH"), help="keep D/N between these"
    )
    target = p.add_argument_group("a shape for a target: two of these")
    target.add_argument("--parameters", type=float, help="N = 12 layers width^2")
    target.add_argument("--width", type=int)
    target.add_argument("--aspect", type=int, help="width / layers and width / heads")
    p.add_argument("--write", type=Path, metavar="FILE", help="write the plan as a recipe that pretrain runs")
    p.add_argument("--measure", action="store_true", default=None, help="run a few real micro-batches of the recipe here")
    p.add_argument("--json", action="store_true", help="one JSON object with the same numbers")
    return p


def mode_of(options: argparse.Namespace) -> Mode:
    """Which question was asked."""
    match options.what:
        case []:
            return "target" if options.parameters or options.width or options.aspect else "budget"
        case ["models"]:
            return "models"
        case ["models", _]:
            return "model"
        case ["models", *more]:
            raise UserError(f"models {' '.join(more)}: models takes one name; change the recipe that --write makes of it")
        case ["compare", *_]:
            return "compare"
    return "recipe"


def check(options: argparse.Namespace, mode: Mode) -> None:
    """Refuse numbers that are none or out of bounds, and options that the question does not take."""
    for name, (low, high) in BOUNDS.items():
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g} is not a positive number; give one above 0")
        if value is not None and not low < value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value:g} is not within {low:g} to {high:g}; give one that is")
    given = {name for name, value in vars(options).items() if value is not None and name not in ("what", "json")}
    if options.measure and options.mfu is not None:
        raise UserError(f"--mfu {options.mfu:g} and --measure both set the MFU; leave one out")
    if ignored := sorted(given - TAKES[mode]):
        named, taken = (", ".join(f"--{name.replace('_', '-')}" for name in names) for names in (ignored, sorted(TAKES[mode])))
        question = {"budget": "a budget", "target": "a shape for a target", "model": "models NAME", "recipe": "a recipe"}
        raise UserError(f"{named}: no part of {question.get(mode, mode)}, which takes {taken or 'no options'}; leave it out")
