"""Select documents over all parts of a corpus: drop duplicates, keep the best by score.

`hash_documents` writes a small file per part. `duplicates` and `score_threshold` then go through all files in bounded memory.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isoflop.data.documents import Batch
from isoflop.utils.errors import UserError
from isoflop.utils.io import atomic_path
from isoflop.utils.untrusted import shown

DOCUMENTS_AT_ONCE = 4_000_000  # compared at once, about 100 MB
_ROW = np.dtype([("hash", "<u8"), ("row", "<i8"), ("score", "<f8")])


def _loaded(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except FileNotFoundError:
        raise
    except Exception as error:  # of numpy, the zip reader and the decompressor
        raise _damaged(file, f"{type(error).__name__}: {shown(str(error))}") from None


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file} is damaged ({reason}); delete it, and the same command writes it again")


class DocumentHashes(NamedTuple):
    """Hashes of a part's documents: a memory map of (hash, row, score), sorted by hash."""

    documents: NDArray[np.void]

    @classmethod
    def open(cls, file: Path) -> DocumentHashes:
        """Map a file that `hash_documents` wrote. Raises `UserError` where it is damaged."""
        documents = _loaded(file, lambda: np.load(file, mmap_mode="r", allow_pickle=False))
        if getattr(documents, "dtype", None) != _ROW or documents.ndim != 1:
            raise _damaged(file, "it holds no rows of hash, row and score")
        return cls(documents)


def hash_documents(batches: Iterable[Batch], file: Path) -> None:
    """Write hash, row and score of a part's documents: 24 bytes each, in memory until the part ends."""
    found = [np.empty(0, _ROW)]
    for batch in batches:
        rows = np.zeros(len(batch.rows), _ROW)
        offsets = np.frombuffer(batch.texts.buffers()[1], np.int64)[batch.texts.offset :][: len(rows) + 1]
        text = memoryview(batch.texts.buffers()[2] or b"")
        # 64 bits: the probability that any two of 600 million different documents collide is 1%.
        digests = [hashlib.blake2b(text[a:b], digest_size=8).digest() for a, b in itertools.pairwise(offsets)]
        rows["hash"] = np.frombuffer(b"".join(digests), "<u8")
        rows["row"] = batch.rows
        rows["score"] = 0.0 if batch.scores is None else batch.scores
        found.append(rows)
    documents = np.concatenate(found)
    with atomic_path(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, documents[np.argsort(documents["hash"], kind="stable")])


def duplicates(parts: list[DocumentHashes]) -> list[NDArray[np.bool_]]:
    """Return for each part and document (in the order of its hashes) whether an earlier part or row has the same text."""
    total = sum(len(part.documents) for part in parts)
    ranges = max(1, -(-total // DOCUMENTS_AT_ONCE))
    marked = [np.zeros(len(part.documents), dtype=bool) for part in parts]
    for low, high in itertools.pairwise(2**64 * border // ranges for border in range(ranges + 1)):
        at = [_between(part.documents["hash"], low, high) for part in parts]
        hashes = np.concatenate([part.documents["hash"][a:b] for part, (a, b) in zip(parts, at, strict=True)])
        order = np.argsort(hashes, kind="stable")  # stable: the first of equal hashes is of the earliest part and row
        again = np.zeros(len(hashes), dtype=bool)
        again[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
        for part_marked, piece, (a, b) in zip(marked, np.split(again, np.cumsum([b - a for a, b in at])[:-1]), at, strict=True):
            part_marked[a:b] = piece
    return marked


def _between(hashes: NDArray[np.uint64], low: int, high: int) -> tuple[int, int]:
    last = len(hashes) if high == 2**64 else int(np.searchsorted(hashes, np.uint64(high)))
    return int(np.searchsorted(hashes, np.uint64(low))), last


def score_threshold(parts: list[DocumentHashes], dropped: list[NDArray[np.bool_]], keep_fraction: float) -> float:
    """Return the lowest score among the best `keep_fraction` of the documents that are not dropped; ties with it are kept.

    Radix selection: counts documents by the leading 16 bits of their score, then by the next 16 bits within the bin of the
    threshold, and so on. Four passes over the files, 512 kB of memory.
    """
    wanted = round(keep_fraction * sum(int((~out).sum()) for out in dropped))
    prefix, above = 0, 0
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, dtype=np.int64)
        for part, out in zip(parts, dropped, strict=True):
            keys = _ordered(part.documents["score"][~out])
            here = keys if shift == 48 else keys[(keys >> np.uint64(shift + 16)) == np.uint64(prefix)]
            counts += np.bincount(((here >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16)
        from_above = np.cumsum(counts[::-1])[::-1]  # documents in a bin or a higher one
        chosen = int(np.flatnonzero(above + from_above >= max(wanted, 1))[-1])
        above += int(from_above[chosen] - counts[chosen])
        prefix = (prefix << 16) | chosen
    bits = np.uint64(prefix)
    sign = np.uint64(1 << 63)
    return float((bits ^ sign if bits & sign else ~bits).view(np.float64))


def _ordered(scores: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Return unsigned integers in the order of the scores: the sign bit is flipped, and all bits of negative numbers."""
    bits = np.ascontiguousarray(scores + 0.0).view(np.uint64)  # -0.0 becomes 0.0
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))


class DropList(NamedTuple):
    """Rows of a part that are left out, in ascending order."""

    duplicates: NDArray[np.int64]
    low_scores: NDArray[np.int64]

    @classmethod
    def open(cls, file: Path) -> DropList:
        """Read what `save` wrote. Raises `UserError` where it is damaged; `FileNotFoundError` is the caller's."""

        def read() -> list[NDArray[np.int64]]:
            with np.load(file, allow_pickle=False) as arrays:
                return [arrays["duplicates"], arrays["low_scores"]]

        arrays = _loaded(file, read)
        if any(rows.dtype != np.int64 or rows.ndim != 1 for rows in arrays):
            raise _damaged(file, "it holds no rows")
        return cls(*arrays)

    def digest(self) -> str:
        """Return the SHA-256 of the rows; the .npz file also holds the time of writing."""
        return hashlib.sha256(self.duplicates.tobytes() + b"/" + self.low_scores.tobytes()).hexdigest()

    def save(self, file: Path) -> None:
        """Write a .npz file. Every machine of a shared folder writes those of all parts."""
        with atomic_path(file, shared=True) as temporary, temporary.open("wb") as stream:
            np.savez(stream, duplicates=self.duplicates, low_scores=self.low_scores)


def rows_to_drop(part: DocumentHashes, duplicate: NDArray[np.bool_], threshold: float | None) -> DropList:
    """Return the rows to drop from a part: its duplicates, and the other rows with a score below the threshold."""
    low = np.zeros(len(duplicate), dtype=bool) if threshold is None else ~duplicate & (part.documents["score"] < threshold)
    return DropList(np.sort(part.documents["row"][duplicate]), np.sort(part.documents["row"][low]))


def is_in(rows: NDArray[np.int64], ascending: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which rows occur among ascending ones."""
    ended = np.append(ascending, -1)
    found: NDArray[np.bool_] = ended[np.searchsorted(ascending, rows)] == rows
    return found
