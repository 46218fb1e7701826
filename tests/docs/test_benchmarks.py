"""Benchmarks are run by hand; here each starts, does its work at toy size, and their page is what their rows say."""

import json
import os
import subprocess
import sys
import time

import gpu
import memory
import performance
import performance_gpu
import psutil
import pytest
import rows as benchmark_rows
import step
import torch
from conftest import ROOT, run_command
from gpu_parts import results, runner

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


def test_every_command_is_there_and_listed():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert scripts == {*COMMANDS, "efficiency", "gpu", "rows", "soak", "ways"}
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert all(f"python benchmarks/{name}.py" in readme for name in (*COMMANDS, "efficiency", "gpu", "soak"))


@pytest.mark.parametrize("name", [*COMMANDS, "efficiency", "gpu"])
def test_it_starts(name):
    printed = run_command(sys.executable, f"benchmarks/{name}.py", "--help").stdout
    assert f"python benchmarks/{name}.py" in printed
    assert "--results" in printed


@pytest.mark.new_process
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


def test_rows_of_the_same_case_are_replaced_and_others_kept(tmp_path):
    given = type("Given", (), {"results": tmp_path})
    for case, figure in (("a", 1), ("b", 2), ("a", 3)):
        benchmark_rows.write(given, "toy", [{"case": case, "way": "x", "figure": figure}])
    written = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["case"], row["figure"]) for row in written] == [("b", 2), ("a", 3)]


def test_a_copy_without_git_is_of_an_unknown_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_rows, "ROOT", tmp_path)
    assert benchmark_rows.commit() == "unknown"
    assert benchmark_rows.about("abc")["commit"] == "abc"


def test_a_matrix_product_is_of_random_numbers_and_its_rate_is_a_rate(monkeypatch):
    assert (step.GPU_MATRIX, step.CPU_MATRIX) == (8192, 2048)
    seen = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (seen.append((a.std().item(), a.mean().item())), multiply(a, b, out=out)))
    flops = step.matmul_flops(bf16=False, size=256)
    assert 1e8 < flops < 1e13
    assert all(0.9 < std < 1.1 and abs(mean) < 0.05 for std, mean in seen)


