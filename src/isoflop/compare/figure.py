"""The curves of several runs: loss against tokens, FLOPs and hours, and downstream scores against tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isoflop.compare.runs import Run
from isoflop.loss_curve import smoothed

COLORS = ("#1f4e8c", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#3aa6b9", "#8c564b", "#555555")
AXES = {"tokens": "tokens", "flops": "FLOPs", "hours": "hours"}
SCORES = 3  # panels at most
FIRST = 0.1  # share of a run whose losses may lie above the panel: they would flatten what follows
METRICS = ("acc_norm", "acc_per_token", "acc", "bits_per_byte")  # a task is drawn by the first of these it has


def draw(runs: list[Run], unit: str, file: Path) -> None:
    """Draw the comparison into a PNG."""
    import matplotlib.figure

    scores = headline_scores(runs)[:SCORES]
    figure = matplotlib.figure.Figure(figsize=(13, 8.5 if scores else 4.6), layout="constrained")
    panels = figure.subplots(2 if scores else 1, 3, squeeze=False)
    for number, (axis, label) in enumerate(AXES.items()):
        _draw_losses(panels[0][number], runs, axis, unit)
        panels[0][number].set_xlabel(label)
    panels[0][0].set_ylabel(f"loss ({unit})")
    panels[0][0].legend(fontsize=8)
    for number in range(3 if scores else 0):
        if number < len(scores):
            _draw_score(panels[1][number], runs, scores[number])
        else:
            panels[1][number].set_axis_off()
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        if panel.get_xlabel() != AXES["hours"]:  # 25 m would be thousandths
            panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    figure.savefig(file, dpi=120)


def headline_scores(runs: list[Run]) -> list[str]:
    """`task/metric` of every task that was run while training, by the metric that is quoted of it."""
    there = {key for run in runs for row in run.rows for key in row if "/" in key}
    tasks = sorted({key.split("/", 1)[0] for key in there})
    found = [next((f"{task}/{metric}" for metric in METRICS if f"{task}/{metric}" in there), None) for task in tasks]
    return [key for key in found if key]


def _draw_losses(axes: Any, runs: list[Run], axis: str, unit: str) -> None:
    """Smoothed training losses as lines, validation losses as dots."""
    shown: list[float] = []
    for run, color in zip(runs, COLORS * len(runs), strict=False):
        finite = [row for row in run.rows if row["loss"] is not None]
        losses = smoothed([run.loss(row["loss"], unit) for row in finite])
        axes.plot([run.cost(axis, row) for row in finite], losses, color=color, linewidth=1.2, label=f"{run.name}, training")
        costs, values = run.validation(axis, unit)
        axes.plot(costs, values, "o--", color=color, markersize=4, linewidth=0.8, label=f"{run.name}, validation")
        shown += [*losses[int(FIRST * len(losses)) :], *values]
    if shown:  # none where every run diverged at its first step
        margin = 0.05 * (max(shown) - min(shown)) or 0.05
        axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _draw_score(axes: Any, runs: list[Run], key: str) -> None:
    """One downstream score, and one standard error on either side."""
    for run, color in zip(runs, COLORS * len(runs), strict=False):
        measured = [row for row in run.rows if row.get(key) is not None]
        errors = [row.get(f"{key}_stderr") or 0.0 for row in measured]
        tokens, values = [row["tokens"] for row in measured], [row[key] for row in measured]
        thin = {"elinewidth": 0.8, "capsize": 3}  # bars of several runs stand on one another
        axes.errorbar(tokens, values, errors, fmt="o-", markersize=4, color=color, label=run.name, **thin)
    axes.set(xlabel="tokens", ylabel=key.replace("/", ": "))
