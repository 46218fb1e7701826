"""How often 90% intervals hold the truth: the course's law with 0.5% of noise, in its own design and in a small one."""

import numpy as np
import pytest
from designs import COURSE, course
from designs import isoflop as few

from isoflop.scaling import isoflop
from isoflop.scaling.laws import INTERVAL
from isoflop.scaling.parametric import Objective, bootstrap, fit_parametric, loss_of, optimum
from isoflop.scaling.points import points


def quantities(coefficients):
    """Coefficients, both exponents, and N, D and loss of a budget 30 times the largest; (..., 10)."""
    alpha, beta = coefficients[..., 2], coefficients[..., 4]
    n, d = optimum(coefficients, np.array(1e23))
    rest = [beta / (alpha + beta), alpha / (alpha + beta), n, d, loss_of(coefficients, n, d)]
    return np.concatenate([coefficients, np.stack(rest, axis=-1)], axis=-1)


def small():
    """Twenty runs of four budgets, as a laptop's sweep."""
    return few(law=COURSE, budgets=(1e18, 2e18, 4e18, 8e18), side=5, spread=2.5)


def held(design, seeds, resamples):
    """Share of seeds whose intervals hold the truth, (10,), and the share for approach 2's best size."""
    hits, parabolas = [], []
    exact = isoflop.laws_of(isoflop.profiles(design)).at(1e23)[0][0]  # what parabolas come to without noise: 0.8% off the law
    for seed in range(seeds):
        noise = np.random.default_rng(seed).normal(0, 0.005, len(design.loss))
        noisy = points(design.parameters, design.tokens, design.loss * np.exp(noise), design.flops)
        low, high = np.quantile(
            quantities(bootstrap(noisy, fit_parametric(noisy), Objective(), resamples, seed)), INTERVAL, axis=0
        )
        hits.append((low <= quantities(COURSE)) & (quantities(COURSE) <= high))
        low, high = np.quantile(isoflop.resample_profiles(isoflop.profiles(noisy), resamples, seed).at(1e23)[0], INTERVAL)
        parabolas.append(low <= exact <= high)
    return np.mean(hits, axis=0), float(np.mean(parabolas))


@pytest.mark.parametrize("design", [course, small])
def test_intervals_hold_the_truth_about_nine_times_in_ten(design):
    shares, parabolas = held(design(), seeds=60, resamples=200)
    assert 0.77 <= shares.min() <= shares.max() <= 1.0  # 60 seeds: a standard error is 0.04
    assert 0.82 <= shares.mean() <= 0.97
    assert 0.77 <= parabolas <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("design", [course, small])
def test_intervals_hold_the_truth_85_to_95_percent_of_the_time(design):
    shares, parabolas = held(design(), seeds=500, resamples=500)
    assert 0.85 <= shares.min() <= shares.max() <= 0.95
    assert 0.85 <= parabolas <= 0.95
