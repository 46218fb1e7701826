"""Approach 3 of Hoffmann et al. 2022: the parametric law L = E + A/N^alpha + B/D^beta.

The objective is their equation 3: a sum (not a mean, which would stop optimizers early) of Huber losses of log loss. The solver
works on logarithms of the coefficients, which keeps them positive, and on log N and log D less their means, which decorrelates A
from alpha and B from beta.
"""

from __future__ import annotations

import time
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from isoflop.scaling.laws import COEFFICIENTS, EXPONENT_RANGE
from isoflop.scaling.newton import VANISHED, Objective, Problem, Solution, derivatives, minimise, objective, terms
from isoflop.scaling.points import Array, Points
from isoflop.utils.errors import UserError

NAMES = COEFFICIENTS["chinchilla"]
Status = Literal["converged", "at_bound", "out_of_iterations", "ill_conditioned"]
FEWEST_POINTS = 6  # one more than coefficients
VANISHING = 1e-6  # of the loss: a term below it at every point counts as zero
# Condition number of J^T J over logs of coefficients, columns scaled to 1. Grids and IsoFLOP designs of several budgets have 1e3
# to 2e4. A single budget has 1e6 or more and D in proportion to N 1e11: other laws fit such points equally well.
WORST_CONDITION = 1e6
# Both chosen by the coverage of the bootstrap's 90% intervals over 500 seeds, on 72 points of nine budgets and 20 of four.
KERNEL = 1.8  # twice Silverman's factor
FREEDOM_TAKEN = 7.5  # degrees of freedom that the fit takes: more than 5, since a sum of absolute deviations interpolates points
# Starts: E as shares of the least loss, the N-term as shares of the rest, and exponents wider than any published. The shares
# begin at 0.01: from 0.1 on, no start leads to a law whose E is 1e-4 of the loss.
_SHARES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
_EXPONENTS = np.geomspace(0.05, 2.0, 9)
POLISHED = 50  # best starts that Newton steps refine; they take 0.1 s on 240 points


class ParametricFit(NamedTuple):
    """Minimum of one objective."""

    coefficients: Array
    """E, A, alpha, B, beta."""
    objective: float
    status: Status
    detail: str
    """Which coefficient is at a bound or not determined, and which runs would help; empty if converged."""
    condition: float
    """Condition number of J^T J, columns scaled to 1."""
    starts: int
    seconds: float
    residuals: Array
    """log(measured / fitted), (n,)."""

    def loss(self, parameters: Array, tokens: Array) -> Array:
        """Return the loss in nats per token."""
        return loss_of(self.coefficients, parameters, tokens)


def loss_of(coefficients: Array, parameters: Array, tokens: Array) -> Array:
    """Return L of coefficients (..., 5); their leading axes broadcast against N and D."""
    e, a, alpha, b, beta = np.moveaxis(coefficients, -1, 0)
    loss: Array = e + a / parameters**alpha + b / tokens**beta
    return loss


def optimum(coefficients: Array, flops: Array) -> tuple[Array, Array]:
    """Return N and D of least loss at C = 6 N D (Hoffmann et al. 2022, equation 4); coefficients (..., 5)."""
    _, a, alpha, b, beta = np.moveaxis(coefficients, -1, 0)
    n: Array = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    return n, flops / 6 / n


def fit_parametric(points: Points, objective_of: Objective = Objective()) -> ParametricFit:  # noqa: B008 (it is immutable)
    """Return the law of least objective over all starts. Raises `UserError` for too few points."""
    started = time.perf_counter()
    require_enough(points)
    problem, starts = problem_of(points, objective_of), _starts(points)
    order = np.argsort(objective(starts, problem))[:POLISHED]
    solution = minimise(starts[order], problem)
    return _fit(points, problem, solution, len(starts), started)


