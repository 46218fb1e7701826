"""What a run reports: rows of metrics, samples, trackers and progress; norms and memory for the rows."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from isoflop.train.records import (
    Row,
    StepFile,
    TrainingCurve,
    describe_steps,
    finite,
    is_row,
    is_sample,
    missing_steps,
    read_records,
)
from isoflop.train.run_folder import RunFolder
from isoflop.train.trackers import forget_after, start_trackers, track
from isoflop.utils.output import seconds_between_lines

logger = logging.getLogger(__name__)


class ProgressBar:
    """Progress of a run, on a terminal."""

    def __init__(self, resumed_step: int, num_steps: int) -> None:
        self._bar = tqdm(total=num_steps, initial=resumed_step, unit="step", desc="pretrain", file=sys.stdout, mininterval=1)

    def show(self, row: Row) -> None:
        """Move the bar to a step."""
        shown = {"loss": or_na(row["loss"], ".3f"), "tok/s": f"{row['tokens_per_s']:,.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(row["step"] - self._bar.n)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


class ProgressLines:
    """Progress of a run as log lines: for the first step and the last, and at growing intervals between them."""

    def __init__(self, resumed_step: int, num_steps: int) -> None:
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None
        """The first step that was reported, which compiles and allocates, and when it was done."""
        self._printed_s = 0.0

    def show(self, row: Row) -> None:
        """Log a line of a step, where one is due."""
        step, now_s = row["step"], time.monotonic()
        first, first_s = self._first = self._first or (step, now_s)
        due = now_s - self._printed_s >= seconds_between_lines(now_s - first_s)
        if not due and step not in (first, self._num_steps):
            return
        self._printed_s = now_s
        parts = [
            f"loss {or_na(row['loss'], '.4f')}",
            f"learning rate {row['learning_rate']:.3g}",
            f"{row['tokens_per_s']:,.0f} tokens/s",
            f"MFU {or_na(row['mfu'], '.1%')}",
        ]
        if first < step < self._num_steps:
            left_s = (self._num_steps - step) * (now_s - first_s) / (step - first)
            parts.append(f"{tqdm.format_interval(left_s)} left")
        logger.info("step %s of %s: %s", f"{step:,}", f"{self._num_steps:,}", ", ".join(parts))

    def close(self) -> None:
        """Do nothing."""


def or_na(value: float | None, form: str) -> str:
    """Format a number, or return `n/a` for None: the loss of a skipped step, the MFU of a CPU."""
    return "n/a" if value is None else f"{value:{form}}"


class MetricsLog:
    """Writer of one JSON object per step, on the main process; trackers get the same scalars, and the recipe's values."""

    def __init__(
        self,
        folder: RunFolder,
        accelerator: Accelerator,
        resumed_step: int,
        num_steps: int,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._accelerator = accelerator
        self.curve = TrainingCurve()
        if not accelerator.is_main_process:
            return
        rows = read_records(folder.metrics, resumed_step, is_row)  # later steps are trained again
        texts = read_records(folder.samples, resumed_step, is_sample)
        self.curve = TrainingCurve(rows)
        self._rows = StepFile(folder.metrics, rows, is_row, self.say, folder.restore)
        self._samples = StepFile(folder.samples, texts, is_sample, self.say, folder.restore)
        # The row of the checkpoint's own step is in the checkpoint.
        if lost := missing_steps([*self.curve.steps, *([resumed_step] if self.lacks(resumed_step) else [])]):
            self.say(f"{folder.metrics}: rows are missing: {describe_steps(lost)}; the curve and the summary show the gap")
        start_trackers(accelerator, folder, config or {}, self._rows.last_step, self.say)
        self._progress = (ProgressBar if sys.stdout.isatty() else ProgressLines)(resumed_step, num_steps)

    def write(self, row: Row) -> None:
        """Append one step's row; NaN and infinity become null."""
        if not self._accelerator.is_main_process:
            return
        row = {key: finite(value) for key, value in row.items()}
        self._track(row)
        self.curve.append(row)
        self._rows.append(row)
        if row["val_loss"] is not None:
            self.say(f"step {row['step']}: validation loss {row['val_loss']:.4f}, training loss {or_na(row['loss'], '.4f')}")
        self._progress.show(row)

    def write_samples(self, step: int, texts: list[str]) -> None:
        """Append a step's texts, unless they were written before the run was stopped at that step."""
        if self._accelerator.is_main_process and self._samples.last_step < step:
            self._samples.append({"step": step, "samples": texts})

    def _track(self, row: Row) -> None:
        """Send the row's scalars to every tracker."""
        scalars = {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
        self._each_tracker(lambda tracker: track(tracker, scalars, row["step"]))

    def _each_tracker(self, action: Callable[[Any], None]) -> None:
        """Run an action on every tracker; one that fails is logged and left out from then on."""
        for tracker in list(self._accelerator.trackers):
            try:
                action(tracker)
            except Exception as error:  # the many errors of many services: none may cost a run
                self.say(f"tracker {tracker.name} failed ({type(error).__name__}: {error}): training without it")
                self._accelerator.trackers.remove(tracker)

    def rewind(self, step: int) -> None:
        """Remove the rows after a step, which are trained again."""
        if self._accelerator.is_main_process:
            self.curve.rewind(step)
            self._rows.rewind(step)
            self._samples.rewind(step)
            self._each_tracker(lambda tracker: forget_after(tracker, step))

    def lacks(self, step: int) -> bool:
        """Return, on the main process, whether the row of a trained step is missing from the file."""
        return self._accelerator.is_main_process and step > self._rows.last_step

    def say(self, text: str) -> None:
        """Log a message, on the main process."""
        if self._accelerator.is_main_process:
            logger.info("%s", text)

    def sync(self) -> None:
        """Sync every row written so far to the disk: a checkpoint holds only the row of its own step."""
        if self._accelerator.is_main_process:
            self._rows.sync()

    def close(self) -> None:
        """Close files, trackers and the progress bar. Raises `UserError` where rows could not be written to a full disk."""
        for tracker in self._accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                self.say(f"tracker {tracker.name} did not close ({type(error).__name__}: {error})")
        self._accelerator.trackers = []
        if self._accelerator.is_main_process:
            self._progress.close()
            try:
                self._samples.close()
            finally:
                self._rows.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux (getrusage(2))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class LayerNorms(NamedTuple):
    """Squared L2 norms of every gradient and parameter, still on the device."""

    squares: torch.Tensor
    """(number of tensors,), fp32."""
    places: list[tuple[str, str]]
    """Kind ("grad_norms" or "param_norms") and layer of each."""

    def by_layer(self, squares: list[float]) -> dict[str, dict[str, float]]:
        """Return the norms of each kind by layer, from `squares` on the host."""
        sums: dict[str, dict[str, float]] = {"grad_norms": {}, "param_norms": {}}
        for (kind, layer), square in zip(self.places, squares, strict=True):
            sums[kind][layer] = sums[kind].get(layer, 0.0) + square
        return {kind: {layer: math.sqrt(total) for layer, total in layers.items()} for kind, layers in sums.items()}


def layer_norms(model: nn.Module) -> LayerNorms:
    """Return norms of gradients and parameters by layer; parameters outside the layers are listed by module.

    Collective under FSDP2. The host does not wait.
    """
    squares, places = [], []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        numbered = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
        layer = ".".join(parts[numbered - 1 : numbered + 1]) if parts[numbered].isdigit() else parts[numbered]
        for kind, tensor in (("param_norms", parameter.detach()), ("grad_norms", parameter.grad)):
            if tensor is not None:
                squares.append(full_tensor(tensor.float().square().sum()))
                places.append((kind, layer))
    return LayerNorms(torch.stack(squares), places)


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return a scalar, summed over the ranks where FSDP2 left it sharded. Collective then; the host does not wait."""
    return value.full_tensor() if isinstance(value, DTensor) else value
