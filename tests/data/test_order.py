import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.data.order import derived_seed, keyed_uniform, permute, share_of_process, windows_of_step


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64), epoch=st.integers(0, 1000))
def test_an_epoch_visits_every_window_exactly_once(size, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


@given(size=st.integers(50, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 100))
def test_the_next_epoch_has_another_order(size, seed, epoch):
    order, following = (permute(np.arange(size), size, seed, e) for e in (epoch, epoch + 1))
    assert not np.array_equal(order, following)
    assert not np.array_equal(order, np.arange(size))


@settings(deadline=None)
@given(
    num_windows=st.integers(1, 60),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    processes=st.sampled_from([1, 2, 3]),
    steps=st.integers(1, 12),
)
def test_steps_deal_out_the_same_windows_whatever_the_processes(num_windows, micro, accumulation, processes, steps):
    per_step = micro * accumulation * processes
    seen = []
    for step in range(steps):
        batch = windows_of_step(step, per_step, num_windows, seed=5)
        shares = [share_of_process(batch, micro, processes, rank) for rank in range(processes)]
        assert all(share.shape == (accumulation, micro) for share in shares)
        assert sorted(np.concatenate(shares, axis=None)) == sorted(batch)
        seen += batch.tolist()
    for epoch in range(len(seen) // num_windows):  # each whole epoch, across the borders of steps
        assert sorted(seen[epoch * num_windows : (epoch + 1) * num_windows]) == list(range(num_windows))


def test_any_step_of_a_huge_set_is_found_by_arithmetic():
    far = windows_of_step(step=10**9, windows_per_step=256, num_windows=306_000_000, seed=1)
    assert len(np.unique(far)) == 256
    assert far.min() >= 0
    assert far.max() < 306_000_000


@pytest.mark.parametrize("size", [64, 1000, 100_000])
def test_positions_and_windows_are_independent(size):
    """Chi-square over (position, window) cells of 16 x 16: 255 degrees of freedom, bounds far beyond chance."""
    cells = np.zeros((16, 16))
    for epoch in range(200 if size < 10_000 else 5):
        order = permute(np.arange(size), size, seed=3, epoch=epoch)
        np.add.at(cells, (np.arange(size) * 16 // size, order * 16 // size), 1)
    expected = cells.sum() / 256
    assert ((cells - expected) ** 2 / expected).sum() < 380  # p < 1e-6


def test_neighbours_are_not_left_together():
    order = permute(np.arange(100_000), 100_000, seed=0, epoch=0)
    assert (np.abs(np.diff(order)) == 1).sum() < 15  # 2 expected


@given(seed=st.integers(0, 2**32))
def test_held_out_documents_are_the_share_asked_for(seed):
    uniform = keyed_uniform(seed, np.arange(20_000))
    assert abs((uniform < 0.1).mean() - 0.1) < 0.013  # 6 standard deviations
    assert np.array_equal(keyed_uniform(seed, np.array([7, 12_345])), uniform[[7, 12_345]])


def test_the_order_is_pinned():
    """These values are what every resumed run relies on: a change here breaks the data order of runs that exist."""
    assert windows_of_step(0, 6, 100, seed=1337).tolist() == [56, 53, 77, 63, 50, 73]
    assert permute(np.arange(4), 306_000_000, 0, 0).tolist() == [144103458, 80924620, 49403617, 76093091]


@given(st.integers(0, 2**64), st.integers(0, 2**40), st.integers(0, 64))
def test_derived_seeds_differ_between_steps_and_ranks(seed, step, rank):
    seeds = {derived_seed(seed, step, rank), derived_seed(seed, step + 1, rank), derived_seed(seed, step, rank + 1)}
    assert len(seeds) == 3
    assert all(0 <= value < 2**63 for value in seeds)
