"""The best shapes for a compute budget: every shape of a family, its tokens solved exactly from the FLOPs, ranked by a law."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isoflop import cost
from isoflop.errors import UserError
from isoflop.families import Family
from isoflop.recipe import Model
from isoflop.scaling.laws import Law

NEAR_OPTIMAL_NATS = 0.001  # closer than any law's own error, or two seeds of one run: a tie
NEAR_20N = (10.0, 30.0)  # tokens per parameter: 20 +- 50%, the founding document's constraint
MIN_TOKENS_PER_PARAMETER = 1.0  # assumption: below it no published law was fitted, and no one trains


FlopsOf = Callable[[int], float]  # training FLOPs as a function of parameters


class Candidate(NamedTuple):
    """One shape, trained for exactly the budget."""

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
    members: Family, flops: float | FlopsOf, law: Law, tokens_per_parameter: tuple[float, float] | None = None
) -> list[Candidate]:
    """All shapes of a family at a budget, least predicted loss first.

    `flops` is the budget, or what it comes to for a number of parameters (hours of a GPU whose MFU depends on the model).
    Raises `UserError` where the budget is too small for the smallest shape, or no shape has D/N within the bounds.
    """
    shapes, n, per_token = _grid(members)
    budgets = np.array([flops(int(size)) for size in n]) if callable(flops) else np.full_like(n, flops)
    tokens = budgets / per_token
    if not (tokens >= MIN_TOKENS_PER_PARAMETER * n).any():
        _refuse_small_budget(members, shapes[int(np.argmax(tokens / n))], float(budgets.max()))
    low, high = tokens_per_parameter or (MIN_TOKENS_PER_PARAMETER, np.inf)
    kept = np.flatnonzero((low * n <= tokens) & (tokens <= high * n))
    if not len(kept):
        ratios = tokens / n
        nearest = ratios[int(np.argmin(np.maximum(low - ratios, ratios - high)))]
        raise UserError(
            f"--constrain-tokens-per-parameter {low:g} {high:g}: no shape of family {members.name} has D/N between these at"
            f" {budgets.max():.4g} FLOPs; the nearest has {nearest:.4g}"
        )
    losses = law.loss(np.array([law.size(shapes[i]) for i in kept]), tokens[kept])
    ranked = sorted(zip(losses, kept, strict=True))
    return [
        Candidate(shapes[i], int(n[i]), float(tokens[i]), float(budgets[i]), float(loss), members.on_edge(shapes[i]))
        for loss, i in ranked
    ]


@cache
def _grid(members: Family) -> tuple[list[Model], NDArray[np.float64], NDArray[np.float64]]:
    """A family's shapes, their parameters and FLOPs per token: the same for every law and budget."""
    shapes = list(members.shapes())
    n = np.array([cost.parameters(shape) for shape in shapes], dtype=float)
    return shapes, n, np.array([cost.flops_per_token(shape, members.sequence_length) for shape in shapes], dtype=float)


def near_optimal(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates that no law can tell from the best, the best first."""
    return [candidate for candidate in candidates if candidate.predicted_loss <= candidates[0].predicted_loss + NEAR_OPTIMAL_NATS]


def _refuse_small_budget(members: Family, smallest: Model, flops: float) -> None:
    n, s = cost.parameters(smallest), cost.shape_of(smallest)
    per_token = cost.flops_per_token(smallest, members.sequence_length)
    raise UserError(
        f"{flops:.4g} FLOPs are too few for family {members.name}: its smallest shape ({s.num_layers} layers x {s.hidden_size},"
        f" {n:,} parameters) would see {flops / per_token:,.0f} tokens, under {MIN_TOKENS_PER_PARAMETER:g} a parameter; the"
        f" least budget is {per_token * MIN_TOKENS_PER_PARAMETER * n:.3g} FLOPs, or choose a family of smaller shapes"
    )


def shape_for_target(members: Family, parameters: float | None, width: int | None, aspect: int | None) -> Model:
    """The shape of given aspect ratios, width / layers = width / heads, by two of N, width and aspect; N = 12 layers width^2.

    From N and aspect the width is (N aspect / 12)^(1/3), down to a multiple of the aspect, so that layers and heads are whole.
    """
    if sum(given is not None for given in (parameters, width, aspect)) != 2:
        raise UserError("give two of --parameters, --width and --aspect")
    if aspect is not None and width is None and parameters is not None:
        width = int((parameters * aspect / 12) ** (1 / 3) * (1 + 1e-12)) // aspect * aspect
        if not width:
            raise UserError(
                f"--parameters {parameters:g} at --aspect {aspect}: not one layer fits; the smallest has width {aspect} and"
                f" {12 * aspect**2:,} parameters"
            )
    assert width is not None
    if aspect is not None:
        layers, rest = divmod(width, aspect)
        if rest or not layers:
            below = width // aspect * aspect
            near = f"{below} or {below + aspect}" if below else str(aspect)
            raise UserError(f"--width {width} is not a multiple of --aspect {aspect}, so layers are not whole; nearest: {near}")
        return members.shape(layers, width, aspect)
    layers = max(1, round((parameters or 0) / (12 * width**2)))
    return members.shape(layers, width, min(members.head_dims, key=lambda size: width % size))
