"""What a run's folder says of it, and runs against one another at equal cost.

Losses in nats per token compare only over the same tokenizer and data; runs that differ in either are compared in bits per byte.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isoflop import cost
from isoflop.data.manifest import read_manifest, validation_facts
from isoflop.errors import UserError
from isoflop.recipe import Recipe
from isoflop.recipe_file import load_recipe
from isoflop.records import Row, read_rows
from isoflop.run_folder import RunFolder
from isoflop.scores import ERRORS, Score, read_scores

NATS, BITS = "nats per token", "bits per byte"


@dataclass(frozen=True)
class Run:
    """A run as its folder has it, finished or not."""

    name: str
    folder: RunFolder
    recipe: Recipe
    rows: list[Row]
    """One a step."""
    bytes_per_token: float | None
    """Of the validation text; None where neither a summary nor the prepared data tells."""

    @property
    def parameters(self) -> int:
        """N, all of them."""
        return cost.parameters(self.recipe.model)

    def cost(self, axis: str, row: Row) -> float:
        """What a run had spent by a row: `tokens`, `flops` or `hours`."""
        if axis == "hours":
            return float(row["elapsed_s"]) / 3600
        per_token = cost.flops_per_token(self.recipe.model, self.recipe.training.sequence_length) if axis == "flops" else 1
        return float(row["tokens"]) * per_token

    def validation(self, axis: str, unit: str) -> tuple[list[float], list[float]]:
        """Costs and validation losses of the steps that were validated."""
        measured = [row for row in self.rows if row["val_loss"] is not None]
        return [self.cost(axis, row) for row in measured], [self.loss(row["val_loss"], unit) for row in measured]

    def loss(self, nats: float, unit: str) -> float:
        """A loss in the unit of a comparison."""
        return float(nats) if unit == NATS else nats / math.log(2) / (self.bytes_per_token or math.nan)


def read_runs(paths: list[str]) -> list[Run]:
    """The runs of some folders, named by the last parts of their paths that tell them apart.

    Raises `UserError` for a folder that is no run's, one without a finished step, and one that is given twice.
    """
    folders = [Path(path).resolve() for path in paths]
    if twice := [path for path, folder in zip(paths, folders, strict=True) if folders.count(folder) > 1]:
        raise UserError(f"{twice[0]} is given twice; give every run once")
    depth = next(n for n in range(1, 100) if len({folder.parts[-n:] for folder in folders}) == len(folders))
    return [_read_run(path, "/".join(folder.parts[-depth:])) for path, folder in zip(paths, folders, strict=True)]


def _read_run(path: str, name: str) -> Run:
    folder = RunFolder(path)
    if not (folder.path / "recipe.yaml").is_file():
        raise UserError(f"{path} is no run's folder: it has no recipe.yaml; give folders that scripts/pretrain.py wrote")
    rows = read_rows(folder.metrics, last_step=sys.maxsize)
    if not rows:
        raise UserError(f"{path} has no finished step in metrics.jsonl yet; compare it later")
    recipe = load_recipe(folder.path / "recipe.yaml")
    return Run(name, folder, recipe, rows, _bytes_per_token(folder, recipe))


def _bytes_per_token(folder: RunFolder, recipe: Recipe) -> float | None:
    if summary := folder.finished():
        return float(summary["val_loss"] / math.log(2) / summary["bits_per_byte"])
    try:
        return validation_facts(read_manifest(recipe.data.prepared_dir), recipe.data.shares())[0]
    except UserError:  # the data are on another machine
        return None


def compare(paths: list[str]) -> tuple[list[Run], dict[str, Any]]:
    """The runs, and all that a table or a figure shows of them, at full precision."""
    runs = read_runs(paths)
    unit = common_unit(runs)
    scores = {run.name: scores_of_run(run) for run in runs}
    return runs, {
        "unit": unit,
        "same_data": [[run.name for run in alike] for alike in by_data(runs)],
        "runs": [facts(run) for run in runs],
        "at_equal_cost": [
            at_equal_cost(runs[0], other, axis, unit) for other in runs[1:] for axis in ("tokens", "flops", "hours")
        ],
        "scores": score_rows(scores),
    }


def by_data(runs: list[Run]) -> list[list[Run]]:
    """The runs by tokenizer and data, as their recipes have them: within a group, losses compare in nats per token."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        sections = run.recipe.model_dump(mode="json", include={"tokenizer", "data"}, exclude={"data": {"prepared_dir"}})
        groups.setdefault(json.dumps(sections, sort_keys=True), []).append(run)
    return list(groups.values())


