"""What Muon saves beside AdamW: the page's arithmetic on known curves, its rows, and that it is what the rows say."""

import json
import math

import efficiency
import numpy as np
import pytest
from conftest import ROOT
from efficiency_parts import arithmetic, page, runs
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.config.recipe import differences
from isoflop.plan import cost
from isoflop.prepare.run import prepare

RESULTS = ROOT / "benchmarks/results"
DURATIONS = runs.DURATIONS


def curve(durations, factor=1.0, irreducible=0.0, exponent=0.3):
    """Final loss by duration, as if it were `factor` times as long."""
    return {duration: irreducible + 6 * (factor * duration) ** -exponent for duration in durations}


@settings(deadline=None)
@given(factor=st.floats(1, 1.99), exponent=st.floats(0.05, 0.5), duration=st.sampled_from(DURATIONS["adamw"]))
def test_the_factor_of_power_laws_is_exact(factor, exponent, duration):
    adamw, muon = (curve(DURATIONS[name], each, exponent=exponent) for name, each in (("adamw", 1.0), ("muon", factor)))
    assert arithmetic.saved(adamw, muon, duration) == pytest.approx(factor, rel=1e-9)
    assert arithmetic.duration_at(adamw[duration], adamw) == pytest.approx(duration, rel=1e-9)


@settings(deadline=None)
@given(factor=st.floats(1.05, 1.95), irreducible=st.floats(0.5, 2.0))
def test_the_factor_above_an_irreducible_loss_is_within_half_a_percent(factor, irreducible):
    adamw, muon = (curve(DURATIONS[name], each, irreducible) for name, each in (("adamw", 1.0), ("muon", factor)))
    for duration in DURATIONS["adamw"]:
        assert arithmetic.saved(adamw, muon, duration) == pytest.approx(factor, rel=5e-3)


def test_what_the_curve_does_not_reach_is_not_extrapolated():
    muon = curve(DURATIONS["muon"], 2.5)
    assert arithmetic.saved(curve(DURATIONS["adamw"]), muon, 10) is None  # at 4 tokens a parameter
    assert arithmetic.saved(curve(DURATIONS["adamw"]), muon, 20) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="do not fall with the duration: train longer"):
        arithmetic.duration_at(3.0, {10: 3.0, 20: 3.1})


def test_the_interval_is_students_and_covers_what_it_says():
    found = arithmetic.interval([1.4, 1.5, 1.6])
    logs = np.log([1.4, 1.5, 1.6])
    half = 2.919986 * logs.std(ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom at 95%
    assert found == pytest.approx([math.exp(logs.mean() + sign * half) for sign in (0, -1, 1)])
    assert arithmetic.interval([1.5]) == pytest.approx((1.5, 0.0, math.inf))
    draws = np.exp(np.random.default_rng(0).normal(math.log(1.5), 0.05, (1000, 3)))
    covered = [low < 1.5 < high for _, low, high in map(arithmetic.interval, draws)]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.03)


def test_growth_with_size_is_a_factor_for_each_doubling():
    exact = [(size, 1.8 * 0.95 ** math.log2(size / 1e4)) for size in (10_000, 20_000, 80_000)]
    assert arithmetic.growth_by_doubling(exact) == pytest.approx((0.95, 0.95, 0.95))
    noisy = [(size, factor * noise) for size, factor in exact for noise in (0.9, 1.0, 1.1)]
    growth = arithmetic.growth_by_doubling(noisy)
    assert growth.estimate == pytest.approx(0.95)
    assert growth.low < 0.95 < growth.high


def test_the_vertex_of_a_parabola_is_exact():
    losses = {rate: 3 + 0.1 * math.log(rate / 0.011) ** 2 for rate in (0.004, 0.008, 0.016, 0.032)}
    found = arithmetic.vertex(losses)
    assert found.learning_rate == pytest.approx(0.011)
    assert found.below == pytest.approx(losses[0.008] - 3)
    assert arithmetic.vertex({0.004: 2.0, 0.008: 3.0}) is None
    assert arithmetic.vertex({0.004: math.inf, 0.008: 3.0, 0.016: 3.1}) is None


@pytest.mark.parametrize(("best", "tried"), [(0.01, 5), (0.07, 6), (0.002, 7), (1e-9, 8)])
def test_learning_rates_are_added_until_the_best_lies_inside(best, tried):
    losses = efficiency.tune(lambda rate: math.log(rate / best) ** 2)
    assert len(losses) == tried
    lowest = min(losses, key=losses.get)
    assert (min(losses) < lowest < max(losses)) == (best > 1e-6)


