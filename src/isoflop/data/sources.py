"""Open the sources of a recipe: local or remote files, a dataset on the Hub, the standard library.

Entered by `open_source`. `datasets` finds the files of a dataset's splits and reads the rarer formats; nothing is copied. A
source is cut into parts, which are read, encoded and stored separately: many processes share them, and a kill loses little.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError
from tqdm.contrib.concurrent import thread_map

from isoflop.config.recipe_data import HubSource, PythonSource, Source, TextSource
from isoflop.data.files import SourceFile, find_damage, format_of, name_of, source_files
from isoflop.data.hub import explain_hub_error, hub_commit, require_exists
from isoflop.data.manifest import SplitName
from isoflop.data.readers.columnar import ArrowFile, Parquet, open_parquet, wanted_columns
from isoflop.data.readers.compression import compression_of
from isoflop.data.readers.json_lines import JsonLines
from isoflop.data.readers.plain_text import PlainText, Separated
from isoflop.data.readers.rows import ROWS, Columns, Piece, Reader, Row, describe, rebatch
from isoflop.utils.errors import UserError, nearest

# Bytes of source files in a part: some seconds of work, so that a kill loses little and many processes share the parts.
PART_BYTES = 256 * 2**20
MAX_PARTS = 4096  # of a table: SlimPajama-627B has 59,166 files, and a shard of windows for each would be 20 MB
RESHARD_BELOW = 64  # files; a Parquet dataset of fewer is cut by row groups, which opens every file
_HELD_OUT_NAMES = ("validation", "val", "valid", "test")  # a dataset's own held-out split, in order of preference
_READERS: dict[str, Reader] = {"json": JsonLines(), "parquet": Parquet(), "arrow": ArrowFile(), "csv": Separated()}
_INSPECTED_ROWS = 100  # first rows, in which every column must occur
T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """One split of a dataset, read in `num_parts` parts."""

    key: str
    """Key of the source in the recipe, for errors."""
    split: SplitName | None
    """None where documents are held out by a hash of their row."""
    content: IterableDataset | tuple[Piece, ...]
    """Pieces of files; for the rarer formats a dataset of `datasets`."""
    num_parts: int
    files: tuple[SourceFile, ...]
    """Its files, in order; none where they are streamed from the Hub."""
    columns: Columns
    reader: Reader | None
    """Reads a piece."""
    held_out_tail: float | None = None
    """Share at the end of the table's only document that is held out as a second document; None for other tables."""

    def tables(self, number: int, start: int) -> Iterator[pa.Table]:
        """Yield a part's rows from `start` on, a few per table: `text` and, if wanted, `score`; null where a row has none.

        Raises `UserError` for a file that cannot be read.
        """
        if self.held_out_tail is None:
            return self._tables(number, start)
        return (self._divide(table, self.held_out_tail).slice(start) for table in self._tables(number, 0))

    def split_by_position(self, fraction: float) -> Table:
        """Return the table of one document with its last `fraction`, in characters, as a second document."""
        return replace(self, num_parts=1, held_out_tail=fraction)

    def _divide(self, table: pa.Table, fraction: float) -> pa.Table:
        text = table["text"][0].as_py() if len(table) else None
        if text is None:
            return table
        end = round(len(text) * (1 - fraction))
        texts = pa.array([text[:end], text[end:]], pa.large_string())
        return table.take([0, 0]).set_column(table.column_names.index("text"), "text", texts)

    def _tables(self, number: int, start: int) -> Iterator[pa.Table]:
        if isinstance(self.content, IterableDataset):
            part = self._streamed(number)
            for table in (part.skip(start) if start else part).with_format("arrow").iter(batch_size=ROWS):
                yield wanted_columns(table, self.columns)
            return
        tables = itertools.chain.from_iterable(map(self._read, self._pieces(number)))
        if not isinstance(self.reader, JsonLines):
            yield from rebatch(tables, start)
            return
        for table in tables:
            if start < len(table):
                yield table.slice(start)
            start = max(0, start - len(table))

    def _read(self, piece: Piece) -> Iterator[pa.Table]:
        assert self.reader is not None
        with _file_errors(self.key, piece.file, self.reader):
            yield from self.reader.tables(piece, self.columns)

    def describe_row(self, number: int, row: int) -> str:
        """Return the place of a part's row and what is wrong with it; reads the part again up to there."""
        for found, file in itertools.islice(self._rows(number), row, None):
            place = f"{name_of(file)}, {found.place}" if found.place else name_of(file)
            return f"{place} {describe(found, self.columns)}"
        return f"row {row + 1} of part {number} cannot be read"

    def _rows(self, number: int) -> Iterator[tuple[Row, str]]:
        if isinstance(self.content, IterableDataset):
            name = ", ".join(name_of(file) for file in self.files_of(number)[:3]) or "streamed"
            of = f" of part {number}" if self.num_parts > 1 else ""
            for count, values in enumerate(self._streamed(number), 1):
                yield Row(f"row {count}{of}", values), name
            return
        assert self.reader is not None
        for piece in self._pieces(number):
            for row in self.reader.rows(piece):
                yield row, piece.file

    def _streamed(self, number: int) -> IterableDataset:
        assert isinstance(self.content, IterableDataset)
        wanted = [name for name in self.columns if name is not None]
        return self.content.shard(self.num_parts, number, contiguous=True).select_columns(wanted)

    def _pieces(self, number: int) -> list[Piece]:
        assert not isinstance(self.content, IterableDataset)
        return list(_share(self.content, self.num_parts, number))

    def files_of(self, number: int) -> tuple[SourceFile, ...]:
        """Return the files of a part; all files of the table where parts are not cut by files."""
        if isinstance(self.content, IterableDataset):
            return _share(self.files, self.num_parts, number) if self.content.num_shards == len(self.files) else self.files
        if isinstance(self.reader, Parquet) and len(self.content) != len(self.files):
            return self.files
        by_path = {file.path: file for file in self.files}
        return tuple(dict.fromkeys(by_path[piece.file] for piece in self._pieces(number))) if self.files else ()


