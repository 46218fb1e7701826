"""Read text files, and tables of comma- or tab-separated values."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

import pyarrow as pa

from isoflop.data.readers.compression import open_bytes
from isoflop.data.readers.rows import ROWS, Columns, Piece, Row, as_score, as_text, from_values

_CHUNK_CHARACTERS = 10 * 2**20
_MOST_FIELD_CHARACTERS = 256 * 2**20


@dataclass(frozen=True)
class PlainText:
    """Reader of text files; a piece is a file. Line ends become `\\n`, as Python reads text."""

    sample_by: Literal["document", "paragraph", "line"] = "document"

    def tables(self, piece: Piece, columns: Columns) -> Iterator[pa.Table]:
        """Yield tables of documents, some megabytes each."""
        for texts in self._documents(piece):
            try:
                yield pa.table({"text": pa.array(texts, pa.large_string())})
            except UnicodeEncodeError:  # surrogateescape: bytes that are not UTF-8 are lone surrogates here
                yield pa.table({"text": pa.array([as_text(text) for text in texts], pa.large_string())})

    def rows(self, piece: Piece) -> Iterator[Row]:
        """Yield every document, with its number in the file where that has several."""
        for number, text in enumerate(itertools.chain.from_iterable(self._documents(piece)), 1):
            place = "" if self.sample_by == "document" else f"{self.sample_by} {number}"
            yield Row(place, {"text": _bytes_where_not_text(text)})

    def _documents(self, piece: Piece) -> Iterator[list[str]]:
        with open_bytes(piece.file) as raw, io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape") as stream:
            if self.sample_by == "document":
                yield [stream.read()]
                return
            rest = ""
            while chunk := stream.read(_CHUNK_CHARACTERS):
                chunk += stream.readline()
                if self.sample_by == "line":
                    yield chunk.removesuffix("\n").split("\n")
                    continue
                *paragraphs, rest = (rest + chunk).split("\n\n")
                yield [paragraph for paragraph in paragraphs if paragraph]
            if rest:
                yield [rest]


def _bytes_where_not_text(text: str) -> str | bytes:
    return text if as_text(text) is not None else text.encode("utf-8", "surrogateescape")


class Separated:
    """Reader of comma-separated values, tab-separated where a name ends with .tsv. The first row names the columns.

    A piece is a file. Text is read literally; `datasets` reads `12` as a number and `NA` as null.
    """

    def tables(self, piece: Piece, columns: Columns) -> Iterator[pa.Table]:
        """Yield tables of a few rows."""
        rows = self._rows(piece, columns.score)
        while some := list(itertools.islice(rows, ROWS)):
            yield from_values(columns, [None if row.fault else row.values for row in some])

    def rows(self, piece: Piece) -> Iterator[Row]:
        """Yield every row with the line on which it starts."""
        return self._rows(piece, None)

    def _rows(self, piece: Piece, score: str | None) -> Iterator[Row]:
        csv.field_size_limit(_MOST_FIELD_CHARACTERS)
        with (
            open_bytes(piece.file) as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream,
        ):
            reader = csv.reader(stream, delimiter="\t" if ".tsv" in _suffixes(piece.file) else ",", strict=True)
            header: list[str] | None = None
            while True:
                place = f"line {reader.line_num + 1}"
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Row(place, None, f"cannot be read: {error}")
                    continue
                if not fields:
                    continue
                if header is None:
                    header = fields
                elif len(fields) != len(header):
                    yield Row(place, None, f"has {len(fields)} values, and the first line names {len(header)} columns")
                else:
                    row = {name: _bytes_where_not_text(value) for name, value in zip(header, fields, strict=True)}
                    yield Row(place, row if score is None else row | {score: as_number(row.get(score))})


def _suffixes(file: str) -> list[str]:
    return [suffix.lower() for suffix in PurePosixPath(urlsplit(file).path if "://" in file else file).suffixes]


def as_number(value: object) -> float | None:
    """Return the finite number that a text is; None for every other value."""
    try:
        return as_score(float(str(value)))
    except ValueError:
        return None
