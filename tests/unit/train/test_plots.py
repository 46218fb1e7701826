"""The smoothed curve of a picture: no line that the losses do not bear out, and one measure for all runs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.train.plots import smoothed

LOSSES = st.lists(st.floats(0.1, 12), min_size=1, max_size=60)


@given(LOSSES, st.integers(1, 60), st.sampled_from([1, 256, 524_288]))
def test_a_shorter_run_is_drawn_as_the_beginning_of_the_longer_one(losses, length, tokens_per_step):
    tokens = [tokens_per_step * step for step in range(1, len(losses) + 1)]
    whole = smoothed(tokens, losses, tokens[-1])
    assert smoothed(tokens[:length], losses[:length], tokens[-1]) == whole[:length]
    assert whole[0] == pytest.approx(losses[0], rel=1e-12)
    assert all(min(losses[: n + 1]) <= value + 1e-9 <= max(losses[: n + 1]) + 2e-9 for n, value in enumerate(whole))


def test_where_losses_fall_steeply_the_smooth_line_is_beside_them():
    """As a quickstart's first 60 steps of 500: from 8.3 by 0.05 a step. A mean over ten steps lies 0.45 above them."""
    losses = [8.3 - 0.05 * step for step in range(500)]
    smooth = smoothed(range(1, 501), losses, 500)
    assert max(smooth[step] - losses[step] for step in range(20)) < 0.08
    assert max(smooth[step] - losses[step] for step in range(60)) < 0.3
    assert smooth[499] - losses[499] == pytest.approx(0.05 * (1 / (1 - math.exp(-0.1)) - 1))  # the lag of a memory of 10 steps


def test_it_is_smooth_by_tokens_whatever_a_step_has():
    """A loss that depends on the tokens alone, in steps of 1 and of 4 tokens."""
    fine, coarse = range(1, 4001), range(4, 4001, 4)
    curves = [smoothed(tokens, [10 * count**-0.1 for count in tokens], 4000) for tokens in (fine, coarse)]
    for count in range(400, 4001, 400):
        assert curves[0][count - 1] == pytest.approx(curves[1][count // 4 - 1], rel=2e-3)


@pytest.mark.parametrize("tokens", [[0, 0], [-5, -1], [10**300, 1], [1e299, 256.0]])
def test_counts_that_no_run_writes_end_in_numbers(tokens):
    assert all(map(math.isfinite, smoothed(tokens, [3.0, 2.0], 100)))
