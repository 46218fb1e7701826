"""Files of JSON lines by step: what is read of them, and what of a run's rows survives what others do to the file."""

import errno
import json
import os
import tracemalloc

import pytest
from conftest import metrics_row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isoflop.train.plots import draw_curve
from isoflop.train.records import StepFile, TrainingCurve, is_row, is_sample, missing_steps, read_records, read_rows
from isoflop.utils.errors import UserError


def steps_of(file):
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def opened(file, last_step=0, printed=None):
    printed = [] if printed is None else printed
    return StepFile(file, read_records(file, last_step, is_row), is_row, printed.append, lambda: None)


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "3", "null", '"step"', '{"a": 1}', '{"step": 1}', '{"step": true}', '{"step": "1"}', "\0" * 9, "[" * 9999,
     *map(json.dumps, (
        metrics_row(0), metrics_row(-3), metrics_row(2**63), metrics_row(2, tokens=None), metrics_row(2, loss="low"),
        metrics_row(2, elapsed_s=[1]), metrics_row(2, tokens=10**400), metrics_row(2, peak_memory_bytes=True),
        metrics_row(2, loss=float("nan")),
     ))],
)  # fmt: skip
def test_a_line_that_is_no_row_is_counted_and_left_out(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(metrics_row(1))}\n{line}\n{json.dumps(metrics_row(3))}\n")
    found = read_records(tmp_path / "metrics.jsonl", 99, is_row)
    assert list(found) == [metrics_row(1), metrics_row(3)]
    assert found.steps.tolist() == [1, 3]
    assert found.damaged == 1


def test_a_last_line_cut_short_is_no_damage(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics_row(1)) + "\n" + json.dumps(metrics_row(2))[:40])
    found = read_records(tmp_path / "metrics.jsonl", 99, is_row)
    assert (list(found), found.damaged) == ([metrics_row(1)], 0)


def test_steps_come_in_order_the_later_of_two_alike(tmp_path):
    rows = [metrics_row(2), metrics_row(1), metrics_row(2, loss=1.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows(tmp_path / "metrics.jsonl", 99) == [metrics_row(1), metrics_row(2, loss=1.0)]


def test_resuming_takes_little_memory_however_many_rows_there_are(tmp_path):
    """Parsed rows with layer norms take 2,400 bytes each, all of them while a run starts."""
    norms = {"grad_norms": {f"layers.{layer}": layer / 7 for layer in range(4)}}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(metrics_row(step, **norms)) + "\n" for step in range(1, 20_001)))
    read_rows(tmp_path / "metrics.jsonl", 1)  # what is imported late is here from now on
    tracemalloc.start()
    rows = opened(tmp_path / "metrics.jsonl", last_step=20_000)
    curve = TrainingCurve(read_records(tmp_path / "metrics.jsonl", 20_000, is_row))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rows.close()
    assert len(curve.steps) == rows.last_step == 20_000
    assert peak < 300 * 20_000, f"{peak:,} bytes"


def test_lines_are_read_when_they_are_asked_for(tmp_path):
    """A file that is gone by then, or whose lines are others, gives an error by name, or no rows of it."""
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(metrics_row(step)) + "\n" for step in (2, 1, 3)))
    found = read_records(file, 2, is_row)
    assert (list(found), list(found)) == ([metrics_row(1), metrics_row(2)],) * 2
    assert [json.loads(line) for line in found.lines()] == list(found)
    file.write_text("x" * 999)
    assert list(found) == []
    file.unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: No such file or directory"):
        list(found)


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read: Is a directory"):
        read_rows(tmp_path / "metrics.jsonl", 99)


def test_samples_are_lists_of_texts():
    assert is_sample({"step": 1, "samples": ["a"]})
    assert not any(map(is_sample, [{"step": 1}, {"samples": "a"}, {"samples": [1]}, {"samples": {"a": 1}}]))


def test_missing_steps_are_ranges():
    assert missing_steps([1, 2, 3]) == missing_steps([]) == []
    assert missing_steps([3, 4, 8, 9, 11]) == [(1, 2), (5, 7), (10, 10)]


