"""Approach 2 of Hoffmann et al. 2022: a parabola of loss in log N at each budget, and power laws through their minima.

Also the line through the least-loss run of each budget, as taught in courses; it is 24 to 58% off on noise-free data.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from isoflop.scaling.points import Array, Indices, Points
from isoflop.scaling.powers import Minimum, PowerLaws, power_laws

SAME_BUDGET = 0.025  # in log FLOPs: rounding to optimizer steps spreads the runs of a budget by up to 1%
FEWEST_SIZES = 4  # one more than a parabola has coefficients


class Profile(NamedTuple):
    """One budget's runs and their parabola."""

    flops: float
    points: Points
    polynomial: Array | None
    """c2, c1, c0 of loss = c2 z^2 + c1 z + c0, z = ln N; None for too few sizes."""
    minimum: Minimum | None
    reason: str
    """Why the budget is left out; empty if it is used."""


def profiles(points: Points) -> list[Profile]:
    """Return the budgets at which several sizes were trained, lowest first."""
    return [_profile(points.take(group)) for group in group_by_budget(points)]


def group_by_budget(points: Points) -> list[Indices]:
    """Return the indices of each budget's runs; a budget has at least two sizes."""
    order = np.argsort(points.flops, kind="stable")
    breaks = np.flatnonzero(np.diff(np.log(points.flops[order])) > SAME_BUDGET) + 1
    groups = [group for group in np.split(order, breaks) if len(np.unique(points.parameters[group])) > 1]
    return [group for group in groups if np.ptp(np.log(points.flops[group])) < 2 * SAME_BUDGET]


def _profile(points: Points) -> Profile:
    flops = float(np.exp(np.log(points.flops).mean()))
    sizes = np.unique(points.parameters)
    if len(sizes) < FEWEST_SIZES:
        return Profile(flops, points, None, None, f"{len(sizes)} sizes, and a parabola with an error needs {FEWEST_SIZES}")
    z = np.log(points.parameters)
    polynomial = _polynomials(points, points.loss)[0]
    c2, c1, c0 = polynomial
    if c2 <= 0:
        return Profile(flops, points, polynomial, None, "loss does not rise to both sides: no minimum")
    at = -c1 / (2 * c2)
    if not z.min() < at < z.max():
        side = "smallest" if at <= z.min() else "largest"
        return Profile(flops, points, polynomial, None, f"its minimum lies beyond the {side} size; train {side[:-3]}er ones")
    return Profile(flops, points, polynomial, Minimum(flops, float(np.exp(at)), float(c0 - c1**2 / (4 * c2))), "")


def _polynomials(points: Points, losses: Array) -> Array:
    """Fit parabolas to losses (k, n) or (n,) in ln N by weighted least squares; (k, 3), the highest power first."""
    z, root = np.log(points.parameters), np.sqrt(points.weights)
    center = z.mean()
    columns = np.stack([(z - center) ** 2, z - center, np.ones_like(z)], axis=1)
    c2, c1, c0 = np.linalg.lstsq(root[:, None] * columns, (root * np.atleast_2d(losses)).T, rcond=None)[0]
    return np.stack([c2, c1 - 2 * c2 * center, c0 - c1 * center + c2 * center**2], axis=1)


def laws_of(found: list[Profile]) -> PowerLaws | None:
    """Return power laws through the minima; None if fewer than two budgets have one."""
    minima = [profile.minimum for profile in found if profile.minimum]
    if len(minima) < 2:
        return None
    flops, parameters, losses = np.array(minima).T
    return power_laws(flops, parameters, losses)


def resample_profiles(found: list[Profile], resamples: int, seed: int) -> PowerLaws:
    """Return the laws of resampled runs: each parabola plus residuals drawn with replacement from those of all parabolas.

    Residuals are relative to the loss and scaled by sqrt(m / (m - 3)) for the three coefficients of a parabola of m runs. A
    resample with a parabola that has no minimum within its sizes is left out.
    """
    generator = np.random.default_rng(seed)
    used = [profile for profile in found if profile.minimum]
    fitted = [
        np.polyval(profile.polynomial, np.log(profile.points.parameters)) for profile in used if profile.polynomial is not None
    ]
    relative = [
        np.log(profile.points.loss / fit) * np.sqrt(len(fit) / (len(fit) - 3)) for profile, fit in zip(used, fitted, strict=True)
    ]
    pool = np.concatenate(relative)
    parameters, losses, valid = np.empty((resamples, len(used))), np.empty((resamples, len(used))), np.ones(resamples, dtype=bool)
    for number, (profile, fit) in enumerate(zip(used, fitted, strict=True)):
        drawn = fit * np.exp(generator.choice(pool, (resamples, len(fit))))
        c2, c1, c0 = _polynomials(profile.points, drawn).T
        with np.errstate(divide="ignore", invalid="ignore"):
            at = -c1 / (2 * c2)
        z = np.log(profile.points.parameters)
        inside = (c2 > 0) & (at > z.min()) & (at < z.max())
        valid &= inside
        parameters[:, number] = np.exp(np.where(inside, at, 0.0))
        losses[:, number] = np.where(inside, c0 - c1**2 / (4 * np.where(inside, c2, 1.0)), 1.0)
    flops = np.array([profile.flops for profile in used])
    return power_laws(flops, parameters[valid], losses[valid])


def least(found: list[Profile]) -> list[Minimum]:
    """Return the run of least loss at each budget, even if it is the smallest or largest."""
    best = [(profile, int(np.argmin(profile.points.loss))) for profile in found]
    return [Minimum(profile.flops, float(profile.points.parameters[i]), float(profile.points.loss[i])) for profile, i in best]
