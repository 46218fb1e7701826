"""Control of Python's garbage collector during training. Entered by `collected_by_hand`.

The automatic collector starts when a rank has made enough objects, so each rank stops at another step and all others wait for it.
A full collection visits every object: 170,000 after importing torch take 70 ms on one CPU core, and nanochat reports about 500 ms
in training (scripts/base_train.py). Here the objects that exist when training starts are frozen, which takes them out of every
collection, and the rest is collected at the same steps on all ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# torchtitan: `gc_freq: int = 50` (torchtitan/config/configs.py), each time `gc.collect(1)` (torchtitan/tools/utils.py).
COLLECT_EVERY_STEPS = 50
# `gc.collect(1)` never visits an object again that survived it once. nanochat collects all generations every 5,000 steps
# (scripts/base_train.py); with the objects of the setup frozen, that visits only those of training.
COLLECT_ALL_EVERY_STEPS = 5_000


class StepCollector:
    """Counter of steps that collects when a collection is due."""

    def __init__(self, every: int, all_every: int) -> None:
        self._every, self._all_every, self._steps = every, all_every, 0

    def step(self) -> None:
        """Count one step; call it at the same place on every rank."""
        self._steps += 1
        if self._steps % self._all_every == 0:
            gc.collect()
        elif self._steps % self._every == 0:
            gc.collect(1)


@contextmanager
def collected_by_hand(every: int = COLLECT_EVERY_STEPS, all_every: int = COLLECT_ALL_EVERY_STEPS) -> Iterator[StepCollector]:
    """Freeze existing objects and disable the automatic collector; `step()` of the yielded object collects when due.

    Generations 0 and 1 are collected every `every` steps, all generations every `all_every`. The exit thaws everything and
    enables the collector if it was enabled, also after an exception. Tensors in reference cycles keep their memory until the next
    collection.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield StepCollector(every, all_every)
    finally:
        # Objects that were frozen before are thawed too, since gc cannot separate them: they cost time in later collections,
        # where a model that stayed frozen would never be freed. Python 3.12 starts with some hundred frozen objects.
        gc.unfreeze()
        if was_enabled:
            gc.enable()
