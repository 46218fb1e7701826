import itertools
import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.data import json_lines
from isoflop.data.json_lines import Piece, read_lines, require_columns
from isoflop.errors import UserError

TEXT = pa.schema([("text", pa.string())])
BOTH = pa.schema([("text", pa.string()), ("score", pa.float64())])


def values(pieces, schema=TEXT):
    return [row for table in read_lines(pieces, schema) for row in table.to_pylist()]


@settings(deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=40),
    block_bytes=st.sampled_from([8, 64, 1000]),
    cuts=st.lists(st.floats(0, 1), max_size=5),
    ends_with_newline=st.booleans(),
)
def test_every_line_belongs_to_one_piece_wherever_files_are_cut(texts, block_bytes, cuts, ends_with_newline, tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    content = "\n".join(json.dumps({"text": text, "other": [1]}, ensure_ascii=len(text) % 2 == 0) for text in texts)
    file.write_text(content + "\n" * ends_with_newline, encoding="utf-8")
    size = file.stat().st_size
    ends = [0, *sorted(round(cut * size) for cut in cuts), size]
    pieces = [Piece(str(file), begin, end) for begin, end in itertools.pairwise(ends)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "BLOCK_BYTES", block_bytes)
        assert [row["text"] for row in values(pieces)] == texts
        assert [row["text"] for row in values([Piece(str(file))])] == texts


def test_a_row_of_another_type_changes_no_other(tmp_path, monkeypatch):
    """`datasets` would hand on every text behind it JSON-encoded."""
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 100)
    rows = [{"text": f'say "{i}"\n', "score": i, "meta": {"k": i}} for i in range(30)]
    odd = {3: 5, 11: True, 17: ["a"], 20: {"a": "b"}, 25: None}
    for number, value in odd.items():
        rows[number]["text"] = value
    rows[7]["score"], rows[8]["score"], rows[9]["new key"] = "high", True, {}
    del rows[14]["text"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = values([Piece(str(tmp_path / "rows.jsonl"))], BOTH)
    assert [row["text"] for row in found] == [None if i in odd or i == 14 else f'say "{i}"\n' for i in range(30)]
    assert [row["score"] for row in found] == [None if i in (7, 8) else float(i) for i in range(30)]


def test_texts_that_look_like_something_else_stay_as_they_are(tmp_path):
    texts = ["2020-01-01", "2020-01-01T00:00:00Z", "5", "null", "NaN", "", " ", "\u2028", "\\ud83d"]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps({"text": text}) + "\n\n" for text in texts).encode())
    assert [row["text"] for row in values([Piece(str(file))])] == texts


def test_columns_are_looked_for_in_the_first_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"other": 1}\n{"text": "a", "score": 1}\n')
    require_columns(str(file), "data.source", {"text_column": "text"})
    with pytest.raises(UserError, match=r"data.source.text_column = 'txt' is not in the data; did you mean text\?"):
        require_columns(str(file), "data.source", {"text_column": "txt"})
    file.write_text('[{"text": "a"}]\n')
    with pytest.raises(UserError, match=r"has lists where objects belong; write one JSON object a line"):
        require_columns(str(file), "data.source", {"text_column": "text"})
