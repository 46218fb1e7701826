"""Packed windows on disk: written from token ids as they come, read back without a copy."""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pyarrow as pa
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from isoflop.data.manifest import Shard
from isoflop.errors import UserError
from isoflop.untrusted import MOST_SHOWN

Ids = NDArray[np.unsignedinteger]

SHARD_BYTES = 512 * 2**20  # of ids: few files even for hundreds of billions of tokens, each copied and hashed on its own
_BATCH_BYTES = 16 * 2**20  # of ids in one Arrow record batch: the reader looks batches up by bisection


def dtype_for(num_ids: int) -> Literal["uint16", "uint32"]:
    """The smallest unsigned type that holds every id: a vocabulary over 65,536 silently wraps in uint16."""
    return "uint16" if num_ids <= 1 << 16 else "uint32"


class ShardWriter:
    """Cuts a stream of ids into disjoint windows of `sequence_length` and writes them as Arrow shards.

    A shard is written aside, synced and renamed: under its name it is whole. Ids that fill no window wait in `tail`.
    """

    def __init__(self, folder: Path, stem: str, sequence_length: int, dtype: str) -> None:
        self._folder, self._stem, self._length, self._dtype = folder, stem, sequence_length, np.dtype(dtype)
        self._features = Features({"input_ids": List(Value(dtype), length=sequence_length)})
        self._pending: list[Ids] = []
        self._pending_tokens = 0
        self._writer: ArrowWriter | None = None
        self._windows = 0
        self._batch_tokens = max(1, _BATCH_BYTES // (self._dtype.itemsize * sequence_length)) * sequence_length
        self.shards: list[Shard] = []

    @property
    def open_bytes(self) -> int:
        """Bytes of ids that are in no finished shard yet."""
        return (self._windows * self._length + self._pending_tokens) * self._dtype.itemsize

    @property
    def tail(self) -> Ids:
        """Ids that no window holds yet: after `cut`, less than a window."""
        return np.concatenate([*self._pending, np.empty(0, self._dtype)])

    def add(self, ids: Ids) -> None:
        """Append ids; each fits the type."""
        self._pending.append(ids.astype(self._dtype))
        self._pending_tokens += len(ids)
        if self._pending_tokens >= self._batch_tokens:
            self._flush()

    def cut(self) -> None:
        """End the shard with the last whole window."""
        self._flush()
        if self._writer is None:
            return
        self._writer.finalize()
        aside, file = self._aside(), self._folder / self._name()
        with aside.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        aside.replace(file)
        self.shards.append(Shard(name=file.name, bytes=file.stat().st_size, sha256=digest, windows=self._windows))
        self._writer, self._windows = None, 0

    def _flush(self) -> None:
        ids = self.tail
        whole = len(ids) // self._length * self._length
        for start in range(0, whole, self._batch_tokens):
            self._write(ids[start : min(start + self._batch_tokens, whole)])
        self._pending, self._pending_tokens = [ids[whole:]], len(ids) - whole

    def _write(self, ids: Ids) -> None:
        if self._writer is None:
            self._writer = ArrowWriter(path=str(self._aside()), features=self._features)
        column = pa.FixedSizeListArray.from_arrays(pa.array(ids), self._length)
        self._writer.write_table(pa.Table.from_arrays([column], schema=self._features.arrow_schema))
        self._windows += len(column)

    def _name(self) -> str:
        return f"{self._stem}-{len(self.shards):03d}.arrow"

    def _aside(self) -> Path:
        return self._folder / f".{self._name()}.{os.getpid()}"


class Windows:
    """All windows of a split as one indexable array, (num_windows, sequence_length), memory-mapped."""

    def __init__(self, prepared_dir: str | Path, shards: list[Shard], sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.blocks: list[Ids] = []
        """Zero-copy views of Arrow record batches, (windows, sequence_length) each."""
        fits = sum(shard.bytes for shard in shards) < psutil.virtual_memory().total / 2
        for shard in shards:
            self.blocks += _blocks(Path(prepared_dir) / shard.name, shard.windows, sequence_length, read_ahead=fits)
        self._starts = np.cumsum([0] + [len(block) for block in self.blocks])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Windows by index, (len(indices), sequence_length) as int64, the type torch's embedding takes."""
        blocks = np.searchsorted(self._starts, indices, side="right") - 1
        taken = np.empty((len(indices), self.sequence_length), dtype=np.int64)
        for row, (index, block) in enumerate(zip(indices, blocks, strict=True)):
            taken[row] = self.blocks[block][index - self._starts[block]]
        return taken


def _blocks(file: Path, windows: int, sequence_length: int, read_ahead: bool) -> list[Ids]:
    """The record batches of a shard. Raises `UserError` where it does not hold so many windows."""
    blocks = []
    try:
        for batch in pa.ipc.open_stream(_mapped(file, read_ahead)):
            batch.validate()
            ids = batch.column("input_ids").flatten().to_numpy(zero_copy_only=True)
            blocks.append(ids.reshape(-1, sequence_length))
        held = sum(map(len, blocks))
        if held != windows or any(block.dtype.kind != "u" for block in blocks):
            raise ValueError(f"it holds {held:,} windows of {sequence_length} ids, and its manifest says {windows:,}")
    except Exception as error:  # Arrow's, of a file that is none of its streams
        reason = " ".join(str(error).split())[:MOST_SHOWN]
        raise UserError(f"{file} holds no windows: {reason}; copy it again, or run scripts/prepare.py again") from None
    return blocks


def _mapped(file: Path, read_ahead: bool) -> pa.Buffer:
    """A file as memory. Windows are read in no order: what the kernel reads ahead is of use only where all of it stays in memory.

    Elsewhere each window would cost the disk all that is read ahead instead of its 4 kB: with 8 MiB of it, opening 1.25 TB took
    minutes instead of a second.
    """
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if not read_ahead:
        memory.madvise(mmap.MADV_RANDOM)
    return pa.py_buffer(memory)
