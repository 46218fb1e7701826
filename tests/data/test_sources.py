import gzip
import json

import datasets
import pytest

from isoflop.data.sources import open_source
from isoflop.errors import UserError
from isoflop.recipe import Data


def data(fraction=0.5, **source):
    return Data.model_validate({"source": source, "prepared_dir": "unused", "validation_fraction": fraction})


def all_texts(documents, split):
    return [text for batch in documents.batches(split) for text in batch]


ROWS = [f"document {i}\nsecond line é\n" for i in range(50)]


@pytest.fixture
def files(tmp_path):
    """The same fifty documents in every local form."""
    for i, text in enumerate(ROWS):
        (tmp_path / f"doc{i:02}.txt").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps({"text": text, "score": 1}) + "\n" for text in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(lines)
    datasets.Dataset.from_dict({"text": ROWS}).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "pattern"), [("text", "doc*.txt"), ("json", "rows.jsonl"), ("json", "rows.jsonl.gz"), ("parquet", "rows.parquet")]
)
def test_every_local_form_gives_the_same_documents_and_split(kind, pattern, files):
    documents, origin = open_source(data(kind=kind, files=[str(files / pattern)]))
    train, validation = all_texts(documents, "train"), all_texts(documents, "validation")
    assert sorted(train + validation) == sorted(ROWS)
    assert 10 < len(validation) < 40
    assert validation == [ROWS[i] for i in (int(text.split()[1]) for text in validation)]
    assert all_texts(documents, "validation") == validation  # as often as asked
    assert all(len(checksum) == 64 for checksum in origin.files.values())
    reference, _ = open_source(data(kind="text", files=[str(files / "doc*.txt")]))
    assert all_texts(reference, "validation") == validation


def test_the_split_is_seeded(files):
    source = {"kind": "json", "files": [str(files / "rows.jsonl")]}
    one, other = (
        all_texts(open_source(data(**source).model_copy(update={"split_seed": seed}))[0], "validation") for seed in (0, 1)
    )
    assert one != other


@pytest.mark.parametrize("own", ["validation", "val", "test", None])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_with_or_without_its_own_held_out_split(own, streaming, tmp_path):
    for split, rows in {"train": ROWS[:40], **({own: ROWS[40:]} if own else {})}.items():
        datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    documents, origin = open_source(data(0.3, kind="hub", name=str(tmp_path / "set"), streaming=streaming))
    train, validation = all_texts(documents, "train"), all_texts(documents, "validation")
    assert sorted(train + validation) == sorted(ROWS if own else ROWS[:40])
    assert origin.revision is None
    if own:
        assert (train, validation) == (ROWS[:40], ROWS[40:])


@pytest.mark.parametrize("only", ["test", "validation"])
def test_a_dataset_with_a_held_out_split_alone_is_never_its_own_validation(only, tmp_path):
    datasets.Dataset.from_dict({"text": ROWS, "score": [0] * 50}).to_parquet(tmp_path / "set" / f"{only}-00000-of-00001.parquet")
    documents, origin = open_source(data(0.3, kind="hub", name=str(tmp_path / "set")))
    train, validation = all_texts(documents, "train"), all_texts(documents, "validation")
    assert sorted(train + validation) == sorted(ROWS)
    assert validation
    assert [name.rsplit("/", 1)[-1] for name in origin.files] == [f"{only}-00000-of-00001.parquet"]


def test_a_file_that_two_patterns_match_is_read_once(files):
    documents, _ = open_source(data(kind="text", files=[str(files / "doc0*.txt"), str(files / "doc*1.txt")]))
    texts = all_texts(documents, "train") + all_texts(documents, "validation")
    assert len(texts) == len(set(texts)) == 14


def test_the_standard_library_without_its_tests():
    documents, origin = open_source(data(kind="python_stdlib"))
    assert "json/decoder.py" in origin.files
    assert not any(set(name.split("/")) & {"test", "tests", "idle_test", "site-packages"} for name in origin.files)
    assert len(origin.files) > 400
    assert any(
        '"""Implementation of JSONDecoder' in text for text in all_texts(documents, "train") + all_texts(documents, "validation")
    )


def test_bad_sources(files, monkeypatch):
    (files / "latin.txt").write_bytes(b"x" * 70 + "é".encode("latin-1") + b"abc")
    (files / "empty.txt").write_text("")
    (files / "cut.jsonl").write_text('{"text": "a"}\n{"text": "b')
    (files / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    monkeypatch.chdir(files)
    cases = [
        ({"kind": "text", "files": ["nothing*.txt"]}, "'nothing\\*.txt' matches no file .*correct the path"),
        ({"kind": "text", "files": ["latin.txt"]}, "latin.txt is not UTF-8: .* near byte 70; convert it, e.g. iconv"),
        ({"kind": "text", "files": ["empty.txt"]}, "is empty: 1 file"),
        ({"kind": "json", "files": ["rows.jsonl"], "text_column": "txt"}, "'txt' is not in the data; did you mean text?"),
        ({"kind": "parquet", "files": ["rows.parquet"], "text_column": "body"}, "'body' is not in the data; known here: text"),
        ({"kind": "json", "files": ["null.jsonl"]}, "row 1 of split 'train' has text = None"),
        ({"kind": "json", "files": ["cut.jsonl"]}, "split 'train' cannot be read: "),
        ({"kind": "hub", "name": "no/such-dataset"}, "'no/such-dataset' at revision 'main' cannot be reached"),
    ]
    for source, message in cases:
        with pytest.raises(UserError, match=message):
            list(open_source(data(0.01, **source))[0].batches("train"))