def fit_least_absolute(points: Points) -> ParametricFit:
    """Fit in the limit of small delta, as Besiroglu et al. 2024 did; `objective` is the sum of |log residuals|."""
    started = time.perf_counter()
    require_enough(points)
    problem, theta = problem_of(points, Objective()), _starts(points)
    theta = theta[np.argsort(objective(theta, problem))[:POLISHED]]
    for delta in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):  # each solution starts the next
        problem = problem._replace(delta=delta)
        solution = minimise(theta, problem)
        theta = solution.theta
    fit = _fit(points, problem, solution, len(theta), started)
    return fit._replace(objective=float(points.weights @ np.abs(fit.residuals)))


def fit_squares(points: Points) -> ParametricFit:
    """Fit by least squares of the loss itself, not of its logarithm.

    Variable projection (Golub and Pereyra 1973): for each alpha and beta, E, A and B solve a non-negative linear problem.
    """
    started = time.perf_counter()
    require_enough(points)
    root, x, y = np.sqrt(points.weights), *_centered(points)

    def solve(logs: Array) -> tuple[Array, Array]:
        columns = np.stack([np.ones_like(x), np.exp(-np.exp(logs[0]) * x), np.exp(-np.exp(logs[1]) * y)], axis=1)
        linear, _ = nnls(root[:, None] * columns, root * points.loss)
        return linear, root * (columns @ linear - points.loss)

    starts = [np.log(pair) for pair in product(_EXPONENTS, _EXPONENTS)]
    best = sorted(starts, key=lambda logs: float(np.sum(solve(logs)[1] ** 2)))[:3]
    bounds = tuple(np.log(EXPONENT_RANGE))
    found = min(
        (least_squares(lambda logs: solve(logs)[1], s, bounds=bounds, xtol=1e-14, ftol=1e-14, gtol=1e-14) for s in best),
        key=lambda result: float(result.cost),
    )
    linear = np.maximum(solve(found.x)[0], 1e-300)
    theta = np.array([[np.log(linear[0]), np.log(linear[1]), found.x[0], np.log(linear[2]), found.x[1]]])
    problem = problem_of(points, Objective(delta=1e9))
    solution = Solution(theta, np.array([2 * found.cost]), np.array([found.status > 0]))
    return _fit(points, problem, solution, len(starts), started)


def bootstrap(points: Points, fit: ParametricFit, objective_of: Objective, resamples: int, seed: int) -> Array:
    """Return coefficients refitted to resampled runs, (k, 5), k <= resamples; refits that end at a bound are left out.

    Each run keeps its N and D and gets the law's loss times another run's residual, drawn with replacement (the bootstrap of
    regression, Efron 1979); drawing runs with replacement would break designs of few runs apart. An objective near absolute
    deviations interpolates some points, so residuals are smoothed (De Angelis, Hall and Young 1993) and scaled up for the degrees
    of freedom that the coefficients took. `tests/unit/scaling/test_coverage.py` measures how often the intervals cover the truth.
    """
    generator, count = np.random.default_rng(seed), len(fit.residuals)
    spread, kernel = fit.residuals.std(), KERNEL * count**-0.2  # in standard deviations; Silverman 1986, equation 3.31
    drawn = generator.choice(fit.residuals - fit.residuals.mean(), (resamples, count))
    drawn = (drawn + generator.normal(0, kernel * spread, drawn.shape)) / np.hypot(1, kernel)
    drawn *= np.sqrt(count / max(1.0, count - FREEDOM_TAKEN))
    problem, theta = problem_of(points, objective_of), _theta(fit.coefficients, points)
    refitted = np.log(fit.loss(points.parameters, points.tokens)) + drawn
    solution = minimise(np.repeat(theta[None], resamples, axis=0), problem._replace(log_loss=refitted))
    inside = np.abs(solution.theta - theta).max(axis=1) < 10  # beyond, a term has vanished or an exponent diverged
    return _coefficients(solution.theta[solution.converged & inside], points)


def require_enough(points: Points) -> None:
    """Raise `UserError` for fewer runs than determine five coefficients, and for runs that differ only in N or only in D."""
    if len(points.loss) < FEWEST_POINTS:
        raise UserError(
            f"{len(points.loss)} points cannot determine 5 coefficients; at least {FEWEST_POINTS} are needed, add runs"
        )
    for name, values in (("N (parameters)", points.parameters), ("D (tokens)", points.tokens)):
        if len(np.unique(values)) < 3:
            raise UserError(
                f"{name} takes {len(np.unique(values))} value(s), {values.min():.4g} to {values.max():.4g}: a power of it and a"
                " constant cannot be separated below 3; add runs that differ in it"
            )


