"""Plans of published models and of shapes for a parameter target, as recipes to start from.

Entered by `plan_model` and `plan_shape`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isoflop.config.recipe import Model
from isoflop.plan import cost
from isoflop.plan.families import PUBLISHED_MODELS, Family, PublishedModel, at_sequence_length, load_family
from isoflop.plan.gpus import GpuOptions, check_bounds
from isoflop.plan.planned_recipe import NewRecipe, PlannedRecipe, Tuning, plan_new_recipe
from isoflop.plan.planner import get_law
from isoflop.plan.search import COMPUTE_OPTIMAL, shape_for_target
from isoflop.scaling.hyperparameters import OptimizerName
from isoflop.scaling.laws import Law
from isoflop.utils.errors import UserError, nearest


@dataclass(frozen=True)
class TargetShape:
    """The shape for a parameter target."""

    family: Family
    model: Model
    planned: PlannedRecipe | None
    """The recipe that trains it on 20 tokens per parameter, where a file was named."""

    @property
    def parameters(self) -> int:
        """N with the family's vocabulary."""
        return cost.parameters(self.model)

    @property
    def parameters_12_layers_width_squared(self) -> int:
        """N = 12 layers width^2, the formula of the target."""
        shape = cost.shape_of(self.model)
        return 12 * shape.num_layers * shape.hidden_size**2

    def to_dict(self) -> dict[str, Any]:
        """Return the keys and values of `--json`."""
        return cost.shape_dict(self.model) | {
            "parameters": self.parameters,
            "parameters_12_layers_width_squared": self.parameters_12_layers_width_squared,
            "parameters_by_class": cost.parameters_by_class(self.model),
            "flops_per_token": cost.flops_per_token(self.model, self.family.sequence_length),
        }


def published_model(name: str) -> PublishedModel:
    """Return a published model. Raises `UserError` for an unknown name."""
    if name not in PUBLISHED_MODELS:
        raise UserError(f"models {name}: not a published model{nearest(name, list(PUBLISHED_MODELS))}")
    return PUBLISHED_MODELS[name]


def plan_model(
    name: str,
    *,
    law: Law | str | Path | None = None,
    gpu: str | None = None,
    num_gpus: int | None = None,
    mfu: float | None = None,
    peak_tflops: float | None = None,
    price_per_gpu_hour: float | None = None,
    optimizer: OptimizerName | None = None,
    hyperparameter_law: str | None = None,
    write: str | Path | None = None,
) -> PlannedRecipe:
    """Plan a published model as a recipe, on its own tokens, or on 20 per parameter where they are not published.

    optimizer and hyperparameter_law: as in `plan_budget`. write: the file of the recipe.
    The other arguments are those of `isoflop.plan.planner.plan`. Raises `UserError`.
    """
    published, family, own_law = published_model(name), load_family(name), get_law(law)
    tokens = published.training_tokens or float(COMPUTE_OPTIMAL * published.parameters)
    source = (
        f"its {tokens:.4g} tokens" if published.training_tokens else f"{COMPUTE_OPTIMAL} tokens a parameter (its own: unknown)"
    )
    new = NewRecipe(
        published.model,
        tokens,
        float(own_law.loss(own_law.model_size(published.model), tokens)),
        family,
        own_law,
        named_law=law is not None,
        options=GpuOptions(gpu, num_gpus, mfu, peak_tflops, price_per_gpu_hour),
        source=source,
        path=Path(write) if write is not None else None,
        tuning=Tuning(optimizer, hyperparameter_law),
    )
    return plan_new_recipe(new, name, num_gpus=2)


def plan_shape(
    *,
    parameters: float | None = None,
    width: int | None = None,
    aspect: int | None = None,
    family: str = "gpt2",
    sequence_length: int | None = None,
    law: Law | str | Path | None = None,
    optimizer: OptimizerName | None = None,
    hyperparameter_law: str | None = None,
    write: str | Path | None = None,
) -> TargetShape:
    """Return the shape that two of N, width and aspect give; N = 12 layers width^2, aspect = width / layers = width / heads.

    optimizer and hyperparameter_law: as in `plan_budget`. write: a recipe that trains the shape on 20 tokens per parameter.
    Raises `UserError` where the numbers do not divide.
    """
    check_bounds(parameters=parameters, width=width, aspect=aspect, sequence_length=sequence_length)
    of_family = family_at(family, sequence_length)
    model, own_law = shape_for_target(of_family, parameters, width, aspect), get_law(law)
    if write is None:
        return TargetShape(of_family, model, None)
    tokens = float(COMPUTE_OPTIMAL * cost.parameters(model))
    new = NewRecipe(
        model,
        tokens,
        float(own_law.loss(own_law.model_size(model), tokens)),
        of_family,
        own_law,
        named_law=law is not None,
        options=GpuOptions(),
        source=f"{COMPUTE_OPTIMAL} tokens a parameter",
        path=Path(write),
        tuning=Tuning(optimizer, hyperparameter_law),
    )
    return TargetShape(of_family, model, plan_new_recipe(new, of_family.recipe, num_gpus=2))


def family_at(name: str, sequence_length: int | None) -> Family:
    """Return a family at a sequence length; default: its own."""
    family = load_family(name)
    return at_sequence_length(family, sequence_length) if sequence_length else family
