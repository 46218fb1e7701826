"""The picture of a run: losses by tokens, with the law's prediction, forecasts and downstream scores."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isoflop.records import Row, TrainingCurve, missing_steps
from isoflop.scaling.laws import Forecast

MOST_POINTS = 4000  # of a line in a picture some 900 pixels wide; more take time and memory, and are not seen


def draw_curve(
    curve: TrainingCurve, file: Path, title: str, unigram_entropy: float, promised: Forecast | None = None, total_tokens: int = 0
) -> None:
    """Training and validation loss against tokens, token frequencies alone for scale; downstream scores below where there are.

    What a law `promised` of the run's end, after `total_tokens`, stands there with its interval, and each forecast on the way.
    Steps whose rows are missing are a gap, shaded. Losses and entropy are in nats.
    """
    import matplotlib.figure

    rows = curve.measured
    scores = sorted({key for row in rows for key in row if "/" in key and not key.endswith("_stderr")})
    figure = matplotlib.figure.Figure(figsize=(8, 8 if scores else 5), layout="constrained")
    axes, *below = figure.subplots(2 if scores else 1, squeeze=False, sharex=True)[:, 0]
    _draw_losses(axes, curve)
    if promised:
        _draw_promise(axes, rows, promised, total_tokens)
    axes.axhline(unigram_entropy, color="#777777", linestyle="--", linewidth=1, label="token frequencies alone")
    axes.set(ylabel="loss (nats per token)", title=title)
    for panel in below:
        _draw_scores(panel, rows, scores)
    for panel in (axes, *below):
        panel.grid(alpha=0.3)
        panel.legend()
    panel.set_xlabel("tokens")
    panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    temporary = file.with_suffix(".partial.png")
    try:
        figure.savefig(temporary, dpi=120)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _draw_losses(axes: Any, curve: TrainingCurve) -> None:
    """The training loss of each step and smoothed, broken where rows are missing, and the validation loss."""
    finite = array("q", (place for place, loss in enumerate(curve.losses) if not math.isnan(loss)))
    losses = array("d", (curve.losses[place] for place in finite))
    lines: dict[str, Sequence[float]] = {"each step": losses, "smoothed": smoothed(losses)}
    every = max(1, len(finite) // MOST_POINTS)
    styles = {"each step": {"color": "#9db7d5", "linewidth": 0.8}, "smoothed": {"color": "#1f4e8c", "linewidth": 1.6}}
    gaps = missing_steps(curve.steps)
    first_after = {last + 1 for _, last in gaps}
    for name, values in lines.items():
        drawn = [
            point
            for number, (place, value) in enumerate(zip(finite, values, strict=True))
            if number % every == 0 or curve.steps[place] in first_after
            for point in ([(math.nan, math.nan)] if curve.steps[place] in first_after else []) + [(curve.tokens[place], value)]
        ]
        axes.plot([x for x, _ in drawn], [y for _, y in drawn], label=f"training loss, {name}", **styles[name])
    validated = [row for row in curve.measured if row["val_loss"] is not None]
    measured = [row["tokens"] for row in validated], [row["val_loss"] for row in validated]
    axes.plot(*measured, "o-", color="#d1495b", label="validation loss")
    for number, (first, last) in enumerate(gaps):
        per_step = curve.tokens[-1] / curve.steps[-1]
        label = {} if number else {"label": "rows missing"}
        axes.axvspan((first - 1) * per_step, last * per_step, color="#cccccc", alpha=0.5, linewidth=0, **label)


def _draw_promise(axes: Any, rows: list[Row], promised: Forecast, total_tokens: int) -> None:
    """The law's prediction at the run's end, and where forecasts on the way saw that end."""
    axes.plot([total_tokens] * 2, promised.interval or [promised.loss] * 2, "_-", color="#2e8b57", markersize=8)
    axes.plot([total_tokens], [promised.loss], "D", color="#2e8b57", label="predicted by the law, 90%")
    seen = [row for row in rows if "forecast_loss" in row]
    if seen:
        tokens = [row["tokens"] for row in seen]
        axes.plot(tokens, [row["forecast_loss"] for row in seen], "--", color="#e08e0b", label="forecast of the last loss, 90%")
        bounds = ([row[key] for row in seen] for key in ("forecast_low", "forecast_high"))
        axes.fill_between(tokens, *bounds, color="#e08e0b", alpha=0.25, linewidth=0)


def _draw_scores(axes: Any, rows: list[Row], scores: list[str]) -> None:
    """Accuracies with one standard error on either side; where a task has none (perplexities), its numbers are in the rows."""
    accuracies = [key for key in scores if key.split("/")[1].startswith("acc")]
    for key in accuracies or scores:
        measured = [row for row in rows if row.get(key) is not None]
        errors = [row.get(f"{key}_stderr") or 0.0 for row in measured]
        axes.errorbar([r["tokens"] for r in measured], [r[key] for r in measured], errors, fmt="o-", markersize=4, label=key)
    axes.set_ylabel("accuracy" if accuracies else "score")


def smoothed(losses: Sequence[float], share: float = 0.02) -> Sequence[float]:
    """Exponential mean whose memory is `share` of the curve, started at the first value."""
    weight = 1 / max(1.0, share * len(losses))
    smooth = array("d")
    for loss in losses:
        smooth.append(loss if not smooth else smooth[-1] + weight * (loss - smooth[-1]))
    return smooth
