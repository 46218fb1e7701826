"""Measured runs from one table of N, D or C, and loss: a CSV, Parquet or JSON file, or a DataFrame."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from isoflop.scaling.checks import check_units, drop_repeated, positive
from isoflop.scaling.columns import Columns, find_columns
from isoflop.scaling.measured import FEWEST_POINTS, Measured
from isoflop.scaling.options import FitOptions
from isoflop.scaling.points import Curve, Points
from isoflop.scaling.tuned import optimizer_of, tuned_rows
from isoflop.utils.errors import UserError, nearest
from isoflop.utils.untrusted import unique_keys

if TYPE_CHECKING:
    import pandas

Rows = list[dict[str, Any]]


def read_table(path: str, options: FitOptions = FitOptions()) -> Measured:  # noqa: B008 (it is frozen)
    """Read and check the points of a table file.

    Rows are counted from 1, without the header. Several rows of one run are its losses during training; the last one is its
    point. Raises `UserError` that names file, rows and column of what is wrong.
    """
    return _measured(_read(path), Path(path).name, options)


def read_frame(frame: pandas.DataFrame, options: FitOptions = FitOptions()) -> Measured:  # noqa: B008
    """Read and check the points of a DataFrame, as `read_table` does; its rows are counted from 1 too."""
    return _measured(frame.to_dict("records"), "the DataFrame", options)


def _measured(cells: Rows, file: str, options: FitOptions) -> Measured:
    rows = list(enumerate(cells, start=1))
    if not rows:
        raise UserError(f"{file} has no rows; a law needs {FEWEST_POINTS} or more")
    header = list(dict.fromkeys(name for _, row in rows for name in row))
    columns = find_columns(header, file, options.columns)
    for condition in options.where:
        rows = _matching(rows, condition, header, file)
    points, notes = _points(rows, columns, file)
    pairs = [tuple(row.get(name) for name in (columns.learning_rate, columns.batch) if name) for _, row in rows]
    kept, warnings = drop_repeated(points, pairs, [number for number, _ in rows], file)
    points, rows = points.take(kept), [rows[i] for i in kept]
    curves, last = _curves(points, [row.get(columns.run) for _, row in rows] if columns.run else [])
    if curves:
        notes.append(
            f"rows with the same {columns.run} are one run during training, and its last row is its point ({len(last)} points of"
            f" {len(rows)} rows); rename that column if they are separate runs"
        )
    points, rows = points.take(last), [rows[i] for i in last]
    tuned, least = tuned_rows(rows, columns, points, file, options.sequence_length)
    if len(least) < len(rows):
        notes.append(f"the loss law is of the best of {len(rows)} runs at each N and D")
        warnings += [f"no laws of learning rate and batch: {tuned}"] if isinstance(tuned, str) else []
    points = points.take(least)
    if len(least) < FEWEST_POINTS and not options.hyperparameters:
        distinct = " of distinct N and D" if len(least) < len(rows) else ""
        raise UserError(
            f"{file} has {len(least)} points{distinct}, and a law of 5 coefficients needs {FEWEST_POINTS} or more; add runs"
        )
    of = f" where {' and '.join(options.where)}" if options.where else ""
    counts: Literal["total", "without_vocabulary"] = "without_vocabulary" if columns.without_vocabulary else "total"
    origin = f"{len(rows)} points of {file}{of}"
    optimizer = optimizer_of(rows, columns, file)
    return Measured(points, curves, origin, counts, notes, warnings, optimizer=optimizer, tuned=tuned)


def _points(rows: list[tuple[int, dict[str, Any]]], columns: Columns, file: str) -> tuple[Points, list[str]]:
    """Return all rows as points, and notes about derived values."""
    numbers = [number for number, _ in rows]
    given = {
        key: positive([row.get(name) for _, row in rows], numbers, name, file)
        for key, name in columns._asdict().items()
        if name is not None and key in ("parameters", "loss", "tokens", "flops", "weight", "unique_tokens")
    }
    check_units(given, columns, numbers, file)
    n, d, c = given["parameters"], given.get("tokens"), given.get("flops")
    notes = []
    if d is None:
        c = given["flops"]
        d = c / (6 * n)
        notes.append(f"tokens are C / (6 N): {file} has no column of them")
    elif c is None:
        c = 6 * n * d
        notes.append(f"FLOPs are 6 N D: {file} has no column of them")
    return Points(n, d, c, given["loss"], given.get("weight", np.ones_like(n)), given.get("unique_tokens")), notes


def _curves(points: Points, runs: list[Any]) -> tuple[list[Curve], NDArray[np.int64]]:
    """Return the curves of runs with several rows, and the index of each run's last row.

    The column does not name runs if equal entries differ in N or repeat D; then every row is a run.
    """
    groups: dict[Any, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(run, []).append(index)
    ordered = [np.array(sorted(group, key=lambda i: points.tokens[i])) for group in groups.values()]
    one_size = all(np.ptp(points.parameters[group]) == 0 for group in ordered)
    if not runs or not one_size or not all(np.all(np.diff(points.tokens[group]) > 0) for group in ordered):
        return [], np.arange(len(points.loss))
    curves = [
        Curve(str(run), float(points.parameters[group[0]]), points.tokens[group], points.flops[group], points.loss[group])
        for run, group in zip(groups, ordered, strict=True)
        if len(group) > 1
    ]
    return curves, np.sort([group[-1] for group in ordered])


def _matching(
    rows: list[tuple[int, dict[str, Any]]], condition: str, header: list[str], file: str
) -> list[tuple[int, dict[str, Any]]]:
    column, equals, value = condition.partition("=")
    if not equals or column not in header:
        raise UserError(f"--where {condition}: not COLUMN=VALUE of a column of {file}{nearest(column, header)}")
    kept = [(number, row) for number, row in rows if str(row.get(column)) == value]
    if not kept:
        there = list(dict.fromkeys(str(row.get(column)) for _, row in rows))
        raise UserError(f"--where {condition}: no row of {file} has it{nearest(value, there[:20])}")
    return kept


def _read(path: str) -> Rows:
    """Return the rows of a file; cells of a CSV are text."""
    readers = {".csv": _read_csv, ".parquet": _read_parquet, ".json": _read_json, ".jsonl": _read_json}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(f"{path} is neither a table ({', '.join(readers)}) nor a folder of runs; give one of these")
    try:
        return reader(Path(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; give a table or folders of runs") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from None


def _read_csv(file: Path) -> Rows:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        for name in reader.fieldnames or ():
            if name and (reader.fieldnames or []).count(name) > 1:
                raise UserError(f"{file.name}: the header names the column {name} twice; rename or delete one of the two")
        rows: Rows = list(reader)
    for number, row in enumerate(rows, start=1):
        if None in row:  # cells beyond the header
            raise UserError(f"{file.name}: row {number} has more cells than the header has names; separate columns by one comma")
    return rows


def _read_parquet(file: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: Rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file.name} is no Parquet file ({error}); write it again") from None
    return rows


def _read_json(file: Path) -> Rows:
    """Read a list of objects, or one object per line."""
    text = file.read_text(encoding="utf-8-sig")
    try:
        tree = (
            json.loads(text, object_pairs_hook=unique_keys)
            if text.lstrip().startswith("[")
            else [json.loads(line, object_pairs_hook=unique_keys) for line in text.splitlines() if line.strip()]
        )
    except ValueError as error:
        raise UserError(f"{file.name} is not JSON ({error}); give a list of objects, or one object a line") from None
    if not all(isinstance(row, dict) for row in tree):
        raise UserError(f'{file.name}: not a list of objects; give [{{"parameters": ..., "tokens": ..., "loss": ...}}, ...]')
    return list(tree)
