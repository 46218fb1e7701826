import numpy as np
import pytest
from designs import grid, many
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime, minimize

from isoflop.scaling import newton
from isoflop.scaling.newton import derivatives, huber, minimise, objective
from isoflop.scaling.parametric import Objective, _starts, problem_of

THETA = st.tuples(*[st.floats(-1.5, 1.5)] * 5).map(np.array)


@given(theta=THETA, asymmetry=st.floats(0.1, 0.9), delta=st.sampled_from([1e-3, 0.05, 10.0]))
@settings(deadline=None, max_examples=50)
def test_gradient_and_hessian_are_those_of_the_objective(theta, asymmetry, delta):
    problem = problem_of(grid(noise=0.01), Objective(delta, asymmetry))
    value, gradient, hessian, majoriser = (part[0] for part in derivatives(theta[None], problem))
    assert value == pytest.approx(objective(theta[None], problem)[0], rel=1e-12)
    numeric = approx_fprime(theta, lambda t: objective(t[None], problem)[0], 1e-7)
    assert gradient == pytest.approx(numeric, rel=1e-3, abs=1e-4 * np.abs(gradient).max() + 1e-7)
    numeric = np.array([approx_fprime(theta, lambda t, i=i: derivatives(t[None], problem)[1][0, i], 1e-7) for i in range(5)])
    if delta == 10.0:  # within delta everywhere: no residual crosses it between the two evaluations
        assert hessian == pytest.approx(numeric, rel=1e-3, abs=1e-4 * np.abs(hessian).max())
    assert np.linalg.eigvalsh(majoriser).min() > -1e-12 * np.abs(majoriser).max()


def test_huber_is_a_square_within_delta_and_a_line_beyond():
    assert huber(np.array([0.0, 0.5, -1.0, 3.0, -5.0]), 1.0).tolist() == [0.0, 0.125, 0.5, 2.5, 4.5]


@pytest.mark.parametrize("delta", [1e-3, 1e-2])
def test_no_other_optimizer_finds_less(delta):
    points = many()
    problem = problem_of(points, Objective(delta))
    starts = _starts(points)
    found = minimise(starts[np.argsort(objective(starts, problem))[:50]], problem)
    assert found.converged.all()
    least = found.objective.min()
    for start in starts[:: len(starts) // 12]:
        other = minimize(
            lambda theta: 1e3 * objective(theta[None], problem)[0],
            start,
            jac=lambda theta: 1e3 * derivatives(theta[None], problem)[1][0],
            method="L-BFGS-B",
            options={"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-12},
        )
        assert least <= other.fun / 1e3 * (1 + 1e-9)
    options = {"xatol": 1e-10, "fatol": 1e-15, "maxfev": 20000}
    best = found.theta[found.objective.argmin()]
    again = minimize(lambda theta: 1e3 * objective(theta[None], problem)[0], best, method="Nelder-Mead", options=options)
    assert least <= again.fun / 1e3 * (1 + 1e-9)


def test_fits_of_a_batch_do_not_know_each_other():
    problem = problem_of(grid(noise=0.01), Objective())
    weights = np.random.default_rng(0).multinomial(36, np.ones(36) / 36, 8).astype(float)
    start = np.repeat(minimise(_starts(grid())[:1], problem).theta, 8, axis=0)
    together = minimise(start, problem._replace(weights=weights))
    for number in range(8):
        alone = minimise(start[:1], problem._replace(weights=weights[number]))
        assert together.objective[number] == pytest.approx(alone.objective[0], rel=1e-9)


def test_a_fit_cut_short_does_not_call_itself_converged(monkeypatch):
    monkeypatch.setattr(newton, "MAX_STEPS", 2)
    assert not minimise(_starts(many())[:3], problem_of(many(), Objective())).converged.any()
