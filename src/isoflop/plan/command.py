"""The command line of `scripts/plan.py`: which question was asked, and where its answer goes."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from isoflop import cost
from isoflop.errors import UserError
from isoflop.families import FAMILIES, PUBLISHED_MODELS, Family, at_sequence_length, family
from isoflop.plan import text
from isoflop.plan.budgets import Budget, plan_budget, require_positive
from isoflop.plan.recipes import COMPUTE_OPTIMAL, Machine, machines, plan_recipe, shape
from isoflop.plan.written import recipe_for, write_recipe
from isoflop.recipe import Model, Recipe
from isoflop.recipe_file import load_recipe
from isoflop.scaling.laws import DEFAULT_LAW, PUBLISHED, Law, load_law
from isoflop.search import shape_for_target


def parser(description: str) -> argparse.ArgumentParser:
    """Every option of `plan`."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p._negative_number_matcher = re.compile(r"-[\d.]+(e[-+]?\d+)?$")  # -1e21 is a number too, before Python 3.14 as well
    p.add_argument(
        "what", nargs="*", help="a recipe and overrides; `compare` and recipes; `models` and a name; nothing: a budget"
    )
    budget = p.add_argument_group("a budget: --flops, or --gpus --gpu --days, or --dollars --gpu --price")
    budget.add_argument("--flops", type=float, help="training FLOPs")
    budget.add_argument("--gpus", type=int, help="number of GPUs (2)")
    budget.add_argument("--gpu", help=f"kind of GPU: {', '.join(cost.GPUS)}")
    budget.add_argument("--days", type=float)
    budget.add_argument("--dollars", type=float)
    budget.add_argument("--price", type=float, help="dollars of one GPU for an hour")
    budget.add_argument("--mfu", type=float, help="share of the peak that training reaches, 0 to 1")
    budget.add_argument("--peak-tflops", type=float, help="dense bf16 TFLOP/s of one GPU that is not in the list")
    p.add_argument("--family", help=f"{', '.join(FAMILIES)}, a published model, or a recipe (llama3)")
    p.add_argument("--sequence-length", type=int, help="tokens of a window, where not the family's")
    p.add_argument("--law", default=DEFAULT_LAW, help=f"{', '.join(PUBLISHED)}, or a file ({DEFAULT_LAW})")
    p.add_argument(
        "--constrain-tokens-per-parameter", type=float, nargs=2, metavar=("LOW", "HIGH"), help="keep D/N between these"
    )
    target = p.add_argument_group("a shape for a target: two of these")
    target.add_argument("--parameters", type=float, help="N = 12 layers width^2")
    target.add_argument("--width", type=int)
    target.add_argument("--aspect", type=int, help="width / layers and width / heads")
    p.add_argument("--write", type=Path, metavar="FILE", help="write the plan as a recipe that pretrain runs")
    p.add_argument("--measure", action="store_true", help="run a few real micro-batches of the recipe on this machine")
    p.add_argument("--json", action="store_true", help="one JSON object with the same numbers")
    return p


def main(description: str, argv: list[str] | None = None) -> int:
    """Answer one question."""
    options = parser(description).parse_intermixed_args(argv)
    require_positive(
        flops=options.flops, gpus=options.gpus, days=options.days, dollars=options.dollars, price=options.price, mfu=options.mfu,
        peak_tflops=options.peak_tflops, parameters=options.parameters, width=options.width, aspect=options.aspect,
        sequence_length=options.sequence_length,
    )  # fmt: skip
    if options.mfu is not None and options.mfu > 1:
        raise UserError(f"--mfu {options.mfu:g} is above 1; give a share of the peak, e.g. 0.38")
    law = load_law(options.law)
    answer, rendered = _answer(options, law)
    print(json.dumps(answer, indent=1) if options.json else rendered)
    return 0


def _answer(options: argparse.Namespace, law: Law) -> tuple[dict[str, Any], str]:
    match options.what:
        case []:
            return _target(options, law) if options.parameters or options.width else _budget(options, law)
        case ["models"]:
            models = [published(name) for name in PUBLISHED_MODELS]
            return {"models": models}, text.models_text(models)
        case ["models", name]:
            return _published(options, law, name)
        case ["compare", *paths]:
            if not paths:
                raise UserError("compare needs recipes: plan.py compare recipes/gpt2_1.36b.yaml recipes/llama2_1.36b.yaml")
            plans = [_plan(options, law, load_recipe(path), path) for path in paths]
            return {"recipes": plans}, text.compare_text(plans, options.gpus or 2)
    path, *overrides = options.what
    return _recipe(options, law, load_recipe(path, overrides), path)


def _plan(options: argparse.Namespace, law: Law, recipe: Recipe, name: str) -> dict[str, Any]:
    kinds = machines(options.gpu, options.peak_tflops, options.mfu)
    return plan_recipe(recipe, name, law, kinds, options.gpus or 2, options.price)


def _recipe(options: argparse.Namespace, law: Law, recipe: Recipe, name: str) -> tuple[dict[str, Any], str]:
    plan = _plan(options, law, recipe, name)
    if options.measure:
        from isoflop.measure import measure  # torch: only where real steps are asked for

        plan["measured"] = measure(recipe, plan["tokens"])
    return plan, text.recipe_text(plan)


def _budget(options: argparse.Namespace, law: Law) -> tuple[dict[str, Any], str]:
    members, constraint = _members(options), _constraint(options)
    budget = _spending(options)
    plan, best = plan_budget(members, budget, law, constraint, machines(options.gpu, options.peak_tflops, options.mfu))
    rendered = text.budget_text(plan)
    if options.write:
        said = _write(options, members, best.model, best.tokens, best.predicted_loss, f"{plan['flops']:.6g} FLOPs")
        rendered += "\n\n" + said
    return plan, rendered


