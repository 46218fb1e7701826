"""`kill -9`: the same command goes on, and nothing shows that it was killed."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, curve_of, metrics_of, weights_of

from isoflop.checkpoint import folder as checkpoints
from isoflop.recipe_file import load_recipe
from isoflop.stop import EXIT_RESUME

PHASES = {
    "step": ("isoflop.pretrain", "train_step", 0.02),
    "save": ("isoflop.checkpoint.saver", "Saver._write", 0.03),
    "evaluation": ("isoflop.pretrain", "validate", 0.02),
    "export": ("isoflop.outcome", "export_checkpoint", 0.1),
    "start": ("isoflop.pretrain", "load_checkpoint", 0.1),
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
# Twelve steps with many saves and evaluations, so that kills fall into all of them.
SIZES = {
    "training__max_steps": 12, "output__checkpoint_every": 2, "evaluation__validate_every": 3, "evaluation__sample_every": 4,
    "output__keep_last": 2,
}  # fmt: skip


def kill_and_go_on(ranks, config, file, kills, seed, processes=None):
    """Kill a run at random moments of all phases, so often, starting over in a new folder where it came to its end."""
    dice = random.Random(seed)
    recipe, done, ended = load_recipe(file), 0, 0
    folder = Path(recipe.output.run_dir)
    while done < kills:
        module, name, longest = PHASES[dice.choice(list(PHASES))]
        code = KILL.format(module=module, name=name, call=dice.randint(1, 3), delay=dice.uniform(0, longest))
        whole = newest_whole(folder)
        launched = ranks.start(config, file, code=code, processes=processes)
        codes = launched.wait()
        assert set(codes) <= {0, -signal.SIGKILL, EXIT_RESUME}, launched.text()
        resumed = re.search(r"resuming from \S*/(step-\d+)", launched.text())
        assert (resumed and resumed[1]) in (whole, None)  # killed before it said so, or just there
        done += -signal.SIGKILL in codes
        if set(codes) == {0}:
            ended += 1
            yield recipe
            shutil.rmtree(folder)
    ranks.run(config, file, processes=processes)
    yield recipe


def newest_whole(folder):
    whole = [path for path in checkpoints.list_checkpoints(folder / "checkpoints") if not checkpoints.find_faults(path)]
    return whole[-1].name if whole else None


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_the_whole_job_at_random_moments(kills, write_recipe, ranks, tried):
    whole = write_recipe("whole", **SIZES)
    ranks.run("cpu", whole)
    expected = curve_of(load_recipe(whole)), weights_of(load_recipe(whole))
    for recipe in kill_and_go_on(ranks, "cpu", write_recipe("killed", **SIZES), kills, seed=kills):
        assert (curve_of(recipe), weights_of(recipe)) == expected
    tried("`kill -9` of a whole job in a step, a save, an evaluation, the export, the start", kills)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("config", ["2gpu_ddp", "2gpu_fsdp2", "2gpu_zero1"])
def test_the_whole_job_of_two_ranks_at_random_moments(config, write_recipe, ranks, tried):
    whole = write_recipe("whole", **SIZES)
    ranks.run(config, whole)
    expected = curve_of(load_recipe(whole)), weights_of(load_recipe(whole))
    for recipe in kill_and_go_on(ranks, config, write_recipe("killed", **SIZES), 8, seed=2):
        assert (curve_of(recipe), weights_of(recipe)) == expected
    tried(f"`kill -9` of both ranks of `{config}`", 8)


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["2gpu_ddp", "2gpu_fsdp2"])
def test_one_rank_of_two_the_other_ends_by_itself_with_a_message(config, write_recipe, ranks, tried):
    """Without an agent that watches: within seconds, and not in a hang. The restart goes on."""
    file = write_recipe(**SIZES)
    killed = KILL.format(module="isoflop.pretrain", name="train_step", call=6, delay=0.01)
    launched = ranks.start(config, file, code=f"import os\nif os.environ['RANK'] == '1':\n    exec({killed!r})")
    started = time.monotonic()
    assert launched.wait(timeout=60) == [EXIT_RESUME, -signal.SIGKILL], launched.text()
    assert time.monotonic() - started < 60
    assert "rank 0: another process of this run is gone" in launched.text()
    assert "resuming from" in ranks.run(config, file)
    whole = write_recipe("whole", **SIZES)
    ranks.run(config, whole)
    assert curve_of(load_recipe(file)) == curve_of(load_recipe(whole))
    assert weights_of(load_recipe(file)) == weights_of(load_recipe(whole))
    tried(f"`kill -9` of one rank of two, `{config}`")


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
    while not newest_whole(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    owner = int(re.search(r"pid (\d+)", (folder / "lock").read_text())[1])
    os.kill(owner, signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resuming from" in output
    assert [row["step"] for row in metrics_of(load_recipe(file))] == list(range(1, 151))
    tried("`kill -9` of one rank under `accelerate launch --max_restarts`", proof="the launch ended well, every step once")
