"""The recipe that a chosen shape becomes: planned, and written where a file was named.

Entered by `plan_new_recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isoflop.config.recipe import Model, Recipe
from isoflop.plan import cost
from isoflop.plan.families import Family
from isoflop.plan.gpus import GpuOptions
from isoflop.plan.launches import known_launches
from isoflop.plan.planner import plan_recipe
from isoflop.plan.recipe_writer import Target, recipe_for, write_recipe
from isoflop.plan.results import Plan
from isoflop.scaling.laws import Law


@dataclass(frozen=True)
class NewRecipe:
    """What a new recipe is made of."""

    model: Model
    tokens: float
    predicted_loss: float
    family: Family
    law: Law
    named_law: bool
    """Whether the user named the law: the written recipe then names it, too."""
    options: GpuOptions
    source: str
    """What the tokens come from, e.g. a budget, for the header of the file."""
    path: Path | None = None


@dataclass(frozen=True)
class PlannedRecipe:
    """A recipe that a plan made, with its own plan."""

    recipe: Recipe
    notes: tuple[str, ...]
    """Values that differ from the family's recipe, and why."""
    plan: Plan
    launch: cost.Launch
    config: Path | None
    """The launch config; None where no config covers the number of GPUs."""
    path: Path | None
    """The file that was written."""


def plan_new_recipe(new: NewRecipe, name: str, num_gpus: int = 1) -> PlannedRecipe:
    """Make, plan and (with a path) write a recipe. `num_gpus` is the default of the plan's tables.

    Raises `UserError` where the tokens are less than a step, or the file cannot be written.
    """
    known = known_launches(new.options.num_gpus or 1)
    launch = known.for_gpus(new.options.num_gpus or 1)
    target = Target(launch, new.options.specs()[0].memory_bytes if new.options.gpu else None)
    recipe, notes = recipe_for(
        new.model, new.tokens, new.family, new.predicted_loss, new.path.stem if new.path else "plan", target
    )
    plan = plan_recipe(recipe, name, new.law, new.options, num_gpus=num_gpus)
    if new.path:
        written = recipe.model_copy(update={"law": new.law.name}) if new.named_law else recipe
        write_recipe(new.path, written, [*_header(new, plan), *notes])
    return PlannedRecipe(recipe, tuple(notes), plan, launch, known.configs.get(launch.name), new.path)


def _header(new: NewRecipe, plan: Plan) -> list[str]:
    prediction, repeated = plan.prediction, plan.repeated_data
    if prediction.predicted_loss is None:
        predicted = f"law {plan.law} has no prediction: {prediction.outside}"
    else:
        predicted = f"law {plan.law} predicts {prediction.predicted_loss:.4f} nats per token"
        if repeated and repeated.epochs > 1 and repeated.predicted_loss:
            predicted += f", {repeated.predicted_loss:.4f} with {repeated.epochs:.2f} epochs of the data"
    return [
        f"Planned from {new.source}: {plan.stats.parameters:,} parameters, D/N {plan.stats.tokens_per_parameter:.2f};"
        f" {predicted}.",
        f"Data, optimizer and the rest are those of {new.family.recipe}.",
    ]
