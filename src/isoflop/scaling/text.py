"""Text of a fit's report: methods, coefficients, budgets, predictions, held-out budget and verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from isoflop.scaling.hyperparameter_text import hyperparameters_text
from isoflop.scaling.laws import FittedOn
from isoflop.scaling.report import FitReport, HeldOutBudget, LeastSum, Parametric, PowerLaw, Repeated, SingleLaw
from isoflop.scaling.verdict import verdict_of
from isoflop.utils.tables import short

MakeTable = Callable[[list[str], list[list[str]]], str]
METHODS = {
    "parametric": "parametric law",
    "parametric_lad": "parametric, least absolute deviations",
    "parametric_square": "parametric, least squares of the loss",
    "isoflop": "IsoFLOP parabolas",
    "argmin_log": "least-loss points, line in logs",
    "argmin_linear": "least-loss points, k C^a in linear space",
    "envelope": "envelope of the loss curves",
}
COEFFICIENTS = ("E", "A", "alpha", "B", "beta")


def page_of(report: FitReport, notes: list[str], make_table: MakeTable) -> str:
    """Return the full report, with tables made by `make_table`."""
    points = report.points
    parts = [
        f"{points.count} points: N {_span(points.parameters)}, D {_span(points.tokens)},"
        f" C {points.flops[0]:.3g} to {points.flops[1]:.3g} FLOPs. Intervals hold 90%.",
        methods_text(report, make_table),
        coefficients_text(report.parametric, make_table),
        budgets_text(report, make_table),
        predictions_text(report, make_table),
        held_out_text(report.leave_largest_out, make_table),
        single_laws_text(report.kaplan, make_table),
        repeated_text(report.repeated),
        hyperparameters_text(report.hyperparameters, make_table) if report.hyperparameters else "",
        "\n".join([*(f"* note: {note}" for note in notes), *(f"* warning: {warning}" for warning in report.warnings)]),
        verdict_of(report),
    ]
    return "\n\n".join(part for part in parts if part)


def methods_text(report: FitReport, make_table: MakeTable) -> str:
    """Return each method's exponents, or why it has none."""
    rows, reasons = [], []
    for key, label in METHODS.items():
        method = getattr(report, key)
        exponents = [_exponent(method, name) for name in ("exponent_n", "exponent_d")]
        rows.append([label, *exponents, method.status.replace("_", " ")])
        if why := method.detail if isinstance(method, LeastSum) else method.reason:
            reasons.append(f"* {label}: {why}")
    return _blocks(make_table(["method", "a in N ~ C^a", "b in D ~ C^b", "status"], rows), reasons)


def _exponent(method: LeastSum | PowerLaw, name: str) -> str:
    value: float | None = getattr(method, name)
    if value is None:
        return "-"
    intervals = getattr(method, "intervals", None)  # least sums other than the parametric law have no bootstrap
    return f"{value:.4f}" + (f" {_interval(intervals[name], '.4f')}" if intervals else "")


def coefficients_text(fit: Parametric, make_table: MakeTable) -> str:
    """Return the parametric law's coefficients, and how they were found."""
    intervals = fit.intervals or {}
    rows = [
        [name, f"{value:.6g}", _interval(intervals[name], ".4g") if intervals else "-"]
        for name, value in zip(COEFFICIENTS, fit.coefficients, strict=True)
    ]
    return (
        f"loss = E + A / N^alpha + B / D^beta\n\n{make_table(['coefficient', 'value', '90% interval'], rows)}\n\n"
        f"points lie {fit.residual_std:.2%} (standard deviation) from the fit; objective {fit.objective:.6g}, best of"
        f" {fit.starts:,} starts in {fit.seconds:.2f} s; {fit.resamples:,} resamples in"
        f" {fit.bootstrap_seconds:.1f} s; condition number {fit.condition:.2g}"
    )


def budgets_text(report: FitReport, make_table: MakeTable) -> str:
    """Return each budget's parabola, and whether it is used."""
    rows = [
        [
            f"{profile.flops:.3g}",
            str(profile.points),
            _or_dash(profile.n_opt, short),
            _or_dash(profile.d_opt, short),
            _or_dash(profile.loss, "{:.4f}".format),
            "yes" if profile.used else f"no: {profile.reason}",
        ]
        for profile in report.isoflop.profiles
    ]
    header = ["budget (FLOPs)", "points", "N at the least loss", "D", "loss", "used"]
    return make_table(header, rows) if rows else ""


