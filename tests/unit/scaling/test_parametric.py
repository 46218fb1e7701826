import time

import numpy as np
import pytest
from designs import COURSE, HOFFMANN, course, grid, isoflop, many
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isoflop.scaling import newton
from isoflop.scaling.laws import load_law
from isoflop.scaling.parametric import (
    NAMES,
    Objective,
    bootstrap,
    fit_least_absolute,
    fit_parametric,
    fit_squares,
    loss_of,
    optimum,
)  # fmt: skip
from isoflop.scaling.points import points
from isoflop.utils.errors import UserError

FITS = [fit_parametric, fit_least_absolute, fit_squares]


@pytest.mark.parametrize("fit", FITS)
def test_the_course_datas_law_is_recovered(fit):
    found = fit(course())
    assert found.status == "converged"
    assert found.coefficients == pytest.approx(COURSE, rel=1e-6)


LAWS = st.tuples(st.floats(0.5, 3), st.floats(50, 2000), st.floats(0.2, 0.6), st.floats(50, 4000), st.floats(0.2, 0.6))


@given(law=LAWS)
@example((2.0, 50.0, 0.5, 50.0, 0.59375))  # a D-term of 7e-6 to 1e-4 of the loss
@example((3.0, 2000.0, 0.6, 50.0, 0.6))
@settings(deadline=None, max_examples=25)
def test_any_law_is_recovered_from_its_own_losses(law):
    found = fit_parametric(grid(law=np.array(law)))
    assert found.coefficients == pytest.approx(law, rel=1e-4)
    assert found.loss(np.array(1e8), np.array(1e10)) == pytest.approx(loss_of(np.array(law), 1e8, 1e10), rel=1e-8)


def test_units_of_n_move_a_alone_and_the_order_of_points_nothing():
    here = many()
    found = fit_parametric(here)
    scaled = fit_parametric(here._replace(parameters=here.parameters / 1e6))
    e, a, alpha, b, beta = found.coefficients
    assert scaled.coefficients == pytest.approx([e, a / 1e6**alpha, alpha, b, beta], rel=1e-5)
    shuffled = fit_parametric(here.take(np.random.default_rng(1).permutation(240)))
    assert shuffled.coefficients == pytest.approx(found.coefficients, rel=1e-5)
    assert shuffled.objective == pytest.approx(found.objective, rel=1e-10)


def test_a_point_counted_twice_is_a_weight_of_two():
    here = grid(noise=0.01)
    twice = here.take(np.r_[0, np.arange(36)])
    weighted = here._replace(weights=np.r_[2.0, np.ones(35)])
    for fit in FITS:
        assert fit(weighted).objective == pytest.approx(fit(twice).objective, rel=1e-6)


def test_least_absolute_deviations_have_the_least_sum_of_them():
    here = many()
    sums = {fit.__name__: np.abs(fit(here).residuals).sum() for fit in FITS}
    assert min(sums, key=sums.get) == "fit_least_absolute"
    assert fit_least_absolute(here).objective == pytest.approx(sums["fit_least_absolute"])
    squares = {fit.__name__: ((here.loss * -np.expm1(-fit(here).residuals)) ** 2).sum() for fit in FITS}
    assert min(squares, key=squares.get) == "fit_squares"


@pytest.mark.parametrize(("asymmetry", "above"), [(0.9, 0.1), (0.5, 0.5), (0.1, 0.9)])
def test_asymmetry_is_the_share_of_points_below_the_law(asymmetry, above):
    residuals = fit_parametric(many(), Objective(delta=1e-5, asymmetry=asymmetry)).residuals
    assert (residuals > 0).mean() == pytest.approx(above, abs=0.03)


def test_optimum_is_the_least_loss_of_a_budget():
    n, d = optimum(HOFFMANN, np.array(1e21))
    assert 6 * n * d == pytest.approx(1e21)
    sizes = np.geomspace(n / 3, n * 3, 1001)
    assert np.argmin(loss_of(HOFFMANN, sizes, 1e21 / 6 / sizes)) == 500
    assert (n, d) == pytest.approx(load_law("hoffmann-rounded").optimum(1e21))


def test_undetermined_coefficients_are_reported():
    n = np.geomspace(1e7, 1e9, 12)
    cases = {
        "D in proportion to N": (points(n, 20 * n, loss_of(HOFFMANN, n, 20 * n)), {"ill_conditioned", "out_of_iterations"}),
        "one budget": (points(n, 1e19 / n, loss_of(HOFFMANN, n, 1e19 / n)), {"ill_conditioned"}),
        "no E": (grid(law=np.array([1e-12, 300.0, 0.3, 400.0, 0.3])), {"at_bound"}),
        "no D": (grid()._replace(loss=1.5 + 300 / grid().parameters ** 0.3), {"at_bound"}),
    }
    for name, (case, statuses) in cases.items():
        found = fit_parametric(case)
        assert found.status in statuses, name
        assert found.detail, name


def test_a_fit_that_was_cut_short_says_so(monkeypatch):
    monkeypatch.setattr(newton, "MAX_STEPS", 2)
    assert fit_parametric(many()).status == "out_of_iterations"


def test_too_few_points_are_refused():
    with pytest.raises(UserError, match=r"5 points cannot determine 5 coefficients; at least 6 are needed"):
        fit_parametric(grid().take(np.arange(0, 35, 7)))
    with pytest.raises(UserError, match=r"N \(parameters\) takes 1 value\(s\), 1e\+07 to 1e\+07: a power of it"):
        fit_parametric(points(np.full(8, 1e7), np.geomspace(1e9, 1e10, 8), np.linspace(3, 4, 8)))


def test_a_bootstrap_is_seeded_and_holds_the_fit():
    here = isoflop(noise=0.005)
    found = fit_parametric(here)
    draws, again, other = (bootstrap(here, found, Objective(), 200, seed) for seed in (0, 0, 1))
    assert draws.tolist() == again.tolist() != other.tolist()
    low, high = np.quantile(draws, (0.01, 0.99), axis=0)
    assert all(low <= found.coefficients)
    assert all(found.coefficients <= high)


def test_the_fit_and_its_bootstrap_are_fast():
    """Some 0.2 s and 0.4 s on two idle cores; CPU time with room for a machine several times slower and for its other work."""
    here = many()
    fit_parametric(here)  # the linear algebra library's first call
    started = time.process_time()
    found = fit_parametric(here)
    assert time.process_time() - started < 2
    assert bootstrap(here, found, Objective(), 1000, 0).shape == (1000, len(NAMES))
    assert time.process_time() - started < 17


def test_without_noise_every_resample_is_the_law():
    exact = isoflop()
    exact = exact._replace(loss=loss_of(HOFFMANN, exact.parameters, exact.tokens))
    fit = fit_parametric(exact)._replace(residuals=np.zeros(len(exact.loss)))
    drawn = bootstrap(exact, fit, Objective(), 20, 0)
    assert drawn == pytest.approx(np.tile(fit.coefficients, (20, 1)), rel=1e-6)


@pytest.mark.parametrize("fit", FITS)
def test_tokens_in_proportion_to_size_give_no_law(fit):
    n = np.repeat(np.geomspace(1e7, 1e9, 6), 5)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.002, len(n)))
    found = fit(points(n, 20 * n, loss_of(HOFFMANN, n, 20 * n) * noise))
    assert found.status in ("ill_conditioned", "at_bound")
