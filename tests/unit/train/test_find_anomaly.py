import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.config.recipe import Anomalies
from isoflop.train.anomalies import LEAST_STEPS, WINDOW_STEPS, find_anomaly, remember

CALM = [[3.0 + 0.01 * (step % 2), 1.0] for step in range(LEAST_STEPS)]
SIX = Anomalies(spike_sigmas=6.0)


@pytest.mark.parametrize(
    ("loss", "norm", "found"),
    [
        (math.nan, 1.0, "loss nan"), (math.inf, 1.0, "loss inf"), (3.0, math.nan, "gradient norm nan"),
        (3.0, -math.inf, "gradient norm -inf"), (3.0, 1.0, None), (1e9, 1e9, None),
    ],
)  # fmt: skip
def test_what_is_not_a_number_always_counts(loss, norm, found):
    assert find_anomaly(CALM, loss, norm, Anomalies()) == found


def test_a_spike_is_above_mean_and_sigmas_and_needs_a_history():
    sigma = statistics.stdev(loss for loss, _ in CALM)
    just, over = 3.005 + 5.9 * sigma, 3.005 + 6.1 * sigma
    assert find_anomaly(CALM, just, 1.0, SIX) is None
    assert find_anomaly(CALM, over, 1.0, SIX).startswith("loss 3.036 is over 6 standard deviations")
    assert find_anomaly(CALM[1:], over, 1.0, SIX) is None
    assert find_anomaly(CALM, 0.0, 1.0, SIX) is None  # a fall is welcome
    assert find_anomaly(CALM, 3.0, 1.1, SIX).startswith("gradient norm 1.1 is over")


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=300))
def test_the_history_holds_the_last_steps_and_no_more(steps):
    history = []
    for loss, norm in steps:
        remember(history, loss, norm)
    assert history == [list(step) for step in steps[-WINDOW_STEPS:]]
