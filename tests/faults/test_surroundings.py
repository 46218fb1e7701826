"""What surrounds a run may fail: the clock, the trackers, a second process on the same folder. Training continues."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, curve_of, metrics_of, weights_of

from isoflop.config.loading import load_recipe

# The clock of the wall, for this process alone: a year ahead and a decade back, by turns.
JUMPING_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    static long calls;
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += ++calls % 3 == 0 ? 31536000L : calls % 3 == 1 ? -315360000L : 0;
    return status;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to put a jumping clock under a process")
@pytest.mark.parametrize("config", ["cpu", pytest.param("2cpu_ddp", marks=[pytest.mark.distributed, pytest.mark.slow])])
def test_a_clock_that_jumps(config, write_recipe, uninterrupted, tmp_path, tried):
    (tmp_path / "clock.c").write_text(JUMPING_CLOCK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "clock.so", tmp_path / "clock.c", "-ldl"], check=True)
    file = write_recipe(training__micro_batch_size=4)
    env = {**os.environ, "LD_PRELOAD": str(tmp_path / "clock.so")}
    command = [sys.executable, "scripts/pretrain.py", str(file)]
    if config != "cpu":
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        command = [sys.executable, *torchrun, *command[1:]]
    jumps = [sys.executable, "-c", "import time; print([time.time() for _ in range(3)])"]
    times = sorted(eval(subprocess.run(jumps, env=env, capture_output=True, text=True, check=True).stdout))
    assert times[-1] - times[0] > 3e8
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=240, capture_output=True)
    rows = metrics_of(load_recipe(file))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in metrics_of(uninterrupted["llama"])], abs=1e-5)
    assert all(0 < row["tokens_per_s"] < 1e9 for row in rows)
    elapsed = [row["elapsed_s"] for row in rows]
    assert 0 < elapsed[0] < elapsed[-1] < 240
    assert elapsed == sorted(elapsed)
    tried(
        f"a clock that jumps years at every look (`{config}`)",
        proof="same losses; seconds and rates from a clock that cannot jump",
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


UNREACHABLE = """
import urllib.request
from accelerate.tracking import GeneralTracker, LOGGER_TYPE_TO_CLASS, TensorBoardTracker
class Remote(TensorBoardTracker):
    def {method}(self, *arguments, **named):
        urllib.request.urlopen("http://127.0.0.1:{port}/", timeout=5)
LOGGER_TYPE_TO_CLASS["tensorboard"] = Remote
"""


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_cannot_be_reached(method, write_recipe, ranks, uninterrupted, tried):
    """A real connection to a port where nobody listens, at the tracker's start, at a step, at its end."""
    file = write_recipe()
    code = UNREACHABLE.format(method=method, port=free_port())
    printed = ranks.run("cpu", file, "output.trackers=[tensorboard]", code=code)
    assert re.search(r"tracker tensorboard (does not start|failed|did not close) \(URLError: .*Connection refused", printed)
    assert printed.count("tracker tensorboard") == 1
    assert curve_of(load_recipe(file)) == curve_of(uninterrupted["llama"])
    assert weights_of(load_recipe(file)) == weights_of(uninterrupted["llama"])
    tried("a tracker that cannot be reached, at its start, at a step, at its end")


def test_an_unwritable_tracker_folder(write_recipe, ranks, uninterrupted, tried):
    """A file where the tracker wants its folder: so it is for root too."""
    file = write_recipe()
    run_dir = Path(load_recipe(file).output.run_dir)
    run_dir.mkdir(parents=True)
    (run_dir / "lock").write_text("host here, pid 1\n")
    (run_dir / "isoflop").write_text("in the way")
    printed = ranks.run("cpu", file, "output.trackers=[tensorboard]")
    assert (
        printed.count("tracker LoggerType.TENSORBOARD does not start") + printed.count("tracker tensorboard does not start") == 1
    )
    assert curve_of(load_recipe(file)) == curve_of(uninterrupted["llama"])
    tried("a tracker's folder that cannot be written")


def test_a_second_process_on_the_same_folder(write_recipe, ranks, tried):
    file = write_recipe(training__max_steps=100_000, evaluation__validate_every=100_000, output__checkpoint_every=1000)
    first = ranks.start("cpu", file)
    folder = Path(load_recipe(file).output.run_dir)
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = ranks.start("cpu", file)
    assert second.wait() == [2]
    assert f"is in use by host {socket.gethostname()}, pid {first.pids[0]}; wait for that run, stop it" in second.text()
    first.kill(0, signal.SIGKILL)
    assert first.wait() == [-signal.SIGKILL]
    third = ranks.start("cpu", file, "training.max_steps=100000")
    steps = (folder / "metrics.jsonl").stat().st_size
    while (folder / "metrics.jsonl").stat().st_size <= steps and time.monotonic() < deadline + 60:
        time.sleep(0.05)
    third.kill(0, signal.SIGTERM)
    assert third.wait() == [75], third.text()
    assert f"pid {third.pids[0]}" in (folder / "lock").read_text()
    tried(
        "a second process on a run's folder; the lock of a killed one",
        proof="refused with the first one's host and pid, whose training went on; taken over",
    )


@pytest.mark.distributed
def test_what_a_kill_left_of_an_extension_being_loaded_stops_no_launch(tmp_path, write_recipe, ranks, tried):
    """Torch waits without end for the file `lock` that a killed process left where DeepSpeed's extensions are built."""
    left = tmp_path / "deepspeed_shm_comm/lock"
    left.parent.mkdir()
    left.touch()
    launched = ranks.start("2gpu_zero1", write_recipe(), env={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert launched.wait(timeout=120) == [0, 0], launched.text()
    tried("a `kill -9` while DeepSpeed loads an extension: its lock stays", proof="the next launch does not wait for it")