@contextlib.contextmanager
def _file_errors(key: str, file: str, reader: Reader) -> Iterator[None]:
    """Raise a `UserError` for every error of reading a file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of Arrow, the decompressors, the Hub client and its transport
        raise UserError(f"{key}: {_fault(file, reader, error)}; fix or leave out the file: finished parts are kept") from error


def _fault(file: str, reader: Reader, error: Exception) -> str:
    kind = {Parquet: "Parquet", ArrowFile: "Arrow"}.get(type(reader))
    if found := None if kind else find_damage(file):
        return found
    reason = explain_hub_error(error, file) or error.__cause__ or error
    if "range requests" in str(reason):  # fsspec
        reason = "its server sends files from their start only; download it, and name the local file"
    what = f"is not a complete {kind} file" if kind and "://" not in file else "cannot be read"
    return f"{name_of(file)} {what}: {reason}"


def _share(items: tuple[T, ...], num_parts: int, number: int) -> tuple[T, ...]:
    """Return one of `num_parts` contiguous shares of the items, as `IterableDataset.shard(contiguous=True)` does."""
    each, more = divmod(len(items), num_parts)
    start = each * number + min(number, more)
    return items[start : start + each + (number < more)]


@dataclass(frozen=True)
class OpenSource:
    """A source that is ready to be read."""

    tables: list[Table]
    revision: str | None
    """Commit of a dataset on the Hub."""


def open_source(source: Source, key: str, commit: str | None = None) -> OpenSource:
    """Open a source; `key` is its key in the recipe, `commit` the commit of a Hub dataset in an earlier start.

    Raises `UserError` for what is missing, empty or unreachable.
    """
    if isinstance(source, HubSource):
        return _open_hub(source, key, commit)
    files = source_files(source, key)
    if isinstance(source, TextSource | PythonSource):
        reader: Reader = PlainText(source.sample_by) if isinstance(source, TextSource) else PlainText()
    else:
        reader = _READERS[source.kind]
    _require_format(source.kind, files, f"{key}.files")
    return OpenSource([_table_of_files(key, None, reader, [file.path for file in files], files, _columns(source))], None)


def _columns(source: Source) -> Columns:
    return Columns() if isinstance(source, TextSource | PythonSource) else Columns(source.text_column, source.score_column)


def _require_format(kind: str, files: list[SourceFile], key: str) -> None:
    """Refuse files whose names or first bytes are of another format than the recipe gives."""
    for number, file in enumerate(files):
        found = format_of(file.path, read_start=number == 0)
        if found and found != kind and (kind in _READERS or found in ("parquet", "arrow")):
            raise UserError(f"{key}: {name_of(file)} is of kind {found}, and kind = {kind!r} is given; write kind: {found}")


def _table_of_files(
    key: str, split: SplitName | None, reader: Reader, names: list[str], files: list[SourceFile], columns: Columns
) -> Table:
    """Return a table of files, local or by URL; `files` are those of known size."""
    pieces: list[Piece] = []
    for name in names:
        with _file_errors(key, name, reader):
            pieces += _cut(name, reader, by_row_groups=len(names) < RESHARD_BELOW)
    if not pieces:
        raise UserError(f"{key}: its {len(names)} file(s) hold no rows; point it at text")
    _require_columns(key, names, reader, columns)
    num_parts = _num_parts(sum(file.bytes for file in files), len(pieces))
    return Table(key, split, tuple(pieces), num_parts, tuple(files), columns, reader)


def _cut(name: str, reader: Reader, by_row_groups: bool) -> list[Piece]:
    """Cut a file into pieces: JSON lines by PART_BYTES, few Parquet files by row groups; others, and compressed ones, uncut."""
    if isinstance(reader, Parquet) and by_row_groups:
        with open_parquet(name) as parquet:
            return [Piece(name, group, group + 1) for group in range(parquet.num_row_groups)]
    if not isinstance(reader, JsonLines) or "://" in name or compression_of(name):
        return [Piece(name)]
    size = Path(name).stat().st_size
    count = max(1, math.ceil(size / PART_BYTES))
    return [Piece(name, size * piece // count, size * (piece + 1) // count) for piece in range(count)]


def _num_parts(total_bytes: int, most: int) -> int:
    """Return the number of parts of about PART_BYTES, of complete pieces; the largest number where the size is unknown."""
    return max(1, min(math.ceil(total_bytes / PART_BYTES) if total_bytes else MAX_PARTS, most, MAX_PARTS))


def _require_columns(key: str, names: list[str], reader: Reader, columns: Columns) -> None:
    """Refuse a table whose first rows lack a column, in the first file that has rows. The error names the recipe's key."""
    if isinstance(reader, PlainText):
        return
    broken = None
    for name in names:
        with _file_errors(key, name, reader):
            known, first = _first_columns(name, reader)
        if known:
            _require_known(key, columns, known)
            return
        broken = broken or (first and f"{name_of(name)}, {first.place} {describe(first, columns)}")
    hint = "; write one JSON object a line" if isinstance(reader, JsonLines) else "; correct the file"
    raise UserError(f"{key}: {f'{broken}{hint}' if broken else f'its {len(names)} file(s) hold no rows; point it at text'}")


