"""What a run reports of itself: rows of metrics, samples, trackers and the progress bar; norms and memory for the rows."""

from __future__ import annotations

import math
import resource
import sys
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from isoflop.records import (
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
from isoflop.run_folder import RunFolder


class MetricsLog:
    """One JSON object a step, on the main process; the same scalars to any tracker."""

    def __init__(self, folder: RunFolder, accelerator: Accelerator, resumed_step: int, num_steps: int) -> None:
        self._accelerator = accelerator
        self.curve = TrainingCurve()
        if not accelerator.is_main_process:
            return
        self._progress = tqdm(total=num_steps, initial=resumed_step, unit="step", desc="pretrain", file=sys.stdout, mininterval=1)
        rows = read_records(folder.metrics, resumed_step, is_row)  # steps after the checkpoint are trained again
        texts = read_records(folder.samples, resumed_step, is_sample)
        self.curve = TrainingCurve(rows.rows)
        self._rows = StepFile(folder.metrics, rows, is_row, self.say, folder.restore)
        self._samples = StepFile(folder.samples, texts, is_sample, self.say, folder.restore)
        # The row of the checkpoint's own step is in the checkpoint.
        if lost := missing_steps([*self.curve.steps, *([resumed_step] if self.lacks(resumed_step) else [])]):
            self.say(f"{folder.metrics}: rows are missing: {describe_steps(lost)}; the curve and the summary show the gap")

    def write(self, row: Row) -> None:
        """Append one step's row; what is not a number becomes null."""
        row = {key: finite(value) for key, value in row.items()}
        self._track(row)
        if not self._accelerator.is_main_process:
            return
        self.curve.append(row)
        self._rows.append(row)
        shown = {"loss": "n/a" if row["loss"] is None else f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_s']:,.0f}"}
        if row["val_loss"] is not None:
            loss = "n/a" if row["loss"] is None else f"{row['loss']:.4f}"  # of a step whose update was skipped
            self._progress.write(f"step {row['step']}: validation loss {row['val_loss']:.4f}, training loss {loss}")
        self._progress.set_postfix(shown, refresh=False)
        self._progress.update(row["step"] - self._progress.n)

    def write_samples(self, step: int, texts: list[str]) -> None:
        """Append a step's texts, unless they were written before a run was stopped at that step."""
        if self._accelerator.is_main_process and self._samples.last_step < step:
            self._samples.append({"step": step, "samples": texts})

    def _track(self, row: Row) -> None:
        """The row's scalars to every tracker; one that fails is named and left out from then on."""
        scalars = {key: value for key, value in row.items() if isinstance(value, int | float)}
        for tracker in list(self._accelerator.trackers):
            try:
                tracker.log(scalars, step=row["step"])
            except Exception as error:  # the many errors of many services: none may cost a run
                self.say(f"tracker {tracker.name} failed ({type(error).__name__}: {error}): going on without it")
                self._accelerator.trackers.remove(tracker)

    def rewind(self, step: int) -> None:
        """Forget the rows after a step: they are trained again."""
        if self._accelerator.is_main_process:
            self.curve.rewind(step)
            self._rows.rewind(step)
            self._samples.rewind(step)

    def lacks(self, step: int) -> bool:
        """On the main process, whether the row of a step that was trained is not in the file."""
        return self._accelerator.is_main_process and step > self._rows.last_step

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._accelerator.is_main_process:
            self._progress.write(text)

    def sync(self) -> None:
        """Have the disk hold every row written so far: a checkpoint brings its own step's row alone."""
        if self._accelerator.is_main_process:
            self._rows.sync()

    def close(self) -> None:
        """Close files and trackers, and take the bar away. Raises `UserError` where rows found no room on the disk to the end."""
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


def start_trackers(accelerator: Accelerator, config: dict[str, Any]) -> None:
    """Start each of Accelerate's trackers; one that cannot be reached, or cannot write, is named and left out."""
    scalars = {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()}
    started: list[Any] = []
    for name in accelerator.log_with:
        wanted, accelerator.log_with = accelerator.log_with, [name]
        try:
            accelerator.init_trackers("isoflop", config=scalars)
            started += accelerator.trackers
        except Exception as error:  # the many errors of many services: none may cost a run
            accelerator.print(f"tracker {name} does not start ({type(error).__name__}: {error}): going on without it")
        accelerator.log_with = wanted
    accelerator.trackers = started


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: the allocator's on a GPU, the process's resident set on a CPU."""
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
        """The norms of each kind by layer, of `squares` as they were read back."""
        sums: dict[str, dict[str, float]] = {"grad_norms": {}, "param_norms": {}}
        for (kind, layer), square in zip(self.places, squares, strict=True):
            sums[kind][layer] = sums[kind].get(layer, 0.0) + square
        return {kind: {layer: math.sqrt(total) for layer, total in layers.items()} for kind, layers in sums.items()}


def layer_norms(model: nn.Module) -> LayerNorms:
    """Norms of gradients and parameters by layer; what lies outside the layers stands under its own module's name. Collective
    under FSDP2; waits for nothing."""
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
    """A scalar, summed over the ranks where FSDP2 left it in parts. Collective then; the host does not wait."""
    return value.full_tensor() if isinstance(value, DTensor) else value
