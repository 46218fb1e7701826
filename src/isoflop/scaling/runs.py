"""Measured runs from run folders: exact N, D and FLOPs, and the loss curves."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import numpy as np

from isoflop.compare.runs import NATS, RunHistory, read_runs
from isoflop.config.recipe import differences, flatten
from isoflop.data.manifest import read_manifest
from isoflop.plan import cost
from isoflop.plan.shape import tuned_parameters
from isoflop.scaling.laws import LossDecayModel
from isoflop.scaling.measured import FEWEST_POINTS, Measured
from isoflop.scaling.points import Curve, Points, TunedPoints
from isoflop.scaling.tuned import least_rows
from isoflop.train.run_folder import RunFolder
from isoflop.utils.errors import UserError

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)  # of a run's tokens, at which its final loss is predicted
FEWEST_RUNS = 5  # two more than the coefficients of `LossDecayModel`


class Finished(NamedTuple):
    """A finished run, with the values of its summary."""

    run: RunHistory
    tokens: float
    flops: float
    loss: float
    unique_tokens: float | None
    """Tokens of its training split; None if the prepared data are on another machine."""


def measured_runs(paths: list[str], hyperparameters: bool = False) -> Measured:
    """Read the finished runs at or below some folders; `hyperparameters` if no law of the loss will be fitted.

    Raises `UserError` for runs whose losses do not compare.
    """
    folders = _run_folders(paths)
    done = [folder for folder in folders if RunFolder(folder).summary.exists()]
    warnings = [f"{folder} is not finished and is left out" for folder in folders if folder not in done]
    finished = [_finished(run) for run in read_runs(done)]
    warnings += [
        f"{one.run.name} ended at a loss that is not a number and is left out" for one in finished if math.isnan(one.loss)
    ]
    finished = [one for one in finished if not math.isnan(one.loss)]
    _require_comparable([one.run for one in finished])
    best, tuned = _least(finished)
    notes = [] if len(best) == len(finished) else [f"the loss law is of the best of {len(finished)} runs at each N and D"]
    if len(best) < FEWEST_POINTS and not hyperparameters:
        raise UserError(
            f"{', '.join(paths)}: {len(best)} finished runs{' at distinct N and D' if notes else ''}, and a law of 5 coefficients"
            f" needs {FEWEST_POINTS} or more; train more, e.g. by `isoflop sweep`"
            + ("; or fit the learning rates and batches alone by --hyperparameters" if notes else "")
        )
    layers = [cost.shape_of(one.run.recipe.model).num_layers for one in best]
    recipe, decays = finished[0].run.recipe, {one.run.recipe.optimizer.weight_decay for one in finished}
    return Measured(
        points=_points(best),
        curves=[_curve(one.run) for one in best],
        origin=_origin(finished),
        notes=notes,
        warnings=warnings + _repetitions(finished),
        progress=loss_decay(best),
        layers=(min(layers), max(layers)),
        optimizer=recipe.optimizer.name,
        parametrization=recipe.parametrization.name,
        weight_decay=decays.pop() if len(decays) == 1 else None,
        tuned=tuned,
    )


def _repetitions(finished: list[Finished]) -> list[str]:
    """Return a warning for each run that repeats its text."""
    return [
        f"{one.run.name} saw {one.tokens:,.0f} tokens of {one.unique_tokens:,.0f} ({one.tokens / one.unique_tokens:.2f} epochs):"
        " repeated tokens are worth less than fresh ones"
        for one in finished
        if one.unique_tokens and one.tokens > one.unique_tokens
    ]


def _least(finished: list[Finished]) -> tuple[list[Finished], TunedPoints | str]:
    """Return the runs of the least loss at each N and D; and all with their rates and batches, or why these do not vary."""
    points = _points(finished)
    recipes = [one.run.recipe for one in finished]
    pairs = [(recipe.optimizer.peak_learning_rate, recipe.training.tokens_per_step) for recipe in recipes]
    kept = least_rows(points, pairs)
    if len(kept) == len(finished):
        return finished, "no runs of the same N and D differ in learning rate or batch; train such by `isoflop sweep`"
    rate, batch = np.array(pairs, dtype=float).T
    sizes = np.array([float(tuned_parameters(recipe.model, recipe.parametrization)) for recipe in recipes])
    return [finished[index] for index in kept], TunedPoints(sizes, points.tokens, rate, batch, points.loss)


def _run_folders(paths: list[str]) -> list[str]:
    """Return the folders with a recipe and metrics at or below each path."""
    found = []
    for path in paths:
        found_here = []
        for folder, inside, files in os.walk(path):
            if {"recipe.yaml", "metrics.jsonl"} <= set(files):
                found_here.append(folder)
                inside.clear()  # a run folder contains no further runs
            inside.sort()
        if not found_here:
            raise UserError(f"{path} holds no run (recipe.yaml and metrics.jsonl); give folders that `isoflop pretrain` wrote")
        found += found_here
    return found


def _finished(run: RunHistory) -> Finished:
    summary = run.folder.read_summary()
    assert summary is not None  # the caller selects finished runs
    try:
        unique = read_manifest(run.recipe.data.prepared_dir).windows("train") * run.recipe.training.sequence_length
    except UserError:  # the prepared data are on another machine
        unique = None
    return Finished(run, summary.tokens, summary.flops, summary.val_loss, unique)


def _require_comparable(runs: list[RunHistory]) -> None:
    """Raise `UserError` unless all runs share tokenizer, data and sequence length, on which nats per token depend, and optimizer
    and parametrization, each of which has a law of its own."""
    values = [_comparable_settings(run) for run in runs]
    for run, other in zip(runs, values, strict=True):
        if changed := differences(values[0], other):
            raise UserError(
                f"{run.name}: its losses do not compare with those of {runs[0].name} ({'; '.join(changed)}); fit runs of one"
                " tokenizer, data, sequence length, optimizer and parametrization: give their folders alone"
            )


def _comparable_settings(run: RunHistory) -> dict[str, Any]:
    sections = {"tokenizer", "data", "parametrization"}
    tree = run.recipe.model_dump(mode="json", include=sections, exclude={"data": {"prepared_dir"}})
    optimizer, training = run.recipe.optimizer, run.recipe.training
    return flatten(tree | {"optimizer": {"name": optimizer.name}, "training": {"sequence_length": training.sequence_length}})


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


def _curve(run: RunHistory) -> Curve:
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


def loss_decay(finished: list[Finished]) -> LossDecayModel | None:
    """Fit how far the final losses lie below those at each share of the tokens, by N and D.

    None for fewer than `FEWEST_RUNS` runs, for runs of several learning-rate schedules, and if no share's losses all decrease.
    """
    schedules = {one.run.recipe.schedule.name for one in finished}
    if len(finished) < FEWEST_RUNS or len(schedules) > 1:
        return None
    logs = np.log([[one.run.parameters, one.tokens] for one in finished])
    design = np.column_stack([np.ones(len(logs)), logs - logs.mean(axis=0)])
    covariance = np.linalg.pinv(design.T @ design)  # a slope is 0 if all runs share that N or D
    gaps = []
    for share in SHARES:
        log_gaps = np.array([_log_gap(one, share) for one in finished])
        if (log_gaps > 0).all():
            intercept, by_n, by_d = coefficients = covariance @ design.T @ np.log(log_gaps)
            free = len(log_gaps) - np.linalg.matrix_rank(design)
            deviation = math.sqrt(float(np.sum((np.log(log_gaps) - design @ coefficients) ** 2)) / free)
            gaps.append((share, float(intercept), float(by_n), float(by_d), deviation))
    center = (float(logs[:, 0].mean()), float(logs[:, 1].mean()))
    return LossDecayModel(schedule=schedules.pop(), center=center, covariance=covariance.tolist(), gaps=gaps) if gaps else None


def _log_gap(one: Finished, share: float) -> float:
    """Return log(loss at a share of the tokens / final loss), interpolated linearly; NaN before the first validation."""
    tokens, losses = one.run.validation("tokens", NATS)
    return math.log(float(np.interp(share * one.tokens, tokens, losses, left=math.nan)) / one.loss)
