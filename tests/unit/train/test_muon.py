import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import curve_of, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from isoflop.config.loading import load_recipe
from isoflop.config.recipe_optimizer import Optimizer
from isoflop.train import muon as muon_module
from isoflop.train.muon import COEFFICIENTS, MARGIN, Muon, orthogonalize
from isoflop.train.optimizers import build_optimizer, fresh_moments, set_learning_rate
from isoflop.train.parametrization import Scale
from isoflop.train.run_ahead import update_unless, updates_unless_flagged
from isoflop.train.training_model import build_training_model

CPU = torch.device("cpu")
JORDAN = [(3.4445, -4.7750, 2.0315)] * 5  # torch.optim.Muon's steps
MATRICES = {"llama": 7, "gpt2": 4, "hybrid": 6}  # in a layer
RECIPE = {"name": "muon", "peak_learning_rate": 3e-3, "adamw_learning_rate": 1e-3}


@pytest.fixture
def model_of(toy_recipe):
    """The toy model of a family."""
    return lambda family: build_training_model(toy_recipe(family=family), eos_token_id=0, bos_token_id=None).causal_lm


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 99), scale=st.sampled_from([1e-4, 1.0, 1e4]))
@settings(deadline=None)
def test_singular_values_come_near_one_and_vectors_stay(rows, columns, seed, scale):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(torch.stack([matrix, 3 * matrix]))
    assert result[0] == pytest.approx(result[1], abs=1e-4)  # whatever the size
    found = u.T @ result[0] @ vt.T
    assert found - torch.diag(found.diagonal()) == pytest.approx(torch.zeros_like(found), abs=1e-3)
    clear = values > 0.004 * values.norm()  # smaller ones come not all the way
    assert ((found.diagonal()[clear] > 0.79) & (found.diagonal()[clear] < 1.21)).all()


def test_each_polynomial_is_the_best_for_what_the_one_before_left():
    """Linear programs on a grid: the least largest distance from 1 of a x + b x^3 + c x^5 over the interval."""
    low, high = 3e-3, 1.0
    for polynomial in COEFFICIENTS:
        x = np.concatenate([np.geomspace(low, high, 2000), np.linspace(low, high, 2000)])
        powers, one = np.stack([x, x**3, x**5], axis=1), np.ones((len(x), 1))
        limits = np.block([[powers, -one], [-powers, -one]]), np.concatenate([np.ones(len(x)), -np.ones(len(x))])
        best = linprog([0, 0, 0, 1], *limits, bounds=[(None, None)] * 3 + [(0, None)])
        assert polynomial == pytest.approx(best.x[:3], rel=1e-3)
        values = powers @ polynomial
        low, high = values.min(), values.max()
    assert (low, high) == pytest.approx((0.8, 1.2), abs=1e-3)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_matrix_of_one_direction_stays_bounded_in_bf16(noise):
    """Its largest singular value is its norm: rounded up without a margin it would leave the polynomials' interval."""
    torch.manual_seed(0)
    matrix = torch.outer(torch.randn(40), torch.randn(60)) + noise * torch.randn(40, 60)
    assert torch.linalg.svdvals(orthogonalize(matrix.bfloat16()[None])[0].float()).max() < 1.25
    assert MARGIN > 1.01


@pytest.mark.parametrize("shape", [(24, 30), (24, 64), (64, 24), (3, 100)])
def test_fp32_is_the_iteration_in_fp64_to_rounding(shape):
    """Wide matrices are iterated by their Gram matrix."""
    torch.manual_seed(0)
    matrix = torch.randn(2, *shape) @ torch.diag(torch.logspace(0, -3, shape[1]))
    assert orthogonalize(matrix) == pytest.approx(orthogonalize(matrix.double()), abs=1e-4)