DONE_TO_IT = ["append", "delete", "replace", "garbage", "truncate", "empty", "rewind"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.sampled_from(DONE_TO_IT), max_size=30))
def test_whatever_others_do_undamaged_rows_stay(actions, tmp_path_factory):
    """Deleting and replacing cost nothing; what is cut off in place is lost, and nothing else."""
    file, printed = tmp_path_factory.mktemp("any") / "metrics.jsonl", []
    written, step, expected = opened(file, printed=printed), 0, set()
    for action in [*actions, "append"]:
        if action == "append":
            written.append(metrics_row(step := step + 1))
            expected.add(step)
        elif action == "rewind":
            written.rewind(step := max(0, step - 2))
            expected = {one for one in expected if one <= step}
        elif action == "replace":
            (other := file.with_name("other")).write_text("somebody's\n")
            other.replace(file)
        elif not file.exists():
            continue
        elif action == "delete":
            file.unlink()
        elif action == "garbage":
            with file.open("a") as appended:
                appended.write("\0\0 not a row\n")
        else:
            os.truncate(file, file.stat().st_size // 2 if action == "truncate" else 0)
            if os.fstat(written._stream.fileno()).st_ino == file.stat().st_ino:
                expected = {row["step"] for row in read_rows(file, 99)}
    written.close()
    assert steps_of(file) == sorted(expected)
    assert all(is_row(json.loads(line)) for line in file.read_text().splitlines())
    assert len(printed) <= len(actions)


def test_a_full_disk_keeps_the_lines_until_there_is_room(tmp_path):
    printed = []
    file = opened(tmp_path / "metrics.jsonl", printed=printed)
    file.append(metrics_row(1))
    write = os.write

    class Full:
        """The stream of a full disk: a part of the line finds room."""

        def __init__(self, stream):
            self.stream = stream

        def write(self, line):
            return write(self.stream.fileno(), line[:10])

        def __getattr__(self, name):
            return getattr(self.stream, name)

    roomy, file._stream = file._stream, Full(file._stream)
    for step in (2, 3):
        file.append(metrics_row(step))
    assert printed == [
        f"{tmp_path}/metrics.jsonl: {os.strerror(errno.ENOSPC)}; training continues, its lines are kept in memory meanwhile"
    ]
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device; 2 lines are not written: free some space"):
        file._require_written()
    file._stream = roomy
    file.append(metrics_row(4))
    file.close()
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]


def test_a_damaged_file_is_kept_under_another_name(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(metrics_row(1))}\nrubbish\n")
    (tmp_path / "metrics.damaged-1.jsonl").write_text("an earlier one")
    opened(tmp_path / "metrics.jsonl", last_step=5, printed=(printed := [])).close()
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    assert (tmp_path / "metrics.damaged-2.jsonl").read_text() == f"{json.dumps(metrics_row(1))}\nrubbish\n"
    assert (tmp_path / "metrics.damaged-1.jsonl").read_text() == "an earlier one"
    assert printed == [
        f"{tmp_path}/metrics.jsonl: 1 damaged lines are left out; a copy of the file as it was is kept as metrics.damaged-2.jsonl"
    ]


def test_the_curve_takes_few_bytes_a_step_and_keeps_what_was_measured():
    curve = TrainingCurve()
    for step in range(1, 101):
        curve.append(
            metrics_row(step, loss=None if step == 7 else 3.0, val_loss=2.5 if step % 50 == 0 else None, grad_norms={"a": 1.0})
        )
    curve.append(metrics_row(101, **{"quick/acc": 0.5}))
    assert [row["step"] for row in curve.measured] == [50, 100, 101]
    assert "grad_norms" not in curve.last
    assert sum(column.itemsize for column in (curve.steps, curve.tokens, curve.losses, curve.tokens_per_s)) == 32
    curve.rewind(60)
    assert (curve.steps[-1], [row["step"] for row in curve.measured]) == (60, [50])


def test_a_gap_is_drawn_as_one(tmp_path):
    """Neither line crosses it."""
    import matplotlib.figure

    rows = [metrics_row(step, loss=5.0 / step, val_loss=4.0 / step if step % 10 == 0 else None) for step in range(1, 41)]
    drawn = []
    save = matplotlib.figure.Figure.savefig
    matplotlib.figure.Figure.savefig = lambda figure, *given, **named: (drawn.append(figure), save(figure, *given, **named))
    try:
        draw_curve(TrainingCurve(rows[:10] + rows[25:]), tmp_path / "loss.png", "toy", unigram_entropy=4.0)
    finally:
        matplotlib.figure.Figure.savefig = save
    (axes,) = drawn[0].axes
    for line in axes.lines[:2]:
        assert [str(x) for x in line.get_xdata()][9:12] == ["2560.0", "nan", "6656.0"]
    assert [text.get_text() for text in axes.get_legend().get_texts()][3] == "rows missing"
