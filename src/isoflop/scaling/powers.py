"""Power laws of compute, N = k C^a and D = k C^b, and what all approaches that end in them say."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import curve_fit

from isoflop.scaling.laws import INTERVAL
from isoflop.scaling.points import Array


class Minimum(NamedTuple):
    """Where loss is least at a budget."""

    flops: float
    parameters: float
    loss: float

    @property
    def tokens(self) -> float:
        """D = C / 6 N."""
        return self.flops / 6 / self.parameters


class PowerLaws(NamedTuple):
    """N, D and least loss as powers of C, one of each a resample: coefficients and exponents, (k,)."""

    n: tuple[Array, Array]
    d: tuple[Array, Array]
    loss: tuple[Array, Array]

    def at(self, flops: float) -> tuple[Array, Array, Array]:
        """N, D and loss at a budget, (k,) each."""
        return tuple(k * flops**a for k, a in (self.n, self.d, self.loss))  # type: ignore[return-value]


def log_line(flops: Array, values: Array) -> tuple[Array, Array]:
    """k and a of values = k C^a by least squares in logs; values (..., budgets)."""
    x = np.log(flops) - np.log(flops).mean()
    y = np.log(values)
    slope = (y * x).sum(axis=-1) / (x**2).sum()
    return np.exp(y.mean(axis=-1) - slope * np.log(flops).mean()), slope


def linear_line(flops: Array, values: Array) -> tuple[Array, Array]:
    """k and a of values = k C^a by least squares of the values themselves: the largest budgets decide alone."""
    k, a = log_line(flops, values)
    scale = flops.max()
    (height, slope), _ = curve_fit(lambda c, height, slope: height * c**slope, flops / scale, values, p0=(k * scale**a, a))
    return height / scale**slope, slope


def power_laws(flops: Array, parameters: Array, losses: Array, line: Any = log_line) -> PowerLaws:
    """Laws through minima, (budgets,) or (k, budgets); D = C / 6 N is fitted by its own line where lines are not straight in logs."""
    tokens = flops / 6 / parameters
    return PowerLaws(*(tuple(np.atleast_1d(part) for part in line(flops, values)) for values in (parameters, tokens, losses)))


def told(laws: PowerLaws, predict: tuple[float, ...], drawn: PowerLaws | None = None) -> dict[str, Any]:
    """Exponents, coefficients and predictions, with their 90% intervals where there are resamples."""
    found: dict[str, Any] = {
        "exponent_n": float(laws.n[1][0]),
        "coefficient_n": float(laws.n[0][0]),
        "exponent_d": float(laws.d[1][0]),
        "coefficient_d": float(laws.d[0][0]),
    }
    for name, values in zip(("n_opt", "d_opt", "loss"), zip(*(laws.at(c) for c in predict), strict=True) or ((),) * 3, strict=False):
        found[name] = [float(value[0]) for value in values]
    if drawn is None:
        return found
    found["resamples"] = len(drawn.n[0])
    found["intervals"] = {
        "exponent_n": interval(drawn.n[1]),
        "coefficient_n": interval(drawn.n[0]),
        "exponent_d": interval(drawn.d[1]),
        "coefficient_d": interval(drawn.d[0]),
    }
    for name, values in zip(("n_opt", "d_opt", "loss"), zip(*(drawn.at(c) for c in predict), strict=True), strict=False):
        found[f"{name}_interval"] = [interval(value) for value in values]
    return found


def interval(values: Array) -> list[float]:
    """5th and 95th percentile."""
    low, high = np.quantile(values, INTERVAL)
    return [float(low), float(high)]
