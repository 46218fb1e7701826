"""`kill -9` of one rank: the others end by themselves, or the launcher starts anew. Whole jobs: test_storm.py."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, curve_of, metrics_of, weights_of

from isoflop.checkpoint import folder as checkpoints
from isoflop.config.loading import load_recipe
from isoflop.train.signals import EXIT_RESUME

# Where in the code a rank is killed, and at which call.
PHASES = {
    "step": ("isoflop.train.trainer", "train_step", 6),
    "save": ("isoflop.checkpoint.saver", "Saver._write", 3),
    "evaluation": ("isoflop.train.trainer", "validate", 2),
    "warm-up": ("isoflop.train.trainer", "warm_up", 1),
}
KILL = """
import importlib, os, signal, threading
owner = importlib.import_module({module!r})
*outer, name = {name!r}.split(".")
for part in outer:
    owner = getattr(owner, part)
function, calls = getattr(owner, name), []
def timed(*arguments, **named):
    calls.append(1)
    if len(calls) == {call}:
        threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return function(*arguments, **named)
setattr(owner, name, timed)
"""
RESTARTS = ["--rdzv_backend", "c10d", "--max_restarts", "2"]
FRESH_STORE = {"PET_RDZV_ENDPOINT": "localhost:0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SIZES = {
    "training__max_steps": 12, "output__checkpoint_every": 2, "evaluation__validate_every": 3, "evaluation__sample_every": 4,
    "output__keep_last": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted_end(ranks):
    """Curve and weights of a run of two ranks, by engine."""
    ends = {}

    def end(config, write_recipe):
        if config not in ends:
            whole = write_recipe("whole", **SIZES)
            ranks.run(config, whole)
            ends[config] = curve_of(load_recipe(whole)), weights_of(load_recipe(whole))
        return ends[config]

    return end


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "rank", "phase"),
    [
        ("2gpu_ddp", 1, "step"), ("2gpu_fsdp2", 0, "save"), ("2gpu_ddp", 0, "evaluation"), ("2gpu_ddp", 1, "warm-up"),
        ("2gpu_zero1", 0, "save"), pytest.param("2gpu_fsdp2", 1, "step", marks=pytest.mark.slow),
        pytest.param("2gpu_ddp", 0, "step", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_one_rank_of_two_the_other_ends_by_itself_with_a_message(
    config, rank, phase, write_recipe, ranks, uninterrupted_end, tried
):
    """Without an agent that watches: within seconds, and not in a hang. The restart resumes."""
    file = write_recipe(**SIZES)
    module, name, call = PHASES[phase]
    killed = KILL.format(module=module, name=name, call=call, delay=0.01)
    launched = ranks.start(config, file, code=f"import os\nif os.environ['RANK'] == '{rank}':\n    exec({killed!r})")
    started = time.monotonic()
    codes = launched.wait(timeout=60)
    assert codes == ([-signal.SIGKILL, EXIT_RESUME] if rank == 0 else [EXIT_RESUME, -signal.SIGKILL]), launched.text()
    assert time.monotonic() - started < 60
    assert f"rank {1 - rank}: another process of this run is gone" in launched.text()
    printed = ranks.run(config, file)
    assert ("resuming from" in printed) == (phase != "warm-up")
    assert (curve_of(load_recipe(file)), weights_of(load_recipe(file))) == uninterrupted_end(config, write_recipe)
    tried(f"`kill -9` of one rank of two ({phase}), the other ends by itself, `{config}`")


@pytest.mark.distributed
def test_a_launcher_with_restarts_goes_on_by_itself(write_recipe, tried):
    """torchrun's agent, through `accelerate launch --max_restarts`: one rank is killed, the same launch ends well."""
    file = write_recipe(training__max_steps=150, output__checkpoint_every=10, evaluation__validate_every=150)
    folder = Path(load_recipe(file).output.run_dir)
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/2cpu_ddp.yaml", "--main_process_port", "0"]
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / command[0]), *command[1:], *RESTARTS, "scripts/pretrain.py", str(file)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | FRESH_STORE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not checkpoints.list_checkpoints(folder / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.1)
    owner = int(re.search(r"pid (\d+)", (folder / "lock").read_text())[1])
    os.kill(owner, signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resuming from" in output
    assert [row["step"] for row in metrics_of(load_recipe(file))] == list(range(1, 151))
    tried("`kill -9` of one rank under `accelerate launch --max_restarts`", proof="the launch ended well, every step once")
