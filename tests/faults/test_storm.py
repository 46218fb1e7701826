"""A storm: the whole job is killed at moments drawn over its whole life, with everything on, under every engine.

Half of the moments are drawn in time, the other half at the entry of each part of the program, or a moment after it. The same
command resumes every time from the newest complete checkpoint, and at the end nothing tells the run from an uninterrupted one.
"""

import json
import pkgutil
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import curve_of, metrics_of, weights_of
from test_anomalies import BAD_BATCH

from isoflop.checkpoint import folder as checkpoints
from isoflop.checkpoint.state import TensorReader, read
from isoflop.config.loading import load_recipe

# Samples fall on steps without validation, and the other way round; saves on both kinds, and on neither.
EVERYTHING = {
    "training__max_steps": 14, "training__micro_batch_size": 2,
    "output__checkpoint_every": 2, "output__checkpoint_at": [5], "output__keep_last": 2,
    "output__keep_every": 6, "evaluation__validate_every": 3, "evaluation__sample_every": 4, "evaluation__tasks": {"quick": 5},
    "evaluation__task_documents": 4, "output__layer_norms": True,
}  # fmt: skip
TWO_BY_TWO = {"processes": 4, "parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 2}
ENGINES = {
    "cpu": {}, "2gpu_ddp": {}, "2gpu_fsdp2": {}, "8gpu_hsdp": TWO_BY_TWO,
    "2gpu_zero1": {"output__layer_norms": False},
}  # fmt: skip
# Every part of the program that a run passes through once, and many times.
ONCE = [
    "isoflop.train.trainer.load_checkpoint", "isoflop.train.trainer.start", "isoflop.train.trainer.warm_up",
    "isoflop.train.trainer.roll_back", "isoflop.train.trainer.finish", "isoflop.train.outcome.export_checkpoint",
    "isoflop.train.run_folder.replace_folder",
]  # fmt: skip
OFTEN = [
    "isoflop.train.trainer.train_step", "isoflop.train.trainer.sum_gradients", "isoflop.train.trainer.update",
    "isoflop.train.trainer.save_checkpoint", "isoflop.checkpoint.saver.Saver._write", "isoflop.checkpoint.saver.commit",
    "isoflop.checkpoint.folder.replace_folder", "isoflop.checkpoint.folder.prune", "isoflop.train.trainer.evaluate_and_log",
    "isoflop.train.trainer.validate", "isoflop.train.trainer.run_downstream", "isoflop.train.trainer.write_samples",
    "isoflop.train.metrics.MetricsLog.write_samples", "isoflop.train.metrics.MetricsLog.write",
    "isoflop.train.outcome.draw_curve", "isoflop.train.run_folder.atomic_write",
]  # fmt: skip
CHECKPOINT = re.compile(r"checkpoints/step-\d+")
BETWEEN_SAVE_AND_ROW = "isoflop.train.trainer.evaluate_and_log"
# All ranks are killed some time after rank 0's n-th entry into (or return from) a part; `settled`: once the checkpoint in flight
# is complete. Stopped first, and from outside, so that none sees another gone.
KILL = """
import contextlib, importlib, os, psutil, signal, threading, time
def kill_job():
    ranks = [rank.pid for rank in psutil.Process(os.getppid()).children()]
    if os.fork() == 0:
        os.closerange(3, 256)  # the lock of the run's folder among them, which must not outlive the ranks
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        os._exit(0)
    time.sleep(60)
if os.environ.get("RANK", "0") == "0":
    module, name = {part!r}.rsplit(".", 1)
    if module.rsplit(".", 1)[1][0].isupper():
        module, outer = module.rsplit(".", 1)
        owner = getattr(importlib.import_module(module), outer)
    else:
        owner = importlib.import_module(module)
    function, calls = getattr(owner, name), []
    def fatal(*given, **named):
        calls.append(1)
        if len(calls) != {call}:
            return function(*given, **named)
        if {settled}:
            given[0].checkpoints.wait()
        elif {after}:
            function(*given, **named)
        elif {delay}:
            threading.Timer({delay}, kill_job).start()
            return function(*given, **named)
        kill_job()
    setattr(owner, name, fatal)
"""
# Until the run has come to its end a poisoned batch is in its way: skipped, or rolled back from.
POISON = BAD_BATCH.format(batch=8, factor="float('nan')")


def launch(ranks, config, file, policy, code=""):
    settings = {key: value for key, value in ENGINES[config].items() if "__" not in key}
    return ranks.start(config, file, f"anomalies.policy={policy}", code=POISON + code, **settings)


def end_of(recipe):
    """All that a run leaves that must be the same: rows with norms and scores, samples, weights, tensors, names of files."""
    folder = Path(recipe.output.run_dir)
    timed = {"elapsed_s", "tokens_per_s", "mfu", "peak_memory_bytes"}
    last = checkpoints.list_checkpoints(folder / "checkpoints")[-1]
    return {
        "curve": curve_of(recipe),
        "rows": [{key: value for key, value in row.items() if key not in timed} for row in metrics_of(recipe)],
        "samples": (folder / "samples.jsonl").read_text(),
        "weights": weights_of(recipe),
        "tensors": tensors_of(last),
        "files": sorted(name for path in folder.rglob("*") if not CHECKPOINT.match(name := str(path.relative_to(folder)))),
    }


def checkpoint_names(recipe):
    return {path.name for path in checkpoints.list_checkpoints(Path(recipe.output.run_dir) / "checkpoints")}


def tensors_of(path):
    """Every tensor of a checkpoint, as bytes."""
    described = TensorReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in described.items()}
    read(path, tensors)
    return {name: tensor.numpy().tobytes() for name, tensor in sorted(tensors.items())}


