"""Where a recipe says its text is: local text, JSON lines, Parquet, a dataset on the Hub, the standard library.

Entered by `open_source`. Reading is left to `datasets`, streamed, so that nothing is copied; a source is cut into parts that
are read, encoded and kept apart, so that many processes work on it and a killed one loses little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset, load_dataset

from isoflop.data.files import find_fault, local_files
from isoflop.data.hub import hub_commit, why_not
from isoflop.data.manifest import SplitName
from isoflop.errors import UserError, nearest
from isoflop.recipe_data import HubSource, PythonStdlibSource, Source, TextSource

# Bytes of source files that make a part: some seconds of work, so that a kill loses little and many processes share it.
PART_BYTES = 256 * 2**20
MAX_PARTS = 4096  # of a table: SlimPajama-627B has 59,166 files, and a shard of windows for each would be 20 MB
RESHARD_BELOW = 64  # files; a Parquet dataset of fewer is cut by row groups, which takes a look into every file
_HELD_OUT_NAMES = ("validation", "val", "valid", "test")  # a dataset's own held-out split, in order of preference


@dataclass(frozen=True)
class Table:
    """One split of a dataset, read in `num_parts` parts."""

    key: str
    """Where the recipe says so, for errors."""
    split: SplitName | None
    """None where documents are held out by their number."""
    dataset: IterableDataset
    num_parts: int
    files: tuple[Path, ...]
    """Its local files, in order."""
    source: Source
    in_files: bool
    """Whether a part is some of the files."""

    def part(self, number: int) -> IterableDataset:
        """One part, in batches of Arrow tables with the columns that are needed."""
        columns = [name for name in (self.text_column, self.score_column) if name]
        return self.dataset.shard(self.num_parts, number, contiguous=True).select_columns(columns).with_format("arrow")

    def files_of(self, number: int) -> tuple[Path, ...]:
        """The local files a part is read from; all of the table's where parts are cut otherwise."""
        if not self.in_files:
            return self.files
        each, more = divmod(len(self.files), self.num_parts)  # as `shard(..., contiguous=True)` deals them out
        start = each * number + min(number, more)
        return self.files[start : start + each + (number < more)]

    @property
    def text_column(self) -> str:
        """Name of the column of text."""
        return "text" if isinstance(self.source, TextSource | PythonStdlibSource) else self.source.text_column

    @property
    def score_column(self) -> str | None:
        """Name of the column of scores, where documents are chosen by one."""
        return None if isinstance(self.source, TextSource | PythonStdlibSource) else self.source.score_column


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
    if isinstance(source, TextSource | PythonStdlibSource):
        sample_by = source.sample_by if isinstance(source, TextSource) else "document"
        dataset = _load(key, "text", data_files=[str(file) for file in files], sample_by=sample_by, split="train", streaming=True)
    else:
        dataset = _load(key, source.kind, data_files=[str(file) for file in files], split="train", streaming=True)
    return Opened([_table(key, None, dataset, source, files)], None)


def _table(key: str, split: SplitName | None, dataset: IterableDataset, source: Source, files: list[Path]) -> Table:
    """A table cut into parts of about PART_BYTES, whole files or row groups each."""
    num_files = dataset.num_shards
    if num_files < RESHARD_BELOW:
        dataset = dataset.reshard()
    total = sum(file.stat().st_size for file in files)
    wanted = math.ceil(total / PART_BYTES) if total else MAX_PARTS
    in_files = dataset.num_shards == len(files)
    table = Table(key, split, dataset, max(1, min(wanted, dataset.num_shards, MAX_PARTS)), tuple(files), source, in_files)
    known = dataset.column_names  # None where only the first rows will tell
    for name in filter(None, (table.text_column, table.score_column)):
        if known is not None and name not in known:
            which = "text_column" if name == table.text_column else "score_column"
            raise UserError(f"{key}.{which} = {name!r} is not in the data{nearest(name, known)}")
    return table


def _open_hub(source: HubSource, key: str, commit: str | None) -> Opened:
    is_local = Path(source.name).is_dir()
    files = local_files(source, key) if is_local else []
    revision = None if is_local else commit or hub_commit(f"{key}.name", source.name, source.revision, "dataset")
    streaming = source.streaming or is_local
    splits = dict(_load(key, source.name, source.config, revision=revision, streaming=streaming))
    train = "train" if "train" in splits else [*(name for name in splits if name not in _HELD_OUT_NAMES), *splits][0]
    held_out = next((name for name in _HELD_OUT_NAMES if name in splits and name != train), None)
    chosen: list[tuple[str, SplitName | None]] = [(train, "train" if held_out else None)]
    chosen += [(held_out, "validation")] if held_out else []
    tables = [_table(key, split, _streamed(splits[name]), source, files) for name, split in chosen]
    return Opened(tables, revision)


def _streamed(dataset: Any) -> IterableDataset:
    """A dataset that was downloaded whole is read in parts too."""
    if isinstance(dataset, Dataset):
        return dataset.to_iterable_dataset(num_shards=max(1, min(MAX_PARTS, dataset.data.nbytes // PART_BYTES, len(dataset))))
    return dataset


def _load(key: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return load_dataset(*args, **kwargs)
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        if "data_files" in kwargs:
            faults = (find_fault(Path(file), args[0]) for file in kwargs["data_files"])
            fault = next(filter(None, faults), str(error.__cause__ or error))
            raise UserError(f"{key}: {fault}; mend or leave out the file") from error
        reason = why_not(error, str(args[0])) or str(error.__cause__ or error)
        raise UserError(f"{key}.name = {args[0]!r} (config {args[1]!r}) cannot be loaded: {reason}") from error
