"""Runs of tokens that the training text shares with evaluation sets: looked for while it is encoded, reported, never removed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isoflop.data.manifest import Overlap

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing: 2^64 over the golden ratio
_FILTER_BITS = 24
MOSTLY = 0.8  # of an example's runs: "dirty" in Llama 2's analysis (Touvron et al. 2023, appendix A.6)


def ngram_hashes(ids: NDArray[np.unsignedinteger], length: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each run of `length` ids, (len(ids) - length + 1,): a polynomial of the ids, mixed at the end."""
    if len(ids) < length:
        return np.empty(0, np.uint64)
    wide = ids.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(len(ids) - length + 1, dtype=np.uint64)
    for offset in range(length):
        hashes *= _FACTOR
        hashes += wide[offset : offset + len(hashes)]
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(32))


class Lookup(NamedTuple):
    """The runs of all evaluation sets."""

    length: int
    hashes: NDArray[np.uint64]
    """(runs,), ascending, each once."""
    possible: NDArray[np.bool_]
    """Whether any of them starts with these 24 bits: answers most questions with one look."""

    @classmethod
    def open(cls, file: Path) -> Lookup:
        """The runs of what `save_sets` wrote."""
        with np.load(file, allow_pickle=False) as arrays:
            length, hashes = int(arrays["length"]), arrays["hashes"]
        possible = np.zeros(1 << _FILTER_BITS, dtype=bool)
        possible[hashes >> np.uint64(64 - _FILTER_BITS)] = True
        return cls(length, hashes, possible)

    def find(self, ids: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
        """Places in `hashes` of the runs that occur in a stream of ids.

        A run across two documents holds an end-of-text id, which no example does.
        """
        hashes = ngram_hashes(ids, self.length)
        likely = np.unique(hashes[self.possible[hashes >> np.uint64(64 - _FILTER_BITS)]])
        places = np.searchsorted(self.hashes, likely)
        inside = places < len(self.hashes)
        found: NDArray[np.int64] = places[inside][self.hashes[places[inside]] == likely[inside]]
        return found


def save_sets(file: Path, length: int, sets: dict[str, list[NDArray[np.uint32]]]) -> None:
    """Write the runs of `length` ids of every example, (ids,), of every set to a .npz file."""
    examples = {name: [ngram_hashes(ids, length) for ids in documents] for name, documents in sets.items()}
    every = [hashes for documents in examples.values() for hashes in documents]
    arrays = {"length": np.array(length), "hashes": np.unique(np.concatenate([*every, np.empty(0, np.uint64)]))}
    for name, documents in examples.items():
        arrays[f"runs of {name}"] = np.concatenate([*documents, np.empty(0, np.uint64)])
        arrays[f"lengths of {name}"] = np.array([len(hashes) for hashes in documents if len(hashes)], dtype=np.int64)
    np.savez(file, **arrays)  # type: ignore[arg-type]  # whose stub takes the names for options


def overlaps(file: Path, found_places: NDArray[np.int64]) -> dict[str, Overlap]:
    """The report on each set, from the places of the runs that were found."""
    with np.load(file, allow_pickle=False) as arrays:
        length, hashes = int(arrays["length"]), arrays["hashes"]
        found = np.zeros(len(hashes), dtype=bool)
        found[found_places] = True
        reports = {}
        for name in (key.removeprefix("runs of ") for key in arrays if key.startswith("runs of ")):
            places = np.searchsorted(hashes, arrays[f"runs of {name}"])
            lengths = arrays[f"lengths of {name}"]
            shares = (
                np.add.reduceat(found[places].astype(np.int64), np.cumsum(lengths) - lengths) / lengths
                if len(lengths)
                else lengths
            )
            reports[name] = Overlap(
                ngram_tokens=length,
                documents=len(lengths),
                documents_found=int((shares > 0).sum()),
                documents_mostly_found=int((shares >= MOSTLY).sum()),
                ngrams=len(np.unique(places)),
                ngrams_found=int(found[np.unique(places)].sum()),
            )
    return reports
