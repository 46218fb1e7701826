"""Make a recipe of a shape that a plan chose: its family's recipe, with the shape, steps and batch of the plan.

Entered by `recipe_for` and `write_recipe`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from isoflop.config.loading import load_recipe, to_yaml, validate_recipe
from isoflop.config.recipe import Model, Recipe
from isoflop.plan import cost
from isoflop.plan.families import Family
from isoflop.plan.hyperparameters import WARMUP_SHARE, Hyperparameters, choose
from isoflop.plan.shape import tuned_parameters
from isoflop.scaling.hyperparameters import HyperparameterLaw
from isoflop.scaling.laws import critical_batch_tokens
from isoflop.utils.credentials import hide_credentials
from isoflop.utils.errors import UserError

# Assumptions: with fewer steps little is left between warm-up and decay; with more, small steps only cost time where the critical
# batch allows larger ones.
STEPS = (1_000, 250_000)
MIN_WINDOWS = 8  # in a step
MOST_ROUNDING = 4  # micro-batches in a law's batch per GPU at least, so that rounding changes it by an eighth at most
MUON_KEYS = ("adamw_learning_rate", "momentum")


class Target(NamedTuple):
    """Launch and GPU that a recipe is written for."""

    launch: cost.Launch
    memory_bytes: int | None
    """Memory of one GPU; None: no limit."""


class MadeRecipe(NamedTuple):
    """A recipe of a shape, and why its values are what they are."""

    recipe: Recipe
    notes: list[str]
    """One for each value that differs from the family's recipe."""
    hyperparameters: Hyperparameters | None
    """What the law gave; None where the family's learning rate and batch were kept."""


