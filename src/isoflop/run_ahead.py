"""Keeping a GPU's queue full: the next step's gradients are enqueued before the host waits for this step's loss.

Metrics and the anomaly check need two numbers of a step. Read at once they drain the queue, and the GPU idles until the host has
launched the update and the next kernels: some 2 ms by reading, not measured. Read behind the next step's gradients they
cost nothing. The update does not wait: a flag on the device skips it where the loss or the gradient norm is not a number.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Micro-batches enqueued beyond the one that the GPU works on. A signal is answered between two micro-batches on the host, and a
# save waits for what is enqueued: unlimited, that could be a whole step, longer than a launcher's grace period.
MICRO_BATCHES_AHEAD = 2


class Throttle:
    """Holds the host back where it is more than `MICRO_BATCHES_AHEAD` micro-batches ahead of the GPU; nothing on a CPU."""

    def __init__(self) -> None:
        self._events = deque[Any]()

    def mark(self, device: torch.device) -> None:
        """Count a micro-batch that was enqueued, and wait for the one `MICRO_BATCHES_AHEAD` before it."""
        if device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)
        if len(self._events) > MICRO_BATCHES_AHEAD:
            self._events.popleft().synchronize()


@dataclass
class Ahead:
    """Gradients that were enqueued ahead of their step."""

    key: tuple[int, int] | None = None
    """Step and batch they are of; None where there are none."""
    summed: Tensor | None = None
    """Their loss, summed over micro-batches; None where a signal to any rank came instead."""
    since: float = 0.0
    """When the values of the step before were read (set by the loop): from then on the GPU worked on this one."""

    def enqueued(self, key: tuple[int, int], summed: Tensor | None) -> None:
        """Remember what was enqueued while the step before is still being computed."""
        self.key, self.summed = key, summed

    def holds(self, key: tuple[int, int]) -> bool:
        """Whether the gradients of this step and batch are there."""
        return self.key == key


class Readback:
    """Numbers on their way from the device to the host."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)  # into pinned memory, which torch allocates for such copies
        self._arrived: Any = None
        if values.device.type == "cuda":
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[float]:
        """Wait for them, and for nothing that was enqueued after them."""
        if self._arrived:
            self._arrived.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


def updates_unless_flagged(optimizer: Any) -> bool:
    """Whether an optimizer's update can be skipped by a flag on the device (torch's fused kernels, as `GradScaler` uses them)."""
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults.get("fused"))


def update_unless(flag: Tensor, optimizer: Any, step: Any) -> None:
    """Call `step` with weights, moments and step counts left as they are where `flag` (a 0-d bool on the device) is true."""
    optimizer.found_inf = flag.float()
    try:
        step()
    finally:
        del optimizer.found_inf
