from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.data import selection as module
from isoflop.data.documents import Batch
from isoflop.data.selection import DocumentHashes, DropList, duplicates, hash_documents, is_in, rows_to_drop, score_threshold

SCORES = st.floats(allow_nan=False, allow_infinity=False, width=64)


def hashed(folder, texts_and_scores, name="part"):
    """A file of document hashes of (text, score) pairs, read in two batches."""
    half = len(texts_and_scores) // 2
    batches = [
        Batch(
            np.arange(first, first + len(pairs)),
            pa.array([text for text, _ in pairs], pa.large_string()),
            np.array([score for _, score in pairs], dtype=np.float64),
            first + len(pairs),
            Counter(),
        )
        for first, pairs in ((0, texts_and_scores[:half]), (half, texts_and_scores[half:]))
    ]
    hash_documents(batches, folder / f"{name}.npy")
    return DocumentHashes.open(folder / f"{name}.npy")


@settings(deadline=None)
@given(
    parts=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=30), min_size=1, max_size=4),
    at_once=st.sampled_from([1, 3, 1000]),
)
def test_the_first_of_equal_texts_is_kept_at_any_memory_limit(parts, at_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hashes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DOCUMENTS_AT_ONCE", at_once)
        parts_hashed = [hashed(folder, [(text, 0.0) for text in part], f"p{i}") for i, part in enumerate(parts)]
        decided = [rows_to_drop(one, again, None) for one, again in zip(parts_hashed, duplicates(parts_hashed), strict=True)]
    seen = set()
    for part, decision in zip(parts, decided, strict=True):
        expected = []
        for row, text in enumerate(part):
            if text in seen:
                expected.append(row)
            seen.add(text)
        assert decision.duplicates.tolist() == expected
        assert decision.low_scores.tolist() == []


@settings(deadline=None)
@given(scores=st.lists(SCORES, min_size=1, max_size=60), fraction=st.floats(0.01, 0.99), parts=st.integers(1, 3))
def test_the_threshold_is_the_score_of_the_last_one_kept(scores, fraction, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hashes")
    pieces = [[(f"{i} {j}", scores[j]) for j in index] for i, index in enumerate(np.array_split(np.arange(len(scores)), parts))]
    parts_hashed = [hashed(folder, piece, f"p{i}") for i, piece in enumerate(pieces)]
    kept = [np.zeros(len(one.documents), dtype=bool) for one in parts_hashed]
    threshold = score_threshold(parts_hashed, kept, fraction)
    assert threshold == sorted(scores, reverse=True)[max(round(fraction * len(scores)), 1) - 1]


def test_duplicates_do_not_count_among_the_best(tmp_path):
    one = hashed(tmp_path, [("a", 9.0), ("a", 9.0), ("b", 1.0), ("c", 2.0), ("d", 3.0)])
    (again,) = duplicates([one])
    decision = rows_to_drop(one, again, score_threshold([one], [again], 0.5))
    assert (decision.duplicates.tolist(), decision.low_scores.tolist()) == ([1], [2, 3])  # 2 of 4 are kept: 9 and 3
    decision.save(tmp_path / "decided.npz")
    assert [rows.tolist() for rows in DropList.open(tmp_path / "decided.npz")] == [[1], [2, 3]]


@given(rows=st.lists(st.integers(0, 50), max_size=20), among=st.sets(st.integers(0, 50)))
def test_is_in(rows, among):
    assert is_in(np.array(rows, dtype=np.int64), np.array(sorted(among), dtype=np.int64)).tolist() == [
        row in among for row in rows
    ]


def test_an_unfinished_file_is_never_read_as_a_finished_one(tmp_path, monkeypatch):
    """Several machines write to a shared folder, and search it for the files of the others."""

    def stop_half_way(file, array):
        (file if hasattr(file, "write") else file.open("wb")).write(b"half")
        seen.extend(tmp_path.glob("survey-*"))
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(np, "save", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        hashed(tmp_path, [("a", 0.0)], "survey-text-00000-0f")
    assert seen == list(tmp_path.iterdir()) == []