def moments(dice, life_s):
    """What kills a launch, without end: seconds after its start, or code that does so in some part."""
    parts = []
    while True:
        yield dice.uniform(0.2, life_s)
        parts = parts or dice.sample([*ONCE, *OFTEN, *[None] * 3], len(ONCE) + len(OFTEN) + 3)  # each once, then anew
        part = parts.pop()
        delay = dice.choice([0, 0, dice.uniform(0, 0.05)])
        yield KILL.format(
            part=part or BETWEEN_SAVE_AND_ROW, call=1 if part in ONCE else dice.randint(1, 4), settled=part is None,
            after=dice.random() < 0.3, delay=delay,
        )  # fmt: skip


def storm(ranks, write_recipe, config, policy, kills, seed):
    """Kill a run so often, starting over in a new folder where it came to its end, and compare every end."""
    changes = EVERYTHING | {key: value for key, value in ENGINES[config].items() if "__" in key}
    whole, file = write_recipe("whole", **changes), write_recipe("killed", **changes)
    ranks.preload("isoflop.evaluate.harness")
    began = time.monotonic()
    launch(ranks, config, whole, policy).succeed()
    life_s = time.monotonic() - began
    expected, retained, recipe = end_of(load_recipe(whole)), checkpoint_names(load_recipe(whole)), load_recipe(file)
    assert [json.loads(line)["step"] for line in expected["samples"].splitlines()] == [4, 8, 12, 14]
    assert [row[0] for row in expected["curve"]] == list(range(1, 15))
    folder, queue, done = Path(recipe.output.run_dir), moments(random.Random(seed), life_s), 0
    while done < kills:
        newest, moment = newest_intact(folder), next(queue)
        launched = launch(ranks, config, file, policy, moment if isinstance(moment, str) else "")
        if not isinstance(moment, str):
            time.sleep(moment)
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for rank in range(len(launched.pids)):
                    launched.kill(rank, number)
        codes, printed = set(launched.wait()), launched.text()
        assert codes <= {0, -signal.SIGKILL}, printed
        done += -signal.SIGKILL in codes
        resumed = re.search(r"resuming from \S*/(step-\d+)", printed.split("return to the newest checkpoint")[0])
        # Killed before it printed that, or just there.
        assert (resumed and resumed[1]) in ((newest,) if codes == {0} else (newest, None)), printed
        if (folder / "summary.json").exists():
            require_same(recipe, expected, retained)
            shutil.rmtree(folder)
    launch(ranks, config, file, policy).succeed()
    require_same(recipe, expected, retained)


