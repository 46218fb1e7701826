"""What a step may cost beside the model's own work, counted instead of timed: the same on any machine, however busy."""

import sys
from collections import Counter

import pytest
import torch
from conftest import TOY_MODELS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from isoflop.modeling import documents
from isoflop.train import trainer as pretrain
from isoflop.train.engines import build_accelerator
from isoflop.train.optimizers import build_optimizer
from isoflop.train.run_ahead import Readback
from isoflop.train.setup import build_job, check_data
from isoflop.train.signals import StopRequest
from isoflop.train.state import TrainState

aten = torch.ops.aten
ACCUMULATION = 2  # 256 tokens a step, 4 windows of 32 a micro-batch


@pytest.fixture(params=TOY_MODELS)
def job(request, toy_recipe):
    recipe = toy_recipe(family=request.param)
    job = build_job(recipe, check_data(recipe, False), build_accelerator(recipe.output), StopRequest())
    assert job.accumulation == ACCUMULATION
    pretrain.train_step(job, TrainState())  # moments exist from here on
    return job


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched, by name; `_local_scalar_dense` is a wait for the device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


def plain_step(job, optimizer):
    """The same step with nothing around it."""
    for micro_batch in job.batch(1):
        (job.training_model(**micro_batch) / ACCUMULATION).backward()
    nn.utils.clip_grad_norm_(job.training_model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_a_step_waits_for_the_device_once_for_all_its_numbers(job, monkeypatch):
    reads = []
    read = Readback.read
    monkeypatch.setattr(Readback, "read", lambda values: reads.append(values) or read(values))
    with Operations() as seen:
        pretrain.train_step(job, TrainState(step=1))
    assert seen.counts[aten._local_scalar_dense] == 0  # no `.item()` or `float()` anywhere
    assert len(reads) == 1


def test_a_packed_batch_brings_its_documents_bounds(toy_recipe, monkeypatch):
    """Found on the host: how many there are decides a shape, for which the model would wait for the device."""
    monkeypatch.setattr(documents, "_has_varlen_kernel", lambda device: True)
    recipe = toy_recipe(training__document_masking=True)
    job = build_job(recipe, check_data(recipe, False), build_accelerator(recipe.output), StopRequest())
    for micro_batch in job.batch(1):
        with Operations() as brought:
            loss = job.model(**micro_batch)
        with Operations() as found:
            assert job.model(micro_batch["input_ids"]) == loss
        assert (brought.counts[aten.nonzero], found.counts[aten.nonzero]) == (0, 1)


def test_running_ahead_enqueues_the_next_gradients_before_the_values_are_read(job, monkeypatch):
    order = []
    monkeypatch.setattr(type(job), "runs_ahead", True)
    read, sum_gradients = Readback.read, pretrain.sum_gradients
    monkeypatch.setattr(Readback, "read", lambda values: order.append("read") or read(values))
    monkeypatch.setattr(
        pretrain, "sum_gradients", lambda job, step, batch: order.append(f"gradients {step}") or sum_gradients(job, step, batch)
    )
    for step in (1, 2, 3, 4):  # validation is due behind the fifth, the one that step 4 makes
        pretrain.train_step(job, TrainState(step=step))
    assert order == ["gradients 1", "gradients 2", "read", "gradients 3", "read", "gradients 4", "read", "read"]


def test_the_loop_adds_operations_on_single_numbers_alone(job):
    with Operations() as ours:
        pretrain.train_step(job, TrainState(step=1))
    optimizer = build_optimizer(job.training_model, job.recipe.optimizer, torch.device("cpu"))
    plain_step(job, optimizer)
    with Operations() as plain:
        plain_step(job, optimizer)
    # Of a micro-batch: its loss into the sum. Of a step: the sum's zero, its copy for the reduction, both numbers together, and
    # whether they are finite, as the flag that the update looks at.
    summing = {aten.detach: ACCUMULATION, aten.add_: ACCUMULATION, aten.zeros: 1, aten.clone: 1}
    added = ours.counts - plain.counts
    assert {name: added[name] for name in summing} == summing
    assert sum(added.values()) <= sum(summing.values()) + 12, added
    assert added[aten.mm] == added[aten._local_scalar_dense] == 0


def test_python_around_a_micro_batch_is_short(job):
    """Calls into Python functions of this library and of Accelerate, in a step and in one with twice the micro-batches."""

    def calls(accumulation):
        counted = 0

        def count(frame, event, _):
            nonlocal counted
            name = frame.f_code.co_filename
            counted += event == "call" and ("isoflop" in name or "accelerate" in name) and "modeling" not in name

        object.__setattr__(job, "accumulation", accumulation)
        batch = job.batch(1) * (accumulation // ACCUMULATION)
        object.__setattr__(job, "batch", lambda step: batch)
        sys.setprofile(count)
        try:
            pretrain.train_step(job, TrainState(step=1))
        finally:
            sys.setprofile(None)
        del job.__dict__["batch"]
        return counted

    few, many = calls(ACCUMULATION), calls(2 * ACCUMULATION)
    assert (many - few) / ACCUMULATION <= 80
    assert few <= 400


def test_the_head_is_multiplied_three_times_and_no_logit_is_computed_twice():
    """Forward, and a product for either gradient: what plain cross-entropy needs too."""
    from isoflop.modeling.loss import linear_cross_entropy_sum

    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    with Operations() as seen:
        linear_cross_entropy_sum(hidden, weight, torch.zeros(64, dtype=torch.long), chunk_rows=16).backward()
    assert seen.counts[aten.mm] + seen.counts[aten.addmm_] == 3 * 4  # of four chunks
    assert seen.counts[aten._softmax] == 4
