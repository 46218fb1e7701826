import gzip
import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.config.recipe_data import Data, Filter
from isoflop.data import documents as module
from isoflop.data.documents import prefetch, read_documents
from isoflop.data.files import find_damage
from isoflop.data.readers import json_lines
from isoflop.data.sources import open_source
from isoflop.utils.errors import UserError


def table(**fields):
    return open_source(Data.model_validate({"source": fields, "prepared_dir": "unused"}).source, "data.source").tables[0]


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return table(kind="json", files=[str(file)])


EVERYTHING = Filter()


def read(one, wanted=EVERYTHING, start=0):
    batches = list(read_documents(one, 0, wanted, start))
    left_out = sum((batch.left_out for batch in batches), Counter())
    rows = [row for batch in batches for row in batch.rows.tolist()]
    return rows, [text for batch in batches for text in batch.texts.to_pylist()], {k: v for k, v in left_out.items() if v}


@settings(deadline=None, max_examples=20)
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=600),
    start=st.integers(0, 500),
    batch_bytes=st.sampled_from([50, 500, 5000]),
    shortest=st.integers(0, 20),
)
def test_every_document_comes_once_in_order_from_any_row_on(texts, start, batch_bytes, shortest, tmp_path_factory):
    one = write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"text": text} for text in texts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_BYTES", batch_bytes)
        rows, found, left_out = read(one, Filter(min_characters=shortest), start)
        expected = [(row, text) for row, text in enumerate(texts) if row >= start and len(text) >= shortest]
        assert list(zip(rows, found, strict=True)) == expected
        assert left_out.get("short", 0) == max(0, len(texts) - start) - len(expected)


def test_reading_resumes_at_the_end_of_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 3000)
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 2000)
    one = write_lines(tmp_path / "rows.jsonl", [{"text": "x" * (i % 97)} for i in range(3000)])

    def batches(start):
        return [(b.rows.tolist(), b.end) for b in read_documents(one, 0, Filter(), start)]

    every = batches(0)
    ends = [end for _, end in every if end is not None]
    assert len(ends) > 5
    assert ends[-1] == 3000
    for number in (0, 2, len(ends) - 2):
        resumed = batches(ends[number])
        assert resumed == every[len(every) - len(resumed) :]


def test_long_documents_are_batches_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 1000)
    one = write_lines(tmp_path / "rows.jsonl", [{"text": "x" * 5000}] * 20)
    assert [len(batch.rows) for batch in read_documents(one, 0, Filter())] == [1] * 20


BAD_ROWS = {
    "null": (None, "null"),
    "a number": (5, "5 (a number)"),
    "a truth": (True, "true (true or false)"),
    "a list": (["a"], '["a"] (a list)'),
    "an object": ({"a": "b"}, '{"a": "b"} (an object)'),
    "a long list": (["a" * 99], f'["{"a" * 78}... (103 characters) (a list)'),
    "half a pair": ("ab\ud83d", r"'ab\ud83d' (with half of a surrogate pair at character 3, which is not text)"),
}


@pytest.mark.parametrize(("bad", "shown"), BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("others", [["a", "b", "c"], []], ids=["among strings", "alone"])
def test_rows_without_text_are_refused_or_skipped(bad, shown, others, tmp_path):
    rows = [{"text": text} for text in others] + [{"text": bad}]
    one = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        UserError,
        match=rf"^data.source: \S+rows.jsonl, line {len(others) + 1} has text = {re.escape(shown)}, and every row needs a string;"
        " fix it, or set data.filter.invalid_rows=skip to leave such rows out and count them$",
    ):
        read(one)
    assert read(one, Filter(invalid_rows="skip")) == (list(range(len(others))), others, {"invalid": 1})


def test_a_row_without_the_text_column_is_null(tmp_path):
    one = write_lines(tmp_path / "rows.jsonl", [{"text": "a"}, {"other": 1}, {"text": "b"}])
    assert read(one, Filter(invalid_rows="skip")) == ([0, 2], ["a", "b"], {"invalid": 1})


def test_scores_are_numbers(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "score": 1}\n{"text": "b", "score": null}\n{"text": "c", "score": 0.5}\n')
    one = table(kind="json", files=[str(tmp_path / "rows.jsonl")], score_column="score", keep_fraction=0.5)
    with pytest.raises(UserError, match=r"rows.jsonl, line 2 has score = null, and every row needs a number"):
        read(one)
    batch = next(read_documents(one, 0, Filter(invalid_rows="skip")))
    assert np.array_equal(batch.scores, [1.0, 0.5])


def test_errors_of_a_file_are_named(tmp_path):
    lines = "".join(json.dumps({"text": f"document {i} " * 50}) + "\n" for i in range(4000)).encode()
    packed = gzip.compress(lines)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    with pa.output_stream(tmp_path / "intact.jsonl.zst", compression="zstd") as stream:
        stream.write(lines)
    zstd = (tmp_path / "intact.jsonl.zst").read_bytes()
    parquet = tmp_path / "intact.parquet"
    pa.parquet.write_table(pa.table({"text": ["a" * 1000] * 100}), parquet)
    cases = {
        "cut.jsonl.gz": (
            packed[: len(packed) // 2],
            "json",
            r"cut.jsonl.gz: Truncated compressed stream after [\d,]+ bytes of its text",
        ),
        "flipped.jsonl.gz": (
            bytes(flipped),
            "json",
            r"flipped.jsonl.gz: .*after [\d,]+ bytes of its text, in a file of [\d,]+ bytes",
        ),
        "cut.jsonl.zst": (zstd[: len(zstd) // 2], "json", r"cut.jsonl.zst: Truncated compressed stream after [\d,]+ bytes"),
        "latin.txt": (
            b"x" * 70 + "é".encode("latin-1") + b"abc",
            "text",
            r"latin.txt has text = b'x{70}.xe9abc', which is not UTF-8: 0xe9 at byte 71 \(convert the file, e.g. iconv",
        ),
        "latin.jsonl": (
            b'{"text": "caf\xe9"}\n',
            "json",
            r"latin.jsonl, line 1 is not UTF-8: 0xe9 at column 14 \(convert",
        ),
        "line.jsonl": (
            b'{"text": "a"}\n{"text": "b\n',
            "json",
            r"line.jsonl, line 2 is not JSON: Unterminated string starting at column 10",
        ),
        "cut.parquet": (
            parquet.read_bytes()[:-20],
            "parquet",
            r"cut.parquet is not a complete Parquet file: ",
        ),
    }
    for name, (content, kind, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read(table(kind=kind, files=[str(tmp_path / name)]))
    assert find_damage(str(tmp_path / "intact.jsonl.zst")) is None


def test_prefetched_items_keep_their_order_and_errors_their_place():
    assert list(prefetch(iter(range(50)))) == list(range(50))
    assert list(prefetch(iter([]))) == []

    def fails():
        yield 1
        raise UserError("second")

    things = prefetch(fails())
    assert next(things) == 1
    with pytest.raises(UserError, match="second"):
        next(things)
