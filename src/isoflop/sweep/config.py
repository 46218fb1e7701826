"""A sweep's file: the budgets and sizes to train, and the rules for learning rate and batch.

Entered by `load_sweep_config`; `isoflop.sweep.design` makes recipes from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag, ValidationError, model_validator

from isoflop.config.loading import MOST_YAML_BYTES, list_errors, load_recipe, parse_yaml
from isoflop.config.recipe import Recipe
from isoflop.config.recipe_data import ConfigFile, Section, require_one_of
from isoflop.config.shipped import find
from isoflop.utils.errors import UserError
from isoflop.utils.untrusted import read_text

# Beyond these, products and powers of budgets overflow; the largest budget of all was 1e26 FLOPs.
Positive = Annotated[float, Field(gt=0, le=1e40)]
Positives = Annotated[list[Positive], Field(min_length=1, max_length=1000)]


class Rule(Section):
    """A power of a run's compute: coefficient x C^exponent, C in FLOPs."""

    coefficient: Positive
    exponent: Annotated[float, Field(ge=-3, le=3)]

    def at(self, flops: float) -> float:
        """Return the rule's value at a budget."""
        return float(self.coefficient * flops**self.exponent)


def _rule_or_values(given: Any) -> str:
    return "values" if isinstance(given, list) else "rule"


# A list is an axis of the sweep: every budget and size is trained with each of its values.
RuleOrRates = Annotated[Annotated[Rule, Tag("rule")] | Annotated[Positives, Tag("values")], Discriminator(_rule_or_values)]
Batches = Annotated[list[PositiveInt], Field(min_length=1, max_length=1000)]
RuleOrBatches = Annotated[Annotated[Rule, Tag("rule")] | Annotated[Batches, Tag("values")], Discriminator(_rule_or_values)]


class SizeGrid(Section):
    """Sizes on either side of each budget's centre, where D/N has a stated value; neighbours differ by `ratio` in N."""

    tokens_per_parameter: Positive = 20.0
    count: Annotated[int, Field(ge=3, le=99)] = 5
    ratio: Annotated[float, Field(gt=1.0, le=100.0)] = 2.0


class SweepConfig(ConfigFile):
    """Budgets x sizes. Budgets are FLOPs, or tokens per parameter; sizes are around each budget's centre, or the same for all."""

    recipe: str
    """The recipe that all runs share: data, tokenizer, the family's ratios, optimizer, schedule."""
    overrides: dict[str, Any] = {}
    """Values that replace the recipe's, by dotted key."""
    budgets: Positives | None = None
    """Training FLOPs of a run, all matrix products and attention counted, as `plan` counts them."""
    tokens_per_parameter: Positives | None = None
    sizes: SizeGrid | None = None
    parameters: Positives | None = None
    """Sizes; each becomes the family's nearest shape."""
    aspect_ratio: Positive | None = None
    """Width / layers of all sizes."""
    num_layers: PositiveInt | None = None
    """Or the depth of all sizes, which then differ only in width: with few layers one more is a jump that no power law fits."""
    peak_learning_rate: RuleOrRates | None = None
    """A rule, or a list of values: every budget and size is trained with each. Default: the recipe's peak for all runs."""
    tokens_per_step: RuleOrBatches | None = None
    """A rule, rounded to a multiple of 8 windows, or a list of values; in micro-batches no larger than the recipe's. Default: the
    recipe's."""
    warmup_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of a run's steps."""
    final_learning_rate_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Share of the peak."""
    validations: PositiveInt = 20
    """Validations per run, evenly spaced; the envelope of the curves and forecasts come from them."""
    branch: bool = False
    """Train each size once at a constant learning rate, and decay from there at every budget (schedule.name: wsd)."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """One run of each for every seed. Default: the recipe's."""
    output_dir: str
    """Folder of the run folders and the law."""

    @model_validator(mode="after")
    def _one_design(self) -> Self:
        require_one_of(self, "budgets", "tokens_per_parameter")
        require_one_of(self, "sizes", "parameters")
        require_one_of(self, "aspect_ratio", "num_layers")
        if self.sizes and not self.budgets:
            raise ValueError("sizes around a budget's centre need budgets; with tokens_per_parameter name parameters")
        for name in ("peak_learning_rate", "tokens_per_step"):
            values = getattr(self, name)
            if isinstance(values, list) and len(set(values)) < len(values):
                raise ValueError(f"{name} = {values} has a value twice; give each once")
        if self.branch and not self.parameters:
            raise ValueError("branch: true trains each size once, so that sizes are the same for all budgets: name parameters")
        return self

    @property
    def learning_rates(self) -> list[float | None]:
        """The axis of peak learning rates; None alone where a rule or the recipe gives them."""
        return [*self.peak_learning_rate] if isinstance(self.peak_learning_rate, list) else [None]

    @property
    def batches(self) -> list[int | None]:
        """The axis of tokens per step; None alone where a rule or the recipe gives them."""
        return [*self.tokens_per_step] if isinstance(self.tokens_per_step, list) else [None]

    @property
    def has_axes(self) -> bool:
        """Whether learning rate or batch is an axis."""
        return [*self.learning_rates, *self.batches] != [None, None]

    def base(self) -> Recipe:
        """Return the recipe that all runs share. Raises `UserError` where it is refused, or its schedule cannot branch."""
        recipe = load_recipe(self.recipe, [f"{key}={json.dumps(value)}" for key, value in self.overrides.items()])
        if self.branch and recipe.schedule.name != "wsd":
            raise UserError(
                f"branch: true needs schedule.name = 'wsd', whose learning rate is constant until it decays;"
                f" {self.recipe} has {recipe.schedule.name!r}: add schedule.name: wsd to the overrides"
            )
        return recipe


def load_sweep_config(path: str | Path) -> SweepConfig:
    """Read a sweep's file. Raises `UserError` for a missing file, broken YAML, an unknown key, a wrong value."""
    file = find("recipes", str(path))
    try:
        tree = parse_yaml(read_text(file, MOST_YAML_BYTES, "give a YAML file of recipes/sweeps/"))
    except FileNotFoundError:
        raise UserError(f"sweep {path} does not exist; give a YAML file of recipes/sweeps/") from None
    except yaml.YAMLError as error:
        raise UserError(f"sweep {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"sweep {path} is not a mapping; its keys are {', '.join(SweepConfig.model_fields)}")
    try:
        return SweepConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"sweep {path}: {list_errors(error, SweepConfig)}") from None
