"""Approach 3 of Hoffmann et al. 2022: the parametric law L = E + A/N^alpha + B/D^beta, with what can be said for each fit.

The objective is their equation 3, a sum (not a mean, which would stop optimizers early) of Huber losses of log loss. Coefficients
are positive by their logarithms, and N and D are taken about their means, without which A and alpha can hardly be told apart.
"""

from __future__ import annotations

import time
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from isoflop.errors import UserError
from isoflop.scaling.laws import COEFFICIENTS, EXPONENT_RANGE
from isoflop.scaling.newton import VANISHED, Problem, Solution, derivatives, minimise, objective, terms
from isoflop.scaling.points import Array, Points

NAMES = COEFFICIENTS["chinchilla"]
Status = Literal["converged", "at_bound", "out_of_iterations", "ill_conditioned"]
DELTA = 1e-3  # Hoffmann et al. 2022, equation 3: in log loss, so about 0.1% of the loss
FEWEST_POINTS = 6  # one more than coefficients
VANISHING = 1e-6  # of the loss, everywhere: a term that small is none
# Condition number of the matrix of squares over logs of coefficients, each scaled to 1. Grids and IsoFLOP designs of some budgets
# have 1e3 to 2e4; a single budget has 1e6 or more, D in proportion to N 1e11: there another law fits as well.
WORST_CONDITION = 1e6
# Of the bootstrap, chosen by the coverage of 90% intervals over 500 seeds each: 72 points of nine budgets, 20 points of four.
KERNEL = 1.8  # twice Silverman's factor
TAKEN = 7.5  # residuals' worth of freedom: more than five, since the sum passes through points as well
# Starts: shares of the least loss that are E, shares of the rest that are the N-term, and exponents beyond any published. From a
# tenth on, a term of a ten-thousandth of the loss is not found: its starts lie in the valley of another law.
_SHARES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
_EXPONENTS = np.geomspace(0.05, 2.0, 9)
POLISHED = 50  # the best starts; a fit of 240 points takes 0.1 s with all of them


class Options(NamedTuple):
    """Which sum is minimised."""

    delta: float = DELTA
    """Toward 0: least absolute deviations."""
    asymmetry: float = 0.5
    """Above 0.5 measurements above the law weigh more than those below, so that it rises towards them."""


class Fit(NamedTuple):
    """One fitted law."""

    coefficients: Array
    """E, A, alpha, B, beta."""
    objective: float
    status: Status
    detail: str
    """Which coefficient is at a bound or not determined, and what would help; empty where converged."""
    condition: float
    starts: int
    seconds: float
    residuals: Array
    """log(measured / fitted), (n,)."""

    def loss(self, parameters: Array, tokens: Array) -> Array:
        """Nats per token."""
        return loss_of(self.coefficients, parameters, tokens)


def loss_of(coefficients: Array, parameters: Array, tokens: Array) -> Array:
    """L of coefficients (..., 5) whose leading axes broadcast against N and D."""
    e, a, alpha, b, beta = np.moveaxis(coefficients, -1, 0)
    loss: Array = e + a / parameters**alpha + b / tokens**beta
    return loss


def optimum(coefficients: Array, flops: Array) -> tuple[Array, Array]:
    """N and D of least loss at C = 6 N D (Hoffmann et al. 2022, equation 4); coefficients (..., 5)."""
    _, a, alpha, b, beta = np.moveaxis(coefficients, -1, 0)
    n: Array = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    return n, flops / 6 / n


def fit_parametric(points: Points, options: Options | None = None) -> Fit:
    """The law of least objective over all starts. Raises `UserError` for too few points."""
    started = time.perf_counter()
    require_enough(points)
    problem, starts = problem_of(points, options or Options()), _starts(points)
    order = np.argsort(objective(starts, problem))[:POLISHED]
    solution = minimise(starts[order], problem)
    return _fit(points, problem, solution, len(starts), started)


def fit_least_absolute(points: Points) -> Fit:
    """The limit of small delta: the sum of |log residuals|, which Besiroglu et al. 2024 published; `objective` is that sum."""
    started = time.perf_counter()
    require_enough(points)
    problem, theta = problem_of(points, Options()), _starts(points)
    theta = theta[np.argsort(objective(theta, problem))[:POLISHED]]
    for delta in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):  # each solution lies near the next
        problem = problem._replace(delta=delta)
        solution = minimise(theta, problem)
        theta = solution.theta
    fit = _fit(points, problem, solution, len(theta), started)
    return fit._replace(objective=float(points.weights @ np.abs(fit.residuals)))


