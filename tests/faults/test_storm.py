"""A storm: the whole job is killed at moments drawn over its whole life, with everything on, under every engine.

Half of the moments are drawn in time, the other half at the entry of each part of the program. The same command goes on every
time, and at the end nothing tells the run from an undisturbed one.
"""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import curve_of, weights_of
from test_anomalies import BAD_BATCH

from isoflop.checkpoint import folder as checkpoints
from isoflop.checkpoint.state import TensorReader, read
from isoflop.recipe_file import load_recipe
from isoflop.stop import EXIT_RESUME

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
# Every part of the program that a run passes through, and how often.
PARTS = [
    "isoflop.pretrain.load_checkpoint", "isoflop.pretrain.start", "isoflop.pretrain.warm_up", "isoflop.pretrain.train_step",
    "isoflop.pretrain.sum_gradients", "isoflop.pretrain.update", "isoflop.pretrain.save_checkpoint", "isoflop.pretrain.measure",
    "isoflop.pretrain.validate", "isoflop.pretrain.run_downstream", "isoflop.pretrain.write_samples",
    "isoflop.pretrain.draw_curve", "isoflop.pretrain.roll_back", "isoflop.pretrain.finish", "isoflop.metrics.MetricsLog.write",
    "isoflop.metrics.MetricsLog.write_samples", "isoflop.checkpoint.saver.Saver._write", "isoflop.checkpoint.saver.seal",
    "isoflop.checkpoint.folder.prune", "isoflop.checkpoint.folder.replace_folder", "isoflop.outcome.export_checkpoint",
    "isoflop.run_folder.replace_folder", "isoflop.run_folder.write_aside",
]  # fmt: skip
# A thread of the main process sends itself away some time after the n-th entry into (or return from) a part; the others follow.
KILL = """
import importlib, os, signal, threading
if os.environ.get("RANK", "0") == "0":
    path = {part!r}.split(".")
    depth = next(n for n in range(len(path) - 1, 0, -1) if path[n - 1].islower())
    while True:
        try:
            owner = importlib.import_module(".".join(path[:depth]))
            break
        except ModuleNotFoundError:
            depth -= 1
    for name in path[depth:-1]:
        owner = getattr(owner, name)
    function, calls = getattr(owner, path[-1]), []
    def fatal(*given, **named):
        calls.append(1)
        due = len(calls) == {call}
        if due and not {after}:
            threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGKILL)).start() if {delay} else os.kill(os.getpid(), 9)
        result = function(*given, **named)
        if due and {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, path[-1], fatal)
"""
# Until the run has come to its end a poisoned batch is in its way: skipped, or rolled back from.
POISON = BAD_BATCH.format(batch=8, factor="float('nan')")


def start_of(config, file, policy, code):
    """Arguments of one launch."""
    settings = {key: value for key, value in ENGINES[config].items() if "__" not in key}
    return {"arguments": (config, file, f"anomalies.policy={policy}"), "settings": settings | {"code": POISON + code}}


def launch(ranks, config, file, policy, code=""):
    what = start_of(config, file, policy, code)
    return ranks.start(*what["arguments"], **what["settings"])


def end_of(recipe, config):
    """All that a run leaves that must be the same: rows, scores and samples, weights, the tensors of the last checkpoint."""
    folder = Path(recipe.output.run_dir)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = {"elapsed_s", "tokens_per_s", "mfu", "peak_memory_bytes"}
    last = checkpoints.list_checkpoints(folder / "checkpoints")
    return {
        "rows": [{key: value for key, value in row.items() if key not in timed} for row in rows],
        "samples": (folder / "samples.jsonl").read_text(),
        "weights": weights_of(recipe),
        "tensors": tensors_of(last[-1]),
        "checkpoints": [path.name for path in last],
        "left over": [path.name for path in folder.rglob("*.partial*")],
        "curve": curve_of(recipe),
    }


def tensors_of(path):
    """Every tensor of a checkpoint, as bytes."""
    described = TensorReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in described.items()}
    read(path, tensors)
    return {name: tensor.numpy().tobytes() for name, tensor in sorted(tensors.items())}


