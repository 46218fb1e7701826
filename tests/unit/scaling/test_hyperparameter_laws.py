"""Laws of learning rate and batch: exact values, intervals, ranges, and what Step Law's own table says of them."""

import math

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from isoflop.scaling.hyperparameter_laws import (
    DEEPSEEK,
    HYPERPARAMETER_LAWS,
    NANOCHAT,
    QUICKSTART_MUON,
    STEP_LAW,
    STEP_LAW_CURVATURE,
    default_law,
    load_hyperparameter_law,
)
from isoflop.scaling.hyperparameters import HyperparameterLaw, Interval, LossCurvature, PowerOfSize
from isoflop.scaling.laws import load_law
from isoflop.utils.errors import UserError

TABLE = ROOT.parent / "shared/data/steplaw_dense.csv"
sizes = st.floats(1e6, 1e12)


def grids():
    if not TABLE.is_file():
        pytest.skip(f"{TABLE}: Step Law's table is not here")
    return list(pd.read_csv(TABLE).groupby(["parameters_without_vocabulary", "tokens"]))


def values(law, n, d):
    return law.peak_learning_rate.at(n, d).value, law.tokens_per_step.at(n, d).value


@pytest.mark.parametrize(("n", "d"), [(2.1e8, 4e9), (1e9, 2e10), (7e9, 1e12)])
def test_the_published_formulas(n, d):
    assert values(STEP_LAW, n, d) == pytest.approx((1.79 * n**-0.713 * d**0.307, 0.58 * d**0.571), rel=1e-9)
    c = 6 * n * d
    assert values(DEEPSEEK, n, d) == pytest.approx((0.3118 * c**-0.125, 0.2920 * c**0.3271), rel=1e-9)


def test_the_muon_laws_give_their_bases_and_nanochats_rules():
    assert values(QUICKSTART_MUON, 2_029_632, 1_024_000) == pytest.approx((3e-3, 2048))
    n, d = 12 * 12 * 768**2, 12 * (12 * 12 * 768**2 + 32_768 * 768)
    assert values(NANOCHAT, n, d) == pytest.approx((0.02 / (0.2 * math.sqrt(768)), 2**19))
    rate, batch = values(NANOCHAT, 8 * n, 16 * d)
    assert batch == pytest.approx(2**19 * 16**0.383)
    assert rate == pytest.approx(0.02 / (0.2 * math.sqrt(768)) * 16 ** (0.383 / 2) / math.sqrt(2))  # twice the width
    assert NANOCHAT.decay_timescale == pytest.approx(2**19 / (0.28 * 0.02 / 4 * d))


@pytest.mark.parametrize(
    ("n", "d", "rates", "batches"),
    [  # 5th and 95th percentile over the 1,000 published draws at N and D
        (1e8, 2e9, (0.002372, 0.002794), (110_307, 127_366)),
        (1e9, 2e10, (0.000956, 0.001072), (424_883, 459_370)),
        (1e9, 1e11, (0.001545, 0.001786), (1_028_718, 1_186_905)),
    ],
)
def test_step_laws_intervals_are_those_of_its_published_draws(n, d, rates, batches):
    rate, batch = STEP_LAW.peak_learning_rate.at(n, d), STEP_LAW.tokens_per_step.at(n, d)
    assert (rate.low, rate.high) == pytest.approx(rates, rel=0.025)  # the means of the draws are not the rounded formula's
    assert (batch.low, batch.high) == pytest.approx(batches, rel=0.01)
    deviations = np.sqrt(np.diag(STEP_LAW.peak_learning_rate.covariance))
    assert deviations == pytest.approx((0.62375, 0.029858, 0.019139), rel=1e-4)


@given(sizes, sizes, st.floats(0.01, 1.0))
def test_an_interval_holds_its_value_and_widens_with_the_covariance(n, d, scale):
    law = STEP_LAW.peak_learning_rate
    value, low, high = law.at(n, d)
    assert low <= value <= high
    assert low * high == pytest.approx(value**2)
    narrower = law.model_copy(update={"covariance": tuple(tuple(scale * x for x in row) for row in law.covariance)}).at(n, d)
    assert low * (1 - 1e-6) <= narrower.low <= narrower.high <= high * (1 + 1e-6)
    assert law.model_copy(update={"covariance": None}).at(n, d) == Interval(value)


@pytest.mark.parametrize("law", HYPERPARAMETER_LAWS.values(), ids=lambda law: law.name)
def test_a_law_is_the_same_after_a_file(law):
    assert HyperparameterLaw.from_dict(law.to_dict()) == law


