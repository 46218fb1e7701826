"""The report of a fit as text: methods side by side, coefficients, budgets, predictions, what was left out, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from isoflop.fit.verdict import verdict

Numbers = dict[str, Any]
Make = Callable[[list[str], list[list[str]]], str]
METHODS = {
    "parametric": "parametric law",
    "parametric_lad": "parametric, least absolute deviations",
    "parametric_square": "parametric, least squares of the loss",
    "isoflop": "IsoFLOP parabolas",
    "argmin_log": "least-loss points, line in logs",
    "argmin_linear": "least-loss points, k C^a in linear space",
    "envelope": "envelope of the losses on the way",
}
COEFFICIENTS = ("E", "A", "alpha", "B", "beta")
SCALES = ((1e15, ""), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def page(numbers: Numbers, notes: list[str], make: Make) -> str:
    """The whole report, its tables made by `make`."""
    points = numbers["points"]
    parts = [
        f"{points['count']} points: N {_span(points['parameters'])}, D {_span(points['tokens'])},"
        f" C {points['flops'][0]:.3g} to {points['flops'][1]:.3g} FLOPs. Intervals hold 90%.",
        methods(numbers, make),
        coefficients(numbers["parametric"], make),
        budgets(numbers, make),
        predictions(numbers, make),
        left_out(numbers["leave_largest_out"], make),
        single_laws(numbers["kaplan"], make),
        repeated(numbers["repeated"]),
        "\n".join([*(f"* note: {note}" for note in notes), *(f"* warning: {warning}" for warning in numbers["warnings"])]),
        verdict(numbers),
    ]
    return "\n\n".join(part for part in parts if part)


def methods(numbers: Numbers, make: Make) -> str:
    """Exponents of each method, and why some have none."""
    rows, reasons = [], []
    for key, label in METHODS.items():
        found = numbers[key]
        exponents = [_with_interval(found, name, ".4f") for name in ("exponent_n", "exponent_d")]
        rows.append([label, *exponents, found["status"].replace("_", " ")])
        if why := found.get("reason") or found.get("detail"):
            reasons.append(f"* {label}: {why}")
    return _blocks(make(["method", "a in N ~ C^a", "b in D ~ C^b", "status"], rows), reasons)


def coefficients(fit: Numbers, make: Make) -> str:
    """The parametric law's coefficients, and how they were found."""
    intervals = fit["intervals"]  # None of what is no law
    rows = [[name, f"{fit[name]:.6g}", _interval(intervals[name], ".4g") if intervals else "-"] for name in COEFFICIENTS]
    return (
        f"loss = E + A / N^alpha + B / D^beta\n\n{make(['coefficient', 'value', '90% interval'], rows)}\n\n"
        f"points lie {fit['residual_std']:.2%} (standard deviation) from the fit; objective {fit['objective']:.6g}, best of"
        f" {fit['starts']:,} starts in {fit['seconds']:.2f} s; {fit['resamples']:,} resamples in"
        f" {fit['bootstrap_seconds']:.1f} s; condition number {fit['condition']:.2g}"
    )


def budgets(numbers: Numbers, make: Make) -> str:
    """Each budget's parabola, used or not."""
    rows = [
        [
            f"{profile['flops']:.3g}",
            str(profile["points"]),
            *(_or_dash(profile[key], short) for key in ("n_opt", "d_opt")),
            _or_dash(profile["loss"], "{:.4f}".format),
            "yes" if profile["used"] else f"no: {profile['reason']}",
        ]
        for profile in numbers["isoflop"].get("profiles", [])
    ]
    header = ["budget (FLOPs)", "points", "N at the least loss", "D", "loss", "used"]
    return make(header, rows) if rows else ""


