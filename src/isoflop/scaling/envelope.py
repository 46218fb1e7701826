"""Approach 1 of Hoffmann et al. 2022: the lower envelope of the runs' loss curves over FLOPs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from isoflop.scaling.points import Array, Curve, Indices
from isoflop.scaling.powers import Minimum, PowerLaws, power_laws

GRID = 1500  # budgets, log-spaced, as in Hoffmann et al. 2022, section 3.1
WARM_UP = 0.1  # share of each curve's tokens that is left out: the learning rate warms up or is still near its peak
FEWEST_CURVES = 3
RESAMPLES = 300  # at most: each searches the grid of budgets, which takes milliseconds


class Envelope(NamedTuple):
    """The least loss at each budget of the grid, and which run has it."""

    minima: list[Minimum]
    laws: PowerLaws
    drawn: PowerLaws


def fit_envelope(curves: list[Curve], resamples: int, seed: int) -> Envelope | str:
    """Return the envelope and its power laws, resampled by run; or the reason why there is none."""
    late = [_late(curve) for curve in curves]
    late = [curve for curve in late if len(curve.loss) > 1]
    sizes = np.array([curve.parameters for curve in late])
    if len(np.unique(sizes)) < FEWEST_CURVES:
        return (
            f"{len(np.unique(sizes))} sizes have losses after the first {WARM_UP:.0%} of their tokens, and an envelope needs"
            f" {FEWEST_CURVES}; give folders of runs, or a table with several rows per run"
        )
    flops = np.geomspace(min(c.flops[0] for c in late), max(c.flops[-1] for c in late), GRID)
    losses = np.array([_at(curve, flops) for curve in late])  # (runs, budgets)
    found = _laws(flops, losses, sizes)
    if found is None:
        return "no budget is reached by runs smaller and larger than its best one; train more sizes"
    used, best, laws = found
    generator, every = np.random.default_rng(seed), np.arange(len(late))
    drawn = [_laws(flops, losses[which], sizes[which]) for which in generator.choice(every, (resamples, len(every)))]
    laws_drawn = [one[2] for one in drawn if one is not None]
    stacked = PowerLaws(
        np.concatenate([one.coefficient for one in laws_drawn]),
        np.concatenate([one.exponent for one in laws_drawn]),
        tuple(np.concatenate(parts) for parts in zip(*(one.loss for one in laws_drawn), strict=True)),  # type: ignore[arg-type]
    )
    minima = [Minimum(*values) for values in zip(flops[used], sizes[best], losses[best, used], strict=True)]
    return Envelope(minima, laws, stacked)


def _laws(flops: Array, losses: Array, sizes: Array) -> tuple[Indices, Indices, PowerLaws] | None:
    """Return the budgets whose best run is neither the smallest nor the largest to reach them, those runs, and the laws."""
    reached = np.isfinite(losses)
    best = np.argmin(np.where(reached, losses, np.inf), axis=0)
    low = np.where(reached, sizes[:, None], np.inf).min(axis=0)
    high = np.where(reached, sizes[:, None], -np.inf).max(axis=0)
    used = np.flatnonzero((low < sizes[best]) & (sizes[best] < high))
    if len(np.unique(sizes[best[used]])) < 2:
        return None
    return used, best[used], power_laws(flops[used], sizes[best[used]], losses[best[used], used])


def _late(curve: Curve) -> Curve:
    late = curve.tokens >= WARM_UP * curve.tokens[-1]
    return curve._replace(tokens=curve.tokens[late], flops=curve.flops[late], loss=curve.loss[late])


def _at(curve: Curve, flops: Array) -> Array:
    """Interpolate a curve's loss at budgets, linearly in logs; NaN before its first and after its last measurement."""
    return np.exp(np.interp(np.log(flops), np.log(curve.flops), np.log(curve.loss), left=np.nan, right=np.nan))
