"""Figure of a comparison: loss against tokens, FLOPs and hours, and downstream scores against tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isoflop.compare.runs import RunHistory, most_tokens

if TYPE_CHECKING:
    import matplotlib.figure

COLORS = ("#1f4e8c", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#3aa6b9", "#8c564b", "#555555")
AXIS_LABELS = {"tokens": "tokens", "flops": "FLOPs", "hours": "hours"}
MOST_SCORES = 3  # panels
FIRST = 0.1  # share of a run whose losses may be cut off: the panel shows the later, smaller differences
METRICS = ("acc_norm", "acc_per_token", "acc", "bits_per_byte")  # a task's panel shows the first of these that it has


def figure_of(runs: list[RunHistory], unit: str) -> matplotlib.figure.Figure:
    """Return the figure."""
    import matplotlib.figure

    scores = headline_scores(runs)[:MOST_SCORES]
    figure = matplotlib.figure.Figure(figsize=(13, 8.5 if scores else 4.6), layout="constrained")
    panels = figure.subplots(2 if scores else 1, 3, squeeze=False)
    for number, (axis, label) in enumerate(AXIS_LABELS.items()):
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
        if panel.get_xlabel() != AXIS_LABELS["hours"]:  # 25 m would read as milli
            panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    return figure


def headline_scores(runs: list[RunHistory]) -> list[str]:
    """Return `task/metric` of every task that was evaluated during training, with its headline metric."""
    there = {key for run in runs for row in run.rows for key in row if "/" in key}
    tasks = sorted({key.split("/", 1)[0] for key in there})
    found = [next((f"{task}/{metric}" for metric in METRICS if f"{task}/{metric}" in there), None) for task in tasks]
    return [key for key in found if key]


def _draw_losses(axes: Any, runs: list[RunHistory], axis: str, unit: str) -> None:
    """Draw smoothed training losses as lines and validation losses as dots."""
    shown: list[float] = []
    for run, color in zip(runs, COLORS * len(runs), strict=False):
        costs, losses = run.training(axis, unit, most_tokens(runs))
        axes.plot(costs, losses, color=color, linewidth=1.2, label=f"{run.name}, training, smoothed")
        costs, values = run.validation(axis, unit)
        axes.plot(costs, values, "o--", color=color, markersize=4, linewidth=0.8, label=f"{run.name}, validation")
        shown += [*losses[int(FIRST * len(losses)) :], *values]
    if shown:  # empty if every run diverged at its first step
        margin = 0.05 * (max(shown) - min(shown)) or 0.05
        axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _draw_score(axes: Any, runs: list[RunHistory], key: str) -> None:
    """Draw one downstream score with one standard error on either side."""
    for run, color in zip(runs, COLORS * len(runs), strict=False):
        measured = [row for row in run.rows if row.get(key) is not None]
        errors = [row.get(f"{key}_stderr") or 0.0 for row in measured]
        tokens, values = [row["tokens"] for row in measured], [row[key] for row in measured]
        thin = {"elinewidth": 0.8, "capsize": 3}  # error bars of several runs overlap
        axes.errorbar(tokens, values, errors, fmt="o-", markersize=4, color=color, label=run.name, **thin)
    axes.set(xlabel="tokens", ylabel=key.replace("/", ": "))
