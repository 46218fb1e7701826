"""Benchmarks are run by hand; here each starts, does its work at toy size, and their page is what their rows say."""

import importlib.util
import json
import sys

import pytest
from conftest import ROOT, run_command

BENCHMARKS = ROOT / "benchmarks"
COMMANDS = ("checkpoint", "growth", "loss", "out_of_the_box", "startup", "step")
SMALL = ["model.n_layer=1", "model.n_embd=24", "model.vocab_size=4096", "training.tokens_per_step=1024"]
TOY = {
    "step": ["gpt2", *SMALL, "--rounds", "2", "--bf16"],
    "checkpoint": ["gpt2", *SMALL, "--rounds", "2"],
    "loss": ["512x64x256", "--rounds", "2"],
    "growth": ["step", "prepare", "loading", "--sizes", "2", "--rounds", "2", "--megabytes", "2", "--windows", "100000"],
    "startup": ["--rounds", "1", "model.num_hidden_layers=1", "training.tokens_per_step=1024"],
}


@pytest.fixture(scope="module")
def performance():
    spec = importlib.util.spec_from_file_location("performance", ROOT / "docs/performance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_is_there_and_listed():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert scripts == {*COMMANDS, "rows", "ways"}
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert all(f"python benchmarks/{name}.py" in readme for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_it_starts(name):
    printed = run_command(sys.executable, f"benchmarks/{name}.py", "--help").stdout
    assert f"python benchmarks/{name}.py" in printed
    assert "--results" in printed


def test_the_loss_is_measured_at_toy_size(tmp_path):
    rows = measured("loss", tmp_path)
    assert [(row["case"], row["way"], row["rounds"]) for row in rows] == [
        ("512x64x256 bf16", way, 2) for way in ("isoflop", "transformers")
    ]
    assert rows[1]["time_of_transformers"] == [1.0, 1.0, 1.0]
    low, high = rows[0]["seconds"][1:]
    assert low <= rows[0]["seconds"][0] <= high
    assert {"machine", "commit", "versions", "command"} <= set(rows[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TOY) - {"loss"}))
def test_it_measures_at_toy_size(name, tmp_path):
    rows = measured(name, tmp_path)
    assert all({"case", "way", "machine", "commit", "versions", "command"} <= set(row) for row in rows)
    if name == "step":
        ways = {row["way"]: row for row in rows}
        assert {"isoflop", "bare", "transformers", "trainer"} <= set(ways)
        assert ways["isoflop"]["loss"] == ways["bare"]["loss"]  # the same tokens in the same order, to the last bit
        assert ways["transformers"]["loss"] == pytest.approx(ways["bare"]["loss"], abs=1e-3)


def measured(name, folder):
    run_command(sys.executable, f"benchmarks/{name}.py", *TOY[name], "--results", folder, timeout=900)
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_rows_of_the_same_case_are_replaced_and_others_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rows

    given = type("Given", (), {"results": tmp_path})
    for case, figure in (("a", 1), ("b", 2), ("a", 3)):
        rows.write(given, "toy", [{"case": case, "way": "x", "figure": figure}])
    written = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["case"], row["figure"]) for row in written] == [("b", 2), ("a", 3)]


def test_ways_take_turns_there_and_back(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rows

    order = []
    found = rows.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert {way: len(seconds) for way, seconds in found.items()} == {"a": 2, "b": 2}
    assert rows.paired([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == [3.0, 2.0, 4.0]


def test_the_page_is_what_its_script_makes_of_the_rows(performance, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (ROOT / "docs/performance.md").read_text(encoding="utf-8") == performance.page()


def test_every_row_says_where_it_is_from(performance):
    for name in COMMANDS:
        rows = performance.rows_of(name)
        assert rows, name
        for row in rows:
            assert "+changes" not in row["commit"], row
            assert row["command"].startswith(f"python benchmarks/{name}.py")
            assert row["machine"]
            assert "torch" in row["versions"]
