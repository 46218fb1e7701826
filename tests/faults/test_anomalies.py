"""Losses that are not a number, and spikes: what the recipe's policy says is done, reported once and counted."""

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import curve_of, metrics_of, weights_of

from isoflop.checkpoint import folder as checkpoints
from isoflop.checkpoint.state import read
from isoflop.config.loading import load_recipe

# The loss of one batch (0-based, in the order of the data) is multiplied.
BAD_BATCH = """
import isoflop.train.setup as job, isoflop.modeling.loss as loss
take, forward, bad = job.Job.batch, loss.TrainingModel.forward, [False]
def batch(self, step):
    bad[0] = step == {batch}
    return take(self, step)
def poisoned(self, *inputs, **named):
    value = forward(self, *inputs, **named)
    return value * {factor} if bad[0] and self.training else value
job.Job.batch, loss.TrainingModel.forward = batch, poisoned
"""
NAN_IN_STEP_8 = BAD_BATCH.format(batch=7, factor="float('nan')")
# Batches from the 6th on are those of two steps later: what a rollback from step 8 to step 5 and past its batches comes to.
PASSED_OVER = """
import isoflop.train.setup as job
take = job.Job.batch
job.Job.batch = lambda self, step: take(self, step if step < 5 else step + 3)
"""


def of_muon(optimizer):
    return ", Muon" if optimizer == "muon" else ""


