import json

import numpy as np
import pytest
from designs import course, grid, isoflop

from isoflop.scaling.approaches import fit_laws
from isoflop.scaling.measured import Measured
from isoflop.scaling.options import FitOptions
from isoflop.scaling.points import points

FEW = FitOptions(resamples=100, predict=(1e20, 1e21))


def test_every_approach_says_its_numbers_or_why_there_are_none():
    numbers = fit_laws(Measured(isoflop(noise=0.003)), FEW).to_dict()
    assert json.loads(json.dumps(numbers)) == numbers
    for name in ("parametric", "isoflop", "argmin_log", "argmin_linear"):
        assert len(numbers[name]["n_opt"]) == len(numbers[name]["d_opt"]) == len(numbers[name]["loss"]) == 2
    for name in ("parametric", "isoflop"):
        for n, (low, high) in zip(numbers[name]["n_opt"], numbers[name]["n_opt_interval"], strict=True):
            assert low < n < high
    assert numbers["envelope"]["status"] == numbers["repeated"]["status"] == "not fitted"
    assert numbers["points"]["budgets"] == pytest.approx([1e18, 3e18, 1e19, 3e19])
    assert numbers["warnings"] == []


def test_the_largest_budget_is_predicted_from_the_others():
    found = fit_laws(Measured(isoflop(noise=0.002)), FEW).to_dict()["leave_largest_out"]
    assert found["fitted_up_to"] == pytest.approx(1e19)
    assert (found["fitted_points"], len(found["runs"])) == (21, 7)
    assert found["mean_absolute_error"] < 0.01
    assert found["inside"] > 0.5
    for run in found["runs"]:
        assert run["inside"] == (run["interval"][0] <= run["measured"] <= run["interval"][1])
        assert run["error"] == run["predicted"] / run["measured"] - 1
    assert abs(found["n_opt"]["error"]) < 0.5


def test_without_budgets_the_upper_half_is_held_out():
    n = np.geomspace(1e7, 1e9, 30)
    d = n * np.random.default_rng(0).uniform(5, 100, 30)
    here = points(n, d, 1.7 + 400 / n**0.34 + 410 / d**0.28)
    found = fit_laws(Measured(here), FEW).to_dict()["leave_largest_out"]
    assert len(found["runs"]) == (here.flops >= here.flops.max() / 2).sum()
    assert found["mean_absolute_error"] < 1e-3


def test_one_budget_alone_has_nothing_to_leave_out():
    numbers = fit_laws(Measured(isoflop(budgets=(1e19,), side=9, noise=0.001)), FEW).to_dict()
    assert numbers["parametric"]["status"] in ("ill_conditioned", "at_bound", "out_of_iterations")
    assert numbers["isoflop"]["reason"] == "1 of 1 budgets have a minimum within their sizes, and two are needed"
    assert numbers["leave_largest_out"]["reason"].startswith("without the largest budget: 0 points cannot determine")


def test_budgets_left_out_and_points_far_off_are_named():
    here = isoflop(noise=0.001)
    edge = here.take((here.flops > 2e18) | (here.parameters < np.median(here.parameters[:7])))
    assert any(
        "budget 1e+18 FLOPs is left out of the parabolas: 3 sizes" in line
        for line in fit_laws(Measured(edge), FEW).to_dict()["warnings"]
    )
    loss = here.loss.copy()
    loss[4] *= 1.2
    *_, last = fit_laws(Measured(here._replace(loss=loss)), FEW).to_dict()["warnings"]
    assert last.startswith("point 5 lies +")
    assert last.endswith("% from the law, over 5 times the others' spread: look at it")


def test_residuals_and_draws_are_the_fits():
    here = grid(noise=0.01)
    report = fit_laws(Measured(here), FEW)
    assert report.draws.shape == (100, 5)
    assert report.residuals.std() == pytest.approx(report.report.parametric.residual_std)
    assert 0.007 < report.residuals.std() < 0.013


def test_the_course_in_one_call():
    numbers = fit_laws(Measured(course()), FitOptions(resamples=100, predict=(1e23,))).to_dict()
    assert numbers["parametric"]["n_opt"] == pytest.approx([9.1892e10], rel=1e-4)
    assert numbers["argmin_linear"]["n_opt"] == pytest.approx([5.0022e10], rel=2e-5)
    assert numbers["leave_largest_out"]["mean_absolute_error"] < 1e-8