def predictions(numbers: Numbers, make: Make) -> str:
    """The least loss that each method sees at the budgets asked for, and where."""
    rows = []
    for i, flops in enumerate(numbers["predict"]):
        for key, label in METHODS.items():
            found = numbers[key]
            if "n_opt" in found and found["status"] == "converged":
                rows.append([f"{flops:.3g}", label, *(_predicted(found, name, i) for name in ("n_opt", "d_opt", "loss"))])
    return make(["at C (FLOPs)", "method", "N", "D", "loss"], rows) if rows else ""


def _predicted(found: Numbers, name: str, i: int) -> str:
    value, form = found[name][i], ".4f" if name == "loss" else ""
    interval = f" {_interval(found[f'{name}_interval'][i], form)}" if f"{name}_interval" in found else ""
    return (f"{value:{form}}" if form else short(value)) + interval


def left_out(found: Numbers, make: Make) -> str:
    """What fits that did not see the largest budget predict of it."""
    if "runs" not in found:
        return f"largest budget left out: {found['status']}: {found['reason']}"
    rows = [
        [
            f"{row['flops']:.3g}",
            *(short(row[key]) for key in ("parameters", "tokens")),
            *(f"{row[key]:.4f}" for key in ("measured", "predicted")),
            _interval(row["interval"], ".4f"),
            f"{row['error']:+.2%}",
            "yes" if row["inside"] else "no",
        ]
        for row in found["runs"]
    ]
    told = make(["C (FLOPs)", "N", "D", "measured", "predicted", "90% of such runs", "error", "inside"], rows)
    lines = [
        f"Largest budget left out: predicted by a fit of {found['fitted_points']} points up to {found['fitted_up_to']:.3g} FLOPs",
        told,
    ]
    if size := found["n_opt"]:
        lines.append(
            f"its best size: {short(size['predicted'])} {_interval(size['interval'], '')} by the smaller budgets' parabolas,"
            f" {short(size['measured'])} by its own ({size['error']:+.1%})"
        )
    return "\n\n".join(lines)


def single_laws(found: Numbers, make: Make) -> str:
    """Kaplan et al. 2020, equations 1.1 to 1.3."""
    rows, reasons = [], []
    for x, law in found.items():
        if "exponent" in law:
            rows.append(
                [
                    f"(X_c / {x})^a",
                    f"{law['exponent']:.4f}",
                    f"{law['scale']:.4g}",
                    f"{law['residual_std']:.2%}",
                    str(law["points"]),
                ]
            )
        else:
            reasons.append(f"* loss as a power of {x} alone: {law['status']}: {law['reason']}")
    return _blocks(make(["loss as", "a", "X_c", "residual", "points"], rows) if rows else "", reasons)


def repeated(found: Numbers) -> str:
    """What repeated tokens are worth."""
    if "r_star" not in found:
        return f"repeated tokens (R* of Muennighoff et al. 2023): {found['status']}: {found['reason']}"
    return f"repeated tokens: R* = {found['r_star']:.4g} ({found['status']}; Muennighoff et al. 2023 give 15.39)"


def short(value: float) -> str:
    """A count in three digits: 91.9B."""
    value = float(f"{value:.3g}")  # 999.6e6 is 1B
    scale, unit = next(((s, u) for s, u in SCALES if value >= s), (1.0, ""))
    return f"{value / scale:.3g}{unit}" if unit else f"{value:.3g}"


def _blocks(table: str, lines: list[str]) -> str:
    return "\n\n".join(part for part in (table, "\n".join(lines)) if part)


def _or_dash(value: float | None, shown: Callable[[float], str]) -> str:
    return "-" if value is None else shown(value)


def _span(bounds: Iterable[float]) -> str:
    return " to ".join(short(value) for value in bounds)


def _interval(bounds: list[float], form: str) -> str:
    """`[low, high]`; as counts where `form` is empty."""
    return f"[{', '.join(f'{value:{form}}' if form else short(value) for value in bounds)}]"


def _with_interval(found: Numbers, name: str, form: str) -> str:
    if name not in found:
        return "-"
    interval = (found.get("intervals") or {}).get(name)
    return f"{found[name]:{form}}" + (f" {_interval(interval, form)}" if interval else "")
