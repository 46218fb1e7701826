"""Power laws of compute through the minima of several budgets, and summaries of any method's predictions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import curve_fit

from isoflop.scaling.laws import INTERVAL
from isoflop.scaling.points import Array

FEWEST_FOR_E = 4  # budgets
_DECAYS = np.geomspace(0.01, 1.0, 200)


class Minimum(NamedTuple):
    """N and loss at a budget's least loss."""

    flops: float
    parameters: float
    loss: float

    @property
    def tokens(self) -> float:
        """D = C / 6 N."""
        return self.flops / 6 / self.parameters


class PowerLaws(NamedTuple):
    """N = k C^a, D = C / 6 N and least loss = E + h C^-g; arrays (k,) with one entry per resample."""

    coefficient: Array
    exponent: Array
    loss: tuple[Array, Array, Array]
    """E, h, g."""

    def at(self, flops: float) -> tuple[Array, Array, Array]:
        """Return N, D and loss at a budget, (k,) each."""
        n, (e, h, g) = self.coefficient * flops**self.exponent, self.loss
        return n, flops / 6 / n, e + h * flops**-g


def log_line(flops: Array, values: Array) -> tuple[Array, Array]:
    """Return k and a of values = k C^a by least squares in logs; values (..., budgets)."""
    x = np.log(flops) - np.log(flops).mean()
    y = np.log(values)
    slope = (y * x).sum(axis=-1) / (x**2).sum()
    return np.exp(y.mean(axis=-1) - slope * np.log(flops).mean()), slope


def linear_line(flops: Array, values: Array) -> tuple[Array, Array]:
    """Return k and a of values = k C^a by least squares of the values themselves, which the largest budgets dominate."""
    k, a = log_line(flops, values)
    scale = flops.max()
    start = (k * scale**a, a)
    (height, slope), *_ = curve_fit(lambda c, height, slope: height * c**slope, flops / scale, values, start, full_output=True)
    return height / scale**slope, slope


def loss_curve(flops: Array, losses: Array) -> tuple[Array, Array, Array]:
    """Return E, h and g of losses = E + h C^-g, losses (..., budgets); E >= 0 and h by least squares for each g of a grid.

    E = 0 for fewer than four budgets: three coefficients would fit the noise.
    """
    scale = np.exp(np.log(flops).mean())
    if len(flops) < FEWEST_FOR_E:
        h, g = log_line(flops, losses)
        return np.zeros_like(h), h, -g
    y, best = losses, None
    for g in _DECAYS:
        x = (flops / scale) ** -g
        centered = x - x.mean()
        h = (y * centered).sum(axis=-1) / (centered**2).sum()
        e = y.mean(axis=-1) - h * x.mean()
        h, e = np.where(e < 0, (y * x).sum(axis=-1) / (x**2).sum(), h), np.maximum(e, 0)
        error = ((y - e[..., None] - h[..., None] * x) ** 2).sum(axis=-1)
        if best is None:
            best = error, e, h, np.full_like(h, g)
        else:
            best = tuple(np.where(error < best[0], new, old) for new, old in zip((error, e, h, g), best, strict=True))
    assert best is not None
    _, e, h, decay = best
    return e, h * scale**decay, decay


def power_laws(flops: Array, parameters: Array, losses: Array, line: Any = log_line) -> PowerLaws:
    """Fit the laws to minima; N and losses are (budgets,) or (k, budgets)."""
    k, a = line(flops, parameters)
    return PowerLaws(np.atleast_1d(k), np.atleast_1d(a), tuple(np.atleast_1d(part) for part in loss_curve(flops, losses)))  # type: ignore[arg-type]


def summarize_power_laws(laws: PowerLaws, predict: tuple[float, ...], drawn: PowerLaws | None = None) -> dict[str, Any]:
    """Return exponents, coefficients and predictions at budgets under their report keys, with 90% intervals if resampled."""
    e, h, g = (float(part[0]) for part in laws.loss)
    found: dict[str, Any] = {
        **{name: float(values[0]) for name, values in _exponents(laws).items()},
        "loss_law": f"{e:.4f} + {h:.4g} C^-{g:.4g}",
        **optima_by_name([laws.at(flops) for flops in predict], None),
    }
    if drawn is None or not len(drawn.exponent):
        return found
    found |= optima_by_name([laws.at(flops) for flops in predict], [drawn.at(flops) for flops in predict])
    return found | {
        "resamples": len(drawn.exponent),
        "intervals": {name: interval(values) for name, values in _exponents(drawn).items()},
    }


def _exponents(laws: PowerLaws) -> dict[str, Array]:
    return {
        "exponent_n": laws.exponent,
        "coefficient_n": laws.coefficient,
        "exponent_d": 1 - laws.exponent,
        "coefficient_d": 1 / (6 * laws.coefficient),
    }


def optima_by_name(found: list[Any], drawn: list[Any] | None) -> dict[str, Any]:
    """Return N, D and loss of each budget under their report keys, with the intervals of `drawn` if given."""
    named: dict[str, Any] = {}
    for number, name in enumerate(("n_opt", "d_opt", "loss")):
        named[name] = [float(np.ravel(values[number])[0]) for values in found]
        if drawn is not None:
            named[f"{name}_interval"] = [interval(values[number]) for values in drawn]
    return named


def interval(values: Array) -> list[float]:
    """Return the 5th and 95th percentile."""
    low, high = np.quantile(values, INTERVAL)
    return [float(low), float(high)]
