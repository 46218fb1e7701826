"""A fit in the field's four pictures, and a table of every number in them.

IsoFLOP profiles (Hoffmann et al. 2022, figure 3), the optimum against compute, iso-loss contours (their figure 4), residuals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isoflop.fit.measured import Measured
from isoflop.scaling.laws import INTERVAL
from isoflop.scaling.parametric import loss_of, optimum
from isoflop.scaling.report import Report
from isoflop.tables import markdown

Array = NDArray[np.float64]
COEFFICIENTS = ("E", "A", "alpha", "B", "beta")
COLORS = {"parametric": "#1f4e8c", "isoflop": "#d1495b", "envelope": "#2e8b57", "argmin_log": "#999999"}
LABELS = {
    "parametric": "parametric law",
    "isoflop": "IsoFLOP parabolas",
    "envelope": "envelope",
    "argmin_log": "least-loss points",
}
GRID = 60  # steps of a line
LEVELS = 12  # contours


def draw(measured: Measured, report: Report, file: Path) -> None:
    """Draw the four panels into a PNG."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(14, 10.5), layout="constrained")
    panels = figure.subplots(2, 2)
    norm = matplotlib.colors.LogNorm(*_widened(measured.points.flops, 1.02))
    _draw_profiles(panels[0][0], measured, report.numbers, norm)
    _draw_optima(panels[0][1], measured, report)
    if _is_law(report.numbers):
        _draw_contours(panels[1][0], measured, report.numbers)
    else:
        _leave_empty(panels[1][0], f"No law: {report.numbers['parametric']['status'].replace('_', ' ')}")
    _draw_residuals(panels[1][1], measured, report, norm)
    figure.savefig(file, dpi=120)


def _leave_empty(axes: Any, why: str) -> None:
    axes.set_axis_off()
    axes.set_title(why)


def _draw_profiles(axes: Any, measured: Measured, numbers: dict[str, Any], norm: Any) -> None:
    """Loss against N; a colour a budget, its parabola, its minimum."""
    import matplotlib

    points, color = measured.points, matplotlib.colormaps["viridis"]
    shown = axes.scatter(points.parameters, points.loss, c=points.flops, norm=norm, cmap=color, s=18, zorder=3)
    profiles = numbers["isoflop"].get("profiles", [])
    for profile in profiles:
        at = _of_budget(points.flops, profiles, profile)
        if profile["polynomial"] is None or not at.any():
            continue
        sizes = np.geomspace(*_widened(points.parameters[at], 1.05), GRID)
        axes.plot(
            sizes, np.polyval(profile["polynomial"], np.log(sizes)), "-" if profile["used"] else ":", lw=1.2,
            color=color(norm(profile["flops"])),
        )  # fmt: skip
    used = [profile for profile in profiles if profile["used"]]
    axes.plot(
        [p["n_opt"] for p in used],
        [p["loss"] for p in used],
        "*",
        color="black",
        markersize=10,
        markeredgecolor="white",
        zorder=4,
        ls="none",
        label="least loss of the parabola",
    )
    axes.set(xscale="log", xlabel="N (parameters)", ylabel="loss (nats per token)", title="IsoFLOP profiles")
    if used:
        axes.legend(fontsize=8)
    axes.figure.colorbar(shown, ax=axes, label="C (FLOPs)", pad=0.01)
    axes.grid(alpha=0.3)


