"""Packed windows on disk: written from token ids as they come, read back without a copy."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray

from isoflop.data.manifest import Shard, Split

Ids = NDArray[np.unsignedinteger]

SHARD_BYTES = 512 * 2**20  # of ids: few files even for hundreds of billions of tokens, each copied and hashed on its own
_BATCH_BYTES = 16 * 2**20  # of ids in one Arrow record batch: the reader looks batches up by bisection


def dtype_for(num_ids: int) -> str:
    """The smallest unsigned type that holds every id: a vocabulary over 65,536 silently wraps in uint16."""
    return "uint16" if num_ids <= 1 << 16 else "uint32"


class SplitWriter:
    """Cuts a stream of ids into disjoint windows of `sequence_length` and writes them as Arrow shards."""

    def __init__(self, folder: Path, name: str, sequence_length: int, dtype: str, num_ids: int) -> None:
        self._folder, self._name, self._length, self._dtype = folder, name, sequence_length, dtype
        self._features = Features({"input_ids": List(Value(dtype), length=sequence_length)})
        self._pending: list[Ids] = []
        self._pending_tokens = 0
        self._counts = np.zeros(num_ids, dtype=np.int64)
        self._documents = self._bytes = 0
        self._shards: list[Shard] = []
        self._writer: ArrowWriter | None = None
        self._shard_windows = 0
        self._batch_tokens = max(1, _BATCH_BYTES // (np.dtype(dtype).itemsize * sequence_length)) * sequence_length

    def add(self, ids: Ids, documents: int, num_bytes: int) -> None:
        """Append the ids of whole documents."""
        self._counts += np.bincount(ids, minlength=len(self._counts))
        self._pending.append(ids.astype(self._dtype))
        self._pending_tokens += len(ids)
        self._documents += documents
        self._bytes += num_bytes
        if self._pending_tokens >= self._batch_tokens:
            self._flush()

    def _flush(self) -> None:
        ids = np.concatenate([*self._pending, np.empty(0, self._dtype)])
        whole = len(ids) // self._length * self._length
        for start in range(0, whole, self._batch_tokens):
            self._write(ids[start : min(start + self._batch_tokens, whole)])
        self._pending, self._pending_tokens = [ids[whole:]], len(ids) - whole

    def _write(self, ids: Ids) -> None:
        if self._writer is None:
            self._writer = ArrowWriter(path=str(self._folder / self._shard_name()), features=self._features)
        column = pa.FixedSizeListArray.from_arrays(pa.array(ids), self._length)
        self._writer.write_table(pa.Table.from_arrays([column], schema=self._features.arrow_schema))
        self._shard_windows += len(column)
        if self._shard_windows * self._length * np.dtype(self._dtype).itemsize >= SHARD_BYTES:
            self._close_shard()

    def _shard_name(self) -> str:
        return f"{self._name}-{len(self._shards):05d}.arrow"

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.finalize()
        file = self._folder / self._shard_name()
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._shards.append(Shard(name=file.name, bytes=file.stat().st_size, sha256=digest, windows=self._shard_windows))
        self._writer, self._shard_windows = None, 0

    def close(self) -> Split:
        """Write what is left, but for a last partial window, and return the split's counts."""
        self._flush()
        self._close_shard()
        tokens = int(self._counts.sum())
        share = self._counts[self._counts > 0] / max(tokens, 1)
        return Split(
            documents=self._documents,
            bytes=self._bytes,
            tokens=tokens,
            windows=sum(shard.windows for shard in self._shards),
            dropped_tokens=self._pending_tokens,
            unigram_entropy_nats=float(-(share * np.log(share)).sum()),
            shards=self._shards,
        )


class Windows:
    """All windows of a split as one indexable array, (num_windows, sequence_length), memory-mapped."""

    def __init__(self, prepared_dir: str, split: Split, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self._blocks: list[Ids] = []  # zero-copy views of Arrow record batches, (windows, sequence_length)
        for shard in split.shards:
            column = Dataset.from_file(str(Path(prepared_dir) / shard.name)).data.column("input_ids")
            for chunk in column.chunks:
                self._blocks.append(chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, sequence_length))
        self._starts = np.cumsum([0] + [len(block) for block in self._blocks])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Windows by index, (len(indices), sequence_length) as int64, the type torch's embedding takes."""
        blocks = np.searchsorted(self._starts, indices, side="right") - 1
        taken = np.empty((len(indices), self.sequence_length), dtype=np.int64)
        for row, (index, block) in enumerate(zip(indices, blocks, strict=True)):
            taken[row] = self._blocks[block][index - self._starts[block]]
        return taken
