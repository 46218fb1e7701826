"""The documents of a part, checked and filtered, in batches of Arrow strings; and what is wrong where they cannot be read."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from isoflop.data.files import find_fault, name_of
from isoflop.data.sources import Table
from isoflop.errors import UserError, nearest
from isoflop.recipe_data import Filter

T = TypeVar("T")
BATCH_BYTES = 4 * 2**20  # of text encoded at once: past the cost of a call, and small beside a process


class Batch(NamedTuple):
    """Documents in the order of the part."""

    rows: NDArray[np.int64]
    """Their row numbers in the part, (documents,)."""
    texts: pa.LargeStringArray
    scores: NDArray[np.float64] | None
    end: int | None
    """The row after the last one looked at, where reading from there on gives the same batches as going on; None elsewhere."""
    left_out: Counter[str]
    """What was left out since the batch before, by reason."""


def ahead(items: Iterator[T], count: int = 2) -> Iterator[T]:
    """The same items, made by a thread of their own up to `count` of them ahead."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, items, end) for _ in range(count))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, items, end))
            yield item


def read_documents(table: Table, number: int, wanted: Filter, start: int = 0) -> Iterator[Batch]:
    """Batches of a part's documents from row `start` on, with counts of what is left out.

    Raises `UserError` for rows that are not text, for text that is not UTF-8, and for files that cannot be read.
    """
    gathered: list[Batch] = []
    size = 0
    for batch in _checked(table, number, wanted, start):
        gathered.append(batch)
        size += batch.texts.nbytes
        if size >= BATCH_BYTES:
            yield from _cut(_joined(gathered))
            gathered, size = [], 0
    if gathered:
        yield from _cut(_joined(gathered))


def _joined(batches: list[Batch]) -> Batch:
    scores = [batch.scores for batch in batches if batch.scores is not None]
    return Batch(
        np.concatenate([batch.rows for batch in batches]),
        pa.concat_arrays([batch.texts for batch in batches]),
        np.concatenate(scores) if scores else None,
        batches[-1].end,
        sum((batch.left_out for batch in batches), Counter()),
    )


def _cut(batch: Batch) -> Iterator[Batch]:
    """Long documents go one by one, so that memory follows the longest document, not the longest hundred."""
    pieces = min(len(batch.rows), max(1, batch.texts.nbytes // (2 * BATCH_BYTES))) or 1
    for piece in np.array_split(np.arange(len(batch.rows)), pieces):
        first, last = (piece[0], piece[-1] + 1) if len(piece) else (0, 0)
        scores = None if batch.scores is None else batch.scores[first:last]
        end, left_out = (batch.end, batch.left_out) if last == len(batch.rows) else (None, Counter[str]())
        yield Batch(batch.rows[first:last], batch.texts.slice(first, last - first), scores, end, left_out)


def _checked(table: Table, number: int, wanted: Filter, start: int) -> Iterator[Batch]:
    row = start
    for read in _read(table, number, start):
        texts, valid = _as_text(table, read)
        scores = None
        if "score_column" in table.columns:
            scores = _column(table, read, "score_column").cast(pa.float64()).fill_null(np.nan).to_numpy()
            valid &= np.isfinite(scores)
        if wanted.invalid_rows == "refuse" and not valid.all():
            _refuse(table, number, row, read, int(np.flatnonzero(~valid)[0]))
        kept = valid
        if wanted.min_characters:
            kept = valid & (pc.utf8_length(texts).fill_null(0).to_numpy() >= wanted.min_characters)
        left_out = Counter({"invalid": int((~valid).sum()), "short": int((valid & ~kept).sum())})
        rows = row + np.flatnonzero(kept)
        row += len(read)
        yield Batch(rows, texts.filter(pa.array(kept)), None if scores is None else scores[kept], row, left_out)


def _read(table: Table, number: int, start: int) -> Iterator[pa.Table]:
    """Tables of a few rows, their strings proved to be UTF-8."""
    try:
        for read in table.tables(number, start):
            read.validate(full=True)
            yield read
    except UserError:
        raise
    except Exception as error:  # Arrow's, the decompressors', the Hub client's and its transport's
        found = next(filter(None, (find_fault(file, table.source.kind) for file in table.files_of(number))), None)
        reason = found or f"part {number} of {table.num_parts} cannot be read: {error.__cause__ or error}"
        raise UserError(f"{table.key}: {reason}; mend or leave out the file: what is finished is kept") from error


def _column(table: Table, read: pa.Table, which: str) -> Any:
    name = table.columns[which]
    if name not in read.column_names:
        raise UserError(f"{table.key}.{which} = {name!r} is not in the data{nearest(name, read.column_names)}")
    column = read[name].combine_chunks()
    return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column


def _as_text(table: Table, read: pa.Table) -> tuple[pa.LargeStringArray, NDArray[np.bool_]]:
    """The text column as strings, and which of its rows are."""
    column = _column(table, read, "text_column")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_string()), np.asarray(column.is_valid())
    return pa.nulls(len(column), pa.large_string()), np.zeros(len(column), dtype=bool)


def _refuse(table: Table, number: int, first_row: int, read: pa.Table, offset: int) -> None:
    bad = [which for which, name in table.columns.items() if not isinstance(read[name][offset].as_py(), str | int | float)]
    which = bad[0] if bad else "text_column"
    name = table.columns[which]
    of = f" of part {number}" if table.num_parts > 1 else ""
    files = ", ".join(name_of(file) for file in table.files_of(number)[:3])
    raise UserError(
        f"{table.key}: row {first_row + offset}{of} ({files or 'streamed'}) has {name} = {read[name][offset].as_py()!r}; every"
        f" row needs {'a string' if which == 'text_column' else 'a number'}: mend it, or set data.filter.invalid_rows=skip to"
        " leave such rows out and count them"
    )
