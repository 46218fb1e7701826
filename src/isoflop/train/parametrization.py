"""How initial weights and learning rates follow a model's width and depth, without a change to the model."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from isoflop.config.recipe import Recipe


class Scale(NamedTuple):
    """Factors on the recipe's values for one parameter."""

    initial_value: float = 1.0
    learning_rate: float = 1.0
    epsilon: float = 1.0
    weight_decay: float = 1.0


def parameter_scales(causal_lm: nn.Module, recipe: Recipe) -> dict[str, Scale]:
    """Return the factors of every parameter of a transformers model, by its name; tied ones once."""
    return {name: Scale() for name, _ in causal_lm.named_parameters()}
