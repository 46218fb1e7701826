import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.data.contamination import Lookup, ngram_hashes, overlaps, save_sets

IDS = st.lists(st.integers(0, 3), max_size=60)
EOS = 9


def ids_of(values):
    return np.array(values, dtype=np.uint32)


def runs_of(ids, length):
    return [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]


@given(one=IDS, other=IDS, length=st.integers(2, 8))
def test_hashes_are_equal_where_runs_are(one, other, length):
    hashes = dict(zip(ngram_hashes(ids_of(one), length).tolist(), runs_of(one, length), strict=True))
    for value, run in zip(ngram_hashes(ids_of(other), length).tolist(), runs_of(other, length), strict=True):
        assert hashes.get(value, run) == run
        assert (value in hashes) == (run in set(hashes.values()))


@settings(deadline=None)
@given(
    documents=st.lists(IDS, max_size=5),
    sets=st.lists(st.lists(IDS, max_size=4), min_size=1, max_size=2),
    length=st.integers(2, 6),
)
def test_the_report_is_what_a_plain_search_finds(documents, sets, length, tmp_path_factory):
    file = tmp_path_factory.mktemp("sets") / "contamination.npz"
    save_sets(file, length, {f"set{i}": [ids_of(example) for example in examples] for i, examples in enumerate(sets)})
    lookup = Lookup.open(file)
    stream = [token for document in documents for token in [*document, EOS]]
    found = lookup.find(ids_of(stream))
    half = len(stream) // 2  # found in pieces that overlap: the same
    again = np.concatenate([lookup.find(ids_of(stream[: half + length])), lookup.find(ids_of(stream[half:]))])
    assert set(found.tolist()) == set(again.tolist())
    in_text = set(runs_of(stream, length))
    for i, examples in enumerate(sets):
        report = overlaps(file, found)[f"set{i}"]
        runs = [runs_of(example, length) for example in examples if len(example) >= length]
        shares = [sum(run in in_text for run in example) / len(example) for example in runs]
        unique = {run for example in runs for run in example}
        assert report.documents == len(runs)
        assert report.documents_found == sum(share > 0 for share in shares)
        assert report.documents_mostly_found == sum(share >= 0.8 for share in shares)
        assert (report.ngrams, report.ngrams_found) == (len(unique), len(unique & in_text))
