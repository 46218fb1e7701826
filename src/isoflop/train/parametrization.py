"""How initial weights and learning rates follow a model's width and depth, without a change to the model.

The rules are CompleteP's (Dey et al., arXiv:2505.01618, with alpha = 1; completed in arXiv:2512.22382). With m = width / base
width and d = layers / base layers, they are stated for a model with two multipliers: the output of each residual branch times
1/d, and the logits times 1/m. Factors on the recipe's values, for AdamW:

    class                           initial value   learning rate   epsilon   weight decay
    embeddings, last norm           1               1               1/m       1
    head (untied)                   1               1               1/m       1
    matrices of the layers          1/sqrt(m)       1/m             1/(md)    m
    norms, biases of the layers     1               1               1/(md)    1
    norms of queries and keys       1               1               1/d       1

Initial values, learning rates and decays are the papers'. Epsilons follow the size of each class's gradient, so that epsilon is
the same fraction of it at every size. The gradient with respect to the residual stream is 1/m, since the logits carry 1/m; so is
that of embeddings and of the last norm. A branch adds its 1/d. Its inner activations have the gradient 1/(md) too: each sums
m times as many terms of random sign, each smaller by 1/sqrt(m). A norm of queries or keys is shared by all heads, whose number
grows as m, so that its gradient is up to 1/d. The head's is 1/m times an activation of constant size.

Stock models have neither multiplier. Adam's update does not see the gradient's scale, so a multiplier c on a weight's output is
the same function, and the same training, as no multiplier with (initial value c, learning rate c, epsilon 1/c, decay 1/c): the
weight is c times as large, its gradient 1/c times ("abc-symmetry", Yang and Hu, arXiv:2011.14522). So 1/d goes into the residual
projections, weights and biases, and 1/m into the head. A tied head is the embedding, whose output is also the first
activation, so there 1/m goes into the last norm, gain and bias, which feeds nothing but the head. The embedding's gradient from
the head is the product of the logits' gradient and that norm's output, 1/m with either placement.

Muon's update of a matrix is 0.2 sqrt(longer side) x learning rate times an orthogonal matrix, so its spectral norm grows as
sqrt(m). A change of constant size in the output needs a constant one (Yang et al., arXiv:2310.17813), where both sides grow as m:
the factor on the learning rate is 1/sqrt(m), on decay sqrt(m). Multipliers fold in the same way, for orthogonalization does not
see the gradient's scale. There is no epsilon.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from isoflop.config.recipe import Recipe
from isoflop.modeling.build import RESIDUAL_PROJECTIONS

LAYERS = ("layers", "h")  # Llama's and the hybrid's name for the list of decoder layers, and GPT-2's
FINAL_NORMS = ("norm", "ln_f")
HEAD_NORMS = ("q_norm", "k_norm")


class Scale(NamedTuple):
    """Factors on the recipe's values for one parameter."""

    initial_value: float = 1.0
    learning_rate: float = 1.0
    epsilon: float = 1.0
    weight_decay: float = 1.0

    def with_multiplier(self, multiplier: float) -> Scale:
        """Return the factors that train as these do with a multiplier on the parameter's output."""
        return Scale(
            self.initial_value * multiplier,
            self.learning_rate * multiplier,
            self.epsilon / multiplier,
            self.weight_decay / multiplier,
        )


class _Transfer(NamedTuple):
    """Size of a model compared with the base, and what else the factors depend on."""

    width: float
    depth: float
    muon: bool
    depth_scaled_init: bool
    tied: bool

    def scale(self, name: str, dimensions: int) -> Scale:
        """Return the factors of a parameter, found by its name in a transformers model."""
        path = name.split(".")
        module = path[-2]
        if any(part in LAYERS for part in path):
            return self._in_a_layer(module, matrix=dimensions >= 2)
        outer = Scale(epsilon=1 / self.width)
        carries_the_logits = module in FINAL_NORMS if self.tied else module == "lm_head"
        return outer.with_multiplier(1 / self.width) if carries_the_logits else outer

    def _in_a_layer(self, module: str, matrix: bool) -> Scale:
        if matrix:
            scale = self._matrix()
        elif module in HEAD_NORMS:
            scale = Scale(epsilon=1 / self.depth)
        else:
            scale = Scale(epsilon=1 / (self.width * self.depth))
        if module not in RESIDUAL_PROJECTIONS:
            return scale
        scale = scale.with_multiplier(1 / self.depth)
        if not matrix:
            return scale
        if self.muon:
            scale = scale._replace(epsilon=1.0)
        # The base's 1 / sqrt(2 x layers), where `build_model` has divided by this model's.
        correction = math.sqrt(self.depth) if self.depth_scaled_init else 1.0
        return scale._replace(initial_value=scale.initial_value * correction)

    def _matrix(self) -> Scale:
        if self.muon:
            return Scale(1 / math.sqrt(self.width), 1 / math.sqrt(self.width), 1.0, math.sqrt(self.width))
        return Scale(1 / math.sqrt(self.width), 1 / self.width, 1 / (self.width * self.depth), self.width)


def parameter_scales(causal_lm: nn.Module, recipe: Recipe) -> dict[str, Scale]:
    """Return the factors of every parameter of a transformers model, by its name; tied ones once."""
    parametrization, model = recipe.parametrization, recipe.model
    base_width, base_depth = parametrization.base_hidden_size, parametrization.base_num_layers
    if base_width is None or base_depth is None:  # standard
        return {name: Scale() for name, _ in causal_lm.named_parameters()}
    config: Any = causal_lm.config
    transfer = _Transfer(
        width=config.hidden_size / base_width,
        depth=config.num_hidden_layers / base_depth,
        muon=recipe.optimizer.name == "muon",
        depth_scaled_init=model.depth_scaled_init,
        tied=model.tie_word_embeddings,
    )
    return {name: transfer.scale(name, parameter.dim()) for name, parameter in causal_lm.named_parameters()}


@torch.no_grad()
def scale_initial_values(causal_lm: nn.Module, scales: dict[str, Scale]) -> None:
    """Multiply initial weights by their factors, in place; a factor of 1 changes nothing."""
    for name, parameter in causal_lm.named_parameters():
        if scales[name].initial_value != 1.0:
            parameter.mul_(scales[name].initial_value)
