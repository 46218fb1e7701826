"""The command of `scripts/plan.py`: each question answered, as text or as JSON."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

from isoflop import cost, hardware
from isoflop.errors import UserError, nearest
from isoflop.families import PUBLISHED_MODELS, Family, at_sequence_length, family
from isoflop.plan import text
from isoflop.plan.budgets import GpuTime, plan_budget
from isoflop.plan.launches import config_of, known_launches
from isoflop.plan.options import check, mode_of, parser
from isoflop.plan.recipes import COMPUTE_OPTIMAL, Machine, machines, plan_recipe, shape
from isoflop.plan.written import Target, recipe_for, write_recipe
from isoflop.recipe import Recipe
from isoflop.recipe_file import load_recipe
from isoflop.scaling.laws import DEFAULT_LAW, Law, load_law
from isoflop.search import shape_for_target


def main(description: str, argv: list[str] | None = None) -> int:
    """Answer one question."""
    options = parser(description).parse_intermixed_args(argv)
    mode = mode_of(options)
    check(options, mode)
    law = load_law(options.law or DEFAULT_LAW)
    match mode:
        case "recipe":
            answer, rendered = _recipe(options, law)
        case "compare":
            answer, rendered = _compare(options, law)
        case "models":
            answer = {"models": [published(name) for name in PUBLISHED_MODELS]}
            rendered = text.models_text(answer["models"])
        case "model":
            answer, rendered = _model(options, law)
        case "budget":
            answer, rendered = _budget(options, law)
        case "target":
            answer, rendered = _target(options, law)
    print(json.dumps(answer, indent=1, allow_nan=False) if options.json else rendered)
    return 0


def _recipe(options: argparse.Namespace, law: Law) -> tuple[dict[str, Any], str]:
    path, *overrides = options.what
    recipe, kinds, measured = load_recipe(path, overrides), _machines(options), None
    if options.law is None and recipe.law:
        law = load_law(recipe.law)
    if options.measure:
        from isoflop.measure import measure  # torch: only where real steps are asked for

        measured = measure(recipe)
        kinds = _as_measured(kinds, measured, described=options.peak_tflops is not None)
    plan = plan_recipe(recipe, path, law, kinds, options.gpus or 2, options.price)
    if measured:
        plan["measured"] = measured | {"hours": plan["tokens"] / measured["tokens_per_s"] / 3600}
    return plan, text.recipe_text(plan)


def _as_measured(kinds: list[Machine], measured: dict[str, Any], described: bool) -> list[Machine]:
    """The kinds of GPU with the MFU that this machine reached, for the one it is: by its name, or as the user described it."""
    if described:
        mfu, name = measured["flops_per_s"] / kinds[0].peak_flops_per_s, kinds[0].name
    elif measured["mfu"] is None:
        return kinds
    else:
        mfu, name = measured["mfu"], hardware.gpu_name(measured["device"])
    others = [kind for kind in kinds if kind.name != name]
    this = next((kind for kind in kinds if kind.name == name), None) or machines(name, None, None)[0]
    return [this._replace(mfu=mfu, mfu_source="measured just now on this machine, one device"), *others]


def _compare(options: argparse.Namespace, law: Law) -> tuple[dict[str, Any], str]:
    overrides = [word for word in options.what[1:] if "=" in word]
    paths = [word for word in options.what[1:] if "=" not in word]
    if not paths:
        raise UserError("compare needs recipes: plan.py compare recipes/gpt2_1.36b.yaml recipes/llama2_1.36b.yaml")
    num_gpus, kinds = options.gpus or 2, _machines(options)
    plans = [plan_recipe(load_recipe(path, overrides), path, law, kinds, num_gpus, options.price) for path in paths]
    return {"recipes": plans}, text.compare_text(plans, num_gpus)


def _machines(options: argparse.Namespace) -> list[Machine]:
    return machines(options.gpu, options.peak_tflops, options.mfu)


def _budget(options: argparse.Namespace, law: Law) -> tuple[dict[str, Any], str]:
    members, kinds = _members(options, "llama3"), _machines(options)
    plan, best = plan_budget(members, _spending(options), law, _constraint(options), kinds, options.price)
    stem = options.write.stem if options.write else "plan"
    recipe, notes = recipe_for(
        best.model, best.tokens, members.sequence_length, best.predicted_loss, members.recipe, stem, _target_of(options)
    )
    return _with_recipe(options, law, plan, recipe, notes, f"{best.flops:.6g} FLOPs", members)


def _with_recipe(
    options: argparse.Namespace, law: Law, plan: dict[str, Any], recipe: Recipe, notes: list[str], spent: str, members: Family
) -> tuple[dict[str, Any], str]:
    """Add to a search what its recipe would be, with the warnings that only a recipe has; write it if that was asked for."""
    whole = plan_recipe(recipe, members.recipe, law, _machines(options), options.gpus or 1, options.price)
    plan["warnings"] += whole["warnings"]
    training = recipe.training
    plan["recipe"] = {
        "steps": whole["steps"],
        "tokens_per_step": training.tokens_per_step,
        "tokens": whole["tokens"],
        "micro_batch_size": training.micro_batch_size,
        "predicted_loss": whole["predicted_loss"],
        "repeated_data": whole["repeated_data"],
        "notes": notes,
        "path": str(options.write) if options.write else None,
    }
    rendered = text.budget_text(plan)
    if options.write:
        rendered += "\n\n" + _write(options, recipe, notes, spent, whole, members)
    return plan, rendered


def _launch(options: argparse.Namespace) -> cost.Launch:
    """The launch config for so many GPUs, the one that shards most where there are several; DDP where there is none."""
    num_gpus = options.gpus or 1
    there = [x for x in known_launches(num_gpus) if x.num_processes == num_gpus and x.gpu and config_of(x).is_file()]
    ddp = cost.Launch(f"{num_gpus}gpu_ddp", "ddp", num_gpus, gpu=True)
    return max(there, key=lambda launch: launch.shards, default=ddp)


def _target_of(options: argparse.Namespace) -> Target:
    """What a written recipe is meant for: so many GPUs, and the memory of one, if its kind was named."""
    return Target(_launch(options), _machines(options)[0].memory_bytes if options.gpu else None)


def _members(options: argparse.Namespace, default: str) -> Family:
    members = family(default if options.family is None else options.family)
    return at_sequence_length(members, options.sequence_length) if options.sequence_length else members


def _constraint(options: argparse.Namespace) -> tuple[float, float] | None:
    if options.constrain_tokens_per_parameter is None:
        return None
    low, high = options.constrain_tokens_per_parameter
    if not 0 <= low < high < float("inf"):
        raise UserError(f"--constrain-tokens-per-parameter {low:g} {high:g} is not 0 <= LOW < HIGH; give e.g. 10 30")
    return low, high


def _spending(options: argparse.Namespace) -> float | GpuTime:
    """What may be spent; exactly one of FLOPs, days and dollars."""
    given = [name for name in ("flops", "days", "dollars") if getattr(options, name) is not None]
    if len(given) != 1:
        raise UserError(
            f"give one budget: --flops 1.36e21, or --gpus 2 --gpu a6000 --days 16, or --dollars 500 --gpu h100 --price 2.5"
            f" (given: {', '.join(f'--{name}' for name in given) or 'none'})"
        )
    if options.flops is not None:
        return float(options.flops)
    if options.gpu is None and options.peak_tflops is None:
        raise UserError(f"--{given[0]} needs --gpu, one of {', '.join(hardware.GPUS)}, or --peak-tflops")
    machine, num_gpus = _machines(options)[0], options.gpus or 1
    if options.days is not None:
        return GpuTime(machine, num_gpus, 24 * options.days * num_gpus)
    if options.price is None:
        raise UserError("--dollars needs --price, dollars of one GPU for an hour, e.g. --price 2.5")
    return GpuTime(machine, num_gpus, options.dollars / options.price)


def _target(options: argparse.Namespace, law: Law) -> tuple[dict[str, Any], str]:
    """A shape for a parameter target, trained on 20 tokens a parameter where a recipe is written."""
    members = _members(options, "gpt2")
    model = shape_for_target(members, options.parameters, options.width, options.aspect)
    n, s = cost.parameters(model), cost.shape_of(model)
    answer = shape(model) | {
        "parameters": n,
        "parameters_12_layers_width_squared": 12 * s.num_layers * s.hidden_size**2,
        "parameters_by_class": cost.parameters_by_class(model),
        "flops_per_token": cost.flops_per_token(model, members.sequence_length),
    }
    rendered = text.target_text(answer, members.name)
    if options.write:
        tokens = float(COMPUTE_OPTIMAL * n)
        loss = float(law.loss(law.size(model), tokens))
        stem, target = options.write.stem, _target_of(options)
        recipe, notes = recipe_for(model, tokens, members.sequence_length, loss, members.recipe, stem, target)
        whole = plan_recipe(recipe, members.recipe, law, _machines(options))
        rendered += "\n" + _write(options, recipe, notes, f"{COMPUTE_OPTIMAL} tokens a parameter", whole, members)
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


def _model(options: argparse.Namespace, law: Law) -> tuple[dict[str, Any], str]:
    """A published model planned as a recipe: on its own tokens, or on 20 a parameter where they are not published."""
    _, name = options.what
    if name not in PUBLISHED_MODELS:
        raise UserError(f"models {name}: not a published model{nearest(name, list(PUBLISHED_MODELS))}")
    members, facts = family(name), PUBLISHED_MODELS[name]
    tokens = facts.training_tokens or float(COMPUTE_OPTIMAL * cost.parameters(facts.model))
    loss = float(law.loss(law.size(facts.model), tokens))
    stem = options.write.stem if options.write else name
    target = _target_of(options)
    recipe, notes = recipe_for(facts.model, tokens, members.sequence_length, loss, members.recipe, stem, target)
    plan = plan_recipe(recipe, name, law, _machines(options), options.gpus or 2, options.price)
    rendered = text.recipe_text(plan)
    if options.write:
        spent = (
            f"its {tokens:.4g} tokens" if facts.training_tokens else f"{COMPUTE_OPTIMAL} tokens a parameter (its own: unknown)"
        )
        rendered += "\n\n" + _write(options, recipe, notes, spent, plan, members)
    return plan, rendered


def _write(
    options: argparse.Namespace, recipe: Recipe, notes: list[str], spent: str, plan: dict[str, Any], members: Family
) -> str:
    """Write a recipe; what was written, and what to type next."""
    repeated = plan["repeated_data"]
    promise = f"law {plan['law']} promises {plan['predicted_loss']:.4f} nats per token"
    if repeated and repeated["epochs"] > 1:
        promise += f", {repeated['predicted_loss']:.4f} with {repeated['epochs']:.2f} epochs of the data"
    header = [
        f"Planned from {spent}: {plan['parameters']['total']:,} parameters, D/N {plan['tokens_per_parameter']:.2f}; {promise}.",
        f"Data, optimizer and the rest are those of {members.recipe}.",
        *notes,
    ]
    if options.law is not None:
        recipe = recipe.model_copy(update={"law": options.law})  # for `pretrain` to keep the score by
    write_recipe(options.write, recipe, header)
    path, launch = shlex.quote(str(options.write)), _launch(options)
    config = config_of(launch)
    how = (
        f"--config_file {config}"
        if config.is_file()
        else f"--multi_gpu --num_processes {launch.num_processes} --mixed_precision bf16"
    )
    return "\n".join([
        f"wrote {options.write}: {recipe.training.max_steps:,} steps x {recipe.training.tokens_per_step:,} tokens",
        *notes,
        f"next: python scripts/prepare.py {path}",
        f"then: accelerate launch {how} scripts/pretrain.py {path} --dry-run",
    ])  # fmt: skip