def test_runs_of_both_optimizers_differ_in_the_optimizer_alone():
    for width, layers in runs.SHAPES:
        adamw, muon = (runs.load(runs.tree_of(runs.Setting(width, layers, name, 8e-3, 20, 1))) for name in ("adamw", "muon"))
        changed = differences(adamw.identity_fields(), muon.identity_fields())
        assert changed == ["optimizer.name: 'adamw' -> 'muon'"]
        parameters = cost.parameters(adamw.model)
        assert adamw.training.num_steps(parameters) == math.ceil(20 * parameters / runs.TOKENS_PER_STEP)
        assert runs.VOCABULARY * width < parameters / 2  # the layers hold most


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Small enough for seconds: a file of rows, and windows of its own."""
    monkeypatch.setattr(runs, "PREPARED", str(tmp_path / "data"))
    monkeypatch.setattr(runs, "VALIDATION_WINDOWS", 16)
    monkeypatch.setattr(runs, "TIMED_ROUNDS", 2)
    return tmp_path / "efficiency.jsonl"


def test_a_run_with_a_row_is_not_trained_again(small, monkeypatch):
    setting = runs.Setting(32, 2, "muon", 8e-3, 1, 0)
    prepare(runs.load(runs.tree_of(setting)))
    where = {"machine": "here"}
    row = runs.train(setting, small, where)
    assert (row.parameters, row.tokens) == (33_952, 34 * runs.TOKENS_PER_STEP)
    assert 3 < row.loss < math.log(runs.VOCABULARY)
    monkeypatch.setattr(runs, "pretrain", None)
    assert runs.train(setting, small, where) == row
    runs.time_size(32, 2, small, where)
    runs.time_size(32, 2, small, where)
    (timed,) = runs.read(small, "time")
    assert timed["time_of_adamw"][1] <= timed["time_of_adamw"][0] <= timed["time_of_adamw"][2]
    # Newton-Schulz in 4 steps of 4 r^2 c + 2 r^3: in each layer 4 matrices of 32 x 32 and 3 of 32 x 48.
    assert timed["muon_update_flops"] == 2 * 4 * (4 * 6 * 32**3 + 3 * (4 * 32**2 * 48 + 2 * 32**3))


def made_up(factors, seeds=runs.SEEDS):
    """Rows of power laws, Muon so many times as good at each size, and of seeds that move it by a tenth of a percent."""
    rows = []
    for (width, layers), factor in zip(runs.SHAPES, factors, strict=True):
        parameters = cost.parameters(runs.load(runs.tree_of(runs.Setting(width, layers, "adamw", 8e-3, 20, 0))).model)
        for name in runs.OPTIMIZERS:
            for seed in seeds:
                own = curve(DURATIONS[name], factor * (1 + 0.001 * seed) if name == "muon" else 1.0)
                rows += [runs.Row(runs.Setting(width, layers, name, 8e-3, *at, seed), parameters, 1000, loss)
                         for *at, loss in own.items()]  # fmt: skip
            worse = [runs.Setting(width, layers, name, rate, 20, 0) for rate in (4e-3, 16e-3)]
            rows += [runs.Row(setting, parameters, 1000, 9.0) for setting in worse]
    return rows


def test_the_page_says_what_is_saved_and_how_it_changes_with_size(tmp_path):
    timed = [
        {"width": width, "layers": layers, "time_of_adamw": [1.25, 1.2, 1.3], "muon_update_flops": 1, "step_flops": 10,
         "adamw_step_s": [0.01, 0.009, 0.011], "muon_step_s": [0.0125, 0.012, 0.013]}
        for width, layers in runs.SHAPES
    ]  # fmt: skip
    sizes = page.sizes_of(made_up((1.8, 1.6, 1.5)), timed)
    text = page.page(sizes, "where", on_gpu=False)
    assert "| 33,952 | 20 | 2.443 | 2.047 | **1.80** (1.80 to 1.80) | 1.64 (1.64 to 1.64) | 1.44 (1.44 to 1.44) | 3 |" in text
    assert "**Muon reaches AdamW's loss with 1.50 to 1.80 times fewer tokens, in 1.20 to 1.44 times less time.**" in text
    assert "- 20 tokens a parameter, by size: 1.80, 1.60, 1.50; each doubling of the parameters multiplies it by 0.8" in text
    assert text.count(", so it falls.") == 3
    assert "The published fall of the factor with\nsize is seen here too." in text
    assert "- 33,952 parameters, by duration: 1.80, 1.80, 1.80; each doubling of the tokens multiplies it by 1.000 (" in text
    assert text.count("no change is beyond what seeds do.") == 3
    assert "| 33,952 | AdamW | 9.000 | **2.443** | 9.000 | 0.0080, 0.0000 nats lower |" in text
    assert "At 124M parameters it is not measured yet" in text
    assert "| 33,952 | 10.0 (9.0 to 11.0) | 12.5 (12.0 to 13.0) | 1.250 (1.200 to 1.300) | 10.0% |" in text
    flat = page.page(page.sizes_of(made_up((1.5, 1.5, 1.5)), []), "where", on_gpu=True)
    assert "size is not seen over these sizes" in flat
    assert flat.count("so no change is beyond what seeds do.") == 6
    page.draw(sizes, tmp_path / "efficiency.png")
    assert (tmp_path / "efficiency.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_is_written_from_what_is_there_so_far():
    some = [row for row in made_up((1.8, 1.6, 1.5)) if row.setting.width < 64 and row.setting.tokens_per_parameter < 40]
    sizes = page.sizes_of(some, [])
    assert [(one.size.width, one.duration) for one in page.savings_of(sizes)] == [(32, 10), (32, 20), (48, 10), (48, 20)]
    text = page.page(sizes, "where", on_gpu=False)
    assert "by size:" not in text
    assert "with 1.60 to 1.80 times fewer tokens.**" in text
    assert "- 33,952 parameters, by duration: 1.80, 1.80;" in text
    single = page.page(page.sizes_of([row for row in some if row.setting.seed == 0], []), "where", on_gpu=False)
    assert "**1.80** (of one seed)" in single
    assert "Median (least to most)" not in single


def test_a_gpus_run_counts_when_it_is_no_rehearsal(tmp_path):
    assert not page.gpu_is_measured(tmp_path)
    row = {"case": "modern_124m muon", "curve": [], "rehearsal": True}
    for rows, measured in (([row], False), ([row, row | {"rehearsal": False}], True)):
        (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
        assert page.gpu_is_measured(tmp_path) == measured


def test_the_page_is_what_its_script_makes_of_the_rows(tmp_path):
    page.write(RESULTS / "efficiency.jsonl", tmp_path)
    written = (ROOT / "docs/results/efficiency.md").read_text(encoding="utf-8")
    assert (tmp_path / "efficiency.md").read_text(encoding="utf-8") == written
