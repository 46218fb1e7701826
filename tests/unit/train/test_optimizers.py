import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isoflop.config.recipe_optimizer import Optimizer, Schedule
from isoflop.train.optimizers import build_optimizer, learning_rate

CPU = torch.device("cpu")


@given(
    name=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    num_steps=st.integers(2, 500),
    warmup=st.integers(0, 499),
)
def test_every_schedule_rises_to_the_peak_and_ends_at_the_final_rate(name, num_steps, warmup):
    warmup = min(warmup, num_steps - 2)
    schedule = Schedule(name=name, warmup_steps=warmup, final_learning_rate=1e-4)
    rates = [learning_rate(step, num_steps, 1e-3, schedule) for step in range(num_steps)]
    rising = rates[:warmup]
    assert rising == pytest.approx([1e-3 * (i + 1) / warmup for i in range(warmup)])
    falling = rates[warmup:]
    assert falling == sorted(falling, reverse=True)
    assert max(falling) <= 1e-3
    assert rates[-1] == pytest.approx(1e-3 if name == "constant" else 1e-4)


def test_cosine_by_its_formula():
    schedule = Schedule(name="cosine", warmup_steps=2000, final_learning_rate=3e-5)
    assert learning_rate(0, 25_000, 3e-4, schedule) == pytest.approx(1.5e-7)
    assert learning_rate(1999, 25_000, 3e-4, schedule) == 3e-4
    assert learning_rate(13_499, 25_000, 3e-4, schedule) == pytest.approx((3e-4 + 3e-5) / 2)
    assert learning_rate(24_999, 25_000, 3e-4, schedule) == pytest.approx(3e-5)


def test_wsd_is_flat_and_then_falls_linearly():
    schedule = Schedule(name="wsd", warmup_steps=10, final_learning_rate=0.0, decay_fraction=0.2)
    rates = [learning_rate(step, 100, 1.0, schedule) for step in range(100)]
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == pytest.approx([1 - (i + 1) / 20 for i in range(20)])


def test_a_warm_up_longer_than_the_run_stays_a_warm_up():
    schedule = Schedule(name="cosine", warmup_steps=2000)
    assert learning_rate(9, 10, 3e-4, schedule) == pytest.approx(3e-4 * 10 / 2000)


def test_decay_falls_on_matrices_and_embeddings_only():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    decayed, plain = build_optimizer(model, Optimizer(peak_learning_rate=1e-3), CPU).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 4), (3, 4)]
    assert [tuple(p.shape) for p in plain["params"]] == [(3,), (3,), (3,)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert (decayed["betas"], decayed["eps"], decayed["fused"]) == ((0.9, 0.95), 1e-8, True)


def descend(moments_dtype, steps=200):
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16)
    target = torch.randn(64, 16)
    inputs = torch.randn(64, 16)
    optimizer = build_optimizer(model, Optimizer(peak_learning_rate=1e-2, moments_dtype=moments_dtype), CPU)
    losses = []
    for _ in range(steps):
        loss = (model(inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def test_bf16_moments_follow_adamw_in_half_the_bytes():
    exact, fp32 = descend("float32")
    coarse, bf16 = descend("bfloat16")
    assert coarse[:2] == pytest.approx(exact[:2], rel=1e-6)  # the first update rounds nothing that it uses
    assert coarse == pytest.approx(exact, rel=5e-3)

    def state_bytes(optimizer):
        return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values() if t.dim())

    assert state_bytes(fp32) == 2 * state_bytes(bf16) == 8 * (16 * 16 + 16)


def test_bf16_moments_with_fp32_arithmetic_equal_torch_for_one_step():
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    settings = Optimizer(peak_learning_rate=0.1, weight_decay=0.5, moments_dtype="bfloat16")
    optimizer = build_optimizer(torch.nn.ParameterList([weight]), settings, CPU)
    weight.grad = torch.tensor([[0.5, 4.0]])
    optimizer.step()
    assert weight.tolist()[0] == pytest.approx([1.0 * 0.95 - 0.1, -2.0 * 0.95 - 0.1], rel=1e-6)
    assert math.isfinite(optimizer.state[weight]["exp_avg_sq"].sum())
