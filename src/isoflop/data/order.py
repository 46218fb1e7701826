"""Order of training: the windows of a step are a pure function of (seed, step), the same for any number of processes.

A keyed permutation per epoch orders all windows with O(1) memory, so that a run resumes at any step by arithmetic alone. No
loader state is saved.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # 4 suffice for pseudorandomness (Luby and Rackoff 1988); twice as many, because domains here can be tiny
_MASK64 = (1 << 64) - 1
_BLOCK = 1 << 16  # windows: 134M tokens at 2,048 of them


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele et al. 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(*parts: int, count: int) -> NDArray[np.uint64]:
    """Return `count` round keys from integers, by iterating splitmix64 over them."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix(state + np.array([part & _MASK64], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return _mix(state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def derived_seed(*parts: int) -> int:
    """Return a seed in [0, 2^63) from integers; seeds of different integers are unrelated."""
    return int(_keys(*parts, count=1)[0] >> np.uint64(1))


def keyed_uniform(seed: int, index: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each index, a function of (seed, index) alone."""
    key = _keys(seed, count=1)
    bits: NDArray[np.float64] = (_mix(_mix(index.astype(np.uint64) + key) ^ key) >> np.uint64(11)).astype(np.float64)
    return bits / float(1 << 53)


def permute(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Map positions in [0, size) to distinct windows in [0, size): one order for each (seed, epoch).

    A balanced Feistel network over the smallest 4^k >= size, walked until it lands inside (at most about 4 rounds on
    average, as 4^k < 4 size). Cost: nanoseconds a position, no table.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = _keys(seed, epoch, count=_ROUNDS)

    def once(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> shift, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << shift) | right

    result = once(positions.astype(np.uint64))
    outside = result >= np.uint64(size)
    while outside.any():
        result[outside] = once(result[outside])
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


def rank_micro_batches(
    indices: NDArray[np.int64], micro_batch_size: int, num_processes: int, process_index: int
) -> NDArray[np.int64]:
    """Return one rank's windows of a batch, (accumulation, micro_batch_size): micro-batches are assigned to ranks in turn."""
    return indices.reshape(-1, num_processes, micro_batch_size)[:, process_index]


class Order(NamedTuple):
    """The order of all windows of one source, or of a mixture of sources.

    Every block of 65,536 positions has each source exactly by its quota, in a keyed order. The windows of a source follow a keyed
    order of their own per epoch, so that each is visited exactly once per epoch of its source.
    """

    sizes: tuple[int, ...]
    """Windows of each source; indices run through the sources in order."""
    quotas: tuple[int, ...]
    """Positions of each source in a block."""
    seed: int

    @classmethod
    def of(cls, sizes: list[int], shares: list[float], seed: int) -> Order:
        """Return the order for each source's windows and share of the tokens, exact to 1 part in 65,536."""
        exact = [share * _BLOCK for share in shares]
        quotas = [max(1, math.floor(quota)) for quota in exact]
        for index in sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])[: max(0, _BLOCK - sum(quotas))]:
            quotas[index] += 1
        quotas[quotas.index(max(quotas))] += _BLOCK - sum(quotas)
        return cls(tuple(sizes), tuple(quotas), seed)

    def windows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the window indices at positions of the run, of the same shape."""
        if len(self.sizes) == 1:
            return _in_epochs(positions, self.sizes[0], self.seed)
        source, place = self._assign(positions)
        indices = np.empty_like(positions)
        for number, size in enumerate(self.sizes):
            of_source = source == number
            first = sum(self.sizes[:number])
            indices[of_source] = first + _in_epochs(place[of_source], size, derived_seed(self.seed, number))
        return indices

    def _assign(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of each position, and its place among the positions of that source."""
        blocks, offsets = np.divmod(positions, _BLOCK)
        slots = np.empty_like(positions)
        seed = derived_seed(self.seed, len(self.sizes))
        for block in np.unique(blocks):
            slots[blocks == block] = permute(offsets[blocks == block], _BLOCK, seed, int(block))
        ends = np.cumsum(self.quotas)
        source = np.searchsorted(ends, slots, side="right")
        return source, blocks * np.array(self.quotas)[source] + slots - (ends - self.quotas)[source]

    def of_step(self, step: int, windows_per_step: int) -> NDArray[np.int64]:
        """Return the window indices of optimizer step `step` (0-based), (windows_per_step,).

        A step may span the end of an epoch and the start of the next, so that every window is visited exactly once per epoch.
        """
        return self.windows(np.arange(step * windows_per_step, (step + 1) * windows_per_step, dtype=np.int64))

    def counts(self, num_positions: int) -> list[int]:
        """Return how many of a run's first positions each source has."""
        if len(self.sizes) == 1:
            return [num_positions]
        blocks, rest = divmod(num_positions, _BLOCK)
        last, _ = self._assign(blocks * _BLOCK + np.arange(rest, dtype=np.int64))
        return [blocks * quota + int((last == number).sum()) for number, quota in enumerate(self.quotas)]


def _in_epochs(positions: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Return the windows of one source: epoch after epoch, each in its own keyed order."""
    epochs, offsets = np.divmod(positions, size)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        of_epoch = epochs == epoch
        indices[of_epoch] = permute(offsets[of_epoch], size, seed, int(epoch))
    return indices
