"""Runs as read from their folders, finished or not.

Losses in nats per token compare only over the same tokenizer and data; runs that differ in either are compared in bits per byte.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe
from isoflop.data.manifest import read_manifest, validation_statistics
from isoflop.plan import cost
from isoflop.train.plots import smoothed
from isoflop.train.records import Row, read_rows
from isoflop.train.run_folder import RunFolder
from isoflop.utils.errors import UserError

NATS, BITS = "nats per token", "bits per byte"


@dataclass(frozen=True)
class RunHistory:
    """Recipe and metrics of a run."""

    name: str
    folder: RunFolder
    recipe: Recipe
    rows: list[Row]
    """One per step."""
    bytes_per_token: float | None
    """Of the validation text; None if neither the summary nor the prepared data are there."""

    @property
    def parameters(self) -> int:
        """N, all parameters."""
        return cost.parameters(self.recipe.model)

    def cost(self, axis: str, row: Row) -> float:
        """Return what the run had spent at a row: `tokens`, `flops` or `hours`."""
        if axis == "hours":
            return float(row["elapsed_s"]) / 3600
        per_token = cost.flops_per_token(self.recipe.model, self.recipe.training.sequence_length) if axis == "flops" else 1
        return float(row["tokens"]) * per_token

    def validation(self, axis: str, unit: str) -> tuple[list[float], list[float]]:
        """Return costs and validation losses of the validated steps."""
        measured = [row for row in self.rows if row["val_loss"] is not None]
        return [self.cost(axis, row) for row in measured], [self.loss(row["val_loss"], unit) for row in measured]

    def training(self, axis: str, unit: str, most_tokens: int) -> tuple[list[float], list[float]]:
        """Return costs and smoothed training losses of the steps with a finite one; `most_tokens` as in `smoothed`."""
        finite = [row for row in self.rows if row["loss"] is not None]
        losses = [self.loss(row["loss"], unit) for row in finite]
        smooth = smoothed([row["tokens"] for row in finite], losses, most_tokens)
        return [self.cost(axis, row) for row in finite], list(smooth)

    def loss(self, nats: float, unit: str) -> float:
        """Convert a loss to the unit of a comparison."""
        return float(nats) if unit == NATS else nats / math.log(2) / (self.bytes_per_token or math.nan)


def read_runs(paths: Sequence[str | Path]) -> list[RunHistory]:
    """Read the runs of some folders, and name each by the last parts of its path that distinguish it.

    Raises `UserError` for a folder without a run, a run without a finished step, and a folder that is given twice.
    """
    folders = [Path(path).resolve() for path in paths]
    if twice := [path for path, folder in zip(paths, folders, strict=True) if folders.count(folder) > 1]:
        raise UserError(f"{twice[0]} is given twice; give every run once")
    depth = next(n for n in range(1, 100) if len({folder.parts[-n:] for folder in folders}) == len(folders))
    return [_read_run(str(path), "/".join(folder.parts[-depth:])) for path, folder in zip(paths, folders, strict=True)]


def _read_run(path: str, name: str) -> RunHistory:
    folder = RunFolder(path)
    if not (folder.path / "recipe.yaml").is_file():
        raise UserError(f"{path} is not a run folder: it has no recipe.yaml; give folders that `isoflop pretrain` wrote")
    rows = read_rows(folder.metrics, last_step=sys.maxsize)
    if not rows:
        raise UserError(f"{path} has no finished step in metrics.jsonl yet; compare it later")
    recipe = load_recipe(folder.path / "recipe.yaml")
    return RunHistory(name, folder, recipe, rows, _bytes_per_token(folder, recipe))


def _bytes_per_token(folder: RunFolder, recipe: Recipe) -> float | None:
    if summary := folder.read_summary():
        return float(summary.val_loss / math.log(2) / summary.bits_per_byte)
    try:
        return validation_statistics(read_manifest(recipe.data.prepared_dir), recipe.data.shares())[0]
    except UserError:  # the prepared data are on another machine
        return None


def group_by_data(runs: list[RunHistory]) -> list[list[RunHistory]]:
    """Group the runs by tokenizer and data; within a group, losses compare in nats per token."""
    groups: dict[str, list[RunHistory]] = {}
    for run in runs:
        sections = run.recipe.model_dump(mode="json", include={"tokenizer", "data"}, exclude={"data": {"prepared_dir"}})
        groups.setdefault(json.dumps(sections, sort_keys=True), []).append(run)
    return list(groups.values())


def common_unit(runs: list[RunHistory]) -> str:
    """Return the unit in which all losses compare. Raises `UserError` if that is bits per byte, and a run's are unknown."""
    if len(group_by_data(runs)) == 1:
        return NATS
    if lacking := [run for run in runs if run.bytes_per_token is None]:
        raise UserError(
            f"{lacking[0].folder.path}: these runs have several tokenizers or data, so that only bits per byte compare, and this"
            f" one is neither finished nor are its data at {lacking[0].recipe.data.prepared_dir}; compare it when it is finished"
        )
    return BITS


def most_tokens(runs: list[RunHistory]) -> int:
    """Return the tokens of the longest run."""
    return max(int(run.rows[-1]["tokens"]) for run in runs)