def problem_of(points: Points, objective_of: Objective) -> Problem:
    """Return the solver's problem for some points."""
    return Problem(*_centered(points), np.log(points.loss), points.weights, objective_of.delta, objective_of.asymmetry)


def _centered(points: Points) -> tuple[Array, Array]:
    x, y = np.log(points.parameters), np.log(points.tokens)
    return x - x.mean(), y - y.mean()


def _starts(points: Points) -> Array:
    """Grid over E, the split of the rest and both exponents, (3969, 5); in centred terms every start passes near the points."""
    e, split, alpha, beta = np.array(list(product(_SHARES, _SHARES, _EXPONENTS, _EXPONENTS))).T
    level = e * points.loss.min()
    rest = np.exp(np.log(points.loss).mean()) - level
    return np.log([level, rest * split, alpha, rest * (1 - split), beta]).T


def _coefficients(theta: Array, points: Points) -> Array:
    """Convert logs of centred terms to E, A, alpha, B, beta."""
    alpha, beta = np.exp(theta[..., 2]), np.exp(theta[..., 4])
    log_a = theta[..., 1] + alpha * np.log(points.parameters).mean()
    log_b = theta[..., 3] + beta * np.log(points.tokens).mean()
    return np.stack([np.exp(theta[..., 0]), np.exp(log_a), alpha, np.exp(log_b), beta], axis=-1)


def _theta(coefficients: Array, points: Points) -> Array:
    e, a, alpha, b, beta = coefficients
    log_n, log_d = np.log(points.parameters).mean(), np.log(points.tokens).mean()
    return np.array([np.log(e), np.log(a) - alpha * log_n, np.log(alpha), np.log(b) - beta * log_d, np.log(beta)])


def _fit(points: Points, problem: Problem, solution: Solution, starts: int, started: float) -> ParametricFit:
    best = int(np.argmin(solution.objective))
    theta = solution.theta[best : best + 1]
    condition = _condition(theta, problem)
    status, detail = _status(theta, problem, bool(solution.converged[best]), condition)
    residuals = problem.log_loss - terms(theta, problem.x, problem.y)[0][0]
    value = float(solution.objective[best])
    return ParametricFit(
        _coefficients(theta[0], points), value, status, detail, condition, starts, time.perf_counter() - started, residuals
    )


def _condition(theta: Array, problem: Problem) -> float:
    """Condition number of J^T J, columns scaled to 1: how well N and D of the points determine the coefficients."""
    matrix = derivatives(theta, problem._replace(delta=1e9))[3][0]  # at this delta no residual is clipped
    scale = np.sqrt(np.maximum(np.diag(matrix), 1e-300))
    return float(np.linalg.cond(matrix / np.outer(scale, scale)))


def _status(theta: Array, problem: Problem, converged: bool, condition: float) -> tuple[Status, str]:
    shares = terms(theta, problem.x, problem.y)[1][0].max(axis=0)
    for name, share in zip(("E", "A / N^alpha", "B / D^beta"), shares, strict=True):
        if share < VANISHING:
            return "at_bound", f"{name} vanishes: the points do not show it; add runs of other sizes, or of more and fewer tokens"
    low, high = EXPONENT_RANGE
    for name, exponent in (("alpha", np.exp(theta[0, 2])), ("beta", np.exp(theta[0, 4]))):
        if not low < exponent < high:
            return "at_bound", f"{name} = {exponent:.3g} is beyond {low:g} to {high:g}; add runs that differ more in N and D"
    if condition > WORST_CONDITION:
        return "ill_conditioned", (
            f"the points determine some combination of coefficients {np.sqrt(condition):.2g} times worse than another; let N and"
            " D vary apart from each other, and further"
        )
    if not converged and float(objective(theta, problem)[0]) > VANISHED:
        return "out_of_iterations", "no minimum was reached; look at the residuals for a point that is far off"
    return "converged", ""