def predictions_text(report: FitReport, make_table: MakeTable) -> str:
    """Return N, D and least loss that each method predicts at the requested budgets."""
    rows, reasons = [], []
    fitted_on = FittedOn(parameters=report.points.parameters, tokens=report.points.tokens)
    for i, flops in enumerate(report.predict):
        for key, label in METHODS.items():
            method: LeastSum | PowerLaw = getattr(report, key)
            if type(method) is LeastSum or method.status != "converged":
                continue
            assert isinstance(method, Parametric | PowerLaw)
            if reason := fitted_on.far_beyond(method.n_opt[i], method.d_opt[i]):
                reasons.append(f"* {label} at {flops:.3g} FLOPs has no prediction: {reason}")
            else:
                rows.append([f"{flops:.3g}", label, *_prediction(method, i)])
    return _blocks(make_table(["at C (FLOPs)", "method", "N", "D", "loss"], rows) if rows else "", reasons)


def _prediction(method: Parametric | PowerLaw, i: int) -> list[str]:
    n, d, loss = short(method.n_opt[i]), short(method.d_opt[i]), f"{method.loss[i]:.4f}"
    if method.n_opt_interval and method.d_opt_interval and method.loss_interval:
        n += f" {_interval(method.n_opt_interval[i], '')}"
        d += f" {_interval(method.d_opt_interval[i], '')}"
        loss += f" {_interval(method.loss_interval[i], '.4f')}"
    return [n, d, loss]


def held_out_text(found: HeldOutBudget, make_table: MakeTable) -> str:
    """Return what a fit to the smaller budgets predicts of the largest one."""
    if not found.runs:
        return f"largest budget left out: {found.status}: {found.reason}"
    rows = [
        [
            f"{run.flops:.3g}",
            short(run.parameters),
            short(run.tokens),
            f"{run.measured:.4f}",
            f"{run.predicted:.4f}",
            _interval(run.interval, ".4f"),
            f"{run.error:+.2%}",
            "yes" if run.inside else "no",
        ]
        for run in found.runs
    ]
    lines = [
        f"Largest budget left out: predicted by a fit of {found.fitted_points} points up to {found.fitted_up_to:.3g} FLOPs",
        make_table(["C (FLOPs)", "N", "D", "measured", "predicted", "90% of such runs", "error", "inside"], rows),
    ]
    if size := found.n_opt:
        lines.append(
            f"its best size: {short(size.predicted)} {_interval(size.interval, '')} by the smaller budgets' parabolas,"
            f" {short(size.measured)} by its own ({size.error:+.1%})"
        )
    return "\n\n".join(lines)


def single_laws_text(found: dict[str, SingleLaw], make_table: MakeTable) -> str:
    """Return the laws of N, D or C alone."""
    rows, reasons = [], []
    for x, law in found.items():
        if law.exponent is None:
            reasons.append(f"* loss as a power of {x} alone: {law.status}: {law.reason}")
        else:
            numbers = [f"{law.exponent:.4f}", f"{law.scale:.4g}", f"{law.residual_std:.2%}", str(law.points)]
            rows.append([f"(X_c / {x})^a", *numbers])
    return _blocks(make_table(["loss as", "a", "X_c", "residual", "points"], rows) if rows else "", reasons)


def repeated_text(found: Repeated) -> str:
    """Return what repeated tokens are worth."""
    if found.r_star is None:
        return f"repeated tokens (R* of Muennighoff et al. 2023): {found.status}: {found.reason}"
    return f"repeated tokens: R* = {found.r_star:.4g} ({found.status}; Muennighoff et al. 2023 give 15.39)"


def _blocks(table: str, lines: list[str]) -> str:
    return "\n\n".join(part for part in (table, "\n".join(lines)) if part)


def _or_dash(value: float | None, shown: Callable[[float], str]) -> str:
    return "-" if value is None else shown(value)


def _span(bounds: Iterable[float]) -> str:
    return " to ".join(short(value) for value in bounds)


def _interval(bounds: list[float], form: str) -> str:
    """Return `[low, high]`; as counts if `form` is empty."""
    return f"[{', '.join(f'{value:{form}}' if form else short(value) for value in bounds)}]"
