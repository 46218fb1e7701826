"""The sections of a recipe on how weights are updated: optimizer, learning rate, and how both follow the model's size."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from isoflop.config.recipe_data import Section

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Optimizer(Section):
    """AdamW for all weights, or Muon for the matrices of the decoder layers and AdamW for embeddings, head, norms and biases.

    Weight decay is on matrices and embeddings, never on norms and biases.
    """

    name: Literal["adamw", "muon"] = "adamw"
    peak_learning_rate: PositiveFloat
    """Under muon that of the matrices. A muon update has the size of an AdamW update: a root mean square of 0.2 x the learning
    rate (Moonlight, arXiv:2502.16982)."""
    adamw_learning_rate: PositiveFloat | None = None
    """muon: peak learning rate of the weights that AdamW updates; default: peak_learning_rate, Moonlight's rule."""
    momentum: Fraction = 0.95
    """muon: decay of the gradients' moving average, with Nesterov's look ahead."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    max_grad_norm: PositiveFloat = 1.0
    """Clip gradients to this global norm."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 halves the optimizer state, with coarser moments: from 8 to 4 bytes a parameter under AdamW, from 4 to 2 under
    Muon."""

    @model_validator(mode="after")
    def _muon_keys_need_muon(self) -> Self:
        given = {"adamw_learning_rate", "momentum"} & self.model_fields_set if self.name == "adamw" else set()
        for key in sorted(given):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} = {getattr(self, key)} is read by optimizer.name: muon alone, and this recipe trains with adamw; set"
                    " optimizer.name: muon, or leave it out"
                )
        return self


class Schedule(Section):
    """The learning rate as a function of the step: linear warm-up, then the named shape."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    final_learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    """Final learning rate of cosine, linear and wsd. `constant` stays at the peak."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """wsd (warm-up, stable, decay): share of the steps, at the end, in which the learning rate decays linearly."""


class Parametrization(Section):
    """How initial weights and learning rates follow width and depth, so that values tuned on a small model fit a larger one."""

    name: Literal["standard", "completep"] = "standard"
    """`standard`: the same for every size. `completep` (arXiv:2505.01618): the recipe's initializer_range, learning rates,
    epsilon and weight decay are those of a model of the base's width and depth, and are scaled to this one's."""
    base_hidden_size: PositiveInt | None = None
    """completep: width of the model that the values were tuned for."""
    base_num_layers: PositiveInt | None = None
    """completep: its decoder layers."""

    @model_validator(mode="after")
    def _base_belongs_to_completep(self) -> Self:
        base = {"base_hidden_size": self.base_hidden_size, "base_num_layers": self.base_num_layers}
        missing, given = [k for k, v in base.items() if v is None], [k for k, v in base.items() if v is not None]
        if self.name == "completep" and missing:
            raise ValueError(
                f"parametrization.name = 'completep' scales values from the model that they were tuned for; give its"
                f" {' and '.join(missing)}"
            )
        if self.name == "standard" and given:
            raise ValueError(
                f"{' and '.join(given)}: read by parametrization.name: completep alone; set that, or leave the base out"
            )
        return self


def require_base_width(parametrization: Parametrization, width_key: str, width: int, num_heads: int) -> None:
    """Refuse a base width at which this model's heads would not be a whole number. Raises `ValueError`.

    Attention divides by sqrt(head_dim), which is the right scale only while the width grows by heads of one size.
    """
    base, unit = parametrization.base_hidden_size, width // math.gcd(width, num_heads)
    if base is None or base % unit == 0:
        return
    near = [each for each in (base // unit * unit, (base // unit + 1) * unit) if each]
    raise ValueError(
        f"parametrization.base_hidden_size = {base} is not a multiple of {unit}, and learning rates transfer only between widths"
        f" with heads of one size, here model.{width_key} {width} with {num_heads} heads; nearest widths:"
        f" {' and '.join(map(str, near))}; or change the number of heads"
    )
