import numpy as np
import pytest

from isoflop.scaling.points import points
from isoflop.scaling.single import fit_single


def test_a_power_of_each_alone():
    n = np.geomspace(1e6, 1e9, 8)
    found = fit_single(points(n, np.full(8, 1e12), (8.8e13 / n) ** 0.076))
    assert found["N"].exponent == pytest.approx(0.076)
    assert found["N"].scale == pytest.approx(8.8e13, rel=1e-6)
    assert (found["D"].status, found["D"].reason) == ("not fitted", "1 values, and a line with an error needs 3")
    assert found["C"].exponent == pytest.approx(0.076)


def test_only_runs_that_none_with_less_beats_count():
    d = np.geomspace(1e8, 1e11, 8)
    good = (5.4e13 / d) ** 0.095
    here = points(np.full(16, 1e9), np.r_[d, d * 1.01], np.r_[good, good + 0.5])
    assert fit_single(here)["D"].points == 8
    assert fit_single(here)["D"].exponent == pytest.approx(0.095)
