"""JSON lines as Arrow tables of the columns that are wanted.

`datasets` has a reader of its own, which infers types: after one row whose text is a number it hands on every later text of
that file JSON-encoded, quotes and backslashes and all, without a word; dates in a later file lose their form; a new key is an
error. Here the types are said, other keys are passed over, and a row of another type is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.json

from isoflop.errors import UserError, nearest

BLOCK_BYTES = 4 * 2**20
MOST_LINE_BYTES = 256 * 2**20
"""A line is read whole, and a few kilobytes under gzip can stand for one without end; the longest books have 20 MB."""
_PIECE_BYTES = 2**20
_LOOKED_AT = 100  # lines in which a column has to turn up
_BOM = b"\xef\xbb\xbf"


class Piece(NamedTuple):
    """The lines of a file that start in a range of its bytes."""

    file: str
    """A path, or a URL that fsspec opens; what its name ends with says how it is compressed."""
    begin: int = 0
    end: int | None = None


def read_lines(pieces: list[Piece], schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of the schema's columns, a block of lines each. Raises what opening, decompressing and parsing raise."""
    for piece in pieces:
        for block in _blocks(piece):
            yield _parse(block, schema, piece.file)


def require_columns(file: str, key: str, wanted: dict[str, str]) -> None:
    """Refuse a file whose first lines do not have a column, by the recipe's name for it."""
    known: set[str] = set()
    with fsspec.open(file, "rb", compression="infer") as stream:
        for _ in range(_LOOKED_AT):
            row = _loads(_read_line(stream, file).removeprefix(_BOM) or b"{}", file)
            if not isinstance(row, dict):
                raise UserError(f"{key}: {file} has {type(row).__name__}s where objects belong; write one JSON object a line")
            known |= row.keys()
    for name, column in wanted.items():
        if known and column not in known:
            raise UserError(f"{key}.{name} = {column!r} is not in the data{nearest(column, sorted(known))}")


def _blocks(piece: Piece) -> Iterator[bytes]:
    """Whole lines, some BLOCK_BYTES at once."""
    with fsspec.open(piece.file, "rb", compression="infer") as stream:
        left, rest = None if piece.end is None else piece.end - piece.begin, b""
        if piece.begin:
            stream.seek(piece.begin - 1)
            skipped = len(_read_line(stream, piece.file)) - 1  # the line that began before belongs to the piece before
            left = None if left is None else left - skipped
        while (left is None or left > 0) and (read := stream.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left))):
            left = None if left is None else left - len(read)
            if left == 0:
                read += _read_line(stream, piece.file) if not read.endswith(b"\n") else b""
            cut = read.rfind(b"\n") + 1
            if cut:
                yield (rest + read[:cut]).removeprefix(_BOM)
                rest = read[cut:]
            else:
                rest += read
            if len(rest) > MOST_LINE_BYTES:
                raise _too_long(piece.file)
        if rest.strip():
            yield rest.removeprefix(_BOM)


def _read_line(stream: BinaryIO, file: str) -> bytes:
    if len(line := stream.readline(MOST_LINE_BYTES + 1)) > MOST_LINE_BYTES:
        raise _too_long(file)
    return line


def _too_long(file: str) -> UserError:
    return UserError(
        f"{file}: a line has more than {MOST_LINE_BYTES:,} bytes, and every line is read whole; write one document a line, or"
        " leave out the file"
    )


def _parse(block: bytes, schema: pa.Schema, file: str) -> pa.Table:
    options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    # Arrow parses pieces of a block on several threads; it fails where a line is longer than a piece, which few are.
    reading = pyarrow.json.ReadOptions(block_size=max(_PIECE_BYTES, len(block) // 4))
    try:
        return pyarrow.json.read_json(pa.BufferReader(block), reading, options)
    except pa.ArrowInvalid:  # a line that is too long, or one that is odd
        rows = [_loads(line, file) for line in block.split(b"\n") if line.strip()]
        return pa.table({field.name: [_as(row, field) for row in rows] for field in schema}, schema)


def _loads(line: bytes, file: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise UserError(
            f'{file}: a line is nested too deep to be read; write {{"text": ...}} lines, or leave out the file'
        ) from None


def _as(row: object, field: pa.Field) -> object:
    """A row's value where it has the field's type; None elsewhere."""
    value = row.get(field.name) if isinstance(row, dict) else None
    if pa.types.is_floating(field.type):
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    return value if isinstance(value, str) else None
