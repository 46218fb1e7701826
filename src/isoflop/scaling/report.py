"""All approaches on the same points: what each says, and how much of it to believe."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from isoflop.errors import UserError
from isoflop.scaling import envelope, isoflop, parametric
from isoflop.scaling.parametric import NAMES, Fit
from isoflop.scaling.points import Array, Curve, Points
from isoflop.scaling.powers import Minimum, interval, linear_line, log_line, power_laws, predictions, told
from isoflop.scaling.repeated import fit_repeated
from isoflop.scaling.single import fit_single

FAR, FAR_AT_LEAST = 5, 0.01  # standard deviations, and log loss: what is named as odd


class Options(NamedTuple):
    """What is asked of a fit."""

    resamples: int = 1000
    seed: int = 0
    predict: tuple[float, ...] = ()
    """Budgets in FLOPs."""
    delta: float = parametric.DELTA
    asymmetry: float = 0.5

    @property
    def sum(self) -> parametric.Options:
        """Which sum the parametric fit minimises."""
        return parametric.Options(self.delta, self.asymmetry)


class Report(NamedTuple):
    """`numbers` is all that is told, ready for JSON; the law's own arrays stand beside it."""

    numbers: dict[str, Any]
    draws: Array
    """Resampled coefficients, (k, 5) in the order of `NAMES`."""
    residuals: Array
    """log(measured / fitted) of the points."""


def fit_laws(points: Points, curves: list[Curve], options: Options) -> Report:
    """Every approach. Raises `UserError` for too few points; an approach that they do not suit is "not fitted", with a reason."""
    fit = parametric.fit_parametric(points, options.sum)
    started = time.perf_counter()
    draws = _draws(points, fit, options)
    law = _parametric(points, fit, draws, options) | {"bootstrap_seconds": time.perf_counter() - started}
    found = isoflop.profiles(points)
    numbers = {
        "predict": list(options.predict),
        "points": {
            "count": len(points.loss),
            **{
                name: [float(v.min()), float(v.max())]
                for name, v in zip(("parameters", "tokens", "flops"), points[:3], strict=True)
            },
            "budgets": [profile.flops for profile in found],
        },
        "warnings": _warnings(found, fit),
        "parametric": law,
        "parametric_lad": _coefficients(parametric.fit_least_absolute(points)),
        "parametric_square": _coefficients(parametric.fit_squares(points)),
        "isoflop": _isoflop(found, options),
        **_argmin(found, options),
        "envelope": _envelope(curves, options),
        "kaplan": fit_single(points),
        "repeated": fit_repeated(points, options.sum),
        "leave_largest_out": _leave_largest_out(points, found, options),
    }
    return Report(numbers, draws, fit.residuals)


def _draws(points: Points, fit: Fit, options: Options) -> Array:
    """Resampled coefficients; none of what is no law."""
    if fit.status != "converged":
        return np.empty((0, len(NAMES)))
    return parametric.resample(points, fit, options.sum, options.resamples, options.seed)


def _coefficients(fit: Fit) -> dict[str, Any]:
    alpha, beta = fit.coefficients[2], fit.coefficients[4]
    return {
        **dict(zip(NAMES, map(float, fit.coefficients), strict=True)),
        "exponent_n": float(beta / (alpha + beta)),
        "exponent_d": float(alpha / (alpha + beta)),
        "objective": fit.objective,
        "status": fit.status,
        "detail": fit.detail,
        "condition": fit.condition,
        "starts": fit.starts,
        "seconds": fit.seconds,
        "residual_std": float(fit.residuals.std()),
    }


def _parametric(points: Points, fit: Fit, draws: Array, options: Options) -> dict[str, Any]:
    alpha, beta = draws[:, 2], draws[:, 4]
    optima = [(*(at := parametric.optimum(fit.coefficients, np.array(c))), fit.loss(*at)) for c in options.predict]
    if not len(draws):
        return {**_coefficients(fit), "resamples": 0, "intervals": None, **predictions(optima, None)}
    drawn = [(*(at := parametric.optimum(draws, np.array(c))), parametric.loss_of(draws, *at)) for c in options.predict]
    return {
        **_coefficients(fit),
        "resamples": len(draws),
        "intervals": {name: interval(values) for name, values in zip(NAMES, draws.T, strict=True)}
        | {"exponent_n": interval(beta / (alpha + beta)), "exponent_d": interval(alpha / (alpha + beta))},
        **predictions(optima, drawn),
    }


def _isoflop(found: list[isoflop.Profile], options: Options) -> dict[str, Any]:
    laws = isoflop.laws_of(found)
    told_of = [
        {
            "flops": profile.flops,
            "points": len(profile.points.loss),
            "used": profile.minimum is not None,
            "reason": profile.reason or None,
            "polynomial": None if profile.polynomial is None else [float(c) for c in profile.polynomial],
            **_minimum(profile.minimum),
        }
        for profile in found
    ]
    if laws is None:
        used = sum(profile.minimum is not None for profile in found)
        reason = f"{used} of {len(found)} budgets have a minimum within their sizes, and two are needed"
        return {"status": "not fitted", "reason": reason, "profiles": told_of}
    drawn = isoflop.resample(found, options.resamples, options.seed)
    return {"status": "converged", **told(laws, options.predict, drawn), "profiles": told_of}


