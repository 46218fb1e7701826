"""The command `isoflop plan`: what a recipe costs, or what a budget buys.

Entered by `main`. `with_subcommand` translates the command lines of `scripts/plan.py`, which had no subcommands.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isoflop.cli.parser import Parser
from isoflop.plan import hardware, report
from isoflop.plan.budgets import plan_budget
from isoflop.plan.families import FAMILIES, PUBLISHED_MODELS
from isoflop.plan.gpus import check_bounds
from isoflop.plan.hyperparameters import choose, law_for
from isoflop.plan.models import plan_model, plan_shape
from isoflop.plan.planner import get_law, plan
from isoflop.plan.results import Plan
from isoflop.plan.summary import written_text
from isoflop.scaling.hyperparameter_laws import HYPERPARAMETER_LAWS
from isoflop.scaling.laws import DEFAULT_LAW, PUBLISHED
from isoflop.utils.errors import UserError

Answer = tuple[dict[str, Any], str]  # as JSON and as text
QUESTIONS = ("recipe", "budget", "compare", "models", "shape", "hyperparameters")
FLAGS = ("--json", "--full", "--measure", "--help")  # options without a value

DESCRIPTION = """\
What a recipe costs, or what a budget buys, with every number's formula.
Nothing is trained, and no GPU is needed.

  isoflop plan recipe llama2_1.36b --gpu a6000 --gpus 2
  isoflop plan budget --flops 1.36e21 --family llama3 --write mine.yaml
  isoflop plan budget --gpus 2 --gpu a6000 --days 16
  isoflop plan compare gpt2_1.36b llama2_1.36b
  isoflop plan models llama-3-8b
  isoflop plan shape --parameters 182.4e6 --aspect 32
  isoflop plan hyperparameters --parameters-without-vocabulary 1e9 --tokens 2e10
"""


def main(argv: list[str], prog: str = "isoflop plan") -> int:
    """Print the answer to one question; returns the exit code. Raises `UserError` for a bad command line."""
    parser, commands = _parser(prog)
    argv = with_subcommand(argv)
    if not argv or argv[0] not in commands:
        parser.parse_args(argv)
        raise UserError(f"give one of {', '.join(commands)}; `{prog} --help` explains them")
    command, answer_of = commands[argv[0]]
    options = command.parse_intermixed_args(argv[1:])
    answer, text = answer_of(options)
    print(json.dumps(answer, indent=1, allow_nan=False) if options.json else text)
    return 0


def with_subcommand(argv: list[str]) -> list[str]:
    """Return a command line with its subcommand first, also where it is left out as in `scripts/plan.py recipes/x.yaml`."""
    if not argv or argv[0] in (*QUESTIONS, "-h", "--help"):
        return argv
    words, value_of = [], 0
    for position, argument in enumerate(argv):
        if value_of:
            value_of -= 1
        elif argument.startswith("--"):
            has_value = argument not in FLAGS and "=" not in argument
            value_of = 2 if argument == "--constrain-tokens-per-parameter" else int(has_value)
        else:
            words.append(position)
    if words and argv[words[0]] in ("compare", "models"):
        return [argv[words[0]], *argv[: words[0]], *argv[words[0] + 1 :]]
    if words:
        return ["recipe", *argv]
    is_target = any(argument.split("=")[0] in ("--parameters", "--width", "--aspect") for argument in argv)
    return ["shape" if is_target else "budget", *argv]


def _parser(prog: str) -> tuple[Parser, dict[str, tuple[Parser, Callable[[argparse.Namespace], Answer]]]]:
    """Return the parser, and each subcommand's parser and function."""
    parser = Parser(prog=prog, description=DESCRIPTION)
    adding = parser.add_subparsers(dest="question", metavar="QUESTION", parser_class=Parser)
    commands: dict[str, tuple[Parser, Callable[[argparse.Namespace], Answer]]] = {}
    for name, short, add_options, answer in (
        ("recipe", "memory, time, cost and predicted loss of a recipe", _recipe_options, _recipe),
        ("budget", "the best shapes for FLOPs, GPU-days or dollars", _budget_options, _budget),
        ("compare", "recipes side by side", _compare_options, _compare),
        ("models", "the published models, or one of them as a recipe", _models_options, _models),
        ("shape", "a model shape for a number of parameters", _shape_options, _shape),
        ("hyperparameters", "learning rate, batch and weight decay for N and D", _hyperparameters_options, _hyperparameters),
    ):
        command = adding.add_parser(name, help=short, description=f"{short[0].upper()}{short[1:]}.", prog=f"{prog} {name}")
        add_options(command)
        command.add_argument("--json", action="store_true", help="print one JSON object with the same numbers")
        commands[name] = command, answer
    return parser, commands