def moments(dice, life_s, kills):
    """What kills a launch: seconds after its start, or code that does so in some part."""
    for number in range(kills):
        if number % 2:
            yield dice.uniform(0.3, life_s)
        else:
            after, part = dice.random() < 0.3, PARTS[(number // 2 * 7 + dice.randint(0, 1)) % len(PARTS)]
            yield KILL.format(part=part, call=dice.randint(1, 4), after=after, delay=dice.choice([0, 0, 0.01, 0.05]))


def storm(ranks, write_recipe, config, policy, kills, seed):
    """Kill a run so often, starting over in a new folder where it came to its end; returns what was compared."""
    changes = EVERYTHING | {key: value for key, value in ENGINES[config].items() if "__" in key}
    whole, file = write_recipe("whole", **changes), write_recipe("killed", **changes)
    began = time.monotonic()
    launch(ranks, config, whole, policy).succeed()
    life_s = time.monotonic() - began
    expected, recipe = end_of(load_recipe(whole), config), load_recipe(file)
    done, ends, dice = 0, 0, random.Random(seed)
    queue = list(moments(dice, life_s, 3 * kills))
    while done < kills:
        moment = queue.pop(0)
        launched = launch(ranks, config, file, policy, moment if isinstance(moment, str) else "")
        if not isinstance(moment, str):
            time.sleep(moment)
            for rank in range(len(launched.pids)):
                launched.kill(rank)
        codes = launched.wait()
        # Of a job of several ranks the others notice within a micro-batch, and leave.
        assert set(codes) <= {0, -signal.SIGKILL, EXIT_RESUME}, launched.text()
        assert "Traceback" not in launched.text(), launched.text()
        done += -signal.SIGKILL in codes
        if set(codes) == {0}:
            ends += 1
            require_same(end_of(recipe, config), expected)
            shutil.rmtree(recipe.output.run_dir)
    launch(ranks, config, file, policy).succeed()
    require_same(end_of(recipe, config), expected)
    return ends + 1


def require_same(found, expected):
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize(
    ("config", "policy", "kills"),
    [
        ("cpu", "rollback", 6),
        *(
            pytest.param(config, policy, 20, marks=[pytest.mark.slow, pytest.mark.distributed])
            for config in ENGINES
            for policy in (("rollback",) * 2 if config == "2gpu_zero1" else ("skip", "rollback"))
        ),
    ],
)
def test_a_storm(config, policy, kills, write_recipe, ranks, tried, request):
    seed = sum(map(ord, request.node.name))
    ends = storm(ranks, write_recipe, config, policy, kills, seed)
    engine = {"cpu": "one process", "8gpu_hsdp": "HSDP, 2 x 2"}.get(config, f"`{config}`")
    proof = "rows, scores, samples, weights, every tensor of the last checkpoint: differences: 0"
    tried(f"`kill -9` over the whole life of a run with everything on, {engine}", kills, proof)
    assert ends >= 1


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["2gpu_fsdp2", "8gpu_hsdp"])
def test_a_resumed_run_may_begin_with_samples(config, write_recipe, ranks, tried):
    """Killed between a save and its step's row, where samples are due and validation is not: FSDP2 wants its root first."""
    file = write_recipe(evaluation__sample_every=4, output__checkpoint_every=4, training__micro_batch_size=2)
    settings = {key: value for key, value in ENGINES[config].items() if "__" not in key}
    dies = """
import os, signal, isoflop.pretrain as pretrain
measure = pretrain.measure
def killed(job, log, row):
    if row["step"] == 4:
        job.saver.wait()
        job.accelerator.wait_for_everyone()
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(job, log, row)
pretrain.measure = killed
"""
    assert set(ranks.start(config, file, code=dies, **settings).wait()) == {-signal.SIGKILL}
    said = ranks.run(config, file, **settings)
    assert "resuming from" in said
    recipe = load_recipe(file)
    samples = (Path(recipe.output.run_dir) / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [4, 8, 10]
    tried(
        "`kill -9` between a save and its row, samples due and validation not, FSDP2 and HSDP", proof="the same command went on"
    )
