"""Read the documents of a part, checked and filtered, in batches of Arrow strings."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from isoflop.config.recipe_data import Filter
from isoflop.data.sources import Table
from isoflop.utils.errors import UserError

T = TypeVar("T")
BATCH_BYTES = 4 * 2**20  # of text encoded at once: enough to amortize a call, and little memory per process


class Batch(NamedTuple):
    """Documents of a part, in order."""

    rows: NDArray[np.int64]
    """Row numbers in the part, (documents,)."""
    texts: pa.LargeStringArray
    scores: NDArray[np.float64] | None
    end: int | None
    """Row at which reading can resume with the same batches that follow; None where it cannot."""
    left_out: Counter[str]
    """Documents left out since the previous batch, by reason."""


def prefetch(items: Iterator[T], count: int = 2) -> Iterator[T]:
    """Yield the same items, computed by a thread up to `count` items ahead."""
    end: Any = object()
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, items, end) for _ in range(count))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, items, end))
            yield item


def read_documents(table: Table, number: int, wanted: Filter, start: int = 0) -> Iterator[Batch]:
    """Yield batches of a part's documents from row `start` on, with counts of those left out.

    Raises `UserError` for rows without text, text that is not UTF-8, and files that cannot be read.
    """
    collected: list[Batch] = []
    size = 0
    for batch in _checked(table, number, wanted, start):
        collected.append(batch)
        size += batch.texts.nbytes
        if size >= BATCH_BYTES:
            yield from _cut(_joined(collected))
            collected, size = [], 0
    if collected:
        yield from _cut(_joined(collected))


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
    """Split a batch of long documents, so that memory follows the longest document, not the longest hundred."""
    pieces = min(len(batch.rows), max(1, batch.texts.nbytes // (2 * BATCH_BYTES))) or 1
    for piece in np.array_split(np.arange(len(batch.rows)), pieces):
        first, last = (piece[0], piece[-1] + 1) if len(piece) else (0, 0)
        scores = None if batch.scores is None else batch.scores[first:last]
        end, left_out = (batch.end, batch.left_out) if last == len(batch.rows) else (None, Counter[str]())
        yield Batch(batch.rows[first:last], batch.texts.slice(first, last - first), scores, end, left_out)


def _checked(table: Table, number: int, wanted: Filter, start: int) -> Iterator[Batch]:
    row = start
    for read in _read(table, number, start):
        texts = pa.concat_arrays(read["text"].chunks) if read["text"].num_chunks else pa.array([], pa.large_string())
        valid = texts.is_valid().to_numpy(zero_copy_only=False)
        scores = None
        if table.columns.score is not None:
            scores = read["score"].fill_null(np.nan).to_numpy()
            valid &= np.isfinite(scores)
        if wanted.invalid_rows == "refuse" and not valid.all():
            raise UserError(
                f"{table.key}: {table.describe_row(number, row + int(np.flatnonzero(~valid)[0]))}; fix it, or set"
                " data.filter.invalid_rows=skip to leave such rows out and count them"
            )
        kept = valid
        if wanted.min_characters:
            kept = valid & (pc.utf8_length(texts).fill_null(0).to_numpy() >= wanted.min_characters)
        left_out = Counter({"invalid": int((~valid).sum()), "short": int((valid & ~kept).sum())})
        rows = row + np.flatnonzero(kept)
        row += len(read)
        yield Batch(rows, texts.filter(pa.array(kept)), None if scores is None else scores[kept], row, left_out)


def _read(table: Table, number: int, start: int) -> Iterator[pa.Table]:
    """Yield tables of a few rows."""
    try:
        yield from table.tables(number, start)
    except UserError:
        raise
    except Exception as error:  # from `datasets`
        raise UserError(
            f"{table.key}: part {number} of {table.num_parts} cannot be read: {error.__cause__ or error}; fix or leave out the"
            " file: finished parts are kept"
        ) from error
