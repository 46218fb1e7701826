"""Worth of repeated data (Muennighoff et al. 2023, arXiv:2305.16264, equation 5): D tokens over U unique ones count as D'."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar

from isoflop.scaling.laws import effective_tokens
from isoflop.scaling.newton import Objective
from isoflop.scaling.parametric import fit_parametric
from isoflop.scaling.points import Points
from isoflop.scaling.report import NOT_FITTED, Repeated

FEWEST_REPEATED = 3  # runs that see their data again
BOUNDS = (0.1, 1000.0)  # of R*


def fit_repeated(points: Points, objective: Objective) -> Repeated:
    """Fit R* together with the law of fresh data: the R* whose five coefficients, fitted to D', have the least objective."""
    unique = points.unique_tokens
    repeated = 0 if unique is None else int((points.tokens > unique).sum())
    if unique is None or repeated < FEWEST_REPEATED:
        reason = (
            f"{repeated} runs see their data more than once, and {FEWEST_REPEATED} are needed; name a column of unique tokens"
        )
        return Repeated(status=NOT_FITTED, reason=reason)

    def effective(log_r_star: float) -> Points:
        return points._replace(tokens=effective_tokens(points.tokens, unique, float(np.exp(log_r_star))))

    found = minimize_scalar(
        lambda log_r_star: fit_parametric(effective(log_r_star), objective).objective, bounds=np.log(BOUNDS), method="bounded"
    )
    fit, r_star = fit_parametric(effective(found.x), objective), float(np.exp(found.x))
    at_bound = not 1.01 * BOUNDS[0] < r_star < 0.99 * BOUNDS[1]
    e, a, alpha, b, beta = map(float, fit.coefficients)
    status = "at_bound" if at_bound else fit.status
    return Repeated(status=status, r_star=r_star, objective=fit.objective, points=repeated, E=e, A=a, alpha=alpha, B=b, beta=beta)
