"""Rows of files: the wanted columns as Arrow arrays, and what is wrong with an invalid row.

A reader returns null for every value that is invalid, so that rows are refused, or skipped and counted, in one place. To report a
refused row, the file is read again, row by row, for its place and its value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from isoflop.utils.errors import nearest
from isoflop.utils.untrusted import shown

ROWS = 128  # read at once: few, because a row may be a book
_MOST_SHOWN = 80  # characters of a document's value in a message


class Columns(NamedTuple):
    """Names of the wanted columns."""

    text: str = "text"
    score: str | None = None


class Piece(NamedTuple):
    """Part of a file that is read separately: the lines that start in a range of bytes, or a range of row groups."""

    file: str
    """A path, or a URL that fsspec opens; its extension gives the compression."""
    begin: int = 0
    end: int | None = None


class Row(NamedTuple):
    """A row as it is in its file, for messages."""

    place: str
    """Place in its file, such as `line 3`."""
    values: Any
    """A mapping of column names to values; anything else is invalid."""
    fault: str | None = None
    """Why it cannot be read."""


class Reader(Protocol):
    """Reader of one format. Both methods raise what opening, decompressing and parsing raise."""

    def tables(self, piece: Piece, columns: Columns) -> Iterator[pa.Table]:
        """Yield tables of `text` (large_string) and, where one is wanted, `score` (float64); null where a row has none."""

    def rows(self, piece: Piece) -> Iterator[Row]:
        """Yield the same rows one by one, as they are in the file."""


def make_table(columns: Columns, texts: pa.Array, scores: pa.Array | None) -> pa.Table:
    """Return a table as readers yield it."""
    return pa.table({"text": texts} if columns.score is None else {"text": texts, "score": scores})


def from_values(columns: Columns, rows: Iterable[Any]) -> pa.Table:
    """Return a table of rows that are mappings; a value of another type than its column's is null."""
    rows = [row if isinstance(row, Mapping) else {} for row in rows]
    texts = pa.array([as_text(row.get(columns.text)) for row in rows], pa.large_string())
    scores = pa.array([as_score(row.get(columns.score)) for row in rows], pa.float64())
    return make_table(columns, texts, scores)


def as_text(value: object) -> str | None:
    """Return a value that is a string or UTF-8 bytes as a string; None for every other value."""
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, str):
            value.encode("utf-8")  # a lone surrogate is not a character
            return value
    except UnicodeError:
        pass
    return None


def as_score(value: object) -> float | None:
    """Return a value that is a finite number; None for every other value."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def text_array(column: Any) -> pa.Array:
    """Return a column of text or bytes as large_string, null where a value is not UTF-8; a column of another type is all null."""
    column = _one_array(column)
    if not any(is_of(column.type) for is_of in _TEXT_TYPES):
        return pa.nulls(len(column), pa.large_string())
    found = column.cast(pa.large_binary())
    try:
        return found.cast(pa.large_string())
    except pa.ArrowInvalid:  # a value is not UTF-8
        return pa.array([as_text(value) for value in found.to_pylist()], pa.large_string())


_TEXT_TYPES = [getattr(pa.types, f"is_{kind}") for kind in ("string", "large_string", "string_view", "binary", "large_binary")]
_TEXT_TYPES += [pa.types.is_binary_view, pa.types.is_fixed_size_binary]


def score_array(column: Any) -> pa.Array:
    """Return a column of numbers as float64, null where a value is not a finite number."""
    column = _one_array(column)
    try:
        found = column.cast(pa.float64())
        return pa.array(found.to_numpy(zero_copy_only=False), mask=~_finite(found))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.array([as_score(value) for value in column.to_pylist()], pa.float64())


def _finite(scores: pa.Array) -> Any:
    import pyarrow.compute as pc

    return pc.is_finite(scores).fill_null(False).to_numpy(zero_copy_only=False)


def _one_array(column: Any) -> pa.Array:
    column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) and column.num_chunks else column
    column = pa.nulls(0, column.type) if isinstance(column, pa.ChunkedArray) else column
    column = column.storage if isinstance(column.type, pa.BaseExtensionType) else column
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def rebatch(tables: Iterator[pa.Table], start: int, rows: int = ROWS) -> Iterator[pa.Table]:
    """Yield the same rows from `start` on in tables of `rows`."""
    gathered: list[pa.Table] = []
    count = 0
    for table in tables:
        begin, start = min(start, len(table)), max(0, start - len(table))
        while begin < len(table):
            taken = table.slice(begin, rows - count)
            gathered, count, begin = [*gathered, taken], count + len(taken), begin + len(taken)
            if count == rows:
                yield pa.concat_tables(gathered)
                gathered, count = [], 0
    if gathered:
        yield pa.concat_tables(gathered)


def describe(row: Row, columns: Columns) -> str:
    """Return what is wrong with a row, such as `has text = 5 (a number), and every row needs a string`."""
    if row.fault:
        return row.fault
    if not isinstance(row.values, Mapping):
        return f"is {_format_value(row.values)}, and every row needs an object of columns"
    wanted = [(columns.text, as_text, "a string"), (columns.score, as_score, "a number")]
    for name, read, needed in wanted:
        if name is None or (name in row.values and read(row.values[name]) is not None):
            continue
        if name not in row.values:
            return f"has no {name!r}{nearest(name, [str(key) for key in row.values])}"
        return f"has {name} = {_format_value(row.values[name])}, and every row needs {needed}"
    return "cannot be read"


def not_utf8(error: UnicodeDecodeError, unit: str = "byte") -> str:
    """Return what is wrong with bytes that are not UTF-8, and the remedy."""
    encoding = "utf-16" if error.object.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
    at = f"0x{error.object[error.start]:02x} at {unit} {error.start + 1}"
    return f"is not UTF-8: {at} (convert the file, e.g. iconv -f {encoding} -t utf-8)"


def _format_value(value: Any) -> str:
    """Format a value with its type for a message, cut where it is long."""
    if value is None:
        return "null"
    if isinstance(value, bytes):
        try:
            value.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"{shown(value, _MOST_SHOWN)}, which {not_utf8(error)}"
    if isinstance(value, str):
        half = next((at for at, letter in enumerate(value, 1) if "\ud800" <= letter <= "\udfff"), None)
        kind = f"with half of a surrogate pair at character {half}, which is not text" if half else "a string"
        return f"{shown(value, _MOST_SHOWN)} ({kind})"
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    kind = kinds.get(type(value), f"of type {type(value).__name__}")
    try:
        return f"{_shorten(json.dumps(value, ensure_ascii=False))} ({kind})"
    except (TypeError, ValueError):
        return f"{shown(value, _MOST_SHOWN)} ({kind})"


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... ({len(text):,} characters)"