def recipe_for(
    model: Model,
    tokens: float,
    family: Family,
    predicted_loss: float,
    name: str,
    target: Target,
    law: HyperparameterLaw | None = None,
) -> MadeRecipe:
    """Return a recipe that spends `tokens` on a shape, with the learning rate, batch and schedule of a law, or the family's own.

    Steps are rounded down, so that the budget is not exceeded. The GPUs divide the windows of a step. Raises `UserError` where
    the tokens are less than a step.
    """
    sequence_length = family.sequence_length
    base, num_gpus = load_recipe(family.recipe), target.launch.num_processes
    chosen = _by_law(law, base, model, tokens, sequence_length, predicted_loss, num_gpus) if law else None
    if chosen:
        windows, notes = int(chosen.tokens_per_step.value) // sequence_length, chosen.warnings
    else:
        windows, notes = _windows_per_step(base, model, tokens, sequence_length, predicted_loss, num_gpus)
    tokens_per_step = windows * sequence_length
    steps = int(tokens // tokens_per_step)
    if not steps:
        raise UserError(f"{tokens:,.0f} tokens are less than one step of {tokens_per_step:,}: a larger budget is needed")
    micro = _dividing_micro_batch(base.training.micro_batch_size, windows // num_gpus, notes)
    tree: dict[str, Any] = base.model_dump(mode="json", exclude_none=True)
    kept = base.training.model_dump(mode="json", exclude_none=True, exclude={"max_tokens", "tokens_per_parameter"})
    tree["model"] = model.model_dump(mode="json", exclude_none=True)
    tree["training"] = kept | {
        "sequence_length": sequence_length,
        "tokens_per_step": tokens_per_step,
        "micro_batch_size": micro,
        "max_steps": steps,
    }
    tree |= _by_family(base, steps) if chosen is None else _tuned_sections(tree["optimizer"], chosen)
    tree["output"]["run_dir"] = f"runs/{name}"
    tree["data"]["prepared_dir"] = _prepared_dir(base, sequence_length)
    recipe, more = _fit_micro_batch(validate_recipe(tree, f"recipe {name}"), target)
    return MadeRecipe(recipe, notes + more, chosen)


def _prepared_dir(base: Recipe, sequence_length: int) -> str:
    """Return the folder of the base recipe's data in windows of this length."""
    folder = base.data.prepared_dir
    if sequence_length == base.training.sequence_length:
        return folder
    return re.sub(r"-\d+$", "", folder) + f"-{sequence_length}"


def _dividing_micro_batch(micro: int, windows_per_gpu: int, notes: list[str]) -> int:
    """Return the largest micro-batch up to `micro` that divides the windows per step and GPU; adds a note of a change."""
    dividing = max(m for m in range(1, min(windows_per_gpu, micro) + 1) if windows_per_gpu % m == 0)
    if dividing != micro:
        notes.append(
            f"micro_batch_size: {micro} changed to {dividing}, which divides the {windows_per_gpu} windows per step and GPU"
        )
    return dividing


def _by_law(
    law: HyperparameterLaw, base: Recipe, model: Model, tokens: float, sequence_length: int, predicted_loss: float, num_gpus: int
) -> Hyperparameters:
    """Return the law's values, with a batch that the GPUs and, where it is small beside the batch, the micro-batch divide."""
    n, micro = tuned_parameters(model, base.parametrization), base.training.micro_batch_size
    windows_per_gpu = law.tokens_per_step.at(n, tokens).value / sequence_length / num_gpus
    while micro > 1 and micro * MOST_ROUNDING > windows_per_gpu:
        micro //= 2
    loss = min(predicted_loss, math.log(model.vocab_size))
    return choose(law, n, tokens, loss=loss, batch_unit=sequence_length * num_gpus * micro)


def _tuned_sections(optimizer: dict[str, Any], chosen: Hyperparameters) -> dict[str, Any]:
    """Return the recipe's sections optimizer and schedule, with the law's optimizer, learning rate, weight decay and schedule."""
    kept = {key: value for key, value in optimizer.items() if key not in MUON_KEYS}
    tuned = {
        "name": chosen.law.optimizer,
        "peak_learning_rate": chosen.rounded(chosen.peak_learning_rate.value),
        "weight_decay": chosen.rounded(chosen.weight_decay.value),
    }
    final = {"final_learning_rate": chosen.rounded(chosen.schedule.final_learning_rate)}
    return {"optimizer": kept | tuned, "schedule": chosen.schedule.model_dump(mode="json") | final}


def _by_family(base: Recipe, steps: int) -> dict[str, Any]:
    """Return the family's schedule, with a warm-up of at most a tenth of the steps."""
    warmup_steps = min(base.schedule.warmup_steps, int(WARMUP_SHARE * steps))
    return {"schedule": base.schedule.model_dump(mode="json") | {"warmup_steps": warmup_steps}}


def _windows_per_step(
    base: Recipe, model: Model, tokens: float, sequence_length: int, predicted_loss: float, num_gpus: int
) -> tuple[int, list[str]]:
    """Return the windows of a step: the base recipe's tokens, halved or doubled towards the critical batch and `STEPS`."""
    before, notes = base.training.tokens_per_step, []
    windows = max(1, before // sequence_length // num_gpus) * num_gpus
    if windows * sequence_length != before:
        notes.append(
            f"tokens_per_step: {before:,} of the base recipe changed to {windows} windows of {sequence_length}, which {num_gpus}"
            " GPU(s) divide"
        )
    start, critical = windows, critical_batch_tokens(min(predicted_loss, math.log(model.vocab_size)))
    fewest, most = STEPS
    while windows % (2 * num_gpus) == 0 and windows > MIN_WINDOWS and _halve(windows * sequence_length, tokens, critical, fewest):
        windows //= 2
    while tokens / (windows * sequence_length) > most and 2 * windows * sequence_length <= critical:
        windows *= 2
    if windows != start:
        notes.append(
            f"tokens_per_step: {start * sequence_length:,} changed to {windows * sequence_length:,}, for a critical batch of"
            f" {critical:,.0f} tokens and {fewest:,} to {most:,} steps"
        )
    return windows, notes


def _halve(tokens_per_step: int, tokens: float, critical: float, fewest: int) -> bool:
    return tokens_per_step > critical or tokens / tokens_per_step < fewest


def _fit_micro_batch(recipe: Recipe, target: Target) -> tuple[Recipe, list[str]]:
    """Return the recipe with a micro-batch that fits the target's memory, no larger than it was, and a note of the change."""
    if target.memory_bytes is None:
        return recipe, []
    largest = cost.largest_micro_batch(recipe.model, recipe.training, recipe.optimizer, target.launch, target.memory_bytes)
    micro, where = recipe.training.micro_batch_size, f"{target.launch.num_processes} GPU(s) under {target.launch.engine}"
    if not largest:
        return recipe, [f"micro_batch_size: not even 1 is predicted to fit {where}"]
    if largest >= micro:
        return recipe, []
    training = recipe.training.model_copy(update={"micro_batch_size": largest})
    note = f"micro_batch_size: {micro} changed to {largest}, the largest that is predicted to fit {where}"
    return recipe.model_copy(update={"training": training}), [note]


def write_recipe(path: Path, recipe: Recipe, header: list[str]) -> None:
    """Write a recipe under comment lines. Raises `UserError` where the file exists, or the recipe is not valid."""
    validate_recipe(recipe.model_dump(mode="json"), f"--write {path}")  # model_copy does not validate
    comments = "".join(f"# {hide_credentials(line)}\n" for line in header)
    if path.suffix not in (".yaml", ".yml") or not path.parent.is_dir():
        raise UserError(f"--write {path}: give a .yaml file in a folder that exists, e.g. recipes/mine.yaml")
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(comments + to_yaml(recipe, exclude_none=True))
    except FileExistsError:
        raise UserError(f"--write {path} exists already; delete it, or give another name") from None
    except OSError as error:
        raise UserError(f"--write {path} cannot be written: {error.strerror}; give another folder") from None
