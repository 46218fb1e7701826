"""Scores of a model: read from lm-eval's results and compared with the nearest published ones.

As in lm-eval, accuracies are fractions, and a perplexity's name states its unit. `eval/references/` holds published scores of the
same tasks.
"""

from __future__ import annotations

import json
import math
import operator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from isoflop.config.shipped import PACKAGE
from isoflop.utils.credentials import hide_in_tree
from isoflop.utils.errors import UserError
from isoflop.utils.io import atomic_write, require_own_files
from isoflop.utils.tables import markdown, table
from isoflop.utils.untrusted import read_json, shown

EVAL = PACKAGE / "eval"
RESULTS = "results.json"
ERRORS = 1.96  # standard errors on either side that hold 95% of a normal distribution


class Score(NamedTuple):
    """One number of one task."""

    task: str
    metric: str
    """lm-eval's name; if filtered, with its filter after a comma."""
    value: float
    stderr: float | None
    """Standard error over the documents; None if unknown."""
    num_documents: int
    higher_is_better: bool
    chance: float | None = None
    """Score of guessing; None if unknown, and for metrics other than accuracies."""
    note: str | None = None
    """Remark of the task's file on its scores."""

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
    """Return the numbers in lm-eval's results, in their order."""
    scores = []
    for task, count in results["n-samples"].items():  # leaves out groups, which have no numbers of their own
        values, better = results["results"][task], results["higher_is_better"][task]
        chance = results.get("chance", {}).get(task)
        note = (results.get("configs", {}).get(task, {}).get("metadata") or {}).get("note")
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
                    chance=float(chance) if metric.startswith("acc") and isinstance(chance, int | float) else None,
                    note=note if isinstance(note, str) else None,
                )
            )
    return scores


def require_own_results(folder: Path) -> None:
    """Raise `UserError` if a file to be written exists and is not from `write_results`."""
    require_own_files([folder / RESULTS, folder / "results.md"], f"results in {folder}", ["results", "n-samples", "config"])


def write_results(results: dict[str, Any], folder: Path, parameters: int | None) -> None:
    """Write lm-eval's results to `results.json`, and the scores with published ones to `results.md`.

    Credentials are removed from lm-eval's record of the arguments (`--model-args token=...`) and of the machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # First: ownership of the files is read from it. As in lm-eval, what JSON lacks (functions, dtypes) becomes text.
    plain = hide_in_tree(json.loads(json.dumps(results, default=str)))
    atomic_write(folder / RESULTS, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    atomic_write(folder / "results.md", score_markdown(scores_of(results), parameters))


def read_scores(evaluations: Path) -> list[Score]:
    """Return the newest score of every task and metric in a run's `evaluations/`, which has a folder per suite."""
    newest: dict[tuple[str, str], Score] = {}
    for file in sorted(evaluations.glob(f"*/{RESULTS}"), key=lambda file: file.stat().st_mtime):
        results = read_json(file, "move it away, or run `isoflop eval` again")
        try:
            scores = scores_of(results)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{file} is not as lm-eval writes results ({type(error).__name__}: {shown(error)}); move it away, or run"
                " `isoflop eval` again"
            ) from None
        newest |= {(score.task, score.metric): score for score in scores}
    return [newest[key] for key in sorted(newest)]


@cache
def _published(folder: Path) -> list[dict[str, Any]]:
    return [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.yaml"))]


def nearest_reference(task: str, metric: str, parameters: int | None, folder: Path = EVAL / "references") -> Reference | None:
    """Return the published score of the model nearest in size (by the ratio of parameters), if there is one."""
    if parameters is None:
        return None
    found = [
        Reference(model["name"], model["parameters"], model["scores"][task][metric], page["source"])
        for page in _published(folder)
        for model in page["models"]
        if metric in model["scores"].get(task, {})
    ]
    return min(found, key=lambda reference: abs(math.log(reference.parameters / parameters)), default=None)


def compare_with_reference(score: Score, reference: Reference) -> str:
    """Return the difference to a published score, or that it is within 1.96 standard errors of the score."""
    difference = score.value - reference.value
    if score.stderr is None:
        return f"{difference:+.4g}, error unknown"
    if abs(difference) <= ERRORS * score.stderr:
        return "within the error"
    return f"{difference:+.4g}, {'better' if (difference > 0) == score.higher_is_better else 'worse'}"


HEADER = ["task", "metric", "value", "standard error", "chance", "documents"]
PUBLISHED_HEADER = ["nearest published", "its value", "difference"]


def table_rows(scores: list[Score], parameters: int | None) -> tuple[list[str], list[list[str]]]:
    """Return a header and a row per score, with the nearest published scores if there are any."""
    rows = []
    references = [nearest_reference(score.task, score.metric, parameters) for score in scores]
    for score, reference in zip(scores, references, strict=True):
        stderr, chance = ("n/a" if value is None else _short(value) for value in (score.stderr, score.chance))
        row = [score.task, score.metric, _short(score.value), stderr, chance, f"{score.num_documents:,}"]
        beside = [reference.model, _short(reference.value), compare_with_reference(score, reference)] if reference else ["-"] * 3
        rows.append(row + beside if any(references) else row)
    return HEADER + (PUBLISHED_HEADER if any(references) else []), rows


def score_table(scores: list[Score], parameters: int | None) -> str:
    """Return the scores as a table for a terminal, and the notes of their tasks."""
    return "\n".join([table(*table_rows(scores, parameters)), *_notes(scores)])


def score_markdown(scores: list[Score], parameters: int | None) -> str:
    """Return the scores in Markdown, with the notes of their tasks and the sources of the published ones."""
    references = [nearest_reference(score.task, score.metric, parameters) for score in scores]
    sources = sorted({f"{reference.model}: {reference.source}" for reference in references if reference})
    parts = [markdown(*table_rows(scores, parameters)), "\n".join(f"- {note}" for note in _notes(scores))]
    parts.append("Published by:\n\n" + "\n".join(f"- {source}" for source in sources) if sources else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def _notes(scores: list[Score]) -> list[str]:
    return list(dict.fromkeys(f"{score.task}: {score.note}" for score in scores if score.note))
