"""Repeated data (Muennighoff et al. 2023, arXiv:2305.16264, equation 5): D tokens of U unique ones are worth D' fresh ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from isoflop.scaling.parametric import NAMES, Options, fit_parametric
from isoflop.scaling.points import Array, Points

FEWEST_REPEATED = 3  # runs that see their data again
R_STAR = (0.1, 1000.0)  # repetitions after which their worth has fallen by 1 - 1/e; Muennighoff et al. 2023 found 15.39


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
        return points._replace(tokens=effective(points.tokens, unique, float(np.exp(log_r_star))))

    found = minimize_scalar(
        lambda log_r_star: fit_parametric(worth(log_r_star), options).objective, bounds=np.log(R_STAR), method="bounded"
    )
    fit, r_star = fit_parametric(worth(found.x), options), float(np.exp(found.x))
    at_bound = not 1.01 * R_STAR[0] < r_star < 0.99 * R_STAR[1]
    return {
        "status": "at_bound" if at_bound else fit.status,
        "r_star": r_star,
        "objective": fit.objective,
        "points": repeated,
        **dict(zip(NAMES, map(float, fit.coefficients), strict=True)),
    }


def effective(tokens: Array, unique: Array, r_star: float) -> Array:
    """D' = U + U R* (1 - exp(-R / R*)), R = D / U - 1 repetitions; D itself where nothing repeats."""
    repetitions = np.maximum(tokens / unique - 1, 0)
    worth: Array = np.minimum(tokens, unique) + unique * r_star * -np.expm1(-repetitions / r_star)
    return worth
