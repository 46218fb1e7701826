"""Where a recipe says its text is: local text, JSON lines, Parquet, a dataset on the Hub, the standard library.

Entered by `open_source`. `datasets` finds the files of a dataset's splits and reads all but JSON lines; nothing is copied. A
source is cut into parts that are read, encoded and kept apart, so that many processes work on it and a killed one loses little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError
from tqdm.contrib.concurrent import thread_map

from isoflop.data.files import find_fault, local_files
from isoflop.data.hub import hub_commit, why_not
from isoflop.data.json_lines import Piece, read_lines, require_columns
from isoflop.data.manifest import SplitName
from isoflop.errors import UserError, nearest
from isoflop.recipe_data import HubSource, PythonSource, Source, TextSource

# Bytes of source files that make a part: some seconds of work, so that a kill loses little and many processes share it.
PART_BYTES = 256 * 2**20
MAX_PARTS = 4096  # of a table: SlimPajama-627B has 59,166 files, and a shard of windows for each would be 20 MB
RESHARD_BELOW = 64  # files; a Parquet dataset of fewer is cut by row groups, which takes a look into every file
ROWS = 128  # read at once: few, since a row may be a book
_HELD_OUT_NAMES = ("validation", "val", "valid", "test")  # a dataset's own held-out split, in order of preference
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """One split of a dataset, read in `num_parts` parts."""

    key: str
    """Where the recipe says so, for errors."""
    split: SplitName | None
    """None where documents are held out by their number."""
    content: IterableDataset | tuple[Piece, ...]
    """The pieces of JSON lines; of everything else, what `datasets` reads."""
    num_parts: int
    files: tuple[Path, ...]
    """Its local files, in order."""
    source: Source

    def tables(self, number: int, start: int) -> Iterator[pa.Table]:
        """A part's rows from `start` on, a few at once, with the columns that are needed."""
        if isinstance(self.content, IterableDataset):
            part = self.content.shard(self.num_parts, number, contiguous=True).select_columns(list(self.columns.values()))
            yield from (part.skip(start) if start else part).with_format("arrow").iter(batch_size=ROWS)
            return
        fields = [(name, pa.float64() if which == "score_column" else pa.string()) for which, name in self.columns.items()]
        for table in read_lines(self._pieces(number), pa.schema(fields)):
            if start < len(table):
                yield table.slice(start)
            start = max(0, start - len(table))

    def _pieces(self, number: int) -> list[Piece]:
        assert not isinstance(self.content, IterableDataset)
        return list(_share(self.content, self.num_parts, number))

    def files_of(self, number: int) -> tuple[Path, ...]:
        """The local files a part is read from; all of the table's where parts are cut otherwise."""
        if isinstance(self.content, IterableDataset):
            return _share(self.files, self.num_parts, number) if self.content.num_shards == len(self.files) else self.files
        return tuple(dict.fromkeys(Path(piece.file) for piece in self._pieces(number))) if self.files else ()

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are needed, by the recipe's name for them."""
        if isinstance(self.source, TextSource | PythonSource):
            return {"text_column": "text"}
        scored = {"score_column": self.source.score_column} if self.source.score_column else {}
        return {"text_column": self.source.text_column} | scored


def _share(items: tuple[T, ...], num_parts: int, number: int) -> tuple[T, ...]:
    """One of `num_parts` runs of items, as `IterableDataset.shard(contiguous=True)` deals them out."""
    each, more = divmod(len(items), num_parts)
    start = each * number + min(number, more)
    return items[start : start + each + (number < more)]


@dataclass(frozen=True)
class Opened:
    """A source, ready to be read."""

    tables: list[Table]
    revision: str | None
    """Commit of a dataset on the Hub."""


def open_source(source: Source, key: str, commit: str | None = None) -> Opened:
    """Open a source; `key` is where the recipe says so, `commit` the one that a dataset on the Hub was read at before.

    Raises `UserError` for what is missing, empty or out of reach.
    """
    if isinstance(source, HubSource):
        return _open_hub(source, key, commit)
    files = local_files(source, key)
    if isinstance(source, TextSource | PythonSource):
        sample_by = source.sample_by if isinstance(source, TextSource) else "document"
        return Opened([_table(key, None, _load(key, "text", files, sample_by=sample_by), source, files)], None)
    return Opened([_table_of_files(key, None, source.kind, [str(file) for file in files], source)], None)


def _table_of_files(key: str, split: SplitName | None, kind: str, names: list[str], source: Source) -> Table:
    """A table of JSON lines or Parquet files, local or by URL."""
    files = [Path(name) for name in names if "://" not in name]
    if kind == "parquet":
        whole = _table(key, split, _load(key, kind, names), source, files)
        narrow = _load(key, kind, names, columns=list(whole.columns.values()))  # else every column crosses the network
        return _table(key, split, narrow, source, files)
    pieces = tuple(piece for name in names for piece in _cut(name))
    total = sum(file.stat().st_size for file in files)
    table = Table(key, split, pieces, _num_parts(total, len(pieces)), tuple(files), source)
    try:
        require_columns(next(name for name in names if "://" in name or Path(name).stat().st_size), key, table.columns)
    except UserError:
        raise
    except Exception as error:  # the decompressors', the parser's, the Hub client's and its transport's
        raise _unreadable(key, files, kind, error, str(getattr(source, "name", ""))) from error
    return table


