import numpy as np
import pytest
from designs import HOFFMANN, course, isoflop

from isoflop.scaling.isoflop import laws_of, least, profiles, resample_profiles
from isoflop.scaling.parametric import optimum
from isoflop.scaling.points import points
from isoflop.scaling.powers import linear_line, log_line, power_laws, summarize_power_laws

BUDGETS = (1e23, 1e24)


def test_the_courses_own_numbers():
    """The least-loss size of each budget, k C^a by least squares of the values: SPEC figures of Stanford CS336, 2024."""
    flops, parameters, losses = np.array(least(profiles(course()))).T
    found = summarize_power_laws(power_laws(flops, parameters, losses, linear_line), BUDGETS)
    assert found["n_opt"] == pytest.approx([5.0022e10, 1.2676e11], rel=2e-5)
    assert found["d_opt"] == pytest.approx([3.3319e11, 1.3148e12], rel=4e-5)
    truth = np.array([9.1892e10, 3.00307e11])
    off = [
        1 - np.array(summarize_power_laws(power_laws(flops, parameters, losses, line), BUDGETS)["n_opt"]) / truth
        for line in (log_line, linear_line)
    ]
    assert np.min(off) > 0.23
    assert np.max(off) < 0.59


def test_parabolas_come_within_a_percent_of_the_truth():
    found = summarize_power_laws(laws_of(profiles(course())), BUDGETS)
    assert found["n_opt"] == pytest.approx([9.1892e10, 3.00307e11], rel=0.0085)
    assert found["exponent_n"] == pytest.approx(0.36 / 0.70, rel=1e-3)
    assert found["exponent_n"] + found["exponent_d"] == 1.0


def test_a_narrow_parabolas_minimum_is_the_laws():
    for profile in profiles(isoflop(spread=1.2)):
        assert profile.minimum.parameters == pytest.approx(optimum(HOFFMANN, np.array(profile.flops))[0], rel=1e-3)
        assert 6 * profile.minimum.parameters * profile.minimum.tokens == pytest.approx(profile.flops)


def test_runs_of_uneven_steps_share_a_budget():
    here = isoflop()
    uneven = here._replace(flops=here.flops * np.random.default_rng(0).uniform(0.99, 1.01, len(here.flops)))
    assert [len(profile.points.loss) for profile in profiles(uneven)] == [7, 7, 7, 7]


def one_budget(parameters, losses):
    n = np.array(parameters)
    return points(n, 1e18 / 6 / n, losses, np.full(len(n), 1e18))


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([3.4, 3.28, 3.18, 3.1, 3.04], "its minimum lies beyond the largest size; train larger ones"),
        ([3.04, 3.1, 3.18, 3.28, 3.4], "its minimum lies beyond the smallest size; train smaller ones"),
        ([3.0, 3.1, 3.15, 3.1, 3.0], "loss does not rise to both sides: no minimum"),
    ],
)
def test_a_budget_without_an_interior_minimum_is_left_out(losses, reason):
    (profile,) = profiles(one_budget([1e7, 2e7, 4e7, 8e7, 16e7], losses))
    assert (profile.minimum, profile.reason) == (None, reason)
    assert laws_of([profile]) is None


def test_three_sizes_are_no_profile():
    (profile,) = profiles(one_budget([1e7, 2e7, 4e7], [3.1, 3.0, 3.1]))
    assert profile.reason == "3 sizes, and a parabola with an error needs 4"


def test_points_without_shared_budgets_have_no_profiles():
    n = np.geomspace(1e7, 1e9, 20)
    assert profiles(points(n, 20 * n, np.linspace(4, 3, 20))) == []


def test_resamples_are_seeded_and_surround_the_law():
    found = profiles(isoflop(noise=0.003))
    drawn, again = (resample_profiles(found, 300, 0).at(1e21)[0] for _ in range(2))
    assert drawn.tolist() == again.tolist()
    low, high = np.quantile(drawn, (0.05, 0.95))
    assert low < laws_of(found).at(1e21)[0][0] < high
