"""Damped Newton solver for batches of fits of L = E + A/N^alpha + B/D^beta, each a sum of Huber losses of log loss.

The same solver refines the starts of a fit and solves all resamples of a bootstrap: each is a row of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from isoflop.scaling.points import Array, Indices

DELTA = 1e-3  # Hoffmann et al. 2022, equation 3: in log loss, so about 0.1% of the loss
TOLERANCE = 1e-13  # predicted decrease of the next step, relative to the objective
VANISHED = 1e-26  # a sum of squared log losses that equals zero in double precision
MAX_STEPS = 400
LONGEST = 2.0  # largest change of a log coefficient per step: a factor of 7


class Objective(NamedTuple):
    """The sum that is minimised."""

    delta: float = DELTA
    """Threshold of the Huber loss; toward 0 the fit is one of least absolute deviations."""
    asymmetry: float = 0.5
    """Weight of measurements above the law, those below weigh 1 - asymmetry; above 0.5 the law moves up."""


class Problem(NamedTuple):
    """A batch of fits to the same N and D."""

    x: Array
    """(n,) log N, less its mean."""
    y: Array
    """(n,) log D, less its mean."""
    log_loss: Array
    """(n,), or (batch, n) if each fit has its own."""
    weights: Array
    """(n,) or (batch, n)."""
    delta: float
    """Threshold between the square and the line of the Huber loss, in log loss."""
    asymmetry: float
    """Weight of measurements above the law; those below weigh 1 - asymmetry, as in quantile regression."""


class Solution(NamedTuple):
    """A batch of solved fits.

    theta (batch, 5) = log E, log of the N-term at mean log N, log alpha, log of the D-term at mean log D, log beta.
    """

    theta: Array
    objective: Array
    converged: Array


def terms(theta: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Return log of the predicted loss, (batch, n), and each term's share of the loss, (batch, n, 3)."""
    e, a, s, b, t = (theta[:, i, None] for i in range(5))
    logs = np.stack(np.broadcast_arrays(e + 0 * x, a - np.exp(s) * x, b - np.exp(t) * y), axis=-1)
    top = logs.max(axis=-1, keepdims=True)
    powers = np.exp(logs - top)
    total = powers.sum(axis=-1, keepdims=True)
    return (top + np.log(total))[..., 0], powers / total


def objective(theta: Array, problem: Problem) -> Array:
    """Return the sum of weighted Huber losses, (batch,)."""
    residual = terms(theta, problem.x, problem.y)[0] - problem.log_loss
    total: Array = (_weights(residual, problem) * huber(residual, problem.delta)).sum(axis=-1)
    return total


def huber(residual: Array, delta: float) -> Array:
    """Return half the square up to delta, and a line beyond (Huber 1964)."""
    size = np.abs(residual)
    return np.where(size <= delta, residual**2 / 2, delta * (size - delta / 2))


def _weights(residual: Array, problem: Problem) -> Array:
    side = np.where(residual < 0, problem.asymmetry, 1 - problem.asymmetry)  # below 0 the measurement lies above the law
    return 2 * side * problem.weights


