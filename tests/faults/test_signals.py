"""Signals in every phase, to one rank or to all: the ranks agree, save, and say "resume me"."""

import signal
import time
from pathlib import Path

import pytest
from conftest import metrics_of

from isoflop.checkpoint import folder as checkpoints
from isoflop.recipe_file import load_recipe
from isoflop.stop import EXIT_RESUME

TOLD = """
import importlib, os, signal
owner = importlib.import_module({module!r})
*outer, name = {name!r}.split(".")
for part in outer:
    owner = getattr(owner, part)
function, calls = getattr(owner, name), []
def signalled(*arguments, **named):
    calls.append(1)
    if len(calls) == {call} and os.environ["RANK"] in {ranks!r}:
        os.kill(os.getpid(), {number})
    return function(*arguments, **named)
setattr(owner, name, signalled)
"""
# Where in the code a signal comes, at which call, and the step that must be saved at least (None: nothing was trained).
PHASES = {
    "compile and warm-up": ("isoflop.pretrain", "settle_buckets", 1, None),
    "mid-accumulation": ("accelerate", "Accelerator.backward", 15, 5),  # 2 settle DDP's buckets, then 2 a step: inside step 7
    "evaluation": ("isoflop.validation", "share_of_process", 1, 5),
    "saving": ("isoflop.checkpoint.saver", "Saver._write", 1, 5),
}


@pytest.fixture(scope="module")
def undisturbed_pair(toy_tree, ranks, tmp_path_factory):
    """The toy run under two ranks, to its end, with two micro-batches a step."""
    import json

    import yaml

    folder = tmp_path_factory.mktemp("pair")
    tree = json.loads(json.dumps(toy_tree))
    tree["training"]["micro_batch_size"] = 2
    tree["output"]["run_dir"] = str(folder / "run")
    (folder / "pair.yaml").write_text(yaml.safe_dump(tree))
    ranks.run("2gpu_ddp", folder / "pair.yaml")
    return metrics_of(load_recipe(folder / "pair.yaml"))


@pytest.mark.distributed
@pytest.mark.parametrize("told", ["0 1", "1"], ids=["the whole group", "one rank alone"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("phase", PHASES)
def test_two_ranks_agree_save_and_leave(phase, number, told, write_recipe, ranks, undisturbed_pair, tried):
    module, name, call, least = PHASES[phase]
    file = write_recipe(training__micro_batch_size=2)
    code = TOLD.format(module=module, name=name, call=call, ranks=told.split(), number=int(number))
    launched = ranks.start("2gpu_ddp", file, code=code)
    started = time.monotonic()
    assert launched.wait(timeout=60) == [EXIT_RESUME] * 2, launched.text()
    assert time.monotonic() - started < 30  # torchrun's patience
    folder = Path(load_recipe(file).output.run_dir) / "checkpoints"
    if least is None:
        assert checkpoints.list_checkpoints(folder) == []
    else:
        assert checkpoints.step_of(checkpoints.newest_whole(folder)) >= least
        assert "saved; the same command goes on from step-" in launched.text()
    assert not list(folder.glob(".step-*"))
    ranks.run("2gpu_ddp", file)
    pick = ("step", "loss", "val_loss", "grad_norm", "learning_rate")
    assert [[row[key] for key in pick] for row in metrics_of(load_recipe(file))] == [
        [row[key] for key in pick] for row in undisturbed_pair
    ]
    tried(f"{number.name} to {'both ranks' if ' ' in told else 'one rank of two'} in {phase}")


HANGS = """
import isoflop.pretrain as pretrain, time
step = pretrain.train_step
def hanging(job, progress):
    if progress.step == 6:
        print("hanging now", flush=True)
        import ctypes
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # the second call never returns, whatever signal comes
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    return step(job, progress)
pretrain.train_step = hanging
"""


def test_a_process_that_hangs_is_ended_within_the_grace_period(write_recipe, ranks, tried):
    """Inside a C call no Python handler runs; the thread behind it does."""
    file = write_recipe()
    patience = {"TORCHELASTIC_RUN_ID": "test", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": 4}
    launched = ranks.start("cpu", file, code=HANGS, env=patience)
    deadline = time.monotonic() + 60
    while "hanging now" not in launched.text() and time.monotonic() < deadline:
        time.sleep(0.05)
    started = time.monotonic()
    launched.kill(0, signal.SIGTERM)
    assert launched.wait(timeout=60) == [EXIT_RESUME], launched.text()
    assert 1.5 < time.monotonic() - started < 4
    assert "SIGTERM: the process did not come to a stop in 2 s and is ended" in launched.text()
    assert "resuming from" in ranks.run("cpu", file)
    tried("SIGTERM to a process that hangs in a library", proof="ended in time with exit code 75; went on from its checkpoint")


@pytest.mark.slow
def test_a_signal_while_torch_compiles(write_recipe, ranks, tried):
    """A compile lasts longer than the grace period: the thread behind it ends the process, and nothing was trained yet."""
    file = write_recipe()
    patience = {"TORCHELASTIC_RUN_ID": "test", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": 6}
    code = TOLD.format(module="isoflop.pretrain", name="sum_gradients", call=1, ranks=["0"], number=int(signal.SIGTERM))
    launched = ranks.start("cpu", file, "training.compile=true", code=code, env=patience | {"RANK": 0})
    started = time.monotonic()
    assert launched.wait(timeout=120) == [EXIT_RESUME], launched.text()
    assert time.monotonic() - started < 30
    ranks.run("cpu", file)
    tried(
        "SIGTERM while torch.compile compiles", proof="ended within the grace period with exit code 75; the same command started"
    )