def _first_columns(name: str, reader: Reader) -> tuple[list[str], Row | None]:
    """Return the columns of a file's first rows, and its first row."""
    if isinstance(reader, Parquet):
        with open_parquet(name) as parquet:
            return (list(parquet.schema_arrow.names), None) if parquet.metadata.num_rows else ([], None)
    rows = list(itertools.islice(reader.rows(Piece(name)), _INSPECTED_ROWS))
    return sorted({column for row in rows if isinstance(row.values, dict) for column in row.values}), next(iter(rows), None)


def _require_known(key: str, columns: Columns, known: list[str]) -> None:
    for which, name in columns._asdict().items():
        if name is not None and name not in known:
            raise UserError(f"{key}.{which}_column = {name!r} is not in the data{nearest(name, known)}")


def _table(key: str, split: SplitName | None, dataset: IterableDataset, source: HubSource) -> Table:
    """Return a table that `datasets` reads, in parts of complete files or row groups."""
    if dataset.num_shards < RESHARD_BELOW:
        dataset = dataset.reshard()
    files = source_files(source, key)
    num_parts = _num_parts(sum(file.bytes for file in files), dataset.num_shards)
    if dataset.column_names is not None:  # None where only reading shows them
        _require_known(key, _columns(source), dataset.column_names)
    return Table(key, split, dataset, num_parts, tuple(files), _columns(source), None)


