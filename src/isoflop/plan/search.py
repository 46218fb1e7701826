"""Rank the shapes of a family for a compute budget: tokens follow exactly from the FLOPs, the order from a law."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isoflop.config.recipe import Model
from isoflop.plan import cost
from isoflop.plan.families import ASPECT_RATIO, Family
from isoflop.scaling.laws import Law
from isoflop.utils.errors import UserError

NEAR_OPTIMAL_NATS = 0.001  # a tie: less than any law's own error, and than random seed noise
NEAR_20N = (10.0, 30.0)  # tokens per parameter: 20 +- 50%, the original report's constraint
COMPUTE_OPTIMAL = 20  # tokens per parameter: the rule of thumb from Hoffmann et al. 2022, table 3
MIN_TOKENS_PER_PARAMETER = 1.0  # assumption: no published law was fitted below it

FlopsOf = Callable[[int], float]  # training FLOPs as a function of parameters


class Candidate(NamedTuple):
    """A shape, trained for exactly the budget."""

    model: Model
    parameters: int
    tokens: float
    """FLOPs / FLOPs per token."""
    flops: float
    predicted_loss: float
    on_grid_edge: bool

    @property
    def tokens_per_parameter(self) -> float:
        """D/N over all parameters."""
        return self.tokens / self.parameters


def search(
    family: Family, flops: float | FlopsOf, law: Law, tokens_per_parameter: tuple[float, float] | None = None
) -> list[Candidate]:
    """Return all shapes of a family at a budget, lowest predicted loss first.

    `flops` is the budget, or a function of parameters (GPU-hours, where the MFU depends on the model). Raises `UserError` where
    the budget is too small for the smallest shape, or no shape has D/N within the bounds.
    """
    layers = law.fitted_on.layers if law.fitted_on else None
    shapes, n, per_token = _grid(family, layers)
    if layers and not shapes:
        raise UserError(
            f"law {law.name} was fitted to models of {layers[0]} to {layers[1]} layers, and family {family.name} has none of"
            " these depths; give another --law or --family"
        )
    budgets = np.array([flops(int(size)) for size in n]) if callable(flops) else np.full_like(n, flops)
    tokens = budgets / per_token
    if not (tokens >= MIN_TOKENS_PER_PARAMETER * n).any():
        _refuse_small_budget(family, shapes[int(np.argmax(tokens / n))], float(budgets.max()))
    low, high = tokens_per_parameter or (MIN_TOKENS_PER_PARAMETER, np.inf)
    kept = np.flatnonzero((low * n <= tokens) & (tokens <= high * n))
    if not len(kept):
        ratios = tokens / n
        nearest = ratios[int(np.argmin(np.maximum(low - ratios, ratios - high)))]
        raise UserError(
            f"--constrain-tokens-per-parameter {low:g} {high:g}: no shape of family {family.name} has D/N between these at"
            f" {budgets.max():.4g} FLOPs; the nearest has {nearest:.4g}"
        )
    losses = law.loss(np.array([law.model_size(shapes[i]) for i in kept]), tokens[kept])
    ranked = sorted(zip(losses, kept, strict=True))
    edges = {i: family.on_edge(shapes[i], layers is not None and layers[0] == layers[1]) for i in kept}
    return [Candidate(shapes[i], int(n[i]), float(tokens[i]), float(budgets[i]), float(loss), edges[i]) for loss, i in ranked]


@cache
def _grid(family: Family, layers: tuple[int, int] | None) -> tuple[list[Model], NDArray[np.float64], NDArray[np.float64]]:
    """Return a family's shapes of some depths, their parameters and FLOPs per token; no budget changes them."""
    fewest, most = layers or (1, math.inf)
    if fewest == most:
        shapes = list(family.shapes_of_depth(int(most)))
    else:
        shapes = [shape for shape in family.shapes() if fewest <= cost.shape_of(shape).num_layers <= most]
    n = np.array([cost.parameters(shape) for shape in shapes], dtype=float)
    return shapes, n, np.array([cost.flops_per_token(shape, family.sequence_length) for shape in shapes], dtype=float)


def by_rule_of_thumb(candidates: list[Candidate]) -> list[Candidate]:
    """Sort candidates without a law: nearest to `COMPUTE_OPTIMAL` tokens per parameter and to the middle aspect ratio first."""
    middle = math.sqrt(math.prod(ASPECT_RATIO))

    def distance(candidate: Candidate) -> float:
        shape = cost.shape_of(candidate.model)
        aspect = shape.hidden_size / shape.num_layers
        return abs(math.log(candidate.tokens_per_parameter / COMPUTE_OPTIMAL)) + abs(math.log(aspect / middle))

    return sorted(candidates, key=distance)


def near_optimal(candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates that no law can tell from the best, the best first."""
    return [candidate for candidate in candidates if candidate.predicted_loss <= candidates[0].predicted_loss + NEAR_OPTIMAL_NATS]


def _refuse_small_budget(family: Family, smallest: Model, flops: float) -> None:
    n, s = cost.parameters(smallest), cost.shape_of(smallest)
    per_token = cost.flops_per_token(smallest, family.sequence_length)
    raise UserError(
        f"{flops:.4g} FLOPs are too few for family {family.name}: its smallest shape ({s.num_layers} layers x {s.hidden_size},"
        f" {n:,} parameters) would see {flops / per_token:,.0f} tokens, under {MIN_TOKENS_PER_PARAMETER:g} per parameter; the"
        f" least budget is {per_token * MIN_TOKENS_PER_PARAMETER * n:.3g} FLOPs, or choose a family of smaller shapes"
    )


def shape_for_target(family: Family, parameters: float | None, width: int | None, aspect: int | None) -> Model:
    """Return the shape that two of N, width and aspect give; aspect = width / layers = width / heads, N = 12 layers width^2.

    From N and aspect the width is (N aspect / 12)^(1/3), rounded down to a multiple of the aspect: layers and heads are integers.
    """
    if sum(given is not None for given in (parameters, width, aspect)) != 2:
        raise UserError("give two of --parameters, --width and --aspect")
    if aspect is not None and width is None and parameters is not None:
        width = int((parameters * aspect / 12) ** (1 / 3) * (1 + 1e-12)) // aspect * aspect
        if not width:
            raise UserError(
                f"--parameters {parameters:g} at --aspect {aspect}: no layer fits; the smallest shape has width {aspect} and"
                f" {12 * aspect**2:,} parameters"
            )
    assert width is not None
    if aspect is not None:
        layers, rest = divmod(width, aspect)
        if rest or not layers:
            below = width // aspect * aspect
            near = f"{below} or {below + aspect}" if below else str(aspect)
            raise UserError(
                f"--width {width} is not a multiple of --aspect {aspect}, so the number of layers is no integer; nearest: {near}"
            )
        return family.shape(layers, width, aspect)
    layers = max(1, round((parameters or 0) / (12 * width**2)))
    return family.shape(layers, width, min(family.head_dims, key=lambda size: width % size))