def _minimum(minimum: Minimum | None) -> dict[str, float | None]:
    if minimum is None:
        return {"n_opt": None, "d_opt": None, "loss": None}
    return {"n_opt": minimum.parameters, "d_opt": minimum.tokens, "loss": minimum.loss}


def _argmin(found: list[isoflop.Profile], options: Options) -> dict[str, Any]:
    best = isoflop.least(found)
    if len(best) < 2:
        not_fitted = {"status": "not fitted", "reason": f"{len(best)} budgets with several sizes, and a line needs two"}
        return {"argmin_log": not_fitted, "argmin_linear": not_fitted}
    flops, parameters, losses = np.array(best).T
    points = [{"flops": one.flops, "parameters": one.parameters, "loss": one.loss} for one in best]
    return {
        f"argmin_{name}": {
            "status": "converged",
            **told(power_laws(flops, parameters, losses, line), options.predict),
            "points": points,
        }
        for name, line in (("log", log_line), ("linear", linear_line))
    }


def _envelope(curves: list[Curve], options: Options) -> dict[str, Any]:
    found = envelope.fit_envelope(curves, min(options.resamples, envelope.RESAMPLES), options.seed)
    if isinstance(found, str):
        return {"status": "not fitted", "reason": found}
    shown = found.minima[:: max(1, len(found.minima) // 100)]
    points = [{"flops": one.flops, "parameters": one.parameters, "loss": one.loss} for one in shown]
    return {"status": "converged", **told(found.laws, options.predict, found.drawn), "points": points}


def _leave_largest_out(points: Points, found: list[isoflop.Profile], options: Options) -> dict[str, Any]:
    """Each run of the largest budget, predicted from the cheaper ones; and its best size, where both have one.

    The largest budget is the one of the IsoFLOP groups; where there are none, all runs above half of the largest run's FLOPs.
    """
    top = found[-1].points.flops.min() if found and found[-1].points.flops.max() == points.flops.max() else points.flops.max() / 2
    held = points.flops >= top * (1 - 1e-9)
    below = points.take(~held)
    try:
        fit = parametric.fit_parametric(below, options.sum)
    except UserError as error:
        return {"status": "not fitted", "reason": f"without the largest budget: {error}"}
    draws = _draws(below, fit, options)
    if not len(draws):
        return {"status": "not fitted", "reason": f"without the largest budget the fit is {fit.status}: {fit.detail}"}
    runs = [_held_out(run, fit, draws, options) for run in map(points.take, np.flatnonzero(held))]
    size = None
    if (laws := isoflop.laws_of(found[:-1])) and (minimum := found[-1].minimum):
        n = isoflop.resample(found[:-1], options.resamples, options.seed).at(minimum.flops)[0]
        predicted = float(laws.at(minimum.flops)[0][0])
        size = {
            "flops": minimum.flops, "measured": minimum.parameters, "predicted": predicted, "interval": interval(n),
            "error": predicted / minimum.parameters - 1,
        }  # fmt: skip
    return {
        "status": fit.status,
        "fitted_up_to": float(below.flops.max()),
        "fitted_points": len(below.loss),
        "runs": runs,
        "inside": sum(run["inside"] for run in runs) / len(runs),
        "mean_absolute_error": float(np.mean([abs(run["error"]) for run in runs])),
        "n_opt": size,
    }


def _held_out(run: Points, fit: Fit, draws: Array, options: Options) -> dict[str, Any]:
    """A run's loss beside its prediction; the interval is one of a run: the law's draws times residuals of single runs."""
    n, d, c, loss = (float(np.ravel(values)[0]) for values in run[:4])
    predicted = float(fit.loss(np.array(n), np.array(d)))
    low, high = interval(np.outer(parametric.loss_of(draws, np.array(n), np.array(d)), np.exp(fit.residuals)))
    return {
        "flops": c, "parameters": n, "tokens": d, "measured": loss, "predicted": predicted, "interval": [low, high],
        "error": predicted / loss - 1, "inside": low <= loss <= high,
    }  # fmt: skip


def _warnings(found: list[isoflop.Profile], fit: Fit) -> list[str]:
    left_out = [
        f"budget {profile.flops:.3g} FLOPs is left out of the parabolas: {profile.reason}" for profile in found if profile.reason
    ]
    spread = float(np.median(np.abs(fit.residuals))) / 0.6745  # the standard deviation, were it normal; odd points do not move it
    far = np.flatnonzero(np.abs(fit.residuals) > max(FAR * spread, FAR_AT_LEAST))
    odd = [
        f"point {i + 1} lies {np.expm1(fit.residuals[i]):+.1%} from the law, over {FAR} times the others' spread: look at it"
        for i in far
    ]
    return left_out + odd