def newest_intact(folder):
    whole = [path for path in checkpoints.list_checkpoints(folder / "checkpoints") if not checkpoints.verify(path)]
    return whole[-1].name if whole else None


def require_same(recipe, expected, retained):
    """What is left is that of an uninterrupted run."""
    found = end_of(recipe)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert checkpoint_names(recipe) == retained


@pytest.mark.parametrize("part", [*ONCE, *OFTEN])
def test_the_parts_that_are_killed_are_there(part):
    assert callable(pkgutil.resolve_name(part))


@pytest.mark.parametrize(
    ("config", "policy", "kills"),
    [
        ("cpu", "rollback", 4),
        *(
            pytest.param(config, policy, 20, marks=[pytest.mark.slow, pytest.mark.distributed])
            for config in ENGINES
            for policy in (("rollback",) * 2 if config == "2gpu_zero1" else ("skip", "rollback"))
        ),
    ],
)
def test_a_storm(config, policy, kills, write_recipe, ranks, tried, request):
    storm(ranks, write_recipe, config, policy, kills, seed=sum(map(ord, request.node.name)))
    engine = {"cpu": "one process", "8gpu_hsdp": "HSDP, 2 x 2"}.get(config, f"`{config}`")
    proof = "rows, scores, samples, weights, files, every tensor of the last checkpoint: differences: 0"
    tried(f"`kill -9` of a whole job over its whole life, everything on, {engine}", kills, proof)


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["2gpu_fsdp2", pytest.param("8gpu_hsdp", marks=pytest.mark.slow)])
def test_a_resumed_run_may_begin_with_samples(config, write_recipe, ranks, tried):
    """Killed between a save and its step's row, where samples are due and validation is not: FSDP2 wants its root first."""
    file = write_recipe(evaluation__sample_every=4, output__checkpoint_every=4, training__micro_batch_size=2)
    settings = {key: value for key, value in ENGINES[config].items() if "__" not in key}
    dies = """
import os, signal, isoflop.train.trainer as pretrain
measure = pretrain.evaluate_and_log
def killed(job, log, row):
    if row["step"] == 4:
        job.checkpoints.wait()
        job.accelerator.wait_for_everyone()
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(job, log, row)
pretrain.evaluate_and_log = killed
"""
    assert set(ranks.start(config, file, code=dies, **settings).wait()) == {-signal.SIGKILL}
    printed = ranks.run(config, file, **settings)
    assert "resuming from" in printed
    recipe = load_recipe(file)
    samples = (Path(recipe.output.run_dir) / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [4, 8, 10]
    tried(
        "`kill -9` between a save and its row, samples due and validation not, FSDP2 and HSDP", proof="the same command went on"
    )


IN_THE_LAST_PICTURE = """
import os, signal, matplotlib.figure
save, calls = matplotlib.figure.Figure.savefig, []
def killed(self, file, **named):
    save(self, file, **named)
    calls.append(1)
    if len(calls) == 2:
        job.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)
matplotlib.figure.Figure.savefig = killed
import isoflop.train.trainer as pretrain
start = pretrain.start
def keeping(given, state):
    global job
    job = given
    return start(given, state)
pretrain.start = keeping
"""


def test_a_kill_in_the_last_picture(write_recipe, ranks, tried):
    """Behind the last step's row and its checkpoint: the picture is drawn again, and nothing is left over."""
    file = write_recipe()
    folder = Path(load_recipe(file).output.run_dir)
    assert ranks.start("cpu", file, code=IN_THE_LAST_PICTURE).wait() == [-signal.SIGKILL]
    assert newest_intact(folder) == "step-10"
    assert metrics_of(load_recipe(file))[-1]["step"] == 10
    before = (folder / "loss.png").stat().st_mtime_ns
    ranks.run("cpu", file)
    assert (folder / "loss.png").stat().st_mtime_ns > before
    assert list(folder.glob("*.partial*")) == []
    tried("`kill -9` in the last picture of a run", proof="it is drawn again, with the last steps")