def test_zeros_stay_zeros():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_update_is_that_of_torch(dtype):
    """torch.optim.Muon iterates in bf16."""
    torch.manual_seed(0)
    for shape in ((24, 64), (64, 24), (32, 32)):
        gradient = torch.randn(shape, dtype=dtype)
        theirs = torch.optim._muon._zeropower_via_newtonschulz(gradient, JORDAN[0], 5, 1e-7)
        ours = orthogonalize(gradient[None], JORDAN, margin=1.0)[0]
        exact = dtype == torch.bfloat16
        assert (ours - theirs).abs().max() <= (0 if exact else 0.02)


def test_ten_steps_of_a_matrix_are_those_of_torch(monkeypatch):
    monkeypatch.setattr(muon_module, "orthogonalize", partial(orthogonalize, coefficients=JORDAN, margin=1.0))
    torch.manual_seed(0)
    weight, gradients = torch.randn(24, 40), torch.randn(10, 24, 40)
    ours, theirs = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    group = {"params": [ours], "algorithm": "muon", "lr": 0.01, "weight_decay": 0.1, "momentum": 0.95}
    rest = {"params": [torch.nn.Parameter(torch.ones(1))], "algorithm": "adamw", "lr": 0.01, "weight_decay": 0.0}
    muon = Muon([group, rest], lambda groups: torch.optim.AdamW(groups, fused=True))
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        reference.step()
    assert torch.equal(muon.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])
    moved = (theirs - weight).norm()
    assert (ours - theirs).norm() / moved < 0.01  # bf16 against fp32


@pytest.mark.parametrize("family", ["llama", "gpt2", "hybrid"])
def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest(family, model_of):
    model = model_of(family)
    optimizer = build_optimizer(model, Optimizer(**RECIPE), CPU)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by = {
        algorithm: {names[id(p)] for g in optimizer.param_groups if g["algorithm"] == algorithm for p in g["params"]}
        for algorithm in ("muon", "adamw")
    }
    assert by["muon"] | by["adamw"] == set(names.values())
    assert not by["muon"] & by["adamw"]
    assert len(by["muon"]) == model.config.num_hidden_layers * MATRICES[family]
    assert all(dict(model.named_parameters())[name].dim() == 2 for name in by["muon"])
    assert not any(word in name for name in by["muon"] for word in ("embed", "wte", "wpe", "lm_head", "norm", "bias", "ln_"))
    for name in by["adamw"]:
        assert any(word in name for word in ("embed", "wte", "wpe", "lm_head", "norm", "bias", "ln_")), name


def test_every_group_follows_the_schedule_in_its_own_ratio(model_of):
    model = model_of("llama")
    scales = {
        name: Scale(learning_rate=0.5, epsilon=2.0, weight_decay=4.0) for name, _ in model.named_parameters() if "q_proj" in name
    }
    optimizer = build_optimizer(model, Optimizer(**RECIPE, weight_decay=0.1), CPU, scales)
    set_learning_rate(optimizer, 6e-4)
    found = {(g["algorithm"], g["lr"], g["weight_decay"], g["eps"]) for g in optimizer.param_groups}
    assert found == {
        ("muon", 6e-4 * 0.5, 0.4, 2e-8), ("muon", 6e-4, 0.1, 1e-8),
        ("adamw", 6e-4 * (1e-3 / 3e-3), 0.1, 1e-8), ("adamw", 6e-4 * (1e-3 / 3e-3), 0.0, 1e-8),
    }  # fmt: skip


