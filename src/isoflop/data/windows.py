"""Packed windows on disk: written from a stream of token ids, read back without a copy."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pyarrow as pa
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from isoflop.data.manifest import Shard
from isoflop.utils.errors import UserError
from isoflop.utils.io import replace_file, sha256, temporary_path
from isoflop.utils.untrusted import MOST_SHOWN

Ids = NDArray[np.unsignedinteger]

SHARD_BYTES = 512 * 2**20  # of ids: few files even for hundreds of billions of tokens, each copied and hashed separately
_BATCH_BYTES = 16 * 2**20  # of ids in one Arrow record batch; the reader finds batches by bisection


def dtype_for(num_ids: int) -> Literal["uint16", "uint32"]:
    """Return the smallest unsigned type for all ids: those above 65,535 would silently wrap in uint16."""
    return "uint16" if num_ids <= 1 << 16 else "uint32"


class ShardWriter:
    """Cuts a stream of ids into disjoint windows of `sequence_length` and writes them as Arrow shards.

    A shard is written to a temporary file, synced and renamed. Ids that do not fill a window stay in `tail`.
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
        """Return the bytes of ids that are in no finished shard yet."""
        return (self._windows * self._length + self._pending_tokens) * self._dtype.itemsize

    @property
    def tail(self) -> Ids:
        """Return the ids that are in no window yet: after `cut`, less than a window."""
        return np.concatenate([*self._pending, np.empty(0, self._dtype)])

    def add(self, ids: Ids) -> None:
        """Append ids that fit the type."""
        self._pending.append(ids.astype(self._dtype))
        self._pending_tokens += len(ids)
        if self._pending_tokens >= self._batch_tokens:
            self._flush()

    def cut(self) -> None:
        """Finish the shard with the last complete window."""
        self._flush()
        if self._writer is None:
            return
        self._writer.finalize()
        file = self._file()
        digest = sha256(temporary_path(file))
        replace_file(temporary_path(file), file, durable=True)
        self.shards.append(Shard(name=file.name, bytes=file.stat().st_size, sha256=digest, windows=self._windows))
        self._writer, self._windows = None, 0

    def _flush(self) -> None:
        ids = self.tail
        complete = len(ids) // self._length * self._length
        for start in range(0, complete, self._batch_tokens):
            self._write(ids[start : min(start + self._batch_tokens, complete)])
        self._pending, self._pending_tokens = [ids[complete:]], len(ids) - complete

    def _write(self, ids: Ids) -> None:
        if self._writer is None:
            self._writer = ArrowWriter(path=str(temporary_path(self._file())), features=self._features)
        column = pa.FixedSizeListArray.from_arrays(pa.array(ids), self._length)
        self._writer.write_table(pa.Table.from_arrays([column], schema=self._features.arrow_schema))
        self._windows += len(column)

    def _file(self) -> Path:
        """Return the path of the shard that is being written."""
        return self._folder / f"{self._stem}-{len(self.shards):03d}.arrow"


class Windows:
    """All windows of a split as one memory-mapped array, (num_windows, sequence_length)."""

    def __init__(self, prepared_dir: str | Path, shards: list[Shard], sequence_length: int, num_ids: int | None = None) -> None:
        self.sequence_length = sequence_length
        self._prepared_dir, self._num_ids = prepared_dir, num_ids
        self.blocks: list[Ids] = []
        """Zero-copy views of Arrow record batches, (windows, sequence_length) each."""
        fits = sum(shard.bytes for shard in shards) < psutil.virtual_memory().total / 2
        for shard in shards:
            self.blocks += _blocks(Path(prepared_dir) / shard.name, shard.windows, sequence_length, read_ahead=fits)
        self._starts = np.cumsum([0] + [len(block) for block in self.blocks])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return windows by index, (len(indices), sequence_length) as int64, the type that torch's embedding takes.

        Raises `UserError` for an id that the tokenizer does not have: on a GPU its embedding fails in a CUDA assertion.
        """
        blocks = np.searchsorted(self._starts, indices, side="right") - 1
        taken = np.empty((len(indices), self.sequence_length), dtype=np.int64)
        for row, (index, block) in enumerate(zip(indices, blocks, strict=True)):
            taken[row] = self.blocks[block][index - self._starts[block]]
        if self._num_ids is not None and taken.size and (largest := int(taken.max())) >= self._num_ids:
            raise UserError(
                f"data.prepared_dir = '{self._prepared_dir}': a window holds the id {largest}, and its tokenizer has"
                f" {self._num_ids} ids; copy the folder again, or run isoflop prepare again"
            )
        return taken


def _blocks(file: Path, windows: int, sequence_length: int, read_ahead: bool) -> list[Ids]:
    """Return the record batches of a shard. Raises `UserError` where it does not hold `windows` windows."""
    blocks = []
    try:
        for batch in _batches(_mapped(file, read_ahead)):
            batch.validate()
            ids = batch.column("input_ids").flatten().to_numpy(zero_copy_only=True)
            blocks.append(ids.reshape(-1, sequence_length))
        found = sum(map(len, blocks))
        if found != windows or any(block.dtype.kind != "u" for block in blocks):
            raise ValueError(f"it holds {found:,} windows of {sequence_length} ids, and its manifest says {windows:,}")
    except Exception as error:  # of Arrow, for a file that is not one of its streams
        reason = " ".join(str(error).split())[:MOST_SHOWN]
        raise UserError(f"{file} holds no windows: {reason}; copy it again, or run isoflop prepare again") from None
    return blocks


def _batches(stream: pa.Buffer) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an Arrow stream without a copy. Raises `ValueError` for a compressed one before reading it."""
    schema = pa.ipc.open_stream(stream).schema
    messages = pa.ipc.MessageReader.open_stream(stream)
    messages.read_next_message()  # the schema's
    for message in messages:
        if message.type != "record batch":
            raise ValueError(f"it has a {message.type} where a record batch belongs")
        if _is_compressed(memoryview(message.metadata)):
            raise ValueError("its record batches are compressed")
        yield pa.ipc.read_record_batch(message, schema)


def _is_compressed(metadata: memoryview) -> bool:
    """Return whether a record batch may be compressed, from its message, which pyarrow does not expose but has validated.

    FlatBuffers of Arrow's Message.fbs: field 2 of a Message is its header, field 3 of a RecordBatch its compression. Before Arrow
    1.0 the compression was in the custom metadata, field 4 of the Message, which shards do not have.
    """

    def field(table: int, number: int) -> int | None:
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        entry = 4 + 2 * number
        if entry >= struct.unpack_from("<H", metadata, vtable)[0]:
            return None
        offset: int = struct.unpack_from("<H", metadata, vtable + entry)[0]
        return table + offset if offset else None

    message: int = struct.unpack_from("<I", metadata)[0]
    header = field(message, 2)
    batch = header + struct.unpack_from("<I", metadata, header)[0] if header is not None else message
    return field(batch, 3) is not None or field(message, 4) is not None


def _mapped(file: Path, read_ahead: bool) -> pa.Buffer:
    """Map a file into memory. Windows are read in random order, so the kernel's read-ahead helps only if all fits in memory.

    Without the advice, each window of 4 kB costs the disk a full read-ahead: at 8 MiB, opening 1.25 TB took minutes instead of a
    second.
    """
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if not read_ahead:
        memory.madvise(mmap.MADV_RANDOM)
    return pa.py_buffer(memory)