def _cut(name: str) -> list[Piece]:
    """A file in pieces of PART_BYTES; whole where it cannot be read from its middle."""
    if "://" in name or Path(name).suffix in _COMPRESSED:
        return [Piece(name)]
    size = Path(name).stat().st_size
    count = max(1, math.ceil(size / PART_BYTES))
    return [Piece(name, size * piece // count, size * (piece + 1) // count) for piece in range(count)]


def _num_parts(total_bytes: int, most: int) -> int:
    """Parts of about PART_BYTES, whole pieces each; where the bytes are not known, as many as there may be."""
    return max(1, min(math.ceil(total_bytes / PART_BYTES) if total_bytes else MAX_PARTS, most, MAX_PARTS))


def _table(key: str, split: SplitName | None, dataset: IterableDataset, source: Source, files: list[Path]) -> Table:
    """A table that `datasets` reads, cut into whole files or row groups."""
    if dataset.num_shards < RESHARD_BELOW:
        dataset = dataset.reshard()
    total = sum(file.stat().st_size for file in files)
    table = Table(key, split, dataset, _num_parts(total, dataset.num_shards), tuple(files), source)
    known = dataset.column_names  # None where only the first rows will tell
    for which, name in table.columns.items():
        if known is not None and name not in known:
            raise UserError(f"{key}.{which} = {name!r} is not in the data{nearest(name, known)}")
    return table


def _load(key: str, kind: str, names: list[Any], **options: Any) -> IterableDataset:
    try:
        return load_dataset(kind, data_files=[str(name) for name in names], split="train", streaming=True, **options)
    except Exception as error:  # Arrow's, the decompressors', the Hub client's and its transport's
        raise _unreadable(key, [Path(str(name)) for name in names if "://" not in str(name)], kind, error) from error


def _unreadable(key: str, files: list[Path], kind: str, error: Exception, name: str = "") -> UserError:
    found = next(filter(None, (find_fault(file, kind) for file in files)), None)
    reason = found or why_not(error, name) or str(error.__cause__ or error)
    return UserError(f"{key}: {reason}; mend or leave out the file" if files else f"{key}: {reason}")


def _open_hub(source: HubSource, key: str, commit: str | None) -> Opened:
    """The files of the splits are what `datasets` says; formats but JSON lines and Parquet it reads itself."""
    is_local = Path(source.name).is_dir()
    revision = None if is_local else commit or hub_commit(f"{key}.name", source.name, source.revision, "dataset")
    try:
        builder = load_dataset_builder(source.name, source.config, revision=revision)
        if not is_local and builder.hash != revision:  # what it finds in its cache when the Hub does not answer
            raise UserError(
                f"{key}.name = {source.name!r}: the Hub did not answer for commit {revision}; check the network, try again"
            )
        splits = _splits_of(builder, source.streaming or is_local, source.name, revision)
    except UserError:
        raise
    except Exception as error:  # the Hub client's, its transport's, the builder's
        gated = isinstance(error, DatasetNotFoundError) and "gated" in str(error)
        reason = why_not(error, source.name, gated=gated) or str(error.__cause__ or error)
        raise UserError(f"{key}.name = {source.name!r} (config {source.config!r}) cannot be loaded: {reason}") from error
    train = "train" if "train" in splits else [*(name for name in splits if name not in _HELD_OUT_NAMES), *splits][0]
    held_out = next((name for name in _HELD_OUT_NAMES if name in splits and name != train), None)
    chosen: list[tuple[str, SplitName | None]] = [(train, "train" if held_out else None)]
    chosen += [(held_out, "validation")] if held_out else []
    kind = _kind(builder)
    return Opened(
        [
            _table_of_files(key, split, kind, _here(splits[name], source, revision), source)
            if isinstance(splits[name], list)
            else _table(key, split, splits[name], source, local_files(source, key))
            for name, split in chosen
        ],
        revision,
    )


def _kind(builder: Any) -> str:
    """`json`, `parquet` or another of the formats that `datasets` reads."""
    return str(type(builder).__module__.rsplit(".", 1)[-1])


def _splits_of(builder: Any, streaming: bool, name: str, revision: str | None) -> dict[str, Any]:
    """Files of each split, or what reads them."""
    if _kind(builder) in ("json", "parquet"):
        return {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    if streaming:
        return dict(builder.as_streaming_dataset())
    return {split: _streamed(dataset) for split, dataset in load_dataset(name, builder.config.name, revision=revision).items()}


def _streamed(dataset: Dataset) -> IterableDataset:
    """A dataset that was downloaded whole is read in parts too."""
    return dataset.to_iterable_dataset(num_shards=max(1, min(_num_parts(dataset.data.nbytes, MAX_PARTS), len(dataset))))


def _here(names: list[str], source: HubSource, revision: str | None) -> list[str]:
    """Files as they are, or downloaded from the Hub into its cache; what is there already is not fetched again."""
    if source.streaming or revision is None:
        return names
    from huggingface_hub import hf_hub_download

    def download(name: str) -> str:
        path = name.split(f"@{revision}/", 1)[1]
        return str(hf_hub_download(source.name, path, repo_type="dataset", revision=revision))

    return list(thread_map(download, names, desc="download", unit="file", max_workers=8))