def fit_squares(points: Points) -> Fit:
    """Least squares of the loss itself by variable projection: E, A and B follow from alpha and beta by a linear problem.

    Golub and Pereyra 1973; E, A and B are kept from below zero by non-negative least squares.
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
    problem = problem_of(points, Options(delta=1e9))
    solution = Solution(theta, np.array([2 * found.cost]), np.array([found.status > 0]))
    return _fit(points, problem, solution, len(starts), started)


def resample(points: Points, fit: Fit, options: Options, resamples: int, seed: int) -> Array:
    """Coefficients refitted to resampled runs, (k, 5), k <= resamples: refits that end at a bound are left out.

    Each run keeps its N and D and is given the law's loss times another run's residual, drawn with replacement (the bootstrap of
    regression, Efron 1979); drawing whole runs instead breaks designs of few runs apart. A sum close to absolute deviations
    passes through points, so residuals are smoothed (De Angelis, Hall and Young 1993) and widened for what the coefficients took
    of them. How often the intervals then hold the truth is measured in `tests/scaling/test_coverage.py`.
    """
    generator, count = np.random.default_rng(seed), len(fit.residuals)
    spread, kernel = fit.residuals.std(), KERNEL * count**-0.2  # in standard deviations; Silverman 1986, equation 3.31
    drawn = generator.choice(fit.residuals - fit.residuals.mean(), (resamples, count))
    drawn = (drawn + generator.normal(0, kernel * spread, drawn.shape)) / np.hypot(1, kernel)
    drawn *= np.sqrt(count / max(1.0, count - TAKEN))
    problem, theta = problem_of(points, options), _theta(fit.coefficients, points)
    refitted = np.log(fit.loss(points.parameters, points.tokens)) + drawn
    solution = minimise(np.repeat(theta[None], resamples, axis=0), problem._replace(log_loss=refitted))
    inside = np.abs(solution.theta - theta).max(axis=1) < 10  # further off, a term has vanished or an exponent run away
    return _coefficients(solution.theta[solution.converged & inside], points)


def require_enough(points: Points) -> None:
    """Refuse fewer runs than determine five coefficients, or runs that differ in N alone or in D alone."""
    if len(points.loss) < FEWEST_POINTS:
        raise UserError(
            f"{len(points.loss)} points cannot determine 5 coefficients; at least {FEWEST_POINTS} are needed, add runs"
        )
    for name, values in (("N (parameters)", points.parameters), ("D (tokens)", points.tokens)):
        if len(np.unique(values)) < 3:
            raise UserError(
                f"{name} takes {len(np.unique(values))} value(s), {values.min():.4g} to {values.max():.4g}: a power of it and a"
                " constant cannot be told apart below 3; add runs that differ in it"
            )


def problem_of(points: Points, options: Options) -> Problem:
    """The points as the solver takes them."""
    return Problem(*_centered(points), np.log(points.loss), points.weights, options.delta, options.asymmetry)


def _centered(points: Points) -> tuple[Array, Array]:
    x, y = np.log(points.parameters), np.log(points.tokens)
    return x - x.mean(), y - y.mean()


def _starts(points: Points) -> Array:
    """A grid over E, the split of the rest and both exponents; (3969, 5). In centred terms every start passes near the points."""
    e, split, alpha, beta = np.array(list(product(_SHARES, _SHARES, _EXPONENTS, _EXPONENTS))).T
    level = e * points.loss.min()
    rest = np.exp(np.log(points.loss).mean()) - level
    return np.log([level, rest * split, alpha, rest * (1 - split), beta]).T


def _coefficients(theta: Array, points: Points) -> Array:
    """E, A, alpha, B, beta of centred logs."""
    alpha, beta = np.exp(theta[..., 2]), np.exp(theta[..., 4])
    log_a = theta[..., 1] + alpha * np.log(points.parameters).mean()
    log_b = theta[..., 3] + beta * np.log(points.tokens).mean()
    return np.stack([np.exp(theta[..., 0]), np.exp(log_a), alpha, np.exp(log_b), beta], axis=-1)


def _theta(coefficients: Array, points: Points) -> Array:
    e, a, alpha, b, beta = coefficients
    log_n, log_d = np.log(points.parameters).mean(), np.log(points.tokens).mean()
    return np.array([np.log(e), np.log(a) - alpha * log_n, np.log(alpha), np.log(b) - beta * log_d, np.log(beta)])


def _fit(points: Points, problem: Problem, solution: Solution, starts: int, started: float) -> Fit:
    best = int(np.argmin(solution.objective))
    theta = solution.theta[best : best + 1]
    condition = _condition(theta, problem)
    status, detail = _status(theta, problem, bool(solution.converged[best]), condition)
    residuals = problem.log_loss - terms(theta, problem.x, problem.y)[0][0]
    value = float(solution.objective[best])
    return Fit(
        _coefficients(theta[0], points), value, status, detail, condition, starts, time.perf_counter() - started, residuals
    )


def _condition(theta: Array, problem: Problem) -> float:
    """Of the matrix of squares, whatever the residuals: how well the design tells the coefficients apart."""
    matrix = derivatives(theta, problem._replace(delta=1e9))[3][0]
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
