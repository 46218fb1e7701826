"""Runs over learning rates and batches: which of them share N and D, which have the least loss, and how a table states them.

The law of the loss is fitted to the least loss at each N and D, the laws of learning rate and batch to all
runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, get_args

import numpy as np

from isoflop.scaling.checks import positive
from isoflop.scaling.columns import Columns
from isoflop.scaling.hyperparameters import OptimizerName
from isoflop.scaling.points import Array, Indices, Points, TunedPoints
from isoflop.utils.errors import UserError

SAME_TOKENS = 1.05  # runs of one N and D differ by this factor in D at most: D is rounded to steps of several batches
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


def same_size(parameters: Array, tokens: Array) -> list[Indices]:
    """Return the indices of the runs of each N and D, smallest first."""
    order = np.lexsort((tokens, parameters))
    n, d = parameters[order], tokens[order]
    starts = np.flatnonzero((np.diff(n) != 0) | (d[1:] > SAME_TOKENS * d[:-1])) + 1
    return np.split(order, starts)


def least_rows(points: Points, pairs: Sequence[Hashable]) -> Indices:
    """Return the runs of each N and D whose pair of learning rate and batch has the least mean loss, in their order."""
    kept: list[int] = []
    for group in same_size(points.parameters, points.tokens):
        losses: dict[Hashable, list[float]] = {}
        for index in group:
            losses.setdefault(pairs[index], []).append(float(points.loss[index]))
        least = min(losses, key=lambda pair: float(np.mean(losses[pair])))
        kept += [int(index) for index in group if pairs[index] == least]
    return np.sort(np.array(kept, dtype=np.intp))


def tuned_rows(
    rows: list[tuple[int, dict[str, Any]]], columns: Columns, points: Points, file: str, sequence_length: int | None
) -> tuple[TunedPoints | str, Indices]:
    """Return a table's runs with their learning rates and batches, or why it has none; and the runs of the least loss.

    `rows` and `points` are the table's runs, in the same order.
    """
    everything = np.arange(len(rows))
    if columns.learning_rate is None or columns.batch is None:
        missing = [
            f"{what} (name one by {flag})"
            for what, flag, column in (
                ("learning rates", "--learning-rate", columns.learning_rate),
                ("batches", "--batch", columns.batch),
            )
            if column is None
        ]
        return f"{file} has no column of {' and of '.join(missing)}", everything
    pairs = [(str(row[columns.learning_rate]), str(row[columns.batch])) for _, row in rows]
    kept = least_rows(points, pairs)
    if len(set(pairs)) == 1 or len(kept) == len(rows):
        return f"{file} has no runs of the same N and D that differ in {columns.learning_rate} or {columns.batch}", everything
    if not columns.without_vocabulary:
        return (
            f"{file}: column {columns.parameters} counts all parameters, by its name; laws of learning rate and batch take N"
            " without embeddings and head: add a column parameters_without_vocabulary and name it by --parameters"
        ), kept
    if not columns.batch_in_tokens and sequence_length is None:
        return (
            f"{file}: column {columns.batch} counts sequences, by its name; give the tokens of one by --sequence-length, or 1 if"
            " it counts tokens"
        ), kept
    numbers = [number for number, _ in rows]
    rate, batch = (
        positive([row.get(name) for _, row in rows], numbers, name, file) for name in (columns.learning_rate, columns.batch)
    )
    unit = 1 if columns.batch_in_tokens else (sequence_length or 1)
    return TunedPoints(points.parameters, points.tokens, rate, unit * batch, points.loss), kept


def optimizer_of(rows: list[tuple[int, dict[str, Any]]], columns: Columns, file: str) -> OptimizerName:
    """Return the optimizer of a table's rows, AdamW without a column of it. Raises `UserError` for several, or an unknown one."""
    if columns.optimizer is None:
        return "adamw"
    found = sorted({str(row.get(columns.optimizer)).strip() for _, row in rows})
    if len(found) > 1:
        raise UserError(
            f"{file}: runs of several optimizers ({', '.join(found)}) follow no single law; choose one by --where"
            f" {columns.optimizer}={found[0]}"
        )
    for name in OPTIMIZERS:
        if found[0].lower() == name:
            return name
    raise UserError(
        f"{file}: {columns.optimizer} = {found[0]!r} is not one of {', '.join(OPTIMIZERS)}, of which laws are kept; rename the"
        " column if it is about something else"
    )