def _members(options: argparse.Namespace) -> Family:
    members = family(options.family or "llama3")
    return at_sequence_length(members, options.sequence_length) if options.sequence_length else members


def _constraint(options: argparse.Namespace) -> tuple[float, float] | None:
    if options.constrain_tokens_per_parameter is None:
        return None
    low, high = options.constrain_tokens_per_parameter
    if not 0 <= low < high:
        raise UserError(f"--constrain-tokens-per-parameter {low:g} {high:g}: LOW must be below HIGH, e.g. 10 30")
    return low, high


def _spending(options: argparse.Namespace) -> Budget:
    """What may be spent; exactly one of FLOPs, days and dollars."""
    given = [name for name in ("flops", "days", "dollars") if getattr(options, name) is not None]
    if len(given) != 1:
        raise UserError(
            f"give one budget: --flops 1.36e21, or --gpus 2 --gpu a6000 --days 16, or --dollars 500 --gpu h100 --price 2.5"
            f" (given: {', '.join(f'--{name}' for name in given) or 'none'})"
        )
    if options.flops is not None:
        return Budget(options.flops)
    if options.gpu is None and options.peak_tflops is None:
        raise UserError(f"--{given[0]} needs --gpu, one of {', '.join(cost.GPUS)}, or --peak-tflops")
    machine: Machine = machines(options.gpu, options.peak_tflops, options.mfu)[0]
    num_gpus = options.gpus or 1
    if options.days is not None:
        return Budget(None, 24 * options.days * num_gpus, num_gpus, machine, options.price)
    if options.price is None:
        raise UserError("--dollars needs --price, dollars of one GPU for an hour, e.g. --price 2.5")
    return Budget(None, options.dollars / options.price, num_gpus, machine, options.price)


def _target(options: argparse.Namespace, law: Law) -> tuple[dict[str, Any], str]:
    """A shape for a parameter target, trained on 20 tokens a parameter."""
    members = family(options.family or "gpt2")
    model = shape_for_target(members, options.parameters, options.width, options.aspect)
    n, s = cost.parameters(model), cost.shape_of(model)
    answer = shape(model) | {
        "parameters": n,
        "parameters_12_layers_width_squared": 12 * s.num_layers * s.hidden_size**2,
        "parameters_by_class": cost.parameters_by_class(model),
        "flops_per_token": cost.flops_per_token(model, members.sequence_length),
    }
    rendered = (
        f"family {members.name}: {s.num_layers} layers, d_model {s.hidden_size}, {s.num_heads} heads of {s.head_dim},"
        f" feed-forward {s.intermediate_size}\n12 layers width^2 = {12 * s.num_layers * s.hidden_size**2:,};"
        f" parameters of the {members.name} shape with its vocabulary: {n:,}"
    )
    if options.write:
        tokens = float(COMPUTE_OPTIMAL * n)
        loss = float(law.loss(law.size(model), tokens))
        rendered += "\n" + _write(options, members, model, tokens, loss, f"{COMPUTE_OPTIMAL} tokens a parameter")
    return answer, rendered


def published(name: str) -> dict[str, Any]:
    """A published model's shape with what follows from it."""
    facts = PUBLISHED_MODELS[name]
    n, tokens = cost.parameters(facts.model), facts.training_tokens
    per_token = cost.flops_per_token(facts.model, facts.sequence_length)
    return {"name": name} | shape(facts.model) | {
        "context": facts.model.max_positions,
        "sequence_length": facts.sequence_length,
        "parameters": n,
        "tokens": tokens,
        "tokens_per_parameter": tokens and tokens / n,
        "flops_per_token": per_token,
        "flops": tokens and tokens * per_token,
        "flops_6nd": tokens and 6 * n * tokens,
        "source": facts.source,
    }  # fmt: skip


def _published(options: argparse.Namespace, law: Law, name: str) -> tuple[dict[str, Any], str]:
    """A published model planned as a recipe: on its own tokens, or on 20 a parameter where they are not published."""
    if name not in PUBLISHED_MODELS:
        raise UserError(f"models {name}: not one of {', '.join(PUBLISHED_MODELS)}")
    members, facts = family(name), PUBLISHED_MODELS[name]
    tokens = facts.training_tokens or float(COMPUTE_OPTIMAL * cost.parameters(facts.model))
    loss = float(law.loss(law.size(facts.model), tokens))
    recipe, _ = recipe_for(facts.model, tokens, members.sequence_length, loss, members.recipe, name)
    plan, rendered = _recipe(options, law, recipe, name)
    if options.write:
        rendered += "\n\n" + _write(options, members, facts.model, tokens, loss, f"its {tokens:.4g} tokens")
    return plan, rendered


def _write(options: argparse.Namespace, members: Family, model: Model, tokens: float, loss: float, spent: str) -> str:
    path: Path = options.write
    recipe, notes = recipe_for(model, tokens, members.sequence_length, loss, members.recipe, path.stem)
    n = cost.parameters(model)
    header = [
        f"Planned from {spent}: {n:,} parameters, D/N {tokens / n:.2f}, law {options.law} promises {loss:.4f} nats per token.",
        f"Data, optimizer and the rest are those of {members.recipe}.",
        *notes,
    ]
    write_recipe(path, recipe, header)
    return f"wrote {path}: {recipe.training.max_steps:,} steps x {recipe.training.tokens_per_step:,} tokens; next:\n" + (
        f"python scripts/prepare.py {path}\n"
        f"accelerate launch --config_file accelerate_configs/1gpu.yaml scripts/pretrain.py {path} --dry-run"
    )
