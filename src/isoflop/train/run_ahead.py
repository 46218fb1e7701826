"""Running ahead: the next step's gradients are enqueued before the host waits for this step's loss, so a GPU never idles.

Metrics and the anomaly check need two numbers of a step. Read at once they drain the queue, and the GPU idles until the host has
launched the update and the next kernels: an estimated 2 ms, not measured. Read after the next step's gradients are enqueued
they cost nothing. The update does not wait: a flag on the device skips it where loss or gradient norm is not finite.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isoflop.train.muon import Muon

# Micro-batches enqueued beyond the one that the GPU works on. A signal is answered between two micro-batches on the host, and a
# save waits for what is enqueued: without a limit that could be an entire step, longer than a launcher's grace period.
MICRO_BATCHES_AHEAD = 2


class Throttle:
    """Limit that holds the host where it is more than `MICRO_BATCHES_AHEAD` micro-batches ahead of the GPU; nothing on a CPU."""

    def __init__(self) -> None:
        self._events = deque[Any]()

    def mark(self, device: torch.device) -> None:
        """Count an enqueued micro-batch, and wait for the one `MICRO_BATCHES_AHEAD` before it."""
        if device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)
        if len(self._events) > MICRO_BATCHES_AHEAD:
            self._events.popleft().synchronize()


@dataclass
class Ahead:
    """Gradients that were enqueued before their step."""

    key: tuple[int, int] | None = None
    """Their step and batch; None where there are none."""
    summed: Tensor | None = None
    """Their loss, summed over micro-batches; None where a signal to any rank came instead."""
    since: float = 0.0
    """When the values of the previous step were read (set by the loop): from then on the GPU worked on this step."""

    def enqueued(self, key: tuple[int, int], summed: Tensor | None) -> None:
        """Record what was enqueued while the previous step is still being computed."""
        self.key, self.summed = key, summed

    def holds(self, key: tuple[int, int]) -> bool:
        """Return whether the gradients of this step and batch are enqueued."""
        return self.key == key


class Readback:
    """Numbers being copied from the device to the host."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)  # into pinned memory, which torch allocates for such copies
        self._arrived: Any = None
        if values.device.type == "cuda":
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[float]:
        """Wait for the numbers, not for anything enqueued after them."""
        if self._arrived:
            self._arrived.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


def updates_unless_flagged(optimizer: Any) -> bool:
    """Return whether a flag on the device can skip an optimizer's update (torch's fused AdamW, as with `GradScaler`; Muon)."""
    return isinstance(optimizer, torch.optim.AdamW | Muon) and bool(optimizer.defaults.get("fused"))


def update_unless(flag: Tensor, optimizer: Any, step: Any) -> None:
    """Call `step`, which leaves weights, moments and step counts unchanged where `flag` (a 0-d bool on the device) is true."""
    optimizer.found_inf = flag.float()
    try:
        step()
    finally:
        del optimizer.found_inf
