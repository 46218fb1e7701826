"""Documents from where a recipe says they are: local text, JSON lines, Parquet, a Hub dataset, the standard library.

Entered by `open_source`. Reading is done by `datasets`, streamed where the files are local, so that nothing is copied.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
from datasets import IterableDataset, load_dataset
from tqdm import tqdm

from isoflop.data.hub import hub_commit
from isoflop.data.order import keyed_uniform
from isoflop.errors import UserError, nearest
from isoflop.recipe import Data, HubSource, PythonStdlibSource, TextSource

BATCH_DOCUMENTS = 256  # documents handed to the tokenizer at once: enough for its threads, few enough for long documents
_VALIDATION_NAMES = ("validation", "val", "valid", "test")  # a dataset's own held-out split, in order of preference
_BLOCK_BYTES = 1 << 20


class Origin(NamedTuple):
    """What identifies the text, for the manifest."""

    files: dict[str, str]
    """SHA-256 of each local file."""
    revision: str | None
    """Commit of a Hub dataset."""


class Documents:
    """The documents of a source, split into `train` and `validation`, in batches of strings, as often as asked."""

    def __init__(self, splits: dict[str, Any], column: str, data: Data) -> None:
        self._splits, self._column, self._data = splits, column, data
        others = [name for name in splits if name not in _VALIDATION_NAMES]
        self._train = "train" if "train" in splits else [*others, *splits][0]
        self._own_validation = next((name for name in _VALIDATION_NAMES if name in splits and name != self._train), None)
        for name in filter(None, (self._train, self._own_validation)):
            columns = splits[name].column_names
            if columns is None:  # a streamed table tells its columns with its first rows
                continue
            if column not in columns:
                raise UserError(f"data.source.text_column = {column!r} is not in the data{nearest(column, columns)}")
            splits[name] = splits[name].select_columns([column])  # else every other column is decoded as well

    def batches(self, split: str) -> Iterator[list[str]]:
        """Batches of documents of `train` or `validation`, in the order of the source."""
        if self._own_validation:
            yield from self._texts(self._train if split == "train" else self._own_validation)
            return
        first = 0
        for texts in self._texts(self._train):
            index = np.arange(first, first + len(texts), dtype=np.int64)
            held_out = keyed_uniform(self._data.split_seed, index) < self._data.validation_fraction
            kept = [text for text, out in zip(texts, held_out, strict=True) if out == (split == "validation")]
            first += len(texts)
            if kept:
                yield kept

    def _texts(self, name: str) -> Iterator[list[str]]:
        row = 0
        for batch in self._read(name):
            if self._column not in batch:
                raise UserError(
                    f"data.source.text_column = {self._column!r} is not in the data{nearest(self._column, list(batch))}"
                )
            for offset, text in enumerate(batch[self._column]):
                if not isinstance(text, str):
                    raise UserError(
                        f"data.source: row {row + offset} of split {name!r} has {self._column} = {text!r}; every row needs"
                        " a string: drop or fill the others first"
                    )
            row += len(batch[self._column])
            yield batch[self._column]

    def _read(self, name: str) -> Iterator[dict[str, list[Any]]]:
        try:
            yield from self._splits[name].iter(batch_size=BATCH_DOCUMENTS)
        except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:  # ArrowInvalid is a ValueError
            reason = error.__cause__ or error
            raise UserError(f"data.source: split {name!r} cannot be read: {reason}; mend or leave out the file") from error


def open_source(data: Data) -> tuple[Documents, Origin]:
    """Open a recipe's source. Raises `UserError` for missing, empty or non-UTF-8 files and unreachable datasets."""
    source = data.source
    if isinstance(source, HubSource):
        return _open_hub(data, source)
    files = _local_files(data)
    origin, names = Origin(_hashes(files, data.source.kind), None), [str(file) for file in files]
    if isinstance(source, TextSource | PythonStdlibSource):
        sample_by = source.sample_by if isinstance(source, TextSource) else "document"
        split: IterableDataset = load_dataset("text", data_files=names, sample_by=sample_by, split="train", streaming=True)
        return Documents({"train": split}, "text", data), origin
    split = load_dataset(source.kind, data_files=names, split="train", streaming=True)
    return Documents({"train": split}, source.text_column, data), origin


def hash_files(data: Data) -> dict[str, str]:
    """SHA-256 of every local file of a source, by path (of the standard library: relative to it). Text is proved to be UTF-8."""
    return _hashes(_local_files(data), data.source.kind)


def _hashes(files: list[Path], kind: str) -> dict[str, str]:
    root, is_text = _stdlib_root(), kind in ("text", "json", "python_stdlib")
    return {
        str(file.relative_to(root) if file.is_relative_to(root) else file): _hash_checked(file, is_text)
        for file in tqdm(files, desc="hash sources", unit="file", delay=3)
    }


def _local_files(data: Data) -> list[Path]:
    source = data.source
    if isinstance(source, PythonStdlibSource):
        return _stdlib_files()
    if isinstance(source, HubSource):
        return sorted(file for file in Path(source.name).rglob("*") if file.is_file())
    return _expand(source.files)


def _open_hub(data: Data, source: HubSource) -> tuple[Documents, Origin]:
    is_local = Path(source.name).is_dir()
    revision = None if is_local else hub_commit("data.source.name", source.name, source.revision, "dataset")
    try:
        splits = load_dataset(source.name, source.config, revision=revision, streaming=source.streaming)
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"data.source.name = {source.name!r} (config {source.config!r}) cannot be loaded: {error}") from error
    return Documents(dict(splits), source.text_column, data), Origin(hash_files(data) if is_local else {}, revision)


def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_files() -> list[Path]:
    root = _stdlib_root()
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(f for f in root.rglob("*.py") if not left_out & set(f.relative_to(root).parts))
    return [f for f in files if f.stat().st_size and _is_utf8(f)]  # a few declare another encoding


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _expand(patterns: list[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not found:
            raise UserError(f"data.source.files = {pattern!r} matches no file (working directory {Path.cwd()}); correct the path")
        files += found
    if not any(file.stat().st_size for file in files):
        raise UserError(f"data.source.files = {patterns} is empty: {len(files)} file(s) of 0 bytes; point it at text")
    return list(dict.fromkeys(files))  # a file that two patterns match is one file


def _hash_checked(file: Path, text: bool) -> str:
    """SHA-256 of a file; for text, one pass also proves that what is inside (also under gzip or zstd) is UTF-8."""
    with file.open("rb") as raw:
        digest = hashlib.file_digest(raw, "sha256").hexdigest()
    if text:
        decoder, seen = codecs.getincrementaldecoder("utf-8")(), 0
        with fsspec.open(str(file), "rb", compression="infer") as stream:
            try:
                while block := stream.read(_BLOCK_BYTES):
                    decoder.decode(block)
                    seen += len(block)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data.source: {file} is not UTF-8: {error.reason} near byte {seen + error.start}; convert it, e.g."
                    f" iconv -f latin1 -t utf-8 {file}"
                ) from None
    return digest