def test_ways_take_turns_there_and_back():
    order = []
    found = benchmark_rows.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert {way: len(seconds) for way, seconds in found.items()} == {"a": 2, "b": 2}
    assert benchmark_rows.paired([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == [3.0, 2.0, 4.0]


def test_the_page_is_what_its_script_makes_of_the_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (ROOT / "docs/performance.md").read_text(encoding="utf-8") == performance.page()


def test_the_gpu_sections_say_that_nothing_is_measured_yet_or_what_was(tmp_path):
    assert "No GPU has been measured yet" in performance_gpu.section(performance_gpu.rows_of(tmp_path))
    assert "No GPU has been measured yet" in memory.on_gpus(tmp_path / "gpu.jsonl")[0]
    about = {
        "machine": "some H100", "commit": "abc", "command": "python benchmarks/gpu.py", "rehearsal": False,
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
    }  # fmt: skip
    rows = [
        {"part": "correct", "case": "loss", "way": "fp32", "metric": "loss", "difference": 1e-6, "tolerance": 1e-5,
         "passed": True},
        {"part": "memory", "case": "gpt2_124m eager", "way": "micro-batch 32", "predicted_bytes": 1020,
         "allocated_bytes": 14_525_317_632, "reserved_bytes": 14_933_819_392, "micro_batch_size": 32, "checkpointing": False,
         "compiled": False},
        {"part": "speed", "case": "modern_124m", "way": "isoflop", "tokens_per_s": [400e3, 390e3, 410e3], "mfu": 0.4321,
         "share_of_matmul": 0.55, "first_step_s": 21.0, "peak_memory_bytes": 2**34, "micro_batch_size": 32, "accumulation": 4},
        {"part": "speed", "case": "machine", "way": "copy", "figure": 2999.0, "unit": "GB/s"},
        {"part": "speed", "case": "llama2_1.36b float8", "skipped": "torchao is not installed"},
        {"part": "rate", "case": "modern_124m", "way": "isoflop", "text": "Python's standard library",
         "curve": [{"elapsed_s": 1.0, "tokens": 131072, "loss": 8.5}]},
    ]  # fmt: skip
    lines = "".join(json.dumps(row | about) + "\n" for row in rows)
    rehearsed = json.dumps(rows[2] | about | {"way": "rehearsed", "rehearsal": True}) + "\n"
    (tmp_path / "gpu.jsonl").write_text(lines + rehearsed, encoding="utf-8")
    text = performance_gpu.section(performance_gpu.rows_of(tmp_path))
    assert "**some H100**" in text
    assert "| modern_124m | isoflop | 32 x 4 | 400,000 (390,000 to 410,000) | 43.2% | 55% | 21 | 16.0 |" in text
    assert "- llama2_1.36b float8: torchao is not installed" in text
    assert "rehearsed" not in text
    assert "Validation loss of AdamW and Muon" not in text
    line = "| `gpt2_124m eager` | micro-batch 32 | 14,428,839,936 | 14,525,317,632 | 14,933,819,392 | -0.66% |"
    assert line in memory.on_gpus(tmp_path / "gpu.jsonl")


def test_both_optimizers_are_compared_at_equal_time_and_tokens():
    def run(optimizer, step_s, losses):
        steps = range(1, 1 + 50 * len(losses))
        curve = [{"elapsed_s": 20 + step_s * (step - 1), "tokens": 100 * step, "loss": 9.0} for step in steps]
        validation = [curve[50 * place - 1] | {"val_loss": loss} for place, loss in enumerate(losses, 1)]
        return {"case": optimizer, "text": "text", "optimizer": optimizer, "curve": curve, "validation": validation}

    adamw, muon = run("adamw", 1.0, [5.0, 4.0, 3.0]), run("muon", 2.0, [4.5, 3.5])
    text = performance_gpu.rate([adamw, muon])
    assert text.endswith(
        "Validation loss of AdamW and Muon at one learning rate: after 149 s 3.000 and 3.990, after 9,900 tokens 4.000 and 3.500;"
        " 100 and 50 tokens/s, validation included."
    )
    assert "Validation loss" not in performance_gpu.rate([adamw])
    assert "Validation loss" not in performance_gpu.rate([adamw, muon | {"validation": []}])


def test_every_row_says_where_it_is_from():
    for name in COMMANDS:
        rows = performance.rows_of(name)
        assert rows, name
        for row in rows:
            assert "+changes" not in row["commit"], row
            assert row["command"].startswith(f"python benchmarks/{name}.py")
            assert row["machine"]
            assert "torch" in row["versions"]


WORKER = """
import argparse, json, os, subprocess, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--done", type=json.loads)
parser.add_argument("--progress", type=Path)
given = parser.parse_args()
def say(**event):
    with given.progress.open("a") as stream:
        stream.write(json.dumps(event) + chr(10))
plan = ["works", "crashes", "works alone", "hangs", "works too"]
say(plan=plan)
with open("starts", "a") as starts:
    starts.write(json.dumps(given.done) + chr(10))
for case in plan:
    if case in given.done:
        continue
    say(begin=case, limit_s=0.5, at=time.time())
    if case == "crashes":
        print("the reason", file=sys.stderr, flush=True)
        os.abort()
    if case == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path("child").write_text(str(child.pid))
        time.sleep(600)
    say(end=case, seconds=0.0)
    if case == "works alone":
        sys.exit()
"""


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 0.3)


def run_worker(folder, script, seconds=60, done=()):
    (folder / "worker.py").write_text(script, encoding="utf-8")
    rows = []
    command = [sys.executable, str(folder / "worker.py")]
    good = runner.run_part("speed", command, folder / "log", time.time() + seconds, rows.extend, dict(os.environ), list(done))
    return good, rows


@pytest.mark.new_process
def test_a_crash_and_a_hang_cost_their_case_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, rows = run_worker(tmp_path, WORKER)
    assert not good
    assert [(row["part"], row["case"], row["error"].splitlines()[0]) for row in rows] == [
        ("speed", "crashes", "the process ended with SIGABRT"), ("speed", "hangs", "not done after its limit of 0 s"),
    ]  # fmt: skip
    assert "the reason" in rows[0]["error"].splitlines()
    starts = [json.loads(line) for line in (tmp_path / "starts").read_text().splitlines()]
    assert starts[0] == []
    assert starts[1] == ["works", "crashes"]
    assert starts[2] == ["works", "crashes", "works alone"]  # it asked for a process of its own
    assert starts[3] == ["works", "crashes", "works alone", "hangs"]
    assert len(starts) == 4
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.new_process
def test_what_the_time_does_not_reach_is_skipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = WORKER.replace("limit_s=0.5", "limit_s=500").replace("os.abort()", "pass")
    good, rows = run_worker(tmp_path, script, seconds=1.5)
    assert good
    assert [(row["case"], "error" in row, row["skipped"][:23]) for row in rows] == [
        ("hangs", False, "the part's time was up "), ("works too", False, "the part's time was up"),
    ]  # fmt: skip


@pytest.mark.new_process
@pytest.mark.parametrize(
    ("script", "printed"), [("raise SystemExit('no CUDA')", "no CUDA"), ("", "the process ended without a plan of its cases")]
)
def test_a_worker_that_does_not_start_is_a_row_too(script, printed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, rows = run_worker(tmp_path, script)
    assert (good, [row["case"] for row in rows]) == (False, ["start"])
    assert printed in rows[0]["error"]


def test_rows_of_an_earlier_run_are_replaced_case_by_case(tmp_path):
    for run, case, figure in ((1, "a", 1), (1, "b", 2), (2, "a", 3), (2, "a", 4)):
        results.put(tmp_path, [{"part": "speed", "case": case, "way": "x", "figure": figure}], {"machine": "m", "run": run})
    results.put(tmp_path, [{"part": "speed", "case": "a", "way": "x", "figure": 5}], {"machine": "other", "run": 3})
    assert [(row["machine"], row["case"], row["figure"]) for row in results.read(tmp_path)] == [
        ("m", "b", 2), ("m", "a", 3), ("m", "a", 4), ("other", "a", 5),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.jsonl"]


@pytest.mark.new_process
def test_a_later_run_measures_what_is_missing_alone(tmp_path, monkeypatch):
    check = {"part": "speed", "tolerance": 1.0, "difference": 2.0}
    rows = [
        {"part": "speed", "case": "works", "figure": 1.0}, {"part": "speed", "case": "works", "skipped": "no such kernel"},
        {"part": "speed", "case": "crashes", "error": "SIGABRT"}, {"part": "speed", "case": "hangs", "skipped": "no time"},
        check | {"case": "works too", "passed": False}, check | {"case": "works alone", "difference": 0.5, "passed": True},
    ]  # fmt: skip
    assert results.measured_cases(rows) == ["works", "works alone"]
    monkeypatch.chdir(tmp_path)
    script = WORKER.replace("os.abort()", "pass").replace("time.sleep(600)", "pass")
    assert run_worker(tmp_path, script, done=["works", "works alone"]) == (True, [])
    started = [json.loads(line) for line in (tmp_path / "starts").read_text().splitlines()]
    assert started == [["works", "works alone"]]
    begun = [json.loads(line).get("begin") for line in (tmp_path / "log-0.progress").read_text().splitlines()]
    assert [case for case in begun if case] == ["crashes", "hangs", "works too"]


def test_lines_say_what_came_out():
    check = {"part": "correct", "case": "c", "way": "fp32", "metric": "loss", "tolerance": 1e-3}
    rows = [check | {"difference": 5e-4, "passed": True}, check | {"way": "bf16", "difference": 2e-3, "passed": False}]
    assert results.line_of(rows) == "1 of 2 checks passed; nearest to its tolerance: bf16, loss 0.002 (tolerance 0.001)"
    assert list(map(results.failed, rows)) == [False, True]
    assert (
        results.line_of([{"part": "speed", "case": "c", "error": "Traceback\n\nRuntimeError: broken\n"}])
        == "FAILED: RuntimeError: broken"
    )
    assert (
        results.line_of([{"part": "speed", "case": "c", "skipped": "torchao is not installed"}])
        == "skipped: torchao is not installed"
    )
    memory = {"part": "memory", "case": "m", "way": "micro-batch 8", "predicted_bytes": 102, "allocated_bytes": 100}
    assert results.line_of([memory]) == "micro-batch 8 +2.0%"


def test_the_minutes_are_shared_and_what_is_left_goes_on():
    assert gpu.limits(["correct", "memory", "speed", "rate"], 0.0, 520.0) == {
        "correct": 200.0, "memory": 280.0, "speed": 440.0, "rate": 520.0,
    }  # fmt: skip
    assert gpu.limits(["memory", "rate"], 100.0, 500.0) == {"memory": 300.0, "rate": 500.0}


def test_the_package_is_found_where_it_is_not_installed(tmp_path):
    folder = gpu.link_package(tmp_path / "package")
    code = "import isoflop.modeling.loss, importlib.metadata as m; print(isoflop.__file__, m.version('isoflop'))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=True
    ).stdout.split()
    import isoflop

    assert found == [str(folder / "isoflop/__init__.py"), isoflop.__version__]


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "torch finds no CUDA device; run this on a machine with a GPU, or add --rehearse" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The rows of every part at toy size, and what was printed: some two minutes."""
    folder = tmp_path_factory.mktemp("rehearsed")
    done = run_command(sys.executable, "benchmarks/gpu.py", "--rehearse", "--out", folder, timeout=1500)
    rows = [json.loads(line) for line in (folder / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    return folder, rows, done.stdout


def test_the_rehearsal_reaches_every_case_without_an_error(rehearsed):
    folder, rows, printed = rehearsed
    assert [row for row in rows if "error" in row] == []
    cases = {part: [row["case"] for row in rows if row["part"] == part] for part in ("correct", "memory", "speed", "rate")}
    assert set(cases["correct"]) == {
        "loss", "models", "documents", "models compiled", "quickstart", "resume after kill -9", "dry run modern_124m",
        "dry run llama2_1.36b", "dry run llama3_1.5b",
    }  # fmt: skip
    recipes = ("modern_124m", "gpt2_124m", "llama2_1.36b", "llama3_1.5b")
    assert set(cases["memory"]) == {f"{name} {how}" for name in recipes for how in ("eager", "compiled")}
    levers = {"machine", "trace modern_124m", "loss", "attention", "optimizer", "muon update", "modern_124m eager",
              "modern_124m Trainer"}  # fmt: skip
    assert set(cases["speed"]) >= {*recipes, *levers, "modern_124m liger", "llama2_1.36b float8", "gpt2_124m nanoGPT"}
    assert cases["rate"] == ["modern_124m", "modern_124m muon"]
    assert all({"machine", "commit", "versions", "command", "run"} <= set(row) and row["rehearsal"] for row in rows)
    assert len(list(folder.iterdir())) <= 8
    table = printed[printed.index("\npart ") :].strip().splitlines()
    assert len(table) <= 100


def test_every_check_of_the_rehearsal_passes_and_says_its_tolerance(rehearsed):
    checks = [row for row in rehearsed[1] if "tolerance" in row]
    assert {row["case"] for row in checks} == {row["case"] for row in rehearsed[1] if row["part"] == "correct"}
    assert all(row["passed"] and row["difference"] <= row["tolerance"] and row["reason"] for row in checks)
    resumed = [row for row in checks if row["case"] == "resume after kill -9"]
    assert {row["resumed_from_step"] for row in resumed} <= {5, 10}
    assert resumed[0]["killed_at_step"] == 13
    ways = {row["way"] for row in checks if row["case"] == "models compiled"}
    assert ways == {f"{family} {bits} compiled" for family in ("gpt2", "llama", "hybrid") for bits in ("fp32", "bf16")}


def test_what_the_rehearsal_measures(rehearsed):
    _, rows, _ = rehearsed
    memory = [row for row in rows if row["part"] == "memory" and not row["compiled"]]
    assert len(memory) == 4 * 2  # both micro-batches, with checkpointing and without
    assert all(abs(row["predicted_bytes"] / row["allocated_bytes"] - 1) < 0.05 for row in memory)
    loops = [row for row in rows if "tokens_per_s" in row]
    assert {row["way"] for row in loops} == {"isoflop", "bare", "transformers", "trainer"}
    by_case = {row["case"]: row for row in loops}
    assert by_case["modern_124m"]["loss"] == pytest.approx(by_case["modern_124m bare loop"]["loss"], abs=1e-3)
    assert all(row["share_of_matmul"] > 0 and row["step_s"][1] <= row["step_s"][0] <= row["step_s"][2] for row in loops)
    kernels = [row for row in rows if row["case"] == "trace modern_124m" and "kernel" in row]
    assert len(kernels) == 10
    assert (rehearsed[0] / "gpu_trace.json.gz").stat().st_size < 16 * 2**20
    rates = [row for row in rows if row["part"] == "rate"]
    assert [row["optimizer"] for row in rates] == ["adamw", "muon"]
    assert all(1 <= len(rate["curve"]) <= 100 and all(point["loss"] > 0 for point in rate["curve"]) for rate in rates)
    assert rates[0]["curve"][0]["loss"] == rates[1]["curve"][0]["loss"]  # the same weights and the same first step
    ways = {row["way"] for row in rows if row["case"] == "muon update"}
    assert ways == {
        f"{name}: {way}" for name in ("modern_124m", "llama2_1.36b") for way in ("library's Muon", "torch.optim.Muon")
    }
    skipped = {row["case"]: row["skipped"] for row in rows if "skipped" in row}
    assert skipped["gpt2_124m nanoGPT"] == "no checkout of nanoGPT is named: --nanogpt PATH"