def derivatives(theta: Array, problem: Problem) -> tuple[Array, Array, Array, Array]:
    """Return objective (batch,), gradient (batch, 5), Hessian (batch, 5, 5) and the Gauss-Newton matrix of a majoriser.

    The majoriser is that of iteratively reweighted least squares: positive definite, and at least as curved as the objective.
    """
    predicted, shares = terms(theta, problem.x, problem.y)
    residual = predicted - problem.log_loss
    weights = _weights(residual, problem)
    slope = np.clip(residual, -problem.delta, problem.delta)
    value = (weights * huber(residual, problem.delta)).sum(axis=-1)
    in_n, in_d = -np.exp(theta[:, 2, None]) * problem.x, -np.exp(theta[:, 4, None]) * problem.y  # d log-term / d log exponent
    p0, p1, p2 = (shares[..., k] for k in range(3))
    jacobian = np.stack([p0, p1, p1 * in_n, p2, p2 * in_d], axis=-1)  # (batch, n, 5)
    pull = weights * slope
    gradient = np.einsum("bn,bni->bi", pull, jacobian)
    within = weights * (np.abs(residual) <= problem.delta)
    hessian = _outer(within - pull, jacobian)
    for first, share, inner in ((0, p0, None), (1, p1, in_n), (3, p2, in_d)):
        hessian[:, first, first] += (pull * share).sum(axis=-1)
        if inner is not None:
            hessian[:, first, first + 1] += (pull * share * inner).sum(axis=-1)
            hessian[:, first + 1, first] += (pull * share * inner).sum(axis=-1)
            hessian[:, first + 1, first + 1] += (pull * share * (inner**2 + inner)).sum(axis=-1)
    reweighted = weights * problem.delta / np.maximum(np.abs(residual), problem.delta)
    return value, gradient, hessian, _outer(reweighted, jacobian)


def _outer(weights: Array, jacobian: Array) -> Array:
    product: Array = np.matmul((weights[..., None] * jacobian).swapaxes(1, 2), jacobian)
    return product


def minimise(theta: Array, problem: Problem) -> Solution:
    """Minimise by Newton steps on H + damping x Gauss-Newton; each fit's damping falls after a step that gains, else rises."""
    theta, count = theta.copy(), len(theta)
    damping, converged = np.ones(count), np.zeros(count, dtype=bool)
    value, active = np.empty(count), np.arange(count)
    for _ in range(MAX_STEPS):
        part = _rows(problem, active)
        value[active], gradient, hessian, majoriser = derivatives(theta[active], part)
        step, gain = _step(gradient, hessian, majoriser, damping[active])
        there = (gain <= TOLERANCE * value[active]) | (value[active] <= VANISHED)
        converged[active[there]] = True
        active, step = active[~there], step[~there]
        if not len(active):
            break
        tried = theta[active] + step
        better = objective(tried, _rows(problem, active)) < value[active]
        theta[active[better]] = tried[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 5, 1e-8), damping[active] * 4)
        stuck = damping[active] > 1e12  # no step gains: the objective is at its rounding error
        converged[active[stuck]] = True
        active = active[~stuck]
    return Solution(theta, value, converged)


def _rows(problem: Problem, active: Indices) -> Problem:
    own = {
        name: values[active]
        for name in ("log_loss", "weights")
        if (values := getattr(problem, name)).ndim == 2 and len(values) > 1
    }
    return problem._replace(**own)


def _step(gradient: Array, hessian: Array, majoriser: Array, damping: Array) -> tuple[Array, Array]:
    """Return each fit's step and the decrease that the majoriser predicts; the Hessian is used only if it leads downhill."""
    diagonal = np.einsum("bii->bi", majoriser)
    scale = 1 / np.sqrt(np.maximum(diagonal, 1e-30 * diagonal.max(axis=-1, keepdims=True) + 1e-300))
    scaled = majoriser * scale[:, :, None] * scale[:, None, :] + 1e-13 * np.eye(5)
    curved = hessian * scale[:, :, None] * scale[:, None, :]
    g = gradient * scale
    damped = curved + damping[:, None, None] * scaled
    spectrum = np.linalg.eigvalsh(damped)
    downhill = spectrum[:, 0] > 1e-12 * np.maximum(1, spectrum[:, -1])
    matrix = np.where(downhill[:, None, None], damped, (1 + damping)[:, None, None] * scaled)
    step = -np.linalg.solve(matrix, g[..., None])[..., 0]
    gain = 0.5 * np.einsum("bi,bi->b", g, np.linalg.solve(scaled, g[..., None])[..., 0])
    step *= scale
    longest = np.abs(step).max(axis=-1, keepdims=True)
    return step * np.minimum(1, LONGEST / np.maximum(longest, 1e-300)), gain
