"""Repeated data (Muennighoff et al. 2023, arXiv:2305.16264, equation 5): D tokens of U unique ones are worth D' fresh ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from isoflop.scaling.laws import effective_tokens
from isoflop.scaling.parametric import NAMES, Options, fit_parametric
from isoflop.scaling.points import Points

FEWEST_REPEATED = 3  # runs that see their data again
BOUNDS = (0.1, 1000.0)  # of R*


def fit_repeated(points: Points, options: Options) -> dict[str, Any]:
    """R* and the law of fresh data together: R* is the one whose five coefficients, fitted to D', have the least objective."""
    unique = points.unique_tokens
    repeated = 0 if unique is None else int((points.tokens > unique).sum())
    if unique is None or repeated < FEWEST_REPEATED:
        return {
            "status": "not fitted",
            "reason": f"{repeated} runs see their data more than once, and {FEWEST_REPEATED} are needed; name a column of unique"
            " tokens",
        }

    def worth(log_r_star: float) -> Points:
        return points._replace(tokens=effective_tokens(points.tokens, unique, float(np.exp(log_r_star))))

    found = minimize_scalar(
        lambda log_r_star: fit_parametric(worth(log_r_star), options).objective, bounds=np.log(BOUNDS), method="bounded"
    )
    fit, r_star = fit_parametric(worth(found.x), options), float(np.exp(found.x))
    at_bound = not 1.01 * BOUNDS[0] < r_star < 0.99 * BOUNDS[1]
    return {
        "status": "at_bound" if at_bound else fit.status,
        "r_star": r_star,
        "objective": fit.objective,
        "points": repeated,
        **dict(zip(NAMES, map(float, fit.coefficients), strict=True)),
    }