def test_adamw_takes_the_rate_of_muon_where_none_is_given(model_of):
    optimizer = build_optimizer(model_of("llama"), Optimizer(name="muon", peak_learning_rate=3e-3), CPU)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_the_state_before_the_first_step_is_as_the_optimizer_makes_it(moments_dtype, model_of):
    model = model_of("gpt2")
    optimizer = build_optimizer(model, Optimizer(**RECIPE, moments_dtype=moments_dtype), CPU)
    expected = {p: fresh_moments(p, optimizer) for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, state in expected.items():
        assert {k: (v.dtype, v.shape) for k, v in optimizer.state[p].items()} == {k: (v.dtype, v.shape) for k, v in state.items()}
    kept = sum(v.numel() * v.element_size() for s in optimizer.state.values() for k, v in s.items() if k != "step")
    hidden = sum(p.numel() for g in optimizer.param_groups if g["algorithm"] == "muon" for p in g["params"])
    rest = sum(p.numel() for p in model.parameters()) - hidden
    assert kept == (4 * hidden + 8 * rest) // (1 if moments_dtype == "float32" else 2)


def test_a_flag_on_the_device_leaves_everything_as_it_is(model_of):
    model = model_of("llama")
    optimizer = build_optimizer(model, Optimizer(**RECIPE), CPU)
    assert updates_unless_flagged(optimizer)
    assert not updates_unless_flagged(build_optimizer(model, Optimizer(**RECIPE, moments_dtype="bfloat16"), CPU))

    def step(gradient, flag):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        update_unless(torch.tensor(flag), optimizer, optimizer.step)

    step(0.5, False)
    weights = [p.detach().clone() for p in model.parameters()]
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    step(math.nan, True)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(torch.equal(v, optimizer.state[p][k]) for p, s in state.items() for k, v in s.items())
    step(0.5, False)
    assert not any(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


@torch.no_grad()
def test_a_flag_that_the_host_does_not_read_changes_matrices_and_momentum_as_none_does(model_of):
    """As on a GPU: a flag of 0 updates as no flag does, a flag of 1 leaves weights and momentum as they are."""
    runs = []
    for flag in (None, torch.tensor(0.0)):
        optimizer = build_optimizer(model_of("llama"), Optimizer(**RECIPE), CPU)
        weights = [p for g in optimizer.param_groups if g["algorithm"] == "muon" for p in g["params"]]
        torch.manual_seed(0)
        for _ in range(3):
            for p in weights:
                p.grad = torch.randn_like(p)
            optimizer._update_matrices(flag)
        runs.append([w.clone() for w in weights])
    for ours, theirs in zip(*runs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-7)
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in weights]
    for p in weights:
        p.grad = torch.full_like(p, math.nan)
    optimizer._update_matrices(torch.tensor(1.0))
    assert all(torch.equal(p, before) for p, before in zip(weights, runs[1], strict=True))
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in zip(weights, momenta, strict=True))


MUON = ["optimizer.name=muon"]


@pytest.mark.parametrize("extra", [[], ["optimizer.moments_dtype=bfloat16", "training.activation_checkpointing=true"]])
def test_a_run_resumes_bit_for_bit(extra, write_recipe, run_in_process):
    complete = load_recipe(write_recipe("complete"), [*MUON, *extra])
    parted = load_recipe(write_recipe("parted"), [*MUON, *extra])
    assert [run_in_process(recipe) for recipe in (complete, parted)] == [0, 0]
    (Path(parted.output.run_dir) / "summary.json").unlink()
    assert run_in_process(parted, resume="5") == 0
    assert curve_of(parted) == curve_of(complete)
    assert weights_of(parted) == weights_of(complete)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adamw_learning_rate": 1e-3}, "adamw_learning_rate = 0.001 is read by optimizer.name: muon alone"),
        ({"momentum": 0.9}, "momentum = 0.9 is read by optimizer.name: muon alone"),
    ],
)
def test_keys_of_muon_are_refused_under_adamw(changes, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(peak_learning_rate=1e-3, **changes)
    assert Optimizer(peak_learning_rate=1e-3, momentum=0.95).momentum == 0.95  # a recipe with every default written out


@pytest.mark.parametrize(
    ("device", "fp32", "dtype"), [("cuda", False, "bfloat16"), ("cuda", True, "float32"), ("cpu", False, "float32")]
)
def test_the_iteration_is_in_bf16_on_a_gpu_but_for_launches_in_fp32(device, fp32, dtype, model_of):
    optimizer = build_optimizer(model_of("llama"), Optimizer(**RECIPE), torch.device(device), fp32=fp32)
    assert optimizer.iteration_dtype == getattr(torch, dtype)
