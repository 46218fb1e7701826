"""A recipe made from a shape that a plan chose: its family's recipe, with the shape, the steps and the batch of the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isoflop.errors import UserError
from isoflop.recipe import Model, Recipe
from isoflop.recipe_file import load_recipe, to_yaml
from isoflop.scaling.laws import critical_batch_tokens

MIN_STEPS = 1000  # assumption: with fewer, warm-up and decay leave too little between them
MIN_WINDOWS = 8  # in a step
WARMUP_SHARE = 0.1  # of the steps at most; the founding recipes warm up over 2,000 of 25,000


def recipe_for(
    model: Model, tokens: float, sequence_length: int, predicted_loss: float, base_path: str, name: str
) -> tuple[Recipe, list[str]]:
    """A recipe that spends `tokens` on a shape, and what was changed on the way, a line each.

    Tokens per step are the base recipe's, halved while they are above the critical batch or leave fewer than `MIN_STEPS` steps.
    Steps are rounded down, so that the budget is not exceeded.
    """
    base = load_recipe(base_path)
    tree: dict[str, Any] = base.model_dump(mode="json", exclude_none=True)
    tokens_per_step, windows = base.training.tokens_per_step, base.training.tokens_per_step // base.training.sequence_length
    if sequence_length != base.training.sequence_length:
        windows = max(1, tokens_per_step // sequence_length)
    critical, notes = critical_batch_tokens(predicted_loss), []
    while windows % 2 == 0 and windows > MIN_WINDOWS and _too_large(windows * sequence_length, tokens, critical):
        windows //= 2
    if windows * sequence_length != tokens_per_step:
        notes.append(
            f"tokens_per_step: {tokens_per_step:,} of the base recipe made {windows * sequence_length:,}, for a critical batch of"
            f" {critical:,.0f} tokens and at least {MIN_STEPS:,} steps"
        )
    tokens_per_step = windows * sequence_length
    steps = int(tokens // tokens_per_step)
    if not steps:
        raise UserError(f"{tokens:,.0f} tokens are less than one step of {tokens_per_step:,}: a larger budget is needed")
    micro = max(m for m in range(1, min(windows, base.training.micro_batch_size) + 1) if windows % m == 0)
    kept = {k: v for k, v in tree["training"].items() if k not in ("max_tokens", "tokens_per_parameter")}
    tree["model"] = model.model_dump(mode="json", exclude_none=True)
    tree["training"] = kept | {
        "sequence_length": sequence_length, "tokens_per_step": tokens_per_step, "micro_batch_size": micro, "max_steps": steps,
    }  # fmt: skip
    tree["schedule"]["warmup_steps"] = min(base.schedule.warmup_steps, int(WARMUP_SHARE * steps))
    tree["output"]["run_dir"] = f"runs/{name}"
    if sequence_length != base.training.sequence_length:
        tree["data"]["prepared_dir"] += f"-windows-of-{sequence_length}"
    return Recipe.model_validate(tree), notes


def _too_large(tokens_per_step: int, tokens: float, critical: float) -> bool:
    return tokens_per_step > critical or tokens / tokens_per_step < MIN_STEPS


def write_recipe(path: Path, recipe: Recipe, header: list[str]) -> None:
    """Write a recipe under comment lines. Raises `UserError` rather than overwrite one."""
    if path.suffix not in (".yaml", ".yml") or not path.parent.is_dir():
        raise UserError(f"--write {path}: give a .yaml file in a folder that exists, e.g. recipes/mine.yaml")
    if path.exists():
        raise UserError(f"--write {path} exists already; delete it, or give another name")
    path.write_text("".join(f"# {line}\n" for line in header) + to_yaml(recipe, exclude_none=True), encoding="utf-8")
