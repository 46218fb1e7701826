"""The runs of a sweep: shapes, steps, rates, batches and names."""

import itertools
import math

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from isoflop.plan import cost
from isoflop.scaling.hyperparameters import HyperparameterLaw, PowerOfSize
from isoflop.scaling.laws import load_law
from isoflop.sweep.config import SweepConfig, load_sweep_config
from isoflop.sweep.design import groups_of, target_of
from isoflop.utils.errors import UserError


@pytest.fixture
def suite(write_recipe):
    """A sweep over the toy recipe: two lengths of three sizes."""

    def make(**changes):
        tree = {
            "recipe": str(write_recipe()), "tokens_per_parameter": [2.0, 5.0], "parameters": [2e4, 4.6e4, 9e4],
            "aspect_ratio": 32, "output_dir": "runs/s",
        }  # fmt: skip
        return SweepConfig(**{key: value for key, value in (tree | changes).items() if value is not None})

    return make


def runs_of(suite):
    return [run for group in groups_of(suite) for run in group]


def test_the_laptop_sweep(monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = runs_of(load_sweep_config("recipes/sweeps/laptop.yaml"))
    assert len(runs) == 20
    budgets = [8e11, 1.5e12, 2.8e12, 5.2e12]
    for i, run in enumerate(runs):
        assert run.flops == pytest.approx(budgets[i // 5], rel=0.002)
        assert run.tokens * cost.flops_per_token(run.recipe.model, 128) == run.flops
        assert run.recipe.model.num_hidden_layers == 3
        assert (run.recipe.optimizer.peak_learning_rate, run.recipe.schedule.final_learning_rate) == (0.01, 0.0)
        assert run.recipe.schedule.warmup_steps == round(0.1 * run.steps)
    widths = [[run.recipe.model.hidden_size for run in runs[at : at + 5]] for at in range(0, 20, 5)]
    assert widths == [[24, 32, 40, 48, 56], [32, 40, 48, 56, 64], [40, 48, 56, 64, 80], [48, 56, 64, 80, 96]]
    for at in range(0, 20, 5):
        ratios = [run.tokens / run.parameters for run in runs[at : at + 5]]
        assert 50 > ratios[0] > 35 > 5 > ratios[4] > 3  # the best size, near 20 tokens each here, lies within


def test_names_steps_and_what_each_recipe_says(suite):
    runs = runs_of(suite())
    assert [(run.parameters, run.steps) for run in runs] == [
        (19552, 153), (19552, 382), (46320, 362), (46320, 905), (90432, 706), (90432, 1766)
    ]  # fmt: skip
    run = runs[1]
    assert run.name == "c1.26e+10_n19552"
    assert run.flops == 382 * 256 * cost.flops_per_token(run.recipe.model, 32)
    recipe = run.recipe
    assert (recipe.training.max_steps, recipe.training.tokens_per_step, recipe.training.micro_batch_size) == (382, 256, 4)
    assert recipe.output.run_dir == "runs/s/c1.26e+10_n19552"
    assert (recipe.schedule.warmup_steps, recipe.schedule.final_learning_rate) == (38, 3e-4)
    assert recipe.evaluation.validate_every == 382 // 20


def test_seeds_make_runs_of_their_own(suite):
    runs = runs_of(suite(seeds=[3, 4]))
    assert len(runs) == 12
    assert [(run.name[-3:], run.recipe.seed) for run in runs[:2]] == [("_s3", 3), ("_s4", 4)]


def test_rates_and_batches_by_rule(suite):
    rules = {
        "peak_learning_rate": {"coefficient": 2.0, "exponent": -0.25},
        "tokens_per_step": {"coefficient": 1e-2, "exponent": 0.5},
        "final_learning_rate_fraction": 0.5,
        "budgets": [1e11, 4e11],
        "tokens_per_parameter": None,
    }
    for run, budget in zip(runs_of(suite(**rules)), [1e11] * 3 + [4e11] * 3, strict=True):
        assert run.recipe.optimizer.peak_learning_rate == float(f"{2 * budget**-0.25:.6g}")
        assert run.recipe.schedule.final_learning_rate == float(f"{budget**-0.25:.6g}")
        assert run.recipe.training.tokens_per_step == 256 * round(1e-2 * budget**0.5 / 256)  # 8 windows of 32
        assert run.recipe.training.micro_batch_size == 4


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(exponent=st.floats(10.0, 13.0), count=st.integers(3, 5), ratio=st.floats(1.7, 2.2))
def test_every_run_meets_its_budget_within_half_a_step(suite, exponent, count, ratio):
    sizes = {"tokens_per_parameter": 20.0, "count": count, "ratio": ratio}
    made = suite(budgets=[10**exponent], tokens_per_parameter=None, parameters=None, sizes=sizes)
    try:
        runs = runs_of(made)
    except UserError:  # sizes that fall on one shape, or too few steps
        reject()
    for run in runs:
        assert abs(run.flops - 10**exponent) <= 0.5 * run.flops / run.steps * (1 + 1e-9)
    assert len({run.name for run in runs}) == count


def test_sizes_surround_the_centre(suite):
    sizes = {"tokens_per_parameter": 20.0, "count": 3, "ratio": 2.0}
    runs = runs_of(suite(budgets=[5e11], tokens_per_parameter=None, parameters=None, sizes=sizes))
    ratios = [run.tokens / run.parameters for run in runs]
    assert ratios[0] > 20 > ratios[2]
    assert 1 / 2.2 < ratios[1] / 20 < 2.2  # the toy's shapes lie far apart


def test_branches_share_everything_up_to_their_cooldown(suite):
    groups = groups_of(suite(branch=True, tokens_per_parameter=[2.0, 3.0, 5.0], overrides={"schedule.name": "wsd"}))
    assert [[run.parameters for run in group] for group in groups] == [[n] * 3 for n in (19552, 46320, 90432)]
    trunk, middle, short = groups[0]
    assert (trunk.steps, middle.steps, short.steps) == (382, 229, 153)
    decay = trunk.recipe.schedule.decay_fraction
    assert [run.branch_step for run in (middle, short)] == [229 - round(229 * decay), 153 - round(153 * decay)]
    assert trunk.recipe.output.checkpoint_at == [short.branch_step, middle.branch_step]
    assert {run.recipe.schedule.warmup_steps for run in groups[0]} == {15}  # of the shortest
    rates = {(run.recipe.optimizer.peak_learning_rate, run.recipe.training.tokens_per_step) for run in groups[0]}
    assert len(rates) == 1


def test_learning_rates_and_batches_as_axes(suite):
    axes = {"peak_learning_rate": [1e-3, 4e-3], "tokens_per_step": [128, 256, 320]}
    runs = runs_of(suite(**axes))
    assert len(runs) == len({run.name for run in runs}) == 6 * 2 * 3
    assert [run.name for run in runs[:3]] == [f"c5.05e+09_n19552_lr0.001_b{batch}" for batch in (128, 256, 320)]
    by_cell = {}
    for run in runs:
        by_cell.setdefault(run.name.split("_lr")[0], []).append(run)
        recipe = run.recipe
        rate, batch = recipe.optimizer.peak_learning_rate, recipe.training.tokens_per_step
        assert run.name.endswith(f"_lr{rate:g}_b{batch}")
        assert recipe.output.run_dir == f"runs/s/{run.name}"
        assert recipe.schedule.final_learning_rate == pytest.approx(0.1 * rate)
        assert recipe.training.micro_batch_size == {128: 4, 256: 4, 320: 2}[batch]  # 10 windows in micro-batches of at most 4
    for cell in by_cell.values():
        assert {(r.recipe.optimizer.peak_learning_rate, r.recipe.training.tokens_per_step) for r in cell} == set(
            itertools.product(*axes.values())
        )
        assert len({run.parameters for run in cell}) == 1
        assert max(run.tokens for run in cell) / min(run.tokens for run in cell) < 1.01  # so that `fit` takes them for one D


def test_one_axis_beside_a_rule(suite):
    rule = {"coefficient": 1e-2, "exponent": 0.5}
    changes = {"budgets": [1e11, 4e11], "tokens_per_parameter": None, "peak_learning_rate": [1e-3, 2e-3], "tokens_per_step": rule}
    runs = runs_of(suite(**changes))
    assert [run.name[-8:] for run in runs[:2]] == ["_lr0.001", "_lr0.002"]
    assert {run.recipe.training.tokens_per_step for run in runs[:6]} == {256 * round(1e-2 * 1e11**0.5 / 256)}
    runs = runs_of(suite(tokens_per_step=[128, 256], seeds=[1, 2]))
    assert [run.name.split("_", 2)[2] for run in runs[:4]] == ["b128_s1", "b128_s2", "b256_s1", "b256_s2"]
    assert {run.recipe.optimizer.peak_learning_rate for run in runs} == {3e-3}


def test_each_rate_and_batch_has_a_trunk_of_its_own(suite):
    """Runs share a prefix with a longer one of the same size, learning rate and batch alone."""
    axes = {"peak_learning_rate": [1e-3, 4e-3], "tokens_per_step": [128, 256]}
    groups = groups_of(suite(branch=True, overrides={"schedule.name": "wsd"}, **axes))
    assert len(groups) == 3 * 4
    for trunk, short in groups:
        assert trunk.steps > short.steps
        assert trunk.recipe.output.checkpoint_at == [short.branch_step]
        for section, key in (("optimizer", "peak_learning_rate"), ("training", "tokens_per_step"), ("schedule", "warmup_steps")):
            assert getattr(getattr(trunk.recipe, section), key) == getattr(getattr(short.recipe, section), key)
        assert trunk.recipe.model == short.recipe.model
    assert len({(t.recipe.model.hidden_size, t.name.split("_lr")[1]) for t, _ in groups}) == 12


def test_a_target_takes_rate_and_batch_from_the_law(suite, tmp_path):
    def power(value):
        return PowerOfSize(log_coefficient=math.log(value))

    best = HyperparameterLaw(source="", optimizer="adamw", peak_learning_rate=power(2e-3), tokens_per_step=power(300.0))
    law = load_law("hoffmann").model_copy(update={"hyperparameters": best})
    axes = {"peak_learning_rate": [1e-3, 4e-3], "tokens_per_step": [128, 256]}
    recipe = target_of(suite(**axes), law, 1e12).recipe
    assert recipe.training.tokens_per_step == 256  # the nearest multiple of 8 windows of 32
    assert recipe.optimizer.peak_learning_rate == float(f"{2e-3 * (256 / 300) ** 0.5:.6g}")  # the square-root rule for the rest
    recipe = target_of(suite(peak_learning_rate=[1e-3, 4e-3]), law, 1e12).recipe
    assert (recipe.training.tokens_per_step, recipe.optimizer.peak_learning_rate) == (256, 2e-3)
    recipe = target_of(suite(tokens_per_step=[128, 256]), law, 1e12).recipe
    assert (recipe.training.tokens_per_step, recipe.optimizer.peak_learning_rate) == (256, 3e-3)
    with pytest.raises(UserError, match="law hoffmann has no law of learning rate and batch, which the sweep has as axes"):
        target_of(suite(**axes), load_law("hoffmann"), 1e12)


def test_what_cannot_be_is_refused(suite):
    with pytest.raises(UserError, match="tokens_per_step = 100 is not a multiple of the sequence length 32; nearest: 96 and 128"):
        groups_of(suite(tokens_per_step=[100, 256]))
    with pytest.raises(UserError, match=r"fall on .* shapes \(c.* twice\): sizes are closer than the shapes"):
        groups_of(suite(parameters=[2e4, 2.001e4]))
    with pytest.raises(UserError, match="FLOPs are 15 steps of 256 tokens for 19,552 parameters, and under 50"):
        groups_of(suite(tokens_per_parameter=[0.2]))


def test_steps_follow_from_the_budget_by_the_models_own_flops(suite):
    for run in runs_of(suite(tokens_per_parameter=[7.0])):
        assert run.steps == round(7.0 * run.parameters / 256)
        assert math.isclose(run.tokens / run.parameters, 7.0, rel_tol=0.01)
