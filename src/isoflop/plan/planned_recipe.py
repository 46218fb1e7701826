"""The recipe that a chosen shape becomes: planned, and written where a file was named.

Entered by `plan_new_recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Model, Recipe
from isoflop.plan import cost
from isoflop.plan.families import Family
from isoflop.plan.gpus import GpuOptions
from isoflop.plan.hyperparameters import Hyperparameters, law_of
from isoflop.plan.launches import known_launches
from isoflop.plan.planner import plan_recipe
from isoflop.plan.recipe_writer import Target, recipe_for, write_recipe
from isoflop.plan.results import Plan
from isoflop.plan.shape import tuned_parameters
from isoflop.scaling.hyperparameters import HyperparameterLaw, OptimizerName
from isoflop.scaling.laws import FAR, Law
from isoflop.utils.errors import UserError


class Tuning(NamedTuple):
    """What the learning rate and the batch of a new recipe are chosen for, and by what."""

    optimizer: OptimizerName | None = None
    """Default: that of the family's recipe."""
    law: str | None = None
    """Name or file of a law of learning rate and batch; default: that of the loss law's file, else the optimizer's default."""


AS_THE_FAMILY = Tuning()


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
    tuning: Tuning = AS_THE_FAMILY


@dataclass(frozen=True)
class PlannedRecipe:
    """A recipe that a plan made, with its own plan."""

    recipe: Recipe
    notes: tuple[str, ...]
    """Values that differ from the family's recipe, and why."""
    hyperparameters: Hyperparameters | None
    """What a law gave for learning rate, batch and schedule; None where those of the family were kept."""
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
    known = known_launches(new.options.num_gpus or 1, new.tuning.optimizer or "adamw")
    launch = known.for_gpus(new.options.num_gpus or 1)
    target = Target(launch, new.options.specs()[0].memory_bytes if new.options.gpu else None)
    name_of_run = new.path.stem if new.path else "plan"
    law, kept = _hyperparameter_law(new)
    made = recipe_for(new.model, new.tokens, new.family, new.predicted_loss, name_of_run, target, law)
    recipe, notes, chosen = made.recipe, [*kept, *made.notes], made.hyperparameters
    plan = plan_recipe(recipe, name, new.law, new.options, num_gpus=num_gpus)
    if new.path:
        written = recipe.model_copy(update={"law": new.law.name}) if new.named_law else recipe
        write_recipe(new.path, written, [*_header(new, plan, chosen), *notes])
    return PlannedRecipe(recipe, tuple(notes), chosen, plan, launch, known.configs.get(launch.name), new.path)


def _hyperparameter_law(new: NewRecipe) -> tuple[HyperparameterLaw | None, list[str]]:
    """Return the law of learning rate and batch; or None and a note, where the family's own values are kept.

    A law that was named is used for any size. The default is not used beyond its own runs by more than the factor `FAR`.
    """
    base = load_recipe(new.family.recipe)
    optimizer, n = new.tuning.optimizer or base.optimizer.name, tuned_parameters(new.model, base.parametrization)
    law = law_of(new.law, optimizer, n, new.tokens, new.tuning.law)
    outside = law.outside(n, new.tokens, factor=FAR)
    if new.tuning.law is not None or not outside:
        return law, []
    reason = f"law {law.name} is far from its runs: {'; '.join(outside)}"
    if optimizer != base.optimizer.name:
        raise UserError(
            f"--optimizer {optimizer}: {reason}, and {new.family.recipe} has values for {base.optimizer.name} alone; name a law"
            " by --hyperparameter-law"
        )
    return None, [f"learning rate and batch: those of {new.family.recipe}, {reason}; name a law by --hyperparameter-law"]


def _header(new: NewRecipe, plan: Plan, chosen: Hyperparameters | None) -> list[str]:
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
        f"{'Data' if chosen else 'Data, optimizer'} and the rest are those of {new.family.recipe}.",
        *([f"Law {chosen.law.name}: {chosen.law.source}.", *chosen.lines()] if chosen else []),
    ]
