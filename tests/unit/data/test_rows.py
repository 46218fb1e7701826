"""Rows of people's files: every fault is named by file, row and column, and can be skipped and counted."""

import gzip
import json
from collections import Counter
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.config.recipe_data import Data, Filter
from isoflop.data import sources
from isoflop.data.documents import read_documents
from isoflop.data.readers import json_lines
from isoflop.data.readers.rows import rebatch
from isoflop.data.sources import open_source
from isoflop.utils.errors import UserError

REMEDY = "; fix it, or set data.filter.invalid_rows=skip to leave such rows out and count them"
NOT_UTF8 = "(convert the file, e.g. iconv -f latin1 -t utf-8)"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def opened(kind, *files, **fields):
    source = {"kind": kind, "files": list(files), **fields}
    return open_source(Data.model_validate({"source": source, "prepared_dir": "unused"}).source, "data.source").tables[0]


def read(table, skip=True):
    """All texts of a table, and what was left out."""
    texts, left_out = [], Counter()
    for number in range(table.num_parts):
        for batch in read_documents(table, number, Filter(invalid_rows="skip" if skip else "refuse")):
            texts += batch.texts.to_pylist()
            left_out += batch.left_out
    return texts, dict(+left_out)


def refusal(table):
    with pytest.raises(UserError) as error:
        read(table, skip=False)
    return str(error.value).removeprefix("data.source: ").removesuffix(REMEDY)


A, B = b'{"text": "a"}\n', b'{"text": "b"}\n'
BAD_LINES = {
    "half of a pair": (rb'{"text": "x\ud800y"}', "has text = 'x\\ud800y' (with half of a surrogate pair at character 2, which is"
                       " not text), and every row needs a string"),
    "latin-1": (b'{"text": "caf\xe9"}', f"is not UTF-8: 0xe9 at column 14 {NOT_UTF8}"),
    "cut": (b'{"text": "cu', "is not JSON: Unterminated string starting at column 10"),
    "NUL": (b"\0\0\0", "is not JSON: it holds NUL bytes at column 1"),
    "NUL in a text": (b'{"text": "a\0b"}', "is not JSON: it holds NUL bytes at column 12"),
    "two objects": (b'{"text": "c"} {"text": "d"}', "is not JSON: Extra data at column 15"),
    "another column": (b'{"txt": "c"}', "has no 'text'; did you mean txt?"),
    "a list": (b'["text"]', 'is ["text"] (a list), and every row needs an object of columns'),
    "null": (b"null", "is null, and every row needs an object of columns"),
    "deep": (b'{"text": ' + b"[" * 100_000, "is nested too deeply"),
    "a list as text": (b'{"text": ["c"]}', 'has text = ["c"] (a list), and every row needs a string'),
    "a long number": (b'{"text": ' + b"9" * 90 + b"}", f"has text = {'9' * 80}... (90 characters) (a number), and every row"
                      " needs a string"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("end", [b"\n", b""], ids=["in the middle", "at the end"])
def test_a_bad_line_is_named_or_skipped(line, message, name, end, tmp_path):
    content = b"\xef\xbb\xbf" + A + b"\r\n \n" + B + line + (end + B if end else b"")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert refusal(opened("json", name)) == f"{name}, line 5 {message}"
    assert read(opened("json", name)) == (["a", "b", "b"] if end else ["a", "b"], {"invalid": 1})


@pytest.mark.parametrize("odd", [b"", b"null\n"], ids=["alone", "beside an odd line"])
def test_invalid_utf8_in_another_column_is_accepted(odd, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(A + b'{"other": "\xe9", "text": "b"}\n' + odd)
    assert read(opened("json", "rows.jsonl")) == (["a", "b"], {"invalid": 1} if odd else {})


def test_a_bad_line_is_named_after_other_files_and_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 100)
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 30)
    (tmp_path / "0.jsonl").write_bytes(b"")
    (tmp_path / "1.jsonl").write_bytes((A + b"\n") * 200)
    (tmp_path / "2.jsonl").write_bytes(B * 100 + b"\n\n{\n" + B * 100)
    assert refusal(opened("json", "?.jsonl")).startswith("2.jsonl, line 103 is not JSON: ")
    assert read(opened("json", "?.jsonl")) == (["a"] * 200 + ["b"] * 200, {"invalid": 1})


def test_a_file_without_json_lines_is_named_at_once(tmp_path):
    (tmp_path / "array.json").write_text('[{"text": "a"}]')
    with pytest.raises(UserError, match=r"array.json, line 1 is .* \(a list\), .*; write one JSON object a line$"):
        opened("json", "array.json")
    (tmp_path / "utf16.jsonl").write_bytes(A.decode().encode("utf-16"))
    with pytest.raises(UserError, match=r"utf16.jsonl, line 1 is not UTF-8: 0xff at column 1 \(convert .* iconv -f utf-16 "):
        opened("json", "utf16.jsonl")
    (tmp_path / "good.jsonl").write_bytes(A)
    assert read(opened("json", "array.json", "good.jsonl")) == (["a"], {"invalid": 1})


TEXT_TYPES = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
    pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string()),
]  # fmt: skip


