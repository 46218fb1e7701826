"""All methods on the same points: each method's numbers, and how well they predict the largest budget from the smaller ones."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from isoflop.scaling import envelope, isoflop, parametric
from isoflop.scaling.measured import Measured
from isoflop.scaling.options import FitOptions
from isoflop.scaling.parametric import NAMES, ParametricFit
from isoflop.scaling.points import Array, Curve, Points
from isoflop.scaling.powers import Minimum, interval, linear_line, log_line, optima_by_name, power_laws, summarize_power_laws
from isoflop.scaling.repeated import fit_repeated
from isoflop.scaling.report import (
    NOT_FITTED,
    FitReport,
    HeldOutBudget,
    HeldOutRun,
    HeldOutSize,
    Least,
    LeastSum,
    Parametric,
    PowerLaw,
    Profile,
    Ranges,
)
from isoflop.scaling.result import Fit
from isoflop.scaling.single import fit_single
from isoflop.utils.errors import UserError

ODD_DEVIATIONS, ODD_AT_LEAST = 5, 0.01  # standard deviations, and log loss: residuals above both are reported


def fit_laws(measured: Measured, options: FitOptions) -> Fit:
    """Fit every method. Raises `UserError` for too few points; a method that they do not suit is "not fitted", with a reason."""
    points = measured.points
    fit = parametric.fit_parametric(points, options.objective)
    started = time.perf_counter()
    draws = _draws(points, fit, options)
    law = _parametric(fit, draws, options) | {"bootstrap_seconds": time.perf_counter() - started}
    found = isoflop.profiles(points)
    least_log, least_linear = _least_points(found, options)
    report = FitReport(
        predict=list(options.predict),
        points=_ranges(points, found),
        warnings=measured.warnings + _warnings(found, fit),
        parametric=Parametric(**law),
        parametric_lad=LeastSum(**_coefficients(parametric.fit_least_absolute(points))),
        parametric_square=LeastSum(**_coefficients(parametric.fit_squares(points))),
        isoflop=_isoflop(found, options),
        argmin_log=least_log,
        argmin_linear=least_linear,
        envelope=_envelope(measured.curves, options),
        kaplan=fit_single(points),
        repeated=fit_repeated(points, options.objective),
        leave_largest_out=_leave_largest_out(points, found, options),
    )
    return Fit(measured, report, draws, fit.residuals)


def _ranges(points: Points, found: list[isoflop.Profile]) -> Ranges:
    n, d, c = ((float(values.min()), float(values.max())) for values in points[:3])
    return Ranges(count=len(points.loss), parameters=n, tokens=d, flops=c, budgets=[profile.flops for profile in found])


def _draws(points: Points, fit: ParametricFit, options: FitOptions) -> Array:
    """Resampled coefficients; none if the fit is no law."""
    if fit.status != "converged":
        return np.empty((0, len(NAMES)))
    return parametric.bootstrap(points, fit, options.objective, options.resamples, options.seed)


def _coefficients(fit: ParametricFit) -> dict[str, Any]:
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


def _parametric(fit: ParametricFit, draws: Array, options: FitOptions) -> dict[str, Any]:
    alpha, beta = draws[:, 2], draws[:, 4]
    optima = [(*(at := parametric.optimum(fit.coefficients, np.array(c))), fit.loss(*at)) for c in options.predict]
    if not len(draws):
        return {**_coefficients(fit), "resamples": 0, "intervals": None, **optima_by_name(optima, None)}
    drawn = [(*(at := parametric.optimum(draws, np.array(c))), parametric.loss_of(draws, *at)) for c in options.predict]
    return {
        **_coefficients(fit),
        "resamples": len(draws),
        "intervals": {name: interval(values) for name, values in zip(NAMES, draws.T, strict=True)}
        | {"exponent_n": interval(beta / (alpha + beta)), "exponent_d": interval(alpha / (alpha + beta))},
        **optima_by_name(optima, drawn),
    }


def _isoflop(found: list[isoflop.Profile], options: FitOptions) -> PowerLaw:
    laws, profiles = isoflop.laws_of(found), [_profile(profile) for profile in found]
    if laws is None:
        reason = (
            f"{sum(profile.used for profile in profiles)} of {len(found)} budgets have a minimum within their sizes, and two are"
            " needed"
        )
        return PowerLaw(status=NOT_FITTED, reason=reason, profiles=profiles)
    drawn = isoflop.resample_profiles(found, options.resamples, options.seed)
    return PowerLaw(status="converged", **summarize_power_laws(laws, options.predict, drawn), profiles=profiles)


def _profile(profile: isoflop.Profile) -> Profile:
    minimum = profile.minimum
    return Profile(
        flops=profile.flops,
        points=len(profile.points.loss),
        used=minimum is not None,
        reason=profile.reason or None,
        polynomial=None if profile.polynomial is None else [float(c) for c in profile.polynomial],
        n_opt=minimum and minimum.parameters,
        d_opt=minimum and minimum.tokens,
        loss=minimum and minimum.loss,
    )


def _least_points(found: list[isoflop.Profile], options: FitOptions) -> tuple[PowerLaw, PowerLaw]:
    """Return the line through the least losses in logs, and the one in linear space."""
    best = isoflop.least(found)
    if len(best) < 2:
        none = PowerLaw(status=NOT_FITTED, reason=f"{len(best)} budgets with several sizes, and a line needs two")
        return none, none
    flops, parameters, losses = np.array(best).T
    log, linear = (
        PowerLaw(
            status="converged",
            **summarize_power_laws(power_laws(flops, parameters, losses, line), options.predict),
            points=_least(best),
        )
        for line in (log_line, linear_line)
    )
    return log, linear


def _envelope(curves: list[Curve], options: FitOptions) -> PowerLaw:
    found = envelope.fit_envelope(curves, min(options.resamples, envelope.RESAMPLES), options.seed)
    if isinstance(found, str):
        return PowerLaw(status=NOT_FITTED, reason=found)
    shown = _least(found.minima[:: max(1, len(found.minima) // 100)])
    return PowerLaw(status="converged", **summarize_power_laws(found.laws, options.predict, found.drawn), points=shown)


def _least(minima: list[Minimum]) -> list[Least]:
    return [Least(flops=one.flops, parameters=one.parameters, loss=one.loss) for one in minima]


def _leave_largest_out(points: Points, found: list[isoflop.Profile], options: FitOptions) -> HeldOutBudget:
    """Predict each run of the largest budget from the cheaper runs; and its best N, if both have one.

    The largest budget is that of the IsoFLOP groups; without groups, it is all runs above half of the largest run's FLOPs.
    """
    top = found[-1].points.flops.min() if found and found[-1].points.flops.max() == points.flops.max() else points.flops.max() / 2
    largest = points.flops >= top * (1 - 1e-9)
    below = points.take(~largest)
    try:
        fit = parametric.fit_parametric(below, options.objective)
    except UserError as error:
        return HeldOutBudget(status=NOT_FITTED, reason=f"without the largest budget: {error}")
    draws = _draws(below, fit, options)
    if not len(draws):
        return HeldOutBudget(status=NOT_FITTED, reason=f"without the largest budget the fit is {fit.status}: {fit.detail}")
    runs = [_held_out_run(run, fit, draws) for run in map(points.take, np.flatnonzero(largest))]
    return HeldOutBudget(
        status=fit.status,
        fitted_up_to=float(below.flops.max()),
        fitted_points=len(below.loss),
        runs=runs,
        inside=sum(run.inside for run in runs) / len(runs),
        mean_absolute_error=float(np.mean([abs(run.error) for run in runs])),
        n_opt=_held_out_size(found, options),
    )


def _held_out_size(found: list[isoflop.Profile], options: FitOptions) -> HeldOutSize | None:
    if not (laws := isoflop.laws_of(found[:-1])) or not (minimum := found[-1].minimum):
        return None
    drawn = isoflop.resample_profiles(found[:-1], options.resamples, options.seed).at(minimum.flops)[0]
    predicted, measured = float(laws.at(minimum.flops)[0][0]), minimum.parameters
    error = predicted / measured - 1
    return HeldOutSize(flops=minimum.flops, measured=measured, predicted=predicted, interval=interval(drawn), error=error)


def _held_out_run(run: Points, fit: ParametricFit, draws: Array) -> HeldOutRun:
    """Predict a run's loss; its interval is that of a single run: the law's draws times the residuals of single runs."""
    n, d, c, loss = (float(np.ravel(values)[0]) for values in run[:4])
    predicted = float(fit.loss(np.array(n), np.array(d)))
    low, high = interval(np.outer(parametric.loss_of(draws, np.array(n), np.array(d)), np.exp(fit.residuals)))
    return HeldOutRun(
        flops=c, parameters=n, tokens=d, measured=loss, predicted=predicted, interval=[low, high], error=predicted / loss - 1,
        inside=low <= loss <= high,
    )  # fmt: skip


def _warnings(found: list[isoflop.Profile], fit: ParametricFit) -> list[str]:
    left_out = [
        f"budget {profile.flops:.3g} FLOPs is left out of the parabolas: {profile.reason}" for profile in found if profile.reason
    ]
    spread = float(np.median(np.abs(fit.residuals))) / 0.6745  # a normal distribution's standard deviation, robust to outliers
    odd = [
        f"point {i + 1} lies {np.expm1(fit.residuals[i]):+.1%} from the law, over {ODD_DEVIATIONS} times the others' spread:"
        " look at it"
        for i in np.flatnonzero(np.abs(fit.residuals) > max(ODD_DEVIATIONS * spread, ODD_AT_LEAST))
    ]
    return left_out + odd
