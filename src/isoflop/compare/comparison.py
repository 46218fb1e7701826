"""`compare`: several runs side by side, and the first one against each other at equal cost."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isoflop.compare.runs import BITS, RunHistory, common_unit, group_by_data, most_tokens, read_runs
from isoflop.evaluate.scores import ERRORS, Score, read_scores
from isoflop.utils.errors import UserError
from isoflop.utils.html import html_image
from isoflop.utils.io import atomic_write, require_own_files
from isoflop.utils.tables import markdown, table

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

AXES = ("tokens", "flops", "hours")


@dataclass(frozen=True)
class RunNumbers:
    """Numbers of one run at its last finished step."""

    name: str
    model_type: str
    parameters: int
    steps: int
    planned_steps: int
    tokens: int
    tokens_per_parameter: float
    flops: float
    hours: float
    loss: float | None
    """Of the last step, nats per token; None if it is not finite."""
    val_loss: float | None
    bits_per_byte: float | None
    tokens_per_s: float
    """Median."""
    mfu: float | None
    peak_memory_bytes: int


@dataclass(frozen=True)
class EqualCost:
    """Losses of two runs at the cost where the cheaper one ended."""

    axis: str
    """tokens, flops or hours."""
    first: str
    other: str
    at: float | None
    loss: str | None
    """Which loss is compared: validation or training."""
    first_loss: float | None
    other_loss: float | None
    reason: str | None
    """Why there is no comparison."""


@dataclass(frozen=True)
class RunScore:
    """A run's score in one task and metric."""

    value: float
    stderr: float | None
    differs: bool | None
    """Whether it differs from the first run's by more than 1.96 standard errors of the difference; None if unknown."""


@dataclass(frozen=True)
class TaskScores:
    """Scores of all runs in one task and metric."""

    task: str
    metric: str
    runs: dict[str, RunScore]
    """By the run's name; runs without this score are absent."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side. A notebook shows it as tables and a figure."""

    histories: list[RunHistory]
    unit: str
    """Unit in which the losses compare: nats per token or bits per byte."""
    same_data: list[list[str]]
    """Names of the runs, grouped by tokenizer and data."""
    runs: list[RunNumbers]
    at_equal_cost: list[EqualCost]
    scores: list[TaskScores]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as `comparison.json` holds them."""
        return {
            "unit": self.unit,
            "same_data": self.same_data,
            "runs": [asdict(run) for run in self.runs],
            "at_equal_cost": [asdict(row) for row in self.at_equal_cost],
            "scores": [asdict(row) for row in self.scores],
        }

    def to_json(self) -> str:
        """Return the JSON text at full precision."""
        return json.dumps(self.to_dict(), indent=1)

    def to_frame(self) -> pandas.DataFrame:
        """Return a row per run: its numbers, and a column TASK/METRIC for each score."""
        import pandas

        scores = {
            f"{row.task}/{row.metric}": [score.value if (score := row.runs.get(run.name)) else math.nan for run in self.runs]
            for row in self.scores
        }
        return pandas.DataFrame([asdict(run) for run in self.runs]).assign(**scores).set_index("name")

    def page(self, as_markdown: bool = False) -> str:
        """Return the comparison as text, its tables padded for a terminal or in Markdown."""
        from isoflop.compare.text import page_of

        return page_of(self, markdown if as_markdown else table)

    def figure(self) -> matplotlib.figure.Figure:
        """Return the figure: losses against tokens, FLOPs and hours, and scores against tokens."""
        from isoflop.compare.figure import figure_of

        return figure_of(self.histories, self.unit)

    def _repr_html_(self) -> str:
        from html import escape

        png = io.BytesIO()
        self.figure().savefig(png, dpi=80, format="png")
        return f"<pre>{escape(self.page())}</pre>{html_image(png.getvalue(), 'the curves')}"

    def save(self, folder: str | Path) -> None:
        """Write comparison.json, .md and .png. Raises `UserError` if `folder` cannot be written or holds others' files."""
        require_own_comparison(folder)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: {error.strerror}; give a folder that can be written") from None
        atomic_write(Path(folder) / "comparison.json", self.to_json() + "\n")
        atomic_write(Path(folder) / "comparison.md", self.page(as_markdown=True) + "\n\n![the curves](comparison.png)\n")
        self.figure().savefig(Path(folder) / "comparison.png", dpi=120)


def require_own_comparison(folder: str | Path) -> None:
    """Raise `UserError` if a file that `Comparison.save` would overwrite is not a comparison's."""
    files = [Path(folder) / f"comparison.{kind}" for kind in ("json", "md", "png")]
    require_own_files(files, f"--out {folder}", ["runs", "unit", "at_equal_cost"])


