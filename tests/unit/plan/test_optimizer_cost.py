"""What Muon keeps, computes and sends, against torch's own tensors and a dispatched count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from isoflop.config.loading import load_recipe
from isoflop.config.recipe_optimizer import Optimizer
from isoflop.plan import cost, hardware, optimizer_cost
from isoflop.plan.gpus import GpuOptions
from isoflop.plan.planner import plan, training_stats
from isoflop.train import muon
from isoflop.train.optimizers import build_optimizer
from isoflop.train.training_model import build_training_model

ADAMW, MUON = (Optimizer(name=name, peak_learning_rate=1e-3) for name in ("adamw", "muon"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "hybrid"])
@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_matrices_state_and_checkpoint_are_those_that_training_has(family, moments_dtype, toy_recipe):
    recipe = toy_recipe(family=family, optimizer__name="muon", optimizer__moments_dtype=moments_dtype)
    model = build_training_model(recipe, 0, None)
    optimizer = build_optimizer(model, recipe.optimizer, torch.device("cpu"))
    of_muon = [p for group in optimizer.param_groups if group["algorithm"] == "muon" for p in group["params"]]
    assert sorted(optimizer_cost.hidden_matrices(recipe.model)) == sorted(tuple(p.shape) for p in of_muon)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [(key, value) for kept in optimizer.state.values() for key, value in kept.items() if key != "step"]
    assert optimizer_cost.moments_bytes(recipe.model, recipe.optimizer) == sum(t.numel() * t.element_size() for _, t in state)
    assert training_stats(recipe).muon_matrices == len(of_muon)


@given(rows=st.integers(2, 24), columns=st.integers(2, 24))
@settings(deadline=None, max_examples=20)
def test_flops_of_an_update_are_those_dispatched(rows, columns):
    with FlopCounterMode(display=False) as counter:
        muon.orthogonalize(torch.randn(1, rows, columns).bfloat16())
    r, c = sorted((rows, columns))
    assert counter.get_total_flops() == 4 * (4 * r * r * c + 2 * r**3)
    assert len(muon.COEFFICIENTS) == optimizer_cost.NEWTON_SCHULZ_STEPS == 4


@given(rows=st.integers(2, 24), columns=st.integers(2, 24))
@settings(deadline=None, max_examples=20)
def test_in_fp32_an_update_takes_at_most_as_many_flops(rows, columns):
    with FlopCounterMode(display=False) as counter:
        muon.orthogonalize(torch.randn(1, rows, columns))
    r, c = sorted((rows, columns))
    by_steps, by_factor = 4 * (4 * r * r * c + 2 * r**3), 4 * r * r * c + 26 * r**3
    assert counter.get_total_flops() == (by_factor if c > 1.5 * r else by_steps) == min(by_factor, by_steps)


def test_adamw_is_as_before():
    model = load_recipe("modern_124m").model
    assert optimizer_cost.moments_bytes(model, ADAMW) == 8 * cost.parameters(model)
    assert optimizer_cost.update_flops(model, ADAMW) == 0
    assert optimizer_cost.exchanged_bytes(model, ADAMW, 8, 4, True) == 0


def test_muon_keeps_four_bytes_for_the_matrices_of_the_layers():
    recipe = load_recipe("modern_124m", ["optimizer.name=muon"])
    matrices = 84_934_656  # 12 layers x (4 x 768^2 + 3 x 768 x 2048)
    n = cost.parameters(recipe.model)
    assert optimizer_cost.moments_bytes(recipe.model, recipe.optimizer) == 8 * n - 4 * matrices
    assert cost.checkpoint_bytes(recipe.model, recipe.optimizer) == 12 * n - 4 * matrices
    sharded = cost.predicted_memory(recipe.model, recipe.training, recipe.optimizer, cost.Launch("4", "fsdp2", 4, True, 4, True))
    assert sharded.moments == (8 * n - 4 * matrices) // 4


def test_what_is_exchanged_by_hand():
    """bf16 elements of 84 matrices: rows to the owners and back in a replica, updates between replicas."""
    model, elements = load_recipe("modern_124m").model, 84_934_656
    sent = lambda ranks, shards: optimizer_cost.exchanged_bytes(model, MUON, ranks, shards, True)  # noqa: E731
    assert sent(1, 1) == 0
    assert sent(8, 1) == 2 * elements * 7 // 8  # DDP: every rank gets seven eighths from the others
    assert sent(8, 8) == 2 * (2 * elements // 8 * 7 // 8)
    assert sent(8, 4) == 2 * (2 * elements // 8 * 3 // 4 + elements // 4 * 1 // 2)


def test_a_step_with_muon_takes_the_measured_time_longer():
    """31 ms for the 84 matrices of the 124M and 144 ms for the 126 of the 1.36B, in five steps on one H200; four take less."""
    peak = hardware.GPUS["h200"].peak_bf16_flops
    for name, seconds in (("modern_124m", 0.0310), ("llama2_1.36b", 0.1439)):
        stats = training_stats(load_recipe(name, ["optimizer.name=muon"]))
        five_steps = stats.update_flops * 5 // 4
        assert hardware.update_seconds(five_steps, stats.muon_matrices, peak, 1) == pytest.approx(seconds, rel=0.01)
        seconds = hardware.update_seconds(stats.update_flops, stats.muon_matrices, peak, 1)
        adamw, (h200,) = training_stats(load_recipe(name)), GpuOptions(gpu="h200").specs()
        longer_s = 3600 * (h200.recipe_hours(stats, 2) - h200.recipe_hours(adamw, 2)) / stats.steps
        assert longer_s == pytest.approx(seconds / 2, rel=0.01)
        measured = h200._replace(mfu=0.5)
        assert measured.recipe_hours(stats) == measured.recipe_hours(adamw)  # a measured MFU is of entire steps


def test_a_plan_for_muon_has_no_launch_of_deepspeed():
    found = plan("modern_124m", overrides=["optimizer.name=muon"], gpu="a6000", num_gpus=2)
    assert {row.launch.engine for row in found.memory_and_time.launches} == {"single", "ddp", "fsdp2"}
    assert found.to_dict()["update_flops"] == 1_348_082_860_032