def _hardware_options(parser: Parser, gpus: str) -> None:
    group = parser.add_argument_group("GPUs")
    group.add_argument("--gpu", metavar="NAME", help=f"GPU model (default: six usual ones): {', '.join(hardware.GPUS)}")
    group.add_argument("--gpus", type=int, metavar="N", help=f"number of GPUs (default: {gpus})")
    group.add_argument(
        "--mfu", type=float, metavar="X", help="share of the peak that training reaches, 0 to 1 (default: measured)"
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="dense bf16 TFLOP/s of one GPU that is not in the list (default: its datasheet)",
    )
    group.add_argument("--price", type=float, metavar="USD", help="dollars of one GPU for an hour (default: no cost is printed)")


def _law_option(parser: Parser, default: str = DEFAULT_LAW) -> None:
    parser.add_argument("--law", metavar="LAW", help=f"{', '.join(PUBLISHED)}, or a file of `fit` (default: {default})")


def _family_options(parser: Parser, default: str) -> None:
    parser.add_argument(
        "--family",
        default=default,
        metavar="NAME",
        help=f"{', '.join(FAMILIES)}, a published model, or a recipe (default: %(default)s)",
    )
    parser.add_argument("--sequence-length", type=int, metavar="TOKENS", help="tokens of a window (default: the family's)")


def _write_option(parser: Parser) -> None:
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write a recipe for `pretrain`, a new .yaml file (default: none)"
    )


def _tuning_options(parser: Parser) -> None:
    _optimizer_option(parser, "the family's")
    parser.add_argument(
        "--hyperparameter-law",
        metavar="LAW",
        help=f"learning rate and batch of the recipe: {', '.join(HYPERPARAMETER_LAWS)}, or a file of `fit` (default: --law's file"
        " where it has one, else step_law; muon: nanochat or quickstart_muon)",
    )


def _tuning(options: argparse.Namespace) -> dict[str, Any]:
    """Return optimizer and law of learning rate and batch as arguments."""
    return {"optimizer": options.optimizer, "hyperparameter_law": options.hyperparameter_law}


def _optimizer_option(parser: Parser, default: str) -> None:
    parser.add_argument("--optimizer", choices=("adamw", "muon"), metavar="NAME", help=f"adamw or muon (default: {default})")


def _full_option(parser: Parser) -> None:
    parser.add_argument("--full", action="store_true", help="print every number with its formula, not the summary")