def common_unit(runs: list[Run]) -> str:
    """The unit in which all the runs' losses compare. Raises `UserError` where a run that needs one has no bytes per token."""
    if len(by_data(runs)) == 1:
        return NATS
    if lacking := [run for run in runs if run.bytes_per_token is None]:
        raise UserError(
            f"{lacking[0].folder.path}: these runs have several tokenizers or data, so that only bits per byte compare, and this"
            f" one is neither finished nor are its data at {lacking[0].recipe.data.prepared_dir}; compare it when it is finished"
        )
    return BITS


def facts(run: Run) -> dict[str, Any]:
    """The numbers of one run, by its last finished step."""
    last = run.rows[-1]
    measured = [row["val_loss"] for row in run.rows if row["val_loss"] is not None]
    val_loss = measured[-1] if measured else None
    mfus = [row["mfu"] for row in run.rows if isinstance(row.get("mfu"), int | float)]
    return {
        "name": run.name,
        "model_type": run.recipe.model.model_type,
        "parameters": run.parameters,
        "steps": last["step"],
        "planned_steps": run.recipe.training.num_steps(run.parameters),
        "tokens": last["tokens"],
        "tokens_per_parameter": last["tokens"] / run.parameters,
        "flops": run.cost("flops", last),
        "hours": run.cost("hours", last),
        "loss": last["loss"],
        "val_loss": val_loss,
        "bits_per_byte": run.loss(val_loss, BITS) if val_loss is not None and run.bytes_per_token else None,
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in run.rows),
        "mfu": statistics.median(mfus) if mfus else None,
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in run.rows),
    }


def at_equal_cost(first: Run, other: Run, axis: str, unit: str) -> dict[str, Any]:
    """Validation losses of two runs where the one that spent less ended; between measurements by a straight line."""
    curves = [run.validation(axis, unit) for run in (first, other)]
    whole = all(costs for costs, _ in curves)
    at = min(costs[-1] for costs, _ in curves) if whole else None
    losses = [interpolated(at, *curve) if at is not None else None for curve in curves]
    names = {"first": first.name, "other": other.name}
    return {"axis": axis, "at": at, **names, "first_loss": losses[0], "other_loss": losses[1]}


def interpolated(at: float, costs: list[float], values: list[float]) -> float | None:
    """A curve's value at a cost, None outside of it."""
    return float(np.interp(at, costs, values)) if costs[0] <= at <= costs[-1] else None


def scores_of_run(run: Run) -> dict[tuple[str, str], Score]:
    """Downstream scores of a run: of its evaluations, and where these lack a task, the last ones of training."""
    last: dict[tuple[str, str], Score] = {}
    for row in run.rows:
        for key in row:
            if "/" in key and key.isprintable() and not key.endswith("_stderr") and isinstance(row[key], int | float):
                (task, metric), error = key.split("/", 1), row.get(f"{key}_stderr")
                last[task, metric] = Score(task, metric, row[key], error if isinstance(error, int | float) else None, 0, True)
    return last | {(score.task, score.metric): score for score in read_scores(run.folder.evaluations)}


def score_rows(scores: dict[str, dict[tuple[str, str], Score]]) -> list[dict[str, Any]]:
    """One row a task and metric: value and standard error of each run, and whether it differs from the first run's."""
    first, rows = next(iter(scores.values())), []
    for key in sorted({key for of_run in scores.values() for key in of_run}):
        found = {name: of_run[key] for name, of_run in scores.items() if key in of_run}
        values = {
            name: {"value": score.value, "stderr": score.stderr, "differs": differs(first.get(key), score)}
            for name, score in found.items()
        }
        rows.append({"task": key[0], "metric": key[1], "runs": values})
    return rows


def differs(one: Score | None, other: Score) -> bool | None:
    """Whether two scores are further apart than 1.96 standard errors of their difference; None where that is not known."""
    if one is None or one.stderr is None or other.stderr is None:
        return None
    return abs(one.value - other.value) > ERRORS * math.hypot(one.stderr, other.stderr)
