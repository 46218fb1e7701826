import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.data.order import Order, derived_seed, keyed_uniform, permute, rank_micro_batches


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
def test_steps_have_the_same_windows_at_any_number_of_processes(num_windows, micro, accumulation, processes, steps):
    per_step = micro * accumulation * processes
    seen = []
    for step in range(steps):
        batch = Order.of([num_windows], [1.0], seed=5).of_step(step, per_step)
        shares = [rank_micro_batches(batch, micro, processes, rank) for rank in range(processes)]
        assert all(share.shape == (accumulation, micro) for share in shares)
        assert sorted(np.concatenate(shares, axis=None)) == sorted(batch)
        seen += batch.tolist()
    for epoch in range(len(seen) // num_windows):  # each complete epoch, across the borders of steps
        assert sorted(seen[epoch * num_windows : (epoch + 1) * num_windows]) == list(range(num_windows))


def test_any_step_of_a_huge_set_is_found_by_arithmetic():
    far = Order.of([306_000_000], [1.0], seed=1).of_step(step=10**9, windows_per_step=256)
    assert len(np.unique(far)) == 256
    assert far.min() >= 0
    assert far.max() < 306_000_000


def test_306_million_windows_take_no_more_memory_than_a_thousand():
    """SlimPajama-627B in windows of 2,048: a table of their order would be 2.4 GB."""
    peaks = []
    for size in (1000, 306_000_000):
        for order in (Order.of([size], [1.0], seed=1), Order.of([size, size // 3], [0.6, 0.4], seed=1)):
            tracemalloc.start()
            for step in (0, 7, 10**6):
                order.of_step(step, 256)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert max(peaks[2:]) < 1.2 * max(peaks[:2]) < 3e6


@settings(deadline=None, max_examples=10)
@given(
    shares=st.lists(st.floats(0.001, 1), min_size=2, max_size=6).map(lambda w: [x / sum(w) for x in w]),
    sizes=st.lists(st.integers(1000, 5000), min_size=6, max_size=6),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 10**9),
)
def test_a_block_of_a_mixture_holds_each_source_by_its_share(shares, sizes, seed, start):
    order = Order.of(sizes[: len(shares)], shares, seed)
    assert sum(order.quotas) == 65_536
    assert all(abs(quota - share * 65_536) < 1 or quota == 1 for quota, share in zip(order.quotas, shares, strict=True))
    block = order.windows(start * 65_536 + np.arange(65_536))
    ends = np.cumsum(order.sizes)
    source = np.searchsorted(ends, block, side="right")
    assert np.bincount(source, minlength=len(shares)).tolist() == list(order.quotas)
    assert order.counts(65_536 * 3 + 100) == [
        3 * quota + int((np.searchsorted(ends, order.windows(65_536 * 3 + np.arange(100)), side="right") == number).sum())
        for number, quota in enumerate(order.quotas)
    ]
    assert np.array_equal(order.windows(start * 65_536 + np.array([5, 60_000])), block[[5, 60_000]])  # any position by itself


@settings(deadline=None, max_examples=5)
@given(share=st.floats(0.05, 0.95), sizes=st.tuples(st.integers(1000, 9000), st.integers(1000, 9000)), seed=st.integers(0, 2**32))
def test_each_source_of_a_mixture_is_visited_epoch_by_epoch(share, sizes, seed):
    order = Order.of(list(sizes), [share, 1 - share], seed)
    seen = order.windows(np.arange(3 * 65_536))
    for first, size in ((0, sizes[0]), (sizes[0], sizes[1])):
        visits = np.bincount(seen[(seen >= first) & (seen < first + size)] - first, minlength=size)
        assert visits.max() - visits.min() <= 2  # a position's block decides its epoch; within a block the order is keyed


def test_the_sources_of_a_mixture_are_interleaved():
    order = Order.of([100_000, 100_000], [0.5, 0.5], seed=3)
    source = order.windows(np.arange(65_536)) >= 100_000
    runs = 1 + int((source[1:] != source[:-1]).sum())
    assert abs(runs - 32_768) < 6 * 128  # as coin tosses would give: standard deviation 128


@pytest.mark.parametrize("size", [64, 1000, 100_000])
def test_positions_and_windows_are_independent(size):
    """Chi-square over (position, window) cells of 16 x 16: 255 degrees of freedom, bounds far beyond chance."""
    cells = np.zeros((16, 16))
    for epoch in range(200 if size < 10_000 else 5):
        order = permute(np.arange(size), size, seed=3, epoch=epoch)
        np.add.at(cells, (np.arange(size) * 16 // size, order * 16 // size), 1)
    expected = cells.sum() / 256
    assert ((cells - expected) ** 2 / expected).sum() < 380  # p < 1e-6


def test_neighbouring_windows_are_separated():
    order = permute(np.arange(100_000), 100_000, seed=0, epoch=0)
    assert (np.abs(np.diff(order)) == 1).sum() < 15  # 2 expected


@given(seed=st.integers(0, 2**32))
def test_held_out_documents_are_the_given_share(seed):
    uniform = keyed_uniform(seed, np.arange(20_000))
    assert abs((uniform < 0.1).mean() - 0.1) < 0.013  # 6 standard deviations
    assert np.array_equal(keyed_uniform(seed, np.array([7, 12_345])), uniform[[7, 12_345]])


def test_the_order_is_pinned():
    """These values are what every resumed run relies on: a change here breaks the data order of runs that exist."""
    assert Order.of([100], [1.0], seed=1337).of_step(0, 6).tolist() == [56, 53, 77, 63, 50, 73]
    assert permute(np.arange(4), 306_000_000, 0, 0).tolist() == [144103458, 80924620, 49403617, 76093091]


@given(st.integers(0, 2**64), st.integers(0, 2**40), st.integers(0, 64))
def test_derived_seeds_differ_between_steps_and_ranks(seed, step, rank):
    seeds = {derived_seed(seed, step, rank), derived_seed(seed, step + 1, rank), derived_seed(seed, step, rank + 1)}
    assert len(seeds) == 3
    assert all(0 <= value < 2**63 for value in seeds)
