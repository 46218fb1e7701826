"""Signals in every phase, to one rank or to all: the ranks agree, save, and say "resume me"."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
import yaml
from conftest import curve_of, weights_of

from isoflop.checkpoint import folder as checkpoints
from isoflop.config.loading import load_recipe
from isoflop.train.signals import EXIT_RESUME

SIGNALLED = """
import importlib, os, signal, time
owner = importlib.import_module({module!r})
*outer, name = {name!r}.split(".")
for part in outer:
    owner = getattr(owner, part)
function, calls = getattr(owner, name), []
def signalled(*arguments, **named):
    calls.append(1)
    if len(calls) == {call} and os.environ["RANK"] in {ranks!r}:
        print(f"signalled at {{time.monotonic()}}", flush=True)
        os.kill(os.getpid(), {number})
    return function(*arguments, **named)
setattr(owner, name, signalled)
"""
# Where in the code a signal comes, at which call, and the step that must be saved at least (None: nothing was trained).
PHASES = {
    "compile and warm-up": ("isoflop.train.trainer", "warm_up", 1, None),
    "mid-accumulation": ("accelerate", "Accelerator.backward", 15, 5),  # 2 settle DDP's buckets, then 2 a step: inside step 7
    "evaluation": ("isoflop.train.evaluation", "rank_micro_batches", 1, 5),
    "a downstream task": ("isoflop.evaluate.harness", "InMemory._model_call", 3, 5),
    "saving": ("isoflop.checkpoint.saver", "Saver._write", 1, 5),
}


@pytest.fixture(scope="module")
def uninterrupted_pair(toy_tree, ranks, tmp_path_factory):
    """The toy run under two ranks of an engine, to its end, with two micro-batches a step."""
    runs = {}

    def run(config):
        if config not in runs:
            folder = tmp_path_factory.mktemp("pair")
            tree = json.loads(json.dumps(toy_tree))
            tree["training"]["micro_batch_size"] = 2
            tree["output"]["run_dir"] = str(folder / "run")
            (folder / "pair.yaml").write_text(yaml.safe_dump(tree))
            ranks.run(config, folder / "pair.yaml")
            runs[config] = load_recipe(folder / "pair.yaml")
        return runs[config]

    return run


BOTH, ONE = "0 1", "1"
TASKS = {"evaluation__tasks": {"quick": 5}, "evaluation__task_documents": 20}
DDP, FSDP2, ZERO1, TERM, USR1 = "2gpu_ddp", "2gpu_fsdp2", "2gpu_zero1", signal.SIGTERM, signal.SIGUSR1
# Every phase under DDP, both signals to one rank and to both, the phases that gather shards under the engines that shard.
COVERING = [
    (DDP, "compile and warm-up", TERM, BOTH), (DDP, "mid-accumulation", USR1, ONE), (DDP, "evaluation", TERM, ONE),
    (DDP, "saving", USR1, BOTH), (DDP, "a downstream task", TERM, ONE), (FSDP2, "mid-accumulation", TERM, BOTH),
    (FSDP2, "evaluation", TERM, BOTH), (ZERO1, "evaluation", TERM, BOTH), (ZERO1, "saving", TERM, BOTH),
]  # fmt: skip
OTHERS = [(DDP, phase, number, ranks) for phase in PHASES for number in (TERM, USR1) for ranks in (BOTH, ONE)]
OTHERS = [case for case in OTHERS if case[1] != "a downstream task"]  # seconds each
OTHERS += [(config, phase, TERM, BOTH) for config in (FSDP2, ZERO1) for phase in PHASES]
CASES = COVERING + [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS if case not in COVERING]


@pytest.mark.distributed
@pytest.mark.parametrize(("config", "phase", "number", "signalled"), CASES)
def test_two_ranks_agree_save_and_leave(config, phase, number, signalled, write_recipe, ranks, uninterrupted_pair, tried):
    module, name, call, least = PHASES[phase]
    if phase == "mid-accumulation" and config != "2gpu_ddp":
        call -= 2  # only DDP has buckets to settle
    file = write_recipe(training__micro_batch_size=2, **(TASKS if phase == "a downstream task" else {}))
    code = SIGNALLED.format(module=module, name=name, call=call, ranks=signalled.split(), number=int(number))
    launched = ranks.start(config, file, code=code)
    assert launched.wait(timeout=120) == [EXIT_RESUME] * 2, launched.text()
    assert time.monotonic() - float(re.search(r"signalled at ([\d.]+)", launched.text())[1]) < 30  # torchrun's patience
    folder = Path(load_recipe(file).output.run_dir) / "checkpoints"
    if least is None:
        assert checkpoints.list_checkpoints(folder) == []
    else:
        assert checkpoints.step_of(checkpoints.newest_intact(folder)) >= least
        assert "saved; the same command resumes from step-" in launched.text()
    assert not list(folder.glob(".step-*"))
    ranks.run(config, file)
    assert curve_of(load_recipe(file)) == curve_of(uninterrupted_pair(config))
    assert weights_of(load_recipe(file)) == weights_of(uninterrupted_pair(config))
    tried(f"{number.name} to {'both ranks' if signalled == BOTH else 'one rank of two'} in {phase}")


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["2gpu_fsdp2", pytest.param("8gpu_hsdp", marks=pytest.mark.slow)])
def test_a_save_right_after_an_evaluation_holds_every_tensor(config, write_recipe, ranks, uninterrupted_pair, tried):
    """FSDP2 leaves embedding, last norm and head whole after a forward without gradients. No save came before it here."""
    file = write_recipe(training__micro_batch_size=2, output__checkpoint_every=100)
    code = SIGNALLED.format(module="isoflop.train.trainer", name="sum_gradients", call=6, ranks=["0"], number=int(signal.SIGTERM))
    two_by_two = {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 2}
    settings = {"processes": 4, **two_by_two} if config == "8gpu_hsdp" else {}
    assert set(ranks.start(config, file, code=code, **settings).wait()) == {EXIT_RESUME}
    assert checkpoints.newest_intact(Path(load_recipe(file).output.run_dir) / "checkpoints").name == "step-5"
    ranks.run(config, file, **settings)
    whole = curve_of(uninterrupted_pair("2gpu_fsdp2"))
    assert [row[1] for row in curve_of(load_recipe(file))] == pytest.approx([row[1] for row in whole], abs=1e-5)
    if config == "2gpu_fsdp2":
        assert weights_of(load_recipe(file)) == weights_of(uninterrupted_pair(config))
    tried("SIGTERM between an evaluation and the next step, FSDP2 and HSDP")


HANGS = """
import isoflop.train.trainer as pretrain, time
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
    assert "SIGTERM: the process did not stop in 2 s and is ended" in launched.text()
    assert "resuming from" in ranks.run("cpu", file)
    tried("SIGTERM to a process that hangs in a library", proof="ended in time with exit code 75; went on from its checkpoint")


@pytest.mark.slow
def test_a_signal_while_torch_compiles(write_recipe, ranks, tried):
    """A compile lasts longer than the grace period: the thread behind it ends the process, and nothing was trained yet."""
    file = write_recipe()
    patience = {"TORCHELASTIC_RUN_ID": "test", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": 6}
    code = SIGNALLED.format(module="isoflop.train.trainer", name="sum_gradients", call=1, ranks=["0"], number=int(signal.SIGTERM))
    launched = ranks.start("cpu", file, "training.compile=true", code=code, env=patience | {"RANK": 0})
    started = time.monotonic()
    assert launched.wait(timeout=120) == [EXIT_RESUME], launched.text()
    assert time.monotonic() - started < 30
    ranks.run("cpu", file)
    tried(
        "SIGTERM while torch.compile compiles", proof="ended within the grace period with exit code 75; the same command started"
    )
