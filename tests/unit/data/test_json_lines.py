import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.data.readers import json_lines
from isoflop.data.readers.json_lines import JsonLines
from isoflop.data.readers.rows import Columns, Piece

TEXT = Columns()


def values(pieces, columns=TEXT):
    return [row for piece in pieces for table in JsonLines().tables(piece, columns) for row in table.to_pylist()]


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
    found = values([Piece(str(tmp_path / "rows.jsonl"))], Columns("text", "score"))
    assert [row["text"] for row in found] == [None if i in odd or i == 14 else f'say "{i}"\n' for i in range(30)]
    assert [row["score"] for row in found] == [None if i in (7, 8) else float(i) for i in range(30)]


def test_texts_that_look_like_something_else_stay_as_they_are(tmp_path):
    texts = ["2020-01-01", "2020-01-01T00:00:00Z", "5", "null", "NaN", "", " ", "\u2028", "\\ud83d"]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps({"text": text}) + "\n\n" for text in texts).encode())
    assert [row["text"] for row in values([Piece(str(file))])] == texts


@settings(deadline=None)
@given(
    lines=st.lists(st.sampled_from(["", "  ", '{"text": "a"}', "null", "5", "{", '{"text": "b"} {"text": "c"}']), max_size=30),
    block_bytes=st.sampled_from([8, 64, 1000]),
    cuts=st.lists(st.floats(0, 1), max_size=5),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_rows_are_those_of_the_tables_with_their_lines(lines, block_bytes, cuts, newline, tmp_path_factory):
    """Blank lines are ignored; each other line is one row, with its number in the file wherever the file is cut."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_bytes(newline.join(lines).encode())
    size = file.stat().st_size
    ends = [0, *sorted(round(cut * size) for cut in cuts), size]
    pieces = [Piece(str(file), begin, end) for begin, end in itertools.pairwise(ends)]
    expected = [(f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "BLOCK_BYTES", block_bytes)
        found = [row for piece in pieces for row in JsonLines().rows(piece)]
        assert [row.place for row in found] == [place for place, _ in expected]
        texts = ["a" if line == '{"text": "a"}' else None for _, line in expected]
        assert [row["text"] for row in values(pieces)] == texts


def test_a_first_line_that_is_null_does_not_crash(tmp_path):
    """Arrow 26 stops with a segmentation fault where a block starts with such a line."""
    (tmp_path / "rows.jsonl").write_text('null\n{"text": "a"}\n')
    assert values([Piece(str(tmp_path / "rows.jsonl"))]) == [{"text": None}, {"text": "a"}]
