"""Processes of a sweep: packed, stopped, failed, skipped, most of them of a script that trains nothing; and branches."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, curve_of, metrics_row, summary_with, weights_of

from isoflop.sweep.config import SweepConfig
from isoflop.sweep.design import Run, groups_of
from isoflop.sweep.runner import Runner, Slot, branch_off, slots_of
from isoflop.train.signals import EXIT_RESUME

pytestmark = pytest.mark.processes

PROGRAM = ("scripts/pretrain.py",)
STAND_IN = (
    f"""
ROW, SUMMARY = {metrics_row(1, elapsed_s=1.0)}, {summary_with(val_loss=1.5, elapsed_s=2.0)}
"""
    + """
import ctypes, json, os, signal, sys, time, yaml
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # as isoflop.train.signals.follow_launcher
run = yaml.safe_load(open(sys.argv[1]))["output"]["run_dir"]
os.makedirs(run, exist_ok=True)
import fcntl
lock = open(run + "/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
def stop(number, frame):
    open(run + "/stopped", "w").close()
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
began = time.time()
with open(run + "/metrics.jsonl", "a") as rows:
    rows.write(json.dumps(ROW) + chr(10))
if os.path.exists("wait"):
    time.sleep(60)
for other in sorted(open("meet").read().split()) if os.path.exists("meet") else []:
    while not os.path.exists(other + "/lock"):  # both at the same time, else the test's time limit ends it
        time.sleep(0.05)
if run.endswith("run1") and os.path.exists("fail"):
    sys.exit("no such luck")
where = [os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")]
summary = SUMMARY | {"where": where, "began": began, "ended": time.time()}
json.dump(summary, open(run + "/summary.json", "w"))
"""
)


@pytest.fixture
def runs(toy_recipe, tmp_path, monkeypatch):
    """Three runs in a folder whose pretrain.py trains nothing."""
    monkeypatch.chdir(tmp_path)
    Path("scripts").mkdir()
    Path("scripts/pretrain.py").write_text(STAND_IN)
    return [Run(f"run{i}", toy_recipe(f"run{i}"), 10) for i in range(3)]


def runner(groups, slots=None):
    return Runner(groups, slots or [Slot({})], str(ROOT / "accelerate_configs/cpu.yaml"), Path("sweep"), program=PROGRAM)


def summary_of(run):
    return json.loads((Path(run.recipe.output.run_dir) / "summary.json").read_text())


def test_slots_name_their_gpu_or_share_the_cores():
    assert slots_of(["0", "3"], 1) == [Slot({"CUDA_VISIBLE_DEVICES": "0"}), Slot({"CUDA_VISIBLE_DEVICES": "3"})]
    assert slots_of([], 1) == [Slot({})]
    assert slots_of([], 2) == [Slot({"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))})] * 2


def test_runs_are_packed_and_none_is_done_twice(runs, capsys):
    Path("meet").write_text(" ".join(run.recipe.output.run_dir for run in runs[:2]))
    assert runner([[run] for run in runs[:2]], slots_of(["5", "7"], 1)).train() == 0
    Path("meet").unlink()
    first, second = summary_of(runs[0]), summary_of(runs[1])
    assert [first["where"][0], second["where"][0]] == ["5", "7"]
    assert "run0: loss 1.5000" in capsys.readouterr().out
    assert runner([[run] for run in runs]).train() == 0
    assert "run0" not in capsys.readouterr().out
    assert summary_of(runs[0]) == first
    assert summary_of(runs[2])["began"] > first["ended"]


def test_a_failed_run_is_told_and_the_rest_goes_on(runs, capsys):
    Path("fail").touch()
    assert runner([[run] for run in runs]).train() == 1
    out = capsys.readouterr().out
    assert "run1 failed (exit code 1); its log ends:" in out
    assert "  no such luck" in out
    assert summary_of(runs[2])["val_loss"] == 1.5
    Path("fail").unlink()
    assert runner([[run] for run in runs]).train() == 0


@pytest.mark.new_process
def test_a_signal_is_passed_on_and_the_same_command_goes_on(runs, capsys):
    Path("wait").touch()

    def stop():
        while not (Path(runs[0].recipe.output.run_dir) / "metrics.jsonl").exists():
            time.sleep(0.1)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    before = signal.getsignal(signal.SIGTERM)
    assert runner([[run] for run in runs]).train() == EXIT_RESUME
    assert signal.getsignal(signal.SIGTERM) is before
    assert (Path(runs[0].recipe.output.run_dir) / "stopped").exists()
    assert not Path(runs[1].recipe.output.run_dir).exists()
    assert "SIGTERM: the runs in training are saved; the same command resumes" in capsys.readouterr().out
    Path("wait").unlink()
    assert runner([[run] for run in runs]).train() == 0


@pytest.mark.new_process
def test_a_killed_sweep_takes_its_runs_with_it(runs):
    Path("wait").touch()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from isoflop.sweep.runner import *; from isoflop.config.loading import *;"
        "run = Run('run0', load_recipe(sys.argv[2]), 10);"
        "Runner([[run]], [Slot({})], sys.argv[3], Path('sweep'), program=('scripts/pretrain.py',)).train()"
    )
    config = str(ROOT / "accelerate_configs/cpu.yaml")
    sweep = subprocess.Popen([sys.executable, "-c", code, str(ROOT / "tests"), "run0.yaml", config])
    folder = Path(runs[0].recipe.output.run_dir)
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.1)
    sweep.kill()
    sweep.wait()
    for _ in range(100):
        if (folder / "stopped").exists():
            break
        time.sleep(0.1)
    assert (folder / "stopped").exists()


def test_a_run_in_other_hands_is_passed_over(runs, capsys):
    folder = Path(runs[0].recipe.output.run_dir)
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runner([[run] for run in runs[:2]]).train() == 0
    assert not (folder / "summary.json").exists()
    assert summary_of(runs[1])["val_loss"] == 1.5


def test_branches_are_bit_for_bit_what_runs_of_their_own_would_be(write_recipe, tmp_path, run_in_process):
    tree = {
        "recipe": str(write_recipe()), "tokens_per_parameter": [1.0, 1.6], "parameters": [19552], "aspect_ratio": 32,
        "overrides": {"schedule.name": "wsd"}, "branch": True, "validations": 4,
    }  # fmt: skip
    (trunk, branch), (_, alone) = (
        groups_of(SweepConfig(**tree, output_dir=str(tmp_path / folder)))[0] for folder in ("branched", "alone")
    )
    assert run_in_process(trunk.recipe) == 0
    branch_off(branch, trunk)
    checkpoints = Path(branch.recipe.output.run_dir) / "checkpoints"
    assert [file.name for file in checkpoints.iterdir()] == [f"step-{branch.branch_step}"]
    assert run_in_process(branch.recipe) == 0
    assert run_in_process(alone.recipe) == 0
    assert weights_of(branch.recipe) == weights_of(alone.recipe)
    losses = [{row[0]: row[1:] for row in curve_of(run.recipe)} for run in (branch, alone)]
    cooldown = range(branch.branch_step + 1, branch.steps + 1)
    assert [losses[0][step] for step in cooldown] == [losses[1][step] for step in cooldown]
    assert [row[0] for row in losses[0].values()] == [row[0] for row in losses[1].values()]
    branch_off(branch, trunk)  # it has checkpoints of its own by now
    assert f"step-{branch.steps}" in [file.name for file in checkpoints.iterdir()]
