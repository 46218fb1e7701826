"""Scores of a model: read from lm-eval's results, set beside the nearest published ones.

Accuracies are fractions, perplexities are per what their name says, as lm-eval writes them. `eval/references/` holds what others
published for the same tasks.
"""

from __future__ import annotations

import json
import math
import operator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from isoflop.credentials import hide_in_tree
from isoflop.disk import require_own_files, write_aside
from isoflop.errors import UserError
from isoflop.tables import markdown, table
from isoflop.untrusted import read_json, shown

EVAL = Path(__file__).parents[2] / "eval"  # of the checkout; an installed copy has lm-eval's own tasks alone
RESULTS = "results.json"
ERRORS = 1.96  # standard errors on either side that hold 95% of a normal distribution


class Score(NamedTuple):
    """One number of one task."""

    task: str
    metric: str
    """lm-eval's name; with its filter behind a comma where there is one."""
    value: float
    stderr: float | None
    """Standard error over the documents; None where none is known."""
    num_documents: int
    higher_is_better: bool

    def __str__(self) -> str:
        return _short(self.value) + (f" ± {_short(self.stderr)}" if self.stderr is not None else "")


class Reference(NamedTuple):
    """One published number of another model."""

    model: str
    parameters: int
    value: float
    source: str


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def scores_of(results: dict[str, Any]) -> list[Score]:
    """The numbers in lm-eval's results, by task and metric as they stand there."""
    scores = []
    for task, count in results["n-samples"].items():  # a group stands in the results too, with no number of its own
        values, better = results["results"][task], results["higher_is_better"][task]
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            scores.append(
                Score(
                    task=task,
                    metric=metric if filtered == "none" else key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                    num_documents=operator.index(count["effective"]),
                    higher_is_better=bool(better.get(metric, True)),
                )
            )
    return scores


def require_own_results(folder: Path) -> None:
    """Refuse to overwrite what `write_results` did not write. Raises `UserError`."""
    require_own_files([folder / RESULTS, folder / "results.md"], f"results in {folder}", ["results", "n-samples", "config"])


def write_results(results: dict[str, Any], folder: Path, parameters: int | None) -> None:
    """Write lm-eval's results as `results.json`, and the table of scores beside published ones as `results.md`.

    Its record of what was typed (`--model-args token=...`) and of the machine goes in without credentials.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # First, since it tells whose the files are. lm-eval turns what JSON does not know (functions, dtypes) into text as well.
    plain = hide_in_tree(json.loads(json.dumps(results, default=str)))
    write_aside(folder / RESULTS, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    write_aside(folder / "results.md", score_markdown(scores_of(results), parameters))


def read_scores(evaluations: Path) -> list[Score]:
    """The newest score of every task and metric in a run's `evaluations/`, one folder a suite."""
    newest: dict[tuple[str, str], Score] = {}
    for file in sorted(evaluations.glob(f"*/{RESULTS}"), key=lambda file: file.stat().st_mtime):
        results = read_json(file, "move it away, or run scripts/run_eval.py again")
        try:
            scores = scores_of(results)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{file} is not as lm-eval writes results ({type(error).__name__}: {shown(error)}); move it away, or run"
                " scripts/run_eval.py again"
            ) from None
        newest |= {(score.task, score.metric): score for score in scores}
    return [newest[key] for key in sorted(newest)]


@cache
def _published(folder: Path) -> list[dict[str, Any]]:
    return [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.yaml"))]


def nearest_reference(task: str, metric: str, parameters: int | None, folder: Path = EVAL / "references") -> Reference | None:
    """What was published for a task and metric by the model nearest in size (the ratio of parameters), if known."""
    if parameters is None:
        return None
    found = [
        Reference(model["name"], model["parameters"], model["scores"][task][metric], page["source"])
        for page in _published(folder)
        for model in page["models"]
        if metric in model["scores"].get(task, {})
    ]
    return min(found, key=lambda reference: abs(math.log(reference.parameters / parameters)), default=None)


def verdict(score: Score, reference: Reference) -> str:
    """The difference to a published score, called one only where it exceeds 1.96 standard errors of the score."""
    difference = score.value - reference.value
    if score.stderr is None:
        return f"{difference:+.4g}, error unknown"
    if abs(difference) <= ERRORS * score.stderr:
        return "within the error"
    return f"{difference:+.4g}, {'better' if (difference > 0) == score.higher_is_better else 'worse'}"


HEADER = ["task", "metric", "value", "standard error", "documents", "nearest published", "its value", "difference"]


def score_rows(scores: list[Score], parameters: int | None) -> list[list[str]]:
    """Rows under `HEADER`: every score beside the nearest published one."""
    rows = []
    for score in scores:
        stderr = "n/a" if score.stderr is None else _short(score.stderr)
        row = [score.task, score.metric, _short(score.value), stderr, f"{score.num_documents:,}"]
        reference = nearest_reference(score.task, score.metric, parameters)
        rows.append(row + ([reference.model, _short(reference.value), verdict(score, reference)] if reference else ["-"] * 3))
    return rows


def score_table(scores: list[Score], parameters: int | None) -> str:
    """Scores for a terminal."""
    return table(HEADER, score_rows(scores, parameters))


def score_markdown(scores: list[Score], parameters: int | None) -> str:
    """Scores for a page, with where the published ones come from."""
    references = [nearest_reference(score.task, score.metric, parameters) for score in scores]
    sources = sorted({f"{reference.model}: {reference.source}" for reference in references if reference})
    notes = "".join(f"\n- {source}" for source in sources)
    return markdown(HEADER, score_rows(scores, parameters)) + (f"\n\nPublished by:\n{notes}\n" if notes else "\n")
