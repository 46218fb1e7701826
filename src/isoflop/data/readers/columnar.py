"""Read Parquet and Arrow files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from isoflop.data.readers.rows import ROWS, Columns, Piece, Row, make_table, score_array, text_array


@contextlib.contextmanager
def open_parquet(file: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, local or by URL; a remote file is read in large requests."""
    if "://" not in file:
        with pq.ParquetFile(file) as parquet:
            yield parquet
        return
    with fsspec.open(file, "rb") as stream, pq.ParquetFile(stream, pre_buffer=True) as parquet:
        yield parquet


class Parquet:
    """Reader of Parquet files; a piece is a range of row groups."""

    def tables(self, piece: Piece, columns: Columns) -> Iterator[pa.Table]:
        """Yield tables of the wanted columns; no other column is read."""
        wanted = [name for name in columns if name is not None]
        for table in self._read(piece, wanted):
            yield wanted_columns(table, columns)

    def rows(self, piece: Piece) -> Iterator[Row]:
        """Yield every row with its number in the file."""
        with open_parquet(piece.file) as parquet:
            number = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.begin))
        for table in self._read(piece, None):
            for values in table.to_pylist():
                number += 1
                yield Row(f"row {number}", values)

    def _read(self, piece: Piece, columns: list[str] | None) -> Iterator[pa.Table]:
        with open_parquet(piece.file) as parquet:
            groups = list(range(parquet.num_row_groups)[piece.begin : piece.end])
            if groups:
                yield from map(_table, parquet.iter_batches(ROWS, row_groups=groups, columns=columns))


class ArrowFile:
    """Reader of Arrow files and streams, as `datasets` caches them; a piece is a file."""

    def tables(self, piece: Piece, columns: Columns) -> Iterator[pa.Table]:
        """Yield tables of the wanted columns."""
        for table in self._read(piece):
            yield wanted_columns(table, columns)

    def rows(self, piece: Piece) -> Iterator[Row]:
        """Yield every row with its number in the file."""
        number = 0
        for table in self._read(piece):
            for values in table.to_pylist():
                number += 1
                yield Row(f"row {number}", values)

    def _read(self, piece: Piece) -> Iterator[pa.Table]:
        with fsspec.open(piece.file, "rb") as stream:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            if not is_file:
                yield from map(_table, pa.ipc.open_stream(stream))
                return
            batches = pa.ipc.open_file(stream)
            for number in range(batches.num_record_batches):
                yield _table(batches.get_batch(number))


def _table(batch: pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([batch])


def wanted_columns(table: pa.Table, columns: Columns) -> pa.Table:
    """Return the wanted columns; a missing one is null in every row."""

    def column(name: str, read: Any) -> pa.Array:
        return read(table[name] if name in table.column_names else pa.nulls(len(table)))

    return make_table(columns, column(columns.text, text_array), columns.score and column(columns.score, score_array))
