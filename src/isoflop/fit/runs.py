"""Measured runs from the folders that `scripts/pretrain.py` wrote: exact N, D and FLOPs, and the losses on the way."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import numpy as np

from isoflop.compare.runs import NATS, Run, read_runs
from isoflop.data.manifest import read_manifest
from isoflop.errors import UserError
from isoflop.fit.measured import FEWEST_POINTS, Measured
from isoflop.recipe import differences, flatten
from isoflop.run_folder import RunFolder
from isoflop.scaling.laws import Progress
from isoflop.scaling.points import Curve, Points

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)  # of a run's tokens, from where its last loss is foretold
FEWEST_RUNS = 5  # two more than the coefficients of how far losses fall


class Finished(NamedTuple):
    """A run that is done."""

    run: Run
    tokens: float
    flops: float
    loss: float
    unique_tokens: float | None
    """Of its training split; None where the prepared data are elsewhere."""


def measured_runs(paths: list[str]) -> Measured:
    """The finished runs in some folders, or in folders of these. Raises `UserError` where their losses do not compare."""
    folders = _run_folders(paths)
    done = [folder for folder in folders if RunFolder(folder).summary.exists()]
    warnings = [f"{folder} is not finished and is left out" for folder in folders if folder not in done]
    finished = [_finished(run) for run in read_runs(done)]
    warnings += [f"{one.run.name} ended at a loss that is no number and is left out" for one in finished if math.isnan(one.loss)]
    finished = [one for one in finished if not math.isnan(one.loss)]
    _require_comparable([one.run for one in finished])
    if len(finished) < FEWEST_POINTS:
        raise UserError(
            f"{', '.join(paths)}: {len(finished)} finished runs, and a law of 5 coefficients needs {FEWEST_POINTS} or more;"
            " train more, e.g. by scripts/sweep.py"
        )
    warnings += [
        f"{one.run.name} saw {one.tokens:,.0f} tokens of {one.unique_tokens:,.0f} ({one.tokens / one.unique_tokens:.2f} epochs):"
        " repeated tokens are worth less than fresh ones"
        for one in finished
        if one.unique_tokens and one.tokens > one.unique_tokens
    ]
    progress = progress_of(finished)
    return Measured(_points(finished), [_curve(one.run) for one in finished], _origin(finished), "total", [], warnings, progress)


def _run_folders(paths: list[str]) -> list[str]:
    """Folders with a recipe and metrics; in one that is none itself, those beneath it."""
    found = []
    for path in paths:
        beneath = []
        for folder, inside, files in os.walk(path):
            if {"recipe.yaml", "metrics.jsonl"} <= set(files):
                beneath.append(folder)
                inside.clear()  # its checkpoints hold no runs
            inside.sort()
        if not beneath:
            raise UserError(f"{path} holds no run (recipe.yaml and metrics.jsonl); give folders that scripts/pretrain.py wrote")
        found += beneath
    return found


def _finished(run: Run) -> Finished:
    summary = run.folder.finished()
    assert summary is not None  # only these are read
    try:
        unique = read_manifest(run.recipe.data.prepared_dir).windows("train") * run.recipe.training.sequence_length
    except UserError:  # the data are on another machine
        unique = None
    return Finished(run, summary["tokens"], summary["flops"], summary["val_loss"], unique)


def _require_comparable(runs: list[Run]) -> None:
    """Losses in nats per token compare over one tokenizer, one text and one length of context."""
    values = [_what_decides_the_unit(run) for run in runs]
    for run, other in zip(runs, values, strict=True):
        if changed := differences(values[0], other):
            raise UserError(
                f"{run.name}: its losses do not compare with those of {runs[0].name} ({'; '.join(changed)}); fit runs of one"
                " tokenizer, data and sequence length"
            )


def _what_decides_the_unit(run: Run) -> dict[str, Any]:
    tree = run.recipe.model_dump(mode="json", include={"tokenizer", "data"}, exclude={"data": {"prepared_dir"}})
    return flatten(tree | {"training": {"sequence_length": run.recipe.training.sequence_length}})


def _points(finished: list[Finished]) -> Points:
    known = all(one.unique_tokens for one in finished)
    return Points(
        np.array([float(one.run.parameters) for one in finished]),
        np.array([float(one.tokens) for one in finished]),
        np.array([float(one.flops) for one in finished]),
        np.array([one.loss for one in finished]),
        np.ones(len(finished)),
        np.array([float(one.unique_tokens or 0) for one in finished]) if known else None,
    )


def _curve(run: Run) -> Curve:
    tokens, losses = run.validation("tokens", NATS)
    flops, _ = run.validation("flops", NATS)
    return Curve(run.name, float(run.parameters), np.array(tokens), np.array(flops), np.array(losses))


def _origin(finished: list[Finished]) -> str:
    recipe = finished[0].run.recipe
    tokenizer = recipe.tokenizer.name or f"a byte-level BPE of {recipe.tokenizer.train_vocab_size} entries trained on the data"
    data = [
        getattr(source, "name", None) or ", ".join(getattr(source, "files", [name]))
        for name, source in recipe.data.sources().items()
    ]
    return (
        f"{len(finished)} runs; tokenizer: {tokenizer}; data: {'; '.join(data)};"
        f" sequence length {recipe.training.sequence_length}"
    )


def progress_of(finished: list[Finished]) -> Progress | None:
    """How far the runs' last losses lie below those at each share of their tokens, by size and length.

    None where fewer than `FEWEST_RUNS` fell from there on, or the runs have several schedules of the learning rate.
    """
    schedules = {one.run.recipe.schedule.name for one in finished}
    if len(finished) < FEWEST_RUNS or len(schedules) > 1:
        return None
    logs = np.log([[one.run.parameters, one.tokens] for one in finished])
    design = np.column_stack([np.ones(len(logs)), logs - logs.mean(axis=0)])
    covariance = np.linalg.pinv(design.T @ design)  # of sizes or lengths that are all the same: no slope
    gaps = []
    for share in SHARES:
        falls = np.array([_fall(one, share) for one in finished])
        if (falls > 0).all():
            intercept, by_n, by_d = coefficients = covariance @ design.T @ np.log(falls)
            free = len(falls) - np.linalg.matrix_rank(design)
            deviation = math.sqrt(float(np.sum((np.log(falls) - design @ coefficients) ** 2)) / free)
            gaps.append((share, float(intercept), float(by_n), float(by_d), deviation))
    center = (float(logs[:, 0].mean()), float(logs[:, 1].mean()))
    return Progress(schedule=schedules.pop(), center=center, covariance=covariance.tolist(), gaps=gaps) if gaps else None


def _fall(one: Finished, share: float) -> float:
    """log(loss at a share of the tokens / last loss), between validations by a line; not a number before the first one."""
    tokens, losses = one.run.validation("tokens", NATS)
    return math.log(float(np.interp(share * one.tokens, tokens, losses, left=math.nan)) / one.loss)