def _open_hub(source: HubSource, key: str, commit: str | None) -> OpenSource:
    """Open a dataset. `datasets` gives the files of its splits, and reads all formats but JSON lines and Parquet."""
    require_exists(f"{key}.name", source.name)
    is_local = Path(source.name).is_dir()
    revision = None if is_local else commit or hub_commit(f"{key}.name", source.name, source.revision, "dataset")
    try:
        builder = load_dataset_builder(source.name, source.config, revision=revision)
        if not is_local and builder.hash != revision:  # found in its cache because the Hub did not answer
            raise UserError(
                f"{key}.name = {source.name!r}: the Hub did not answer for commit {revision}; check the network, try again"
            )
        splits = _splits_of(builder, source.streaming or is_local, source.name, revision)
    except UserError:
        raise
    except Exception as error:  # of the Hub client, its transport and the builder
        gated = isinstance(error, DatasetNotFoundError) and "gated" in str(error)
        reason = explain_hub_error(error, source.name, gated=gated) or str(error.__cause__ or error)
        raise UserError(f"{key}.name = {source.name!r} (config {source.config!r}) cannot be loaded: {reason}") from error
    train = "train" if "train" in splits else [*(name for name in splits if name not in _HELD_OUT_NAMES), *splits][0]
    held_out = next((name for name in _HELD_OUT_NAMES if name in splits and name != train), None)
    chosen: list[tuple[str, SplitName | None]] = [(train, "train" if held_out else None)]
    chosen += [(held_out, "validation")] if held_out else []
    kind = _kind(builder)
    return OpenSource(
        [
            _hub_files(key, split, _READERS[kind], _local_files(splits[name], source, revision), source)
            if isinstance(splits[name], list)
            else _table(key, split, splits[name], source)
            for name, split in chosen
        ],
        revision,
    )


def _hub_files(key: str, split: SplitName | None, reader: Reader, names: list[str], source: HubSource) -> Table:
    files = [SourceFile.local(Path(name)) for name in names if "://" not in name]
    return _table_of_files(key, split, reader, names, files, _columns(source))


def _kind(builder: Any) -> str:
    """Return the format of a builder by its module's name: `json`, `parquet` ..."""
    return str(type(builder).__module__.rsplit(".", 1)[-1])


def _splits_of(builder: Any, streaming: bool, name: str, revision: str | None) -> dict[str, Any]:
    """Return the files of each split, or a dataset that reads them."""
    if _kind(builder) in ("json", "parquet"):
        return {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    if streaming:
        return dict(builder.as_streaming_dataset())
    return {split: _streamed(dataset) for split, dataset in load_dataset(name, builder.config.name, revision=revision).items()}


def _streamed(dataset: Dataset) -> IterableDataset:
    """Return a downloaded dataset as one that is read in parts."""
    return dataset.to_iterable_dataset(num_shards=max(1, min(_num_parts(dataset.data.nbytes, MAX_PARTS), len(dataset))))


def _local_files(names: list[str], source: HubSource, revision: str | None) -> list[str]:
    """Return local files; download those on the Hub into its cache, unless they are cached."""
    if source.streaming or revision is None:
        return names
    from huggingface_hub import hf_hub_download

    def download(name: str) -> str:
        path = name.split(f"@{revision}/", 1)[1]
        return str(hf_hub_download(source.name, path, repo_type="dataset", revision=revision))

    return list(thread_map(download, names, desc="download", unit="file", max_workers=8))
