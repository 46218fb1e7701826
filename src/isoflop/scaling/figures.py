"""Figure of a fit, and tables of its numbers.

Four panels: IsoFLOP profiles (Hoffmann et al. 2022, figure 3), the optimum against compute, iso-loss contours (their figure 4)
and residuals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isoflop.scaling.laws import INTERVAL
from isoflop.scaling.parametric import loss_of, optimum
from isoflop.scaling.points import Points
from isoflop.scaling.report import FitReport, Parametric, PowerLaw, Profile
from isoflop.scaling.result import Fit
from isoflop.utils.tables import markdown

if TYPE_CHECKING:
    import matplotlib.figure

Array = NDArray[np.float64]
COLORS = {"parametric": "#1f4e8c", "isoflop": "#d1495b", "envelope": "#2e8b57", "argmin_log": "#999999"}
LABELS = {
    "parametric": "parametric law",
    "isoflop": "IsoFLOP parabolas",
    "envelope": "envelope",
    "argmin_log": "least-loss points",
}
GRID = 60  # points of a line
LEVELS = 12  # contours


def figure_of(fit: Fit) -> matplotlib.figure.Figure:
    """Return the figure."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(14, 10.5), layout="constrained")
    panels = figure.subplots(2, 2)
    norm = matplotlib.colors.LogNorm(*_widened(fit.measured.points.flops, 1.02))
    _draw_profiles(panels[0][0], fit, norm)
    _draw_optima(panels[0][1], fit)
    if fit.report.parametric.converged:
        _draw_contours(panels[1][0], fit)
    else:
        _leave_empty(panels[1][0], f"No law: {fit.report.parametric.status.replace('_', ' ')}")
    _draw_residuals(panels[1][1], fit, norm)
    return figure


def _leave_empty(axes: Any, why: str) -> None:
    axes.set_axis_off()
    axes.set_title(why)


def _draw_profiles(axes: Any, fit: Fit, norm: Any) -> None:
    """Draw loss against N; each budget has a colour, a parabola and its minimum."""
    import matplotlib

    points, color, profiles = fit.measured.points, matplotlib.colormaps["viridis"], fit.report.isoflop.profiles
    shown = axes.scatter(points.parameters, points.loss, c=points.flops, norm=norm, cmap=color, s=18, zorder=3)
    for profile in profiles:
        at = _of_budget(points.flops, profiles, profile)
        if profile.polynomial is None or not at.any():
            continue
        sizes = np.geomspace(*_widened(points.parameters[at], 1.05), GRID)
        axes.plot(
            sizes, np.polyval(profile.polynomial, np.log(sizes)), "-" if profile.used else ":", lw=1.2,
            color=color(norm(profile.flops)),
        )  # fmt: skip
    used = [profile for profile in profiles if profile.used]
    star = {"color": "black", "markersize": 10, "markeredgecolor": "white", "zorder": 4, "ls": "none"}
    axes.plot([p.n_opt for p in used], [p.loss for p in used], "*", **star, label="least loss of the parabola")
    axes.set(xscale="log", xlabel="N (parameters)", ylabel="loss (nats per token)", title="IsoFLOP profiles")
    if used:
        axes.legend(fontsize=8)
    axes.figure.colorbar(shown, ax=axes, label="C (FLOPs)", pad=0.01)
    axes.grid(alpha=0.3)


