import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.scaling.powers import interval, linear_line, log_line, loss_curve

C = np.geomspace(1e18, 1e21, 6)


@given(k=st.floats(1e-3, 1e3), a=st.floats(0.2, 0.8))
def test_lines_recover_a_power(k, a):
    for line in (log_line, linear_line):
        assert line(C, k * C**a) == pytest.approx((k, a), rel=1e-6)


def test_lines_of_many_at_once():
    values = np.array([[2.0], [5.0]]) * C**0.5
    k, a = log_line(C, values)
    assert k == pytest.approx([2, 5])
    assert a == pytest.approx([0.5, 0.5])


def test_the_least_loss_has_a_floor_if_budgets_determine_it():
    losses = np.array([1.7 + 900 * C**-0.15, 0.5 + 70 * C**-0.1])
    e, h, g = loss_curve(C, losses)
    assert e + h * 1e23**-g == pytest.approx([1.7 + 900 * 1e23**-0.15, 0.5 + 70 * 1e23**-0.1], rel=5e-3)
    assert e == pytest.approx([1.7, 0.5], rel=0.1)
    e, h, g = loss_curve(C[:3], 70 * C[:3] ** -0.1)
    assert (e, h, g) == pytest.approx((0.0, 70, 0.1), rel=1e-6)


def test_an_interval_is_the_5th_and_95th_percentile():
    assert interval(np.arange(101.0)) == [5.0, 95.0]