def _recipe_options(parser: Parser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")
    _hardware_options(parser, "tables of 1, 2, 4 and 8")
    _law_option(parser, f"the recipe's, else {DEFAULT_LAW}")
    parser.add_argument("--measure", action="store_true", help="run a few micro-batches of the recipe on this machine")
    _full_option(parser)


def _recipe(options: argparse.Namespace) -> Answer:
    found = plan(options.recipe, options.overrides, law=options.law, measure=options.measure, **_hardware(options))
    return found.to_dict(), _plan_text(found, options.full)


def _hardware(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of GPUs as arguments."""
    return {
        "gpu": options.gpu,
        "num_gpus": options.gpus,
        "mfu": options.mfu,
        "peak_tflops": options.peak_tflops,
        "price_per_gpu_hour": options.price,
    }


def _plan_text(found: Plan, full: bool) -> str:
    return report.recipe_text(found) if full else str(found)


def _budget_options(parser: Parser) -> None:
    group = parser.add_argument_group("budget: --flops, or --gpus --gpu --days, or --dollars --gpu --price")
    group.add_argument("--flops", type=float, metavar="C", help="training FLOPs")
    group.add_argument("--days", type=float, metavar="DAYS", help="days of --gpus GPUs")
    group.add_argument("--dollars", type=float, metavar="USD", help="dollars for GPUs of --price")
    _hardware_options(parser, "1")
    _family_options(parser, "llama3")
    _law_option(parser)
    parser.add_argument(
        "--constrain-tokens-per-parameter", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="keep D/N between these (default: at least 1)",
    )  # fmt: skip
    _tuning_options(parser)
    _write_option(parser)
    _full_option(parser)


def _budget(options: argparse.Namespace) -> Answer:
    bounds = options.constrain_tokens_per_parameter
    found = plan_budget(
        options.flops,
        days=options.days,
        dollars=options.dollars,
        family=options.family,
        sequence_length=options.sequence_length,
        law=options.law,
        tokens_per_parameter=(bounds[0], bounds[1]) if bounds else None,
        write=options.write,
        **_tuning(options),
        **_hardware(options),
    )
    written = f"\n\n{written_text(found.planned)}" if options.write else ""
    return found.to_dict(), report.budget_text(found, options.full) + written


def _compare_options(parser: Parser) -> None:
    parser.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help="YAML files or shipped recipes; KEY=VALUE changes all of them"
    )
    _hardware_options(parser, "2")
    _law_option(parser)


def _compare(options: argparse.Namespace) -> Answer:
    overrides = [word for word in options.recipes if "=" in word]
    paths = [word for word in options.recipes if "=" not in word]
    if not paths:
        raise UserError("compare needs recipes, e.g. compare gpt2_1.36b llama2_1.36b")
    law = get_law(options.law)
    plans = [plan(path, overrides, law=law, **_hardware(options)) for path in paths]
    return {"recipes": [found.to_dict() for found in plans]}, report.compare_text(plans, options.gpus or 2)


def _models_options(parser: Parser) -> None:
    parser.add_argument("name", nargs="*", metavar="NAME", help="the model to plan (default: a table of all)")
    _hardware_options(parser, "tables of 1, 2, 4 and 8")
    _law_option(parser)
    _tuning_options(parser)
    _write_option(parser)
    _full_option(parser)


def _models(options: argparse.Namespace) -> Answer:
    if len(options.name) > 1:
        raise UserError(f"models {' '.join(options.name)}: models takes one name; change the recipe that --write makes of it")
    if not options.name:
        given = [name for name, value in vars(options).items() if value and name != "json"]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} is for one model; give its name, e.g. models llama-3-8b")
        models = PUBLISHED_MODELS.values()
        return {"models": [published.to_dict() for published in models]}, report.models_text(models)
    planned = plan_model(options.name[0], law=options.law, write=options.write, **_tuning(options), **_hardware(options))
    written = f"\n\n{written_text(planned)}" if options.write else ""
    return planned.plan.to_dict(), _plan_text(planned.plan, options.full) + written


def _shape_options(parser: Parser) -> None:
    group = parser.add_argument_group("target: two of these")
    group.add_argument("--parameters", type=float, metavar="N", help="N = 12 layers width^2")
    group.add_argument("--width", type=int, metavar="WIDTH", help="hidden size")
    group.add_argument("--aspect", type=int, metavar="RATIO", help="width / layers and width / heads")
    _family_options(parser, "gpt2")
    _law_option(parser)
    _tuning_options(parser)
    _write_option(parser)


def _shape(options: argparse.Namespace) -> Answer:
    found = plan_shape(
        parameters=options.parameters,
        width=options.width,
        aspect=options.aspect,
        family=options.family,
        sequence_length=options.sequence_length,
        law=options.law,
        write=options.write,
        **_tuning(options),
    )
    written = f"\n{written_text(found.planned)}" if found.planned else ""
    return found.to_dict(), report.target_text(found) + written


def _hyperparameters_options(parser: Parser) -> None:
    parser.add_argument(
        "--parameters-without-vocabulary", type=float, required=True, metavar="N", help="all parameters but embeddings and head"
    )
    parser.add_argument("--tokens", type=float, required=True, metavar="D", help="tokens of the run")
    _optimizer_option(parser, "adamw")
    names = ", ".join(HYPERPARAMETER_LAWS)
    parser.add_argument(
        "--law",
        metavar="LAW",
        help=f"{names}, or a file of `fit` (default: step_law; muon: nanochat or quickstart_muon, the nearer)",
    )
    group = parser.add_argument_group("a batch that divides (default: the law's)")
    group.add_argument("--sequence-length", type=int, metavar="TOKENS", help="tokens of a window")
    group.add_argument("--micro-batch-size", type=int, metavar="N", help="windows in a forward pass per GPU (default: 1)")
    group.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: 1)")


def _hyperparameters(options: argparse.Namespace) -> Answer:
    n, d, sequence_length = options.parameters_without_vocabulary, options.tokens, options.sequence_length
    micro, gpus = options.micro_batch_size, options.gpus
    check_bounds(parameters_without_vocabulary=n, tokens=d, sequence_length=sequence_length, micro_batch_size=micro, gpus=gpus)
    if sequence_length is None and (micro or gpus):
        given = "--micro-batch-size" if micro else "--gpus"
        raise UserError(f"{given} rounds the batch to what divides, which needs --sequence-length, e.g. --sequence-length 2048")
    unit = sequence_length and sequence_length * (micro or 1) * (gpus or 1)
    found = choose(law_for(options.optimizer or "adamw", n, d, options.law), n, d, batch_unit=unit)
    return found.to_dict(), str(found)
