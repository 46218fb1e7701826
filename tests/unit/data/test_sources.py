from pathlib import Path

import datasets
import pytest
from conftest import documents_of, rows_of

from isoflop.config.recipe_data import Data
from isoflop.data import sources
from isoflop.data.files import hash_files, name_of, source_files
from isoflop.data.sources import open_source
from isoflop.utils.errors import UserError


def source(**fields):
    return Data.model_validate({"source": fields, "prepared_dir": "unused"}).source


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("text", "doc*.txt"),
        ("json", "rows.jsonl"),
        ("json", "rows.jsonl.gz"),
        ("json", "rows.jsonl.zst"),
        ("parquet", "rows.parquet"),
    ],
)
def test_every_local_form_gives_the_same_documents(kind, pattern, fifty_documents):
    opened = open_source(source(kind=kind, files=[str(fifty_documents / pattern)]), "data.source")
    assert documents_of(opened) == rows_of(fifty_documents)
    assert opened.revision is None
    assert [table.split for table in opened.tables] == [None]


@pytest.mark.parametrize("own", ["validation", "val", "test", None])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_with_or_without_its_own_held_out_split(own, streaming, tmp_path, fifty_documents):
    rows = rows_of(fifty_documents)
    for split, texts in {"train": rows[:40], **({own: rows[40:]} if own else {})}.items():
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    opened = open_source(source(kind="hub", name=str(tmp_path / "set"), streaming=streaming), "data.source")
    assert [table.split for table in opened.tables] == (["train", "validation"] if own else [None])
    assert documents_of(opened) == (rows if own else rows[:40])


@pytest.mark.parametrize("only", ["test", "validation"])
def test_a_dataset_with_a_held_out_split_alone_is_never_its_own_validation(only, tmp_path, fifty_documents):
    rows = datasets.Dataset.from_dict({"text": rows_of(fifty_documents), "score": [0] * 50})
    rows.to_parquet(tmp_path / "set" / f"{only}-00000-of-00001.parquet")
    opened = open_source(source(kind="hub", name=str(tmp_path / "set")), "data.source")
    assert [table.split for table in opened.tables] == [None]
    assert documents_of(opened) == rows["text"][:]


def test_a_file_that_two_patterns_match_is_read_once(fifty_documents):
    opened = open_source(
        source(kind="text", files=[str(fifty_documents / "doc0*.txt"), str(fifty_documents / "doc*1.txt")]), "data.source"
    )
    texts = documents_of(opened)
    assert len(texts) == len(set(texts)) == 14


def test_the_standard_library_without_its_tests():
    files = source_files(source(kind="python_stdlib"), "data.source")
    hashes = hash_files(files)
    assert len(hashes) == len(files) > 400
    assert len(hashes["json/decoder.py"]) == 64
    assert not any(set(name.split("/")) & {"test", "tests", "idle_test", "site-packages"} for name in hashes)


def test_the_packages_installed_beside_it():
    alone, files = (source_files(source(kind=f"python_{which}"), "data.source") for which in ("stdlib", "packages"))
    assert files[: len(alone)] == alone
    names = [name_of(file) for file in files]
    assert len(set(names)) == len(names) > 4 * len(alone)
    assert {"json/decoder.py", "site-packages/torch/__init__.py"} <= set(names)
    assert not any(set(name.split("/")) & {"test", "tests"} for name in names)


def test_parts_are_complete_files_in_order(fifty_documents, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 200)
    (table,) = open_source(source(kind="text", files=[str(fifty_documents / "doc*.txt")]), "data.source").tables
    assert table.num_parts == 7  # 1,330 bytes
    files = [table.files_of(number) for number in range(7)]
    assert [len(part) for part in files] == [8, 7, 7, 7, 7, 7, 7]
    for number, part in enumerate(files):
        assert [text for read in table.tables(number, 0) for text in read["text"].to_pylist()] == [
            Path(file.path).read_text() for file in part
        ]


def test_one_parquet_file_is_cut_by_row_groups(tmp_path, fifty_documents, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 1000)
    rows = datasets.Dataset.from_dict({"text": rows_of(fifty_documents)})
    rows.to_parquet(tmp_path / "rows.parquet", batch_size=10)
    opened = open_source(source(kind="parquet", files=[str(tmp_path / "rows.parquet")]), "data.source")
    assert 1 < opened.tables[0].num_parts <= 5
    assert [file.path for file in opened.tables[0].files_of(0)] == [str(tmp_path / "rows.parquet")]
    assert documents_of(opened) == rows["text"][:]


def test_bad_sources(fifty_documents, monkeypatch):
    (fifty_documents / "empty.txt").write_text("")
    monkeypatch.chdir(fifty_documents)
    cases = [
        ({"kind": "text", "files": ["nothing*.txt"]}, r"data.source.files = 'nothing\*.txt' matches no file .*correct the path"),
        ({"kind": "text", "files": ["empty.txt"]}, "is empty: 1 file"),
        (
            {"kind": "json", "files": ["rows.jsonl"], "text_column": "txt"},
            "text_column = 'txt' is not in the data; did you mean text?",
        ),
        (
            {"kind": "parquet", "files": ["rows.parquet"], "text_column": "body"},
            "'body' is not in the data; known here: score, text",
        ),
        (
            {"kind": "parquet", "files": ["rows.parquet"], "score_column": "scor", "keep_fraction": 0.5},
            "score_column = 'scor' is not in the data; did you mean score?",
        ),
        ({"kind": "hub", "name": "no/such-dataset"}, "'no/such-dataset' at revision 'main' cannot be reached: "),
    ]
    for fields, message in cases:
        with pytest.raises(UserError, match=message):
            open_source(source(**fields), "data.source")