def test_a_law_file_holds_one(tmp_path):
    path = tmp_path / "mine.json"
    load_law("hoffmann").model_copy(update={"hyperparameters": DEEPSEEK.model_copy(update={"name": ""})}).save(path)
    found = load_hyperparameter_law(path)
    assert found.name == str(path)
    assert found.peak_learning_rate == DEEPSEEK.peak_learning_rate


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("step_lw", "law step_lw: neither a law of learning rate and batch nor a law file; did you mean step_law"),
        ("hoffmann", "law hoffmann has no `hyperparameters`; fit them to runs over learning rate and batch, or name one of"),
    ],
)
def test_an_unknown_law_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        load_hyperparameter_law(name)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PowerOfSize(log_coefficient=0.0, covariance=((1, 2, 0), (0, 1, 0), (0, 0, 1))), "not symmetric"),
        (lambda: PowerOfSize(log_coefficient=0.0, covariance=((1, 2, 0), (2, 1, 0), (0, 0, 1))), "negative eigenvalue"),
        (lambda: LossCurvature(rate=0.01, batch=0.01, cross=0.03), "cross = 0.03 is too large"),
        (lambda: HyperparameterLaw.from_dict(STEP_LAW.to_dict() | {"tokens_range": [2, 1]}), "not lowest first"),
        (lambda: HyperparameterLaw.from_dict(STEP_LAW.to_dict() | {"decay_timescale": 0.2}), "leave one out"),
    ],
)
def test_what_is_no_law_is_refused(build, message):
    with pytest.raises(ValidationError, match=message):
        build()


def test_ranges_are_named_and_widened_by_a_factor():
    assert STEP_LAW.outside(5e8, 5e9) == []
    assert STEP_LAW.outside(1e8, 2e11) == [
        "N = 1e+08 parameters without vocabulary (fitted on 2.15e+08 to 1.07e+09)",
        "D = 2e+11 tokens (fitted on 4e+09 to 1e+11)",
    ]
    assert STEP_LAW.outside(1e8, 2e11, factor=10) == []
    assert DEEPSEEK.outside(1e9, 2e10) == ["6ND = 1.2e+20 FLOPs (fitted on 1e+17 to 2e+19)"]


def test_the_default_law_is_of_the_optimizer_and_of_the_nearest_base():
    assert default_law("adamw", 1e6, 1e6) is STEP_LAW
    assert default_law("muon", 3e6, 2e6) is QUICKSTART_MUON
    assert default_law("muon", 1e8, 2e9) is NANOCHAT


def loss_above_the_best(grid, rate, batch):
    """Loss above the grid's best of its point nearest to a rate and a batch."""
    distance = np.log(grid.learning_rate / rate) ** 2 + np.log(grid.batch_sequences * 2048 / batch) ** 2
    return grid.loss[distance.idxmin()] - grid.loss.min()


def test_step_law_lies_near_each_grids_best():
    lost = [loss_above_the_best(grid, *values(STEP_LAW, n, d)) for (n, d), grid in grids()]
    assert len(lost) == 13
    assert np.mean(lost) < 0.006
    assert max(lost) < 0.012
    others = [loss_above_the_best(grid, *values(DEEPSEEK, n, d)) for (n, d), grid in grids()]
    assert np.mean(lost) < np.mean(others) < 0.02


def test_the_shipped_curvature_is_that_of_the_tables_grids():
    """On each grid, least squares of the points within 0.03 nats of the least; quadratic in ln rate and ln batch."""
    fitted = []
    for _, grid in grids():
        near = grid[grid.loss < grid.loss.min() + 0.03]
        r, b = np.log(near.learning_rate), np.log(near.batch_sequences * 2048.0)
        r, b = r - r.mean(), b - b.mean()
        columns = np.stack([np.ones(len(near)), r, b, r**2, b**2, r * b], axis=1)
        fitted.append(np.linalg.lstsq(columns, near.loss, rcond=None)[0][3:])
    shipped = (STEP_LAW_CURVATURE.rate, STEP_LAW_CURVATURE.batch, STEP_LAW_CURVATURE.cross)
    assert np.mean(fitted, axis=0) == pytest.approx(shipped, abs=5e-5)
    assert np.std(fitted, axis=0, ddof=1) == pytest.approx((0.0035, 0.0030, 0.0045), abs=1e-4)


def test_the_curvature_estimates_what_a_usual_choice_costs():
    """The points nearest to 3e-4 and 524,288 tokens, which lie 0.041 nats above the best on average."""
    measured, estimated = [], []
    for (n, d), grid in grids():
        distance = np.log(grid.learning_rate / 3e-4) ** 2 + np.log(grid.batch_sequences * 2048 / 524_288) ** 2
        point = grid.loc[distance.idxmin()]
        rate, batch = values(STEP_LAW, n, d)
        measured.append(point.loss - grid.loss.min())
        estimated.append(STEP_LAW_CURVATURE.nats(point.learning_rate / rate, point.batch_sequences * 2048 / batch))
    assert np.mean(estimated) == pytest.approx(np.mean(measured), rel=0.25)
    ratios = np.array(measured) / estimated
    assert 0.4 < ratios.min() < ratios.max() < 1.4
