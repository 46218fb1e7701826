"""Kaplan et al. 2020, equations 1.1 to 1.3: loss as a power of N, D or C alone, if the others do not limit it."""

from __future__ import annotations

import numpy as np

from isoflop.scaling.points import Array, Indices, Points
from isoflop.scaling.powers import log_line
from isoflop.scaling.report import NOT_FITTED, SingleLaw

FEWEST = 3  # a line through two points has no residual


def fit_single(points: Points) -> dict[str, SingleLaw]:
    """Fit L = (scale / x)^exponent by least squares in logs, x each of N, D and C; "not fitted" for too few values of x.

    Each fit takes the runs that no run with less of x beats: the other two limit these least.
    """
    axes = {"N": points.parameters, "D": points.tokens, "C": points.flops}
    return {name: _law(x, points.loss, _frontier(x, points.loss)) for name, x in axes.items()}


def _law(x: Array, loss: Array, chosen: Indices) -> SingleLaw:
    if (values := len(np.unique(x[chosen]))) < FEWEST:
        return SingleLaw(status=NOT_FITTED, reason=f"{values} values, and a line with an error needs {FEWEST}")
    k, slope = log_line(x[chosen], loss[chosen])
    residuals = np.log(loss[chosen] / (k * x[chosen] ** slope))
    return SingleLaw(
        status="converged",
        exponent=float(-slope),
        scale=float(np.exp(np.log(k) / -slope)),
        residual_std=float(residuals.std()),
        points=len(chosen),
    )


def _frontier(x: Array, loss: Array) -> Indices:
    """Return the runs whose loss no run of less or equal x reaches."""
    order = np.lexsort((loss, x))
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(loss[order])[:-1]])
    return order[loss[order] < best_before]