def skipped_step(folder, optimizer):
    """Weights and moments before and after a step, from the checkpoints."""
    shapes = {"model.causal_lm.model.norm.weight": (32,), "optimizer.causal_lm.model.norm.weight.exp_avg": (32,)}
    if optimizer == "muon":
        matrix = "causal_lm.model.layers.1.self_attn.q_proj.weight"
        shapes |= {f"model.{matrix}": (32, 32), f"optimizer.{matrix}.momentum_buffer": (32, 32)}
    for step in (7, 8):
        tensors = {name: torch.empty(size) for name, size in shapes.items()}
        read(folder / f"checkpoints/step-{step}", tensors)
        yield tensors


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("config", ["cpu", pytest.param("2gpu_fsdp2", marks=pytest.mark.distributed)])
def test_nan_is_skipped_where_the_recipe_says_so(config, optimizer, write_recipe, ranks, tried):
    file = write_recipe(output__checkpoint_every=1, output__keep_last=20, optimizer__name=optimizer)
    printed = ranks.run(config, file, "anomalies.policy=skip", code=NAN_IN_STEP_8)
    assert printed.count("step 8: loss nan: its update is skipped (1 of at most 10)") == 1
    rows = metrics_of(load_recipe(file))
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row.get("anomaly") for row in rows] == [None] * 7 + ["loss nan"] + [None] * 2
    assert [row["anomalies"] for row in rows] == [0] * 7 + [1] * 3
    assert rows[7]["loss"] is None
    before, after = skipped_step(Path(load_recipe(file).output.run_dir), optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rows[-1]["val_loss"] < rows[4]["val_loss"]
    tried(
        f"a loss that is not a number, policy skip (`{config}`{of_muon(optimizer)})",
        proof="one update left out, reported once, counted",
    )


@pytest.mark.parametrize(
    ("config", "optimizer"),
    [("cpu", "adamw"), ("cpu", "muon"), pytest.param("2gpu_zero1", "adamw", marks=pytest.mark.distributed)],
)
def test_a_rollback_goes_on_past_the_batch(config, optimizer, write_recipe, ranks, tried):
    file, expected = (write_recipe(name, optimizer__name=optimizer) for name in ("toy", "expected"))
    printed = ranks.run(config, file, "anomalies.policy=rollback", code=NAN_IN_STEP_8)
    assert printed.count("step 8: loss nan: return to the newest checkpoint, and skip the batches since (1 of at most 10)") == 1
    assert "resuming from" in printed
    ranks.run(config, expected, code=PASSED_OVER)
    assert curve_of(load_recipe(file)) == curve_of(load_recipe(expected))
    assert weights_of(load_recipe(file)) == weights_of(load_recipe(expected))
    state = checkpoints.read_trainer_state(Path(load_recipe(file).output.run_dir) / "checkpoints/step-10")
    assert (state["passed_over"], state["anomalies"]) == (3, 1)
    tried(
        f"a loss that is not a number, policy rollback (`{config}`{of_muon(optimizer)})",
        proof="bit for bit the run that never saw those batches; reported once, counted",
    )


def test_a_kill_after_a_rollback_changes_nothing(write_recipe, ranks, tried):
    file, expected = write_recipe(), write_recipe("expected")
    ranks.run("cpu", expected, "anomalies.policy=rollback", code=NAN_IN_STEP_8)
    dies = (
        "import os, signal, isoflop.train.trainer as pretrain\nstep = pretrain.train_step\n"
        "def dying(job, progress):\n    if progress.step == 8 and progress.skipped_batches:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n    return step(job, progress)\npretrain.train_step = dying\n"
    )
    assert ranks.start("cpu", file, "anomalies.policy=rollback", code=NAN_IN_STEP_8 + dies).wait() == [-signal.SIGKILL]
    ranks.run("cpu", file, "anomalies.policy=rollback", code=NAN_IN_STEP_8)
    assert curve_of(load_recipe(file)) == curve_of(load_recipe(expected))
    assert weights_of(load_recipe(file)) == weights_of(load_recipe(expected))
    tried("`kill -9` after a rollback")


def test_a_run_that_stopped_goes_on_under_another_policy(write_recipe, ranks, tried):
    file = write_recipe()
    launched = ranks.start("cpu", file, code=NAN_IN_STEP_8)
    assert launched.wait() == [2]
    assert "training diverged at step 8: loss nan; the last good checkpoint is kept (step-5)" in launched.text()
    assert "resuming from" in ranks.run("cpu", file, "anomalies.policy=rollback", code=NAN_IN_STEP_8)
    summary = json.loads((Path(load_recipe(file).output.run_dir) / "summary.json").read_text())
    assert summary["steps"] == 10
    tried("a loss that is not a number, policy stop", proof="stopped with the last good checkpoint kept; went on under rollback")


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_spike_counts_where_the_recipe_gives_a_bound(policy, write_recipe, ranks, tried):
    file = write_recipe(training__max_steps=90, evaluation__validate_every=90, output__checkpoint_every=30)
    code = BAD_BATCH.format(batch=75, factor="3")
    printed = ranks.run("cpu", file, f"anomalies.policy={policy}", "anomalies.spike_sigmas=6", code=code)
    assert printed.count("step 76: loss ") == 1
    assert "is over 6 standard deviations" in printed
    assert metrics_of(load_recipe(file))[-1]["anomalies"] == 1
    losses = [row["loss"] for row in metrics_of(load_recipe(file))]
    assert len(losses) == 90
    assert (max(losses[70:]) > 10) == (policy == "skip")  # a rolled-back step leaves no row
    tried(f"a loss spike, policy {policy}", proof="the update left out or undone, reported once, counted")


def test_more_than_the_limit_stop_the_run(write_recipe, ranks):
    always = BAD_BATCH.format(batch="step", factor="float('nan')")
    launched = ranks.start("cpu", write_recipe(), "anomalies.policy=skip", "anomalies.limit=3", code=always)
    assert launched.wait() == [2]
    assert "training diverged at step 4: loss nan" in launched.text()
    assert "3 anomalies before were skipped" in launched.text()


def test_a_rollback_without_a_checkpoint_says_so(write_recipe, ranks):
    early = BAD_BATCH.format(batch=1, factor="float('nan')")
    launched = ranks.start("cpu", write_recipe(), "anomalies.policy=rollback", code=early)
    assert launched.wait() == [2]
    assert "anomalies.policy = 'rollback' has no checkpoint to return to yet" in launched.text()


@pytest.mark.distributed
def test_deepspeed_cannot_skip_and_says_so(write_recipe, ranks):
    launched = ranks.start("2gpu_zero1", write_recipe(), "anomalies.policy=skip", "output.layer_norms=true")
    assert launched.wait() == [2, 2]
    assert "anomalies.policy = 'skip' and output.layer_norms = true: not with DeepSpeed" in launched.text()