def _draw_optima(axes: Any, measured: Measured, report: Report) -> None:
    """N and D of least loss against C by each method: lines, the law's band, and the budgets' own minima."""
    numbers, flops = report.numbers, _flops(measured, report.numbers)
    if not (lines := _lines(numbers, flops)):
        _leave_empty(axes, "No method was fitted")
        return
    for method, sizes, tokens in lines:
        thin = 1.0 if method == "argmin_log" else 1.6
        above = 3 if method == "parametric" else 2
        axes.plot(flops, sizes, "-", color=COLORS[method], lw=thin, label=LABELS[method], zorder=above)
        axes.plot(flops, tokens, "--", color=COLORS[method], lw=thin, zorder=above)
    for low, high in _bands(report, flops).values():
        axes.fill_between(flops, low, high, color=COLORS["parametric"], alpha=0.2, linewidth=0)
    used = [profile for profile in numbers["isoflop"].get("profiles", []) if profile["used"]]
    axes.plot([p["flops"] for p in used], [p["n_opt"] for p in used], "o", color=COLORS["isoflop"], markersize=5)
    axes.plot([p["flops"] for p in used], [p["d_opt"] for p in used], "s", color=COLORS["isoflop"], markersize=5)
    axes.plot([], [], "ko-", label="N", markersize=5)
    axes.plot([], [], "ks--", label="D (tokens)", markersize=5)
    axes.axvline(measured.points.flops.max(), color="#555555", lw=0.8, ls=":", label="largest C measured")
    axes.set(xscale="log", yscale="log", xlabel="C (FLOPs)", ylabel="N, D", title="Size and tokens of least loss (band: 90%)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _draw_contours(axes: Any, measured: Measured, numbers: dict[str, Any]) -> None:
    """Lines of equal fitted loss over C and N, the frontier along their least C, and the points."""
    import matplotlib

    points, law = measured.points, _coefficients(numbers)
    spent = 6 * points.parameters * points.tokens
    flops = np.geomspace(*_widened(np.append(spent, numbers["predict"]), 1.3), GRID)
    sizes = np.geomspace(*_widened(np.append(points.parameters, optimum(law, flops)[0]), 1.3), GRID)
    axes.set(xscale="log", yscale="log", xlabel="6 N D (FLOPs)", ylabel="N (parameters)")  # contour labels are laid by the scales
    axes.set(xlim=flops[[0, -1]], ylim=sizes[[0, -1]], title="Loss by the parametric law (nats per token)")
    c, n = np.meshgrid(flops, sizes)
    losses = loss_of(law, n, c / 6 / n)
    above = losses.min() - law[0], points.loss.max() - law[0]
    levels = np.unique(np.round(law[0] + np.geomspace(*above, LEVELS), 2))
    norm = matplotlib.colors.LogNorm(above[0], 2 * above[1])
    lines = axes.contour(c, n, losses - law[0], levels=levels[levels > law[0]] - law[0], cmap="plasma", norm=norm, linewidths=1.0)
    axes.clabel(lines, fmt=lambda level: f"{level + law[0]:.2f}", fontsize=7)
    axes.plot(flops, optimum(law, flops)[0], color=COLORS["parametric"], lw=1.8, label="efficient frontier")
    axes.plot(spent, points.parameters, "o", color="#333333", markersize=3.5, label="runs")
    axes.legend(fontsize=8, loc="upper left")


def _draw_residuals(axes: Any, measured: Measured, report: Report, norm: Any) -> None:
    """log(measured / fitted) in percent against N, coloured by C: structure here is what the law misses."""
    points = measured.points
    shown = axes.scatter(points.parameters, 100 * report.residuals, c=points.flops, norm=norm, cmap="viridis", s=18)
    axes.axhline(0.0, color="#333333", lw=0.8)
    for side in (-1, 1):
        axes.axhline(100 * side * report.numbers["parametric"]["residual_std"], color="#999999", lw=0.8, ls="--")
    axes.set(
        xscale="log",
        xlabel="N (parameters)",
        ylabel="log(measured / fitted), %",
        title="Residuals (dashed: one standard deviation)",
    )
    axes.figure.colorbar(shown, ax=axes, label="C (FLOPs)", pad=0.01)
    axes.grid(alpha=0.3)


def drawn_tables(measured: Measured, report: Report) -> str:
    """Every number of the figure, as Markdown tables at six digits."""
    numbers, points = report.numbers, measured.points
    fitted = points.loss / np.exp(report.residuals)
    rows = zip(points.parameters, points.tokens, points.flops, points.loss, fitted, report.residuals, strict=True)
    header = ["N", "D", "C", "loss", "fitted", "log(measured / fitted)"]
    parts = [f"Points\n\n{markdown(header, [[f'{value:.6g}' for value in row] for row in rows])}"]
    if profiles := numbers["isoflop"].get("profiles"):
        cells = [
            [
                f"{p['flops']:.6g}",
                *(_or_dash(c) for c in p["polynomial"] or [None] * 3),
                _or_dash(p["n_opt"]),
                _or_dash(p["loss"]),
            ]
            for p in profiles
        ]
        table = markdown(["C", "c2", "c1", "c0", "N", "loss"], cells)
        parts.append(f"Parabolas: loss = c2 ln(N)^2 + c1 ln(N) + c0, and their minima\n\n{table}")
    return "\n\n".join([*parts, f"Lines of N and D against C\n\n{_line_table(measured, report)}"])


def _line_table(measured: Measured, report: Report) -> str:
    flops = _flops(measured, report.numbers)[:: GRID // 10]
    columns: dict[str, Array] = {"C": flops}
    for method, sizes, tokens in _lines(report.numbers, flops):
        columns |= {f"N, {LABELS[method]}": sizes, f"D, {LABELS[method]}": tokens}
    for name, (low, high) in _bands(report, flops).items():
        columns |= {f"{name}, law, 5%": low, f"{name}, law, 95%": high}
    return markdown(list(columns), [[f"{value:.6g}" for value in row] for row in zip(*columns.values(), strict=True)])


def _lines(numbers: dict[str, Any], flops: Array) -> list[tuple[str, Array, Array]]:
    """Method, N and D at budgets, of every method that was fitted."""
    lines = []
    for method in COLORS:
        found = numbers[method]
        if method == "parametric" and _is_law(numbers):
            lines.append((method, *optimum(_coefficients(numbers), flops)))
        elif "coefficient_n" in found:
            sizes, tokens = (found[f"coefficient_{x}"] * flops ** found[f"exponent_{x}"] for x in "nd")
            lines.append((method, sizes, tokens))
    return lines


def _bands(report: Report, flops: Array) -> dict[str, Array]:
    """5th and 95th percentile (2, budgets) of the law's N, and of its D, at each budget; none where there is no law."""
    if not _is_law(report.numbers):
        return {}
    optima = optimum(report.draws[:, None, :], flops)
    return {name: np.quantile(values, INTERVAL, axis=0) for name, values in zip("ND", optima, strict=True)}


def _is_law(numbers: dict[str, Any]) -> bool:
    """Whether the parametric fit holds; where it does not, powers of its coefficients may overflow."""
    return bool(numbers["parametric"]["status"] == "converged")


def _coefficients(numbers: dict[str, Any]) -> Array:
    return np.array([numbers["parametric"][name] for name in COEFFICIENTS])


def _flops(measured: Measured, numbers: dict[str, Any]) -> Array:
    """Budgets from the least measured to the largest that is measured or asked for."""
    return np.geomspace(measured.points.flops.min(), max(measured.points.flops.max(), *numbers["predict"]), GRID + 1)


def _of_budget(flops: Array, profiles: list[dict[str, Any]], profile: dict[str, Any]) -> NDArray[np.bool_]:
    """The points whose nearest budget this is, in logs."""
    budgets = np.log([p["flops"] for p in profiles])
    nearest = np.argmin(np.abs(np.log(flops)[:, None] - budgets), axis=1)
    mask: NDArray[np.bool_] = nearest == profiles.index(profile)
    return mask


def _widened(values: Array, factor: float) -> tuple[float, float]:
    return float(values.min()) / factor, float(values.max()) * factor


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