def compare(runs: str | Path | Sequence[str | Path]) -> Comparison:
    """Compare run folders, finished or still training; the first is what the others are compared with.

    Raises `UserError` for a folder without a run, and for runs whose losses have no common unit.
    """
    histories = read_runs([runs] if isinstance(runs, str | Path) else runs)
    unit = common_unit(histories)
    first, *others = histories
    return Comparison(
        histories=histories,
        unit=unit,
        same_data=[[run.name for run in group] for group in group_by_data(histories)],
        runs=[numbers_of(run) for run in histories],
        at_equal_cost=[at_equal_cost(first, other, axis, unit, most_tokens(histories)) for other in others for axis in AXES],
        scores=compare_scores({run.name: scores_of_run(run) for run in histories}),
    )


def numbers_of(run: RunHistory) -> RunNumbers:
    """Return a run's numbers at its last finished step."""
    last = run.rows[-1]
    measured = [row["val_loss"] for row in run.rows if row["val_loss"] is not None]
    val_loss = measured[-1] if measured else None
    mfus = [row["mfu"] for row in run.rows if isinstance(row.get("mfu"), int | float)]
    return RunNumbers(
        name=run.name,
        model_type=run.recipe.model.model_type,
        parameters=run.parameters,
        steps=last["step"],
        planned_steps=run.recipe.training.num_steps(run.parameters),
        tokens=last["tokens"],
        tokens_per_parameter=last["tokens"] / run.parameters,
        flops=run.cost("flops", last),
        hours=run.cost("hours", last),
        loss=last["loss"],
        val_loss=val_loss,
        bits_per_byte=run.loss(val_loss, BITS) if val_loss is not None and run.bytes_per_token else None,
        tokens_per_s=statistics.median(row["tokens_per_s"] for row in run.rows),
        mfu=statistics.median(mfus) if mfus else None,
        peak_memory_bytes=max(row["peak_memory_bytes"] for row in run.rows),
    )


def at_equal_cost(first: RunHistory, other: RunHistory, axis: str, unit: str, most_tokens: int) -> EqualCost:
    """Compare two runs where the cheaper one ended: validation losses, interpolated linearly between measurements.

    Smoothed training losses if the validations have no cost in common; else the reason why there is no comparison.
    """
    pair = (first, other)
    curves_of = {
        "validation": [run.validation(axis, unit) for run in pair],
        "training": [run.training(axis, unit, most_tokens) for run in pair],
    }
    for kind, curves in curves_of.items():
        if all(costs for costs, _ in curves):
            at = min(costs[-1] for costs, _ in curves)
            first_loss, other_loss = (interpolated(at, *curve) for curve in curves)
            if first_loss is not None and other_loss is not None:
                return EqualCost(axis, first.name, other.name, at, kind, first_loss, other_loss, reason=None)
    without = [run.name for run, (costs, _) in zip(pair, curves_of["training"], strict=True) if not costs]
    reason = f"no loss of {' and '.join(without)} is a number" if without else "one had ended before the other's first step"
    return EqualCost(axis, first.name, other.name, None, None, None, None, reason)


def interpolated(at: float, costs: list[float], values: list[float]) -> float | None:
    """Return a curve's value at a cost, None outside of the curve."""
    return float(np.interp(at, costs, values)) if costs[0] <= at <= costs[-1] else None


def scores_of_run(run: RunHistory) -> dict[tuple[str, str], Score]:
    """Return a run's scores by task and metric: from its evaluations, else from the last evaluation during training."""
    last: dict[tuple[str, str], Score] = {}
    for row in run.rows:
        for key in row:
            if "/" in key and key.isprintable() and not key.endswith("_stderr") and isinstance(row[key], int | float):
                (task, metric), error = key.split("/", 1), row.get(f"{key}_stderr")
                last[task, metric] = Score(task, metric, row[key], error if isinstance(error, int | float) else None, 0, True)
    return last | {(score.task, score.metric): score for score in read_scores(run.folder.evaluations)}


def compare_scores(scores: dict[str, dict[tuple[str, str], Score]]) -> list[TaskScores]:
    """Return each task's and metric's scores of all runs, and whether they differ from the first run's."""
    first = next(iter(scores.values()))
    return [
        TaskScores(
            *key,
            runs={
                name: RunScore(of_run[key].value, of_run[key].stderr, differs(first.get(key), of_run[key]))
                for name, of_run in scores.items()
                if key in of_run
            },
        )
        for key in sorted({key for of_run in scores.values() for key in of_run})
    ]


def differs(one: Score | None, other: Score) -> bool | None:
    """Return whether two scores differ by more than 1.96 standard errors of their difference; None if unknown."""
    if one is None or one.stderr is None or other.stderr is None:
        return None
    return abs(one.value - other.value) > ERRORS * math.hypot(one.stderr, other.stderr)