@pytest.mark.parametrize("stored", [True, False], ids=["with Arrow's schema", "as others write it"])
@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_every_type_of_text_reads_as_text(kind, stored, tmp_path):
    pq.write_table(pa.table({"text": pa.array(["é", "", None, "b"]).cast(kind)}), "rows.parquet", store_schema=stored)
    assert read(opened("parquet", "rows.parquet")) == (["é", "", "b"], {"invalid": 1})
    assert refusal(opened("parquet", "rows.parquet")) == "rows.parquet, row 3 has text = null, and every row needs a string"
    with pa.OSFile("rows.arrow", "wb") as file, pa.ipc.new_file(file, pa.schema({"text": kind})) as writer:
        writer.write_table(pa.table({"text": pa.array(["é", "", None, "b"]).cast(kind)}))
    assert read(opened("arrow", "rows.arrow")) == (["é", "", "b"], {"invalid": 1})


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.one_of(st.none(), st.binary(max_size=8), st.text(max_size=8).map(str.encode)), max_size=300))
def test_bytes_are_text_where_they_are_utf8(values, tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.parquet"
    pq.write_table(pa.table({"text": pa.array([b"first", *values], pa.binary())}), file, row_group_size=100)

    def text(value):
        try:
            return value and value.decode()
        except UnicodeDecodeError:
            return None

    texts = [decoded for value in values if (decoded := value if value == b"" else text(value)) is not None]
    texts = ["first", *("" if one == b"" else one for one in texts)]
    left_out = 1 + len(values) - len(texts)
    assert read(opened("parquet", str(file))) == (texts, {"invalid": left_out} if left_out else {})


def test_values_of_a_document_are_cut_in_messages(tmp_path):
    pq.write_table(pa.table({"text": [b"good", b"\xff" * 5000], "other": ["x" * 5000] * 2}), "bytes.parquet")
    shown = "b'" + r"\xff" * 20
    assert refusal(opened("parquet", "bytes.parquet")) == (
        f"bytes.parquet, row 2 has text = {shown[:80]}... (20,003 characters), which is not UTF-8: 0xff at byte 1 {NOT_UTF8}, and"
        " every row needs a string"
    )
    pq.write_table(pa.table({"text": [["word " * 900]]}), "list.parquet")
    assert len(refusal(opened("parquet", "list.parquet"))) < 200
    for value, shown in ((5, "5 (a number)"), (Decimal("1.5"), "Decimal('1.5') (of type Decimal)")):
        pq.write_table(pa.table({"text": [value]}), "value.parquet")
        assert (
            refusal(opened("parquet", "value.parquet"))
            == f"value.parquet, row 1 has text = {shown}, and every row needs a string"
        )


def test_rows_of_parquet_are_named_by_their_number_in_the_file(tmp_path):
    pq.write_table(pa.table({"text": ["a"] * 300}), "1.parquet", row_group_size=70)
    pq.write_table(pa.table({"text": ["b"] * 250 + [None] + ["b"] * 20}), "2.parquet", row_group_size=70)
    pq.write_table(pa.table({"body": ["c"] * 10}), "3.parquet")
    assert refusal(opened("parquet", "?.parquet")) == "2.parquet, row 251 has text = null, and every row needs a string"
    assert refusal(opened("parquet", "1.parquet", "3.parquet")) == "3.parquet, row 1 has no 'text'; known here: body"
    assert read(opened("parquet", "?.parquet")) == (["a"] * 300 + ["b"] * 270, {"invalid": 11})


def test_empty_files_among_others_are_fine(tmp_path):
    for name, texts in (("1", []), ("2", ["a", "b"]), ("3", [])):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), f"{name}.parquet")
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (tmp_path / f"{name}.csv").write_text("".join(f"{text}\n" for text in ["text", *texts] if texts))
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    for kind, pattern in (("parquet", "?.parquet"), ("json", "?.jsonl"), ("csv", "?.csv")):
        assert read(opened(kind, pattern)) == (["a", "b"], {})
    assert read(opened("text", "?.txt", sample_by="line")) == (["a", "b"], {})
    with pytest.raises(UserError, match=r"^data.source: its 2 file\(s\) hold no rows; point it at text$"):
        opened("parquet", "1.parquet", "3.parquet")
    with pytest.raises(UserError, match=r"is empty: 2 file\(s\) of 0 bytes"):
        opened("json", "1.jsonl", "3.jsonl")
    (tmp_path / "1.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"^data.source: its 1 file\(s\) hold no rows; point it at text$"):
        opened("json", "1.jsonl")


@pytest.mark.parametrize(
    ("sample_by", "texts", "where"),
    [
        ("document", ["fine"], "bad.txt has text = b'good\\n\\nb\\xe9d\\n\\ngood', which is not UTF-8: 0xe9 at byte 8"),
        ("paragraph", ["good", "good", "fine"], "bad.txt, paragraph 2 has text = b'b\\xe9d', which is not UTF-8: 0xe9 at byte 2"),
        ("line", ["good", "", "", "good", "fine"], "bad.txt, line 3 has text = b'b\\xe9d', which is not UTF-8: 0xe9 at byte 2"),
    ],
)
def test_text_that_is_not_utf8_is_named_or_skipped(sample_by, texts, where, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good\n\nb\xe9d\n\ngood")
    (tmp_path / "fine.txt").write_text("fine")
    table = opened("text", "*.txt", sample_by=sample_by)
    assert read(table) == (texts, {"invalid": 1})
    assert refusal(table) == f"{where} {NOT_UTF8}, and every row needs a string"


def test_tables_of_separated_values(tmp_path):
    content = b'\xef\xbb\xbftext,n\r\n12,1\r\n"two\nlines, ""quoted""",2\r\n\r\nNA,3\r\nshort\r\n\xe9,4\r\n"a"b,5\r\n,6\r\n'
    (tmp_path / "rows.csv").write_bytes(content)
    assert read(opened("csv", "rows.csv")) == (["12", 'two\nlines, "quoted"', "NA", ""], {"invalid": 3})
    assert refusal(opened("csv", "rows.csv")) == "rows.csv, line 7 has 1 values, and the first line names 2 columns"
    (tmp_path / "rows.tsv.gz").write_bytes(gzip.compress(b"score\tbody\n0.5\ta,b\nhigh\tc\n"))
    table = opened("csv", "rows.tsv.gz", text_column="body", score_column="score", keep_fraction=0.5)
    assert read(table) == (["a,b"], {"invalid": 1})
    assert refusal(table) == "rows.tsv.gz, line 3 has score = 'high' (a string), and every row needs a number"
    with pytest.raises(UserError, match=r"text_column = 'text' is not in the data; known here: body, score"):
        opened("csv", "rows.tsv.gz")


def test_arrow_files_of_both_kinds(tmp_path):
    for name, new, texts in (("1.arrow", pa.ipc.new_stream, ["a", "b"]), ("2.arrow", pa.ipc.new_file, ["c"])):
        with pa.OSFile(name, "wb") as file, new(file, pa.schema({"text": pa.string(), "n": pa.int64()})) as writer:
            writer.write_table(pa.table({"text": texts, "n": range(len(texts))}))
    assert read(opened("arrow", "?.arrow")) == (["a", "b", "c"], {})
    (tmp_path / "1.arrow").write_bytes((tmp_path / "1.arrow").read_bytes()[:-150])
    with pytest.raises(UserError, match=r"^data.source: 1.arrow is not a complete Arrow file: .*; fix or leave out the file"):
        opened("arrow", "?.arrow")


FORMATS = {"rows.parquet": "parquet", "rows.arrow": "arrow", "rows.csv": "csv", "rows.tsv": "csv", "rows.jsonl.gz": "json"}


@pytest.mark.parametrize(("name", "kind"), FORMATS.items())
def test_a_file_of_another_kind_is_named_with_the_kind_to_write(name, kind, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    for other in {*FORMATS.values()} - {kind}:
        with pytest.raises(UserError) as error:
            opened(other, name)
        message = f"data.source.files: {name} is of kind {kind}, and kind = '{other}' is given; write kind: {kind}"
        assert str(error.value) == message
    pq.write_table(pa.table({"text": ["a"]}), "unnamed")
    for other in ("json", "csv", "text", "arrow"):
        with pytest.raises(UserError, match=r"^data.source.files: unnamed is of kind parquet, .*; write kind: parquet$"):
            opened(other, "unnamed")


def test_a_folder_is_refused_as_a_file(tmp_path):
    (tmp_path / "shards/more").mkdir(parents=True)
    for name in ("a.jsonl", "more/b.jsonl", "more/readme.md"):
        (tmp_path / "shards" / name).write_bytes(A)
    with pytest.raises(UserError) as error:
        opened("json", "shards")
    assert str(error.value) == "data.source.files = 'shards' is a folder; write the files in it, e.g. 'shards/**/*.jsonl'"
    assert read(opened("json", "shards/**/*.jsonl")) == (["a", "a"], {})


@given(lengths=st.lists(st.integers(0, 9), max_size=12), start=st.integers(0, 60), rows=st.integers(1, 7))
def test_tables_are_rebatched_without_loss(lengths, start, rows):
    numbers = iter(range(1000))
    tables = [pa.table({"n": pa.array([next(numbers) for _ in range(length)], pa.int64())}) for length in lengths]
    found = list(rebatch(iter(tables), start, rows))
    assert [n for table in found for n in table["n"].to_pylist()] == list(range(start, sum(lengths)))
    assert all(len(table) == rows for table in found[:-1])