def _draw_optima(axes: Any, fit: Fit) -> None:
    """Draw N and D of least loss against C: a line per method, the law's band, and the budgets' own minima."""
    flops = _flops(fit)
    if not (lines := _lines(fit.report, flops)):
        _leave_empty(axes, "No method was fitted")
        return
    for method, sizes, tokens in lines:
        thin = 1.0 if method == "argmin_log" else 1.6
        above = 3 if method == "parametric" else 2
        axes.plot(flops, sizes, "-", color=COLORS[method], lw=thin, label=LABELS[method], zorder=above)
        axes.plot(flops, tokens, "--", color=COLORS[method], lw=thin, zorder=above)
    for low, high in _bands(fit, flops).values():
        axes.fill_between(flops, low, high, color=COLORS["parametric"], alpha=0.2, linewidth=0)
    used = [profile for profile in fit.report.isoflop.profiles if profile.used]
    axes.plot([p.flops for p in used], [p.n_opt for p in used], "o", color=COLORS["isoflop"], markersize=5)
    axes.plot([p.flops for p in used], [p.d_opt for p in used], "s", color=COLORS["isoflop"], markersize=5)
    axes.plot([], [], "ko-", label="N", markersize=5)
    axes.plot([], [], "ks--", label="D (tokens)", markersize=5)
    axes.axvline(fit.measured.points.flops.max(), color="#555555", lw=0.8, ls=":", label="largest C measured")
    axes.set(xscale="log", yscale="log", xlabel="C (FLOPs)", ylabel="N, D", title="Size and tokens of least loss (band: 90%)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _draw_contours(axes: Any, fit: Fit) -> None:
    """Draw contours of the fitted loss over C and N, the efficient frontier through their least C, and the runs."""
    import matplotlib

    points, law = fit.measured.points, np.array(fit.report.parametric.coefficients)
    spent = 6 * points.parameters * points.tokens
    flops = np.geomspace(*_widened(np.append(spent, fit.report.predict), 1.3), GRID)
    sizes = np.geomspace(*_widened(np.append(points.parameters, optimum(law, flops)[0]), 1.3), GRID)
    axes.set(
        xscale="log", yscale="log", xlabel="6 N D (FLOPs)", ylabel="N (parameters)"
    )  # before the contours: their labels are placed by the scales
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


def _draw_residuals(axes: Any, fit: Fit, norm: Any) -> None:
    """Draw log(measured / fitted) in percent against N, coloured by C; a pattern here is one that the law misses."""
    points = fit.measured.points
    shown = axes.scatter(points.parameters, 100 * fit.residuals, c=points.flops, norm=norm, cmap="viridis", s=18)
    axes.axhline(0.0, color="#333333", lw=0.8)
    for side in (-1, 1):
        axes.axhline(100 * side * fit.report.parametric.residual_std, color="#999999", lw=0.8, ls="--")
    axes.set(
        xscale="log",
        xlabel="N (parameters)",
        ylabel="log(measured / fitted), %",
        title="Residuals (dashed: one standard deviation)",
    )
    axes.figure.colorbar(shown, ax=axes, label="C (FLOPs)", pad=0.01)
    axes.grid(alpha=0.3)


def drawn_tables(fit: Fit) -> str:
    """Return every number of the figure as Markdown tables at six digits."""
    parts = [f"Points\n\n{_point_table(fit.measured.points, fit.residuals)}"]
    if profiles := fit.report.isoflop.profiles:
        rows = [[p.flops, *(p.polynomial or (None, None, None)), p.n_opt, p.loss] for p in profiles]
        table = markdown(["C", "c2", "c1", "c0", "N", "loss"], [[_or_dash(value) for value in row] for row in rows])
        parts.append(f"Parabolas: loss = c2 ln(N)^2 + c1 ln(N) + c0, and their minima\n\n{table}")
    return "\n\n".join([*parts, f"Lines of N and D against C\n\n{_line_table(fit)}"])


def _point_table(points: Points, residuals: Array) -> str:
    fitted = points.loss / np.exp(residuals)
    rows = zip(points.parameters, points.tokens, points.flops, points.loss, fitted, residuals, strict=True)
    header = ["N", "D", "C", "loss", "fitted", "log(measured / fitted)"]
    return markdown(header, [[f"{value:.6g}" for value in row] for row in rows])


def _line_table(fit: Fit) -> str:
    flops = _flops(fit)[:: GRID // 10]
    columns: dict[str, Array] = {"C": flops}
    for method, sizes, tokens in _lines(fit.report, flops):
        columns |= {f"N, {LABELS[method]}": sizes, f"D, {LABELS[method]}": tokens}
    for name, (low, high) in _bands(fit, flops).items():
        columns |= {f"{name}, law, 5%": low, f"{name}, law, 95%": high}
    return markdown(list(columns), [[f"{value:.6g}" for value in row] for row in zip(*columns.values(), strict=True)])


def _lines(report: FitReport, flops: Array) -> list[tuple[str, Array, Array]]:
    """Return method, N and D at budgets, for every method that was fitted."""
    lines = []
    for method in COLORS:
        found: Parametric | PowerLaw = getattr(report, method)
        if isinstance(found, Parametric):
            if found.converged:
                lines.append((method, *optimum(np.array(found.coefficients), flops)))
        elif found.power_n and found.power_d:
            (k, a), (h, b) = found.power_n, found.power_d
            lines.append((method, k * flops**a, h * flops**b))
    return lines


def _bands(fit: Fit, flops: Array) -> dict[str, Array]:
    """Return the 5th and 95th percentile (2, budgets) of the law's N, and of its D; none if the fit is no law."""
    if not fit.report.parametric.converged:
        return {}
    optima = optimum(fit.draws[:, None, :], flops)
    return {name: np.quantile(values, INTERVAL, axis=0) for name, values in zip("ND", optima, strict=True)}


def _flops(fit: Fit) -> Array:
    """Return budgets from the smallest measured to the largest measured or requested."""
    flops = fit.measured.points.flops
    return np.geomspace(flops.min(), max(flops.max(), *fit.report.predict), GRID + 1)


def _of_budget(flops: Array, profiles: list[Profile], profile: Profile) -> NDArray[np.bool_]:
    """Return the mask of the points whose nearest budget in logs is this one."""
    budgets = np.log([p.flops for p in profiles])
    nearest = np.argmin(np.abs(np.log(flops)[:, None] - budgets), axis=1)
    mask: NDArray[np.bool_] = nearest == profiles.index(profile)
    return mask


def _widened(values: Array, factor: float) -> tuple[float, float]:
    return float(values.min()) / factor, float(values.max()) * factor


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
