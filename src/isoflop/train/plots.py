"""The loss curve of a run: losses by tokens, with the law's prediction, forecasts and downstream scores."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isoflop.scaling.laws import NoPrediction, Prediction
from isoflop.train.records import Row, TrainingCurve, missing_steps
from isoflop.utils.io import atomic_path

# Memory of the smoothed curve. In the beginning losses fall steeply, and a longer memory would lie above all of them.
MEMORY_SO_FAR, MEMORY_SHARE = 0.1, 0.02
MOST_POINTS = 4000  # per line of a figure about 900 pixels wide; more cannot be seen


def draw_curve(
    curve: TrainingCurve,
    file: Path,
    title: str,
    unigram_entropy: float,
    predicted: Prediction | NoPrediction | None = None,
    total_tokens: int = 0,
) -> None:
    """Draw training and validation loss against tokens, the unigram entropy for scale, and any downstream scores below.

    The loss that a law `predicted` for the end, at `total_tokens`, is drawn with its interval, and so is each forecast. Steps
    whose rows are missing are a shaded gap. Losses and entropy are in nats.
    """
    import matplotlib.figure

    rows = curve.measured
    scores = sorted({key for row in rows for key in row if "/" in key and not key.endswith("_stderr")})
    figure = matplotlib.figure.Figure(figsize=(8, 8 if scores else 5), layout="constrained")
    axes, *below = figure.subplots(2 if scores else 1, squeeze=False, sharex=True)[:, 0]
    _draw_losses(axes, curve)
    if isinstance(predicted, Prediction):
        _draw_prediction(axes, rows, predicted, total_tokens)
    axes.axhline(unigram_entropy, color="#777777", linestyle="--", linewidth=1, label="token frequencies alone")
    axes.set(ylabel="loss (nats per token)", title=title)
    for panel in below:
        _draw_scores(panel, rows, scores)
    for panel in (axes, *below):
        panel.grid(alpha=0.3)
        panel.legend()
    panel.set_xlabel("tokens")
    panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_losses(axes: Any, curve: TrainingCurve) -> None:
    """Draw the training loss of each step and smoothed, with gaps where rows are missing, and the validation loss."""
    finite = array("q", (place for place, loss in enumerate(curve.losses) if not math.isnan(loss)))
    losses = array("d", (curve.losses[place] for place in finite))
    tokens = array("q", (curve.tokens[place] for place in finite))
    smooth = smoothed(tokens, losses, tokens[-1]) if tokens else losses
    lines: dict[str, Sequence[float]] = {"each step": losses, "smoothed": smooth}
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


def _draw_prediction(axes: Any, rows: list[Row], predicted: Prediction, total_tokens: int) -> None:
    """Draw the law's prediction at the run's end, and the forecasts made during the run."""
    axes.plot([total_tokens] * 2, predicted.interval or [predicted.loss] * 2, "_-", color="#2e8b57", markersize=8)
    axes.plot([total_tokens], [predicted.loss], "D", color="#2e8b57", label="predicted by the law, 90%")
    seen = [row for row in rows if "forecast_loss" in row]
    if seen:
        tokens = [row["tokens"] for row in seen]
        axes.plot(tokens, [row["forecast_loss"] for row in seen], "--", color="#e08e0b", label="forecast of the final loss, 90%")
        bounds = ([row[key] for row in seen] for key in ("forecast_low", "forecast_high"))
        axes.fill_between(tokens, *bounds, color="#e08e0b", alpha=0.25, linewidth=0)


def _draw_scores(axes: Any, rows: list[Row], scores: list[str]) -> None:
    """Draw accuracies with one standard error on either side; perplexities only where there are no accuracies."""
    accuracies = [key for key in scores if key.split("/")[1].startswith("acc")]
    for key in accuracies or scores:
        measured = [row for row in rows if row.get(key) is not None]
        errors = [row.get(f"{key}_stderr") or 0.0 for row in measured]
        axes.errorbar([r["tokens"] for r in measured], [r[key] for r in measured], errors, fmt="o-", markersize=4, label=key)
    axes.set_ylabel("accuracy" if accuracies else "score")


def smoothed(tokens: Sequence[int], losses: Sequence[float], most_tokens: int) -> Sequence[float]:
    """Return the exponential mean of the losses; its memory is a tenth of the tokens so far, at most 2% of `most_tokens`.

    No value depends on a later one, and `most_tokens` is one number for all runs of a figure: runs that are equal up to some
    tokens look equal up to there, however long they are. The weights sum to one from the first value on (bias correction).
    """
    smooth, mean, weight, before = array("d"), 0.0, 0.0, 0
    for count, loss in zip(tokens, losses, strict=True):
        memory = max(1.0, min(MEMORY_SO_FAR * count, MEMORY_SHARE * most_tokens))
        kept = math.exp(-max(1, count - before) / memory)
        mean, weight, before = kept * mean + (1 - kept) * loss, kept * weight + 1 - kept, count
        smooth.append(mean / weight)
    return smooth
