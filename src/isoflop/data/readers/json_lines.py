"""Read JSON lines: one JSON object per line; blank lines are ignored.

The reader of `datasets` infers types. After one row whose text is a number, it silently returns every later text of that file
JSON-encoded, with quotes and backslashes; dates in a later file change their form; a new key is an error. Here types are
given and other keys ignored. A row of another type is null, as is a line that is not JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.json

from isoflop.data.readers.compression import open_bytes
from isoflop.data.readers.rows import Columns, Piece, Row, from_values, make_table, not_utf8, text_array
from isoflop.utils.errors import UserError

BLOCK_BYTES = 4 * 2**20
MOST_LINE_BYTES = 256 * 2**20
"""A line is read at once, and a few kilobytes of gzip can expand to an endless one; the longest books have 20 MB."""
_PIECE_BYTES = 2**20
_BOM = b"\xef\xbb\xbf"
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_NULL_LINE = re.compile(rb"\n[ \t\r]*n")  # Arrow 26 crashes on a block that starts with one


class JsonLines:
    """Reader of JSON lines; a piece is a range of bytes."""

    def tables(self, piece: Piece, columns: Columns) -> Iterator[pa.Table]:
        """Yield tables of the wanted columns, one per block of lines."""
        for block in _blocks(piece):
            yield _parse(block, columns)

    def rows(self, piece: Piece) -> Iterator[Row]:
        """Yield every line that is not blank, with its number in the file."""
        number = 1 + _lines_before(piece)
        for block in _blocks(piece):
            for line in block.removesuffix(b"\n").split(b"\n"):
                if line.strip():
                    yield Row(f"line {number}", *_load(line))
                number += 1


def _blocks(piece: Piece) -> Iterator[bytes]:
    """Yield blocks of complete lines, about BLOCK_BYTES each."""
    with open_bytes(piece.file) as stream:
        left, rest = None if piece.end is None else piece.end - piece.begin, b""
        if piece.begin:
            stream.seek(piece.begin - 1)
            skipped = len(_read_line(stream, piece.file)) - 1  # a line that starts before the piece belongs to the piece before
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


def _lines_before(piece: Piece) -> int:
    """Count the lines of the file that start before the piece."""
    if not piece.begin:
        return 0
    left, found = piece.begin - 1, 1
    with open_bytes(piece.file) as stream:
        while left and (read := stream.read(min(BLOCK_BYTES, left))):
            left -= len(read)
            found += read.count(b"\n")
    return found


def _read_line(stream: BinaryIO, file: str) -> bytes:
    if len(line := stream.readline(MOST_LINE_BYTES + 1)) > MOST_LINE_BYTES:
        raise _too_long(file)
    return line


def _too_long(file: str) -> UserError:
    return UserError(
        f"{file}: a line has more than {MOST_LINE_BYTES:,} bytes, and a line is read at once; write one document a line, or"
        " leave out the file"
    )


def _parse(block: bytes, columns: Columns) -> pa.Table:
    block = block.lstrip(b" \t\r\n")
    fields = {columns.text: pa.string()} | ({columns.score: pa.float64()} if columns.score else {})
    options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
    # Arrow parses pieces of a block on several threads. It fails where a line is longer than a piece, which is rare.
    reading = pyarrow.json.ReadOptions(block_size=max(_PIECE_BYTES, len(block) // 4))
    if block.startswith(b"{") and not _NULL_LINE.search(block):
        try:
            found = pyarrow.json.read_json(pa.BufferReader(block), reading, options)
            if len(found) == _count(block):  # Arrow reads an object over several lines too, and several objects in one
                found.validate(full=True)  # proves that strings are UTF-8
                return make_table(columns, text_array(found[columns.text]), columns.score and found[columns.score])
        except pa.ArrowInvalid:  # a line that is too long, or not what Arrow expects
            pass
    return from_values(columns, [_load(line)[0] for line in block.split(b"\n") if line.strip()])


def _count(block: bytes) -> int:
    """Count the lines of a block that are not blank; its first line is not."""
    if _BLANK_LINE.search(block):
        return sum(1 for line in block.split(b"\n") if line.strip())
    return block.count(b"\n") + (not block.endswith(b"\n"))


def _load(line: bytes) -> tuple[Any, str | None]:
    """Return the value of a line, None where it has none, and what is wrong; invalid UTF-8 may be in another column."""
    try:
        text, fault = line.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        text, fault = line.decode("utf-8-sig", "surrogateescape"), not_utf8(error, "column")
    try:
        return json.loads(text), fault
    except RecursionError:
        return None, "is nested too deeply"
    except json.JSONDecodeError as error:
        reason = "it holds NUL bytes" if b"\0" in line else error.msg.removesuffix(" at")
        return None, fault or f"is not JSON: {reason} at column {error.colno}"
    except ValueError as error:  # of an integer of thousands of digits
        return None, f"is not JSON that can be read: {error}"
