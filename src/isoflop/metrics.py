"""What a run writes down about itself: `metrics.jsonl`, trackers, the progress bar and the loss curve."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from isoflop.errors import UserError
from isoflop.scaling.laws import Forecast

Row = dict[str, Any]


class MetricsLog:
    """One JSON object a step, on the main process; the same scalars to any tracker."""

    def __init__(self, file: Path, accelerator: Accelerator, resumed_step: int, num_steps: int) -> None:
        self._accelerator, self._file = accelerator, file
        self.rows: list[Row] = []
        if not accelerator.is_main_process:
            return
        self.rows = read_rows(file, resumed_step)
        _rewrite(file, self.rows)  # steps after the checkpoint are trained again
        self._stream = file.open("a", encoding="utf-8")
        self._progress = tqdm(total=num_steps, initial=resumed_step, unit="step", desc="pretrain", file=sys.stdout, mininterval=1)

    def write(self, row: Row) -> None:
        """Append one step's row; what is not a number becomes null. Raises `UserError` when the disk is full."""
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        self._track(row)
        if not self._accelerator.is_main_process:
            return
        self.rows.append(row)
        try:
            self._stream.write(json.dumps(row) + "\n")
            self._stream.flush()
        except OSError as error:
            raise UserError(f"{self._file}: {error}; free some space, then the same command goes on") from None
        shown = {"loss": "n/a" if row["loss"] is None else f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_s']:,.0f}"}
        if row["val_loss"] is not None:
            loss = "n/a" if row["loss"] is None else f"{row['loss']:.4f}"  # of a step whose update was skipped
            self._progress.write(f"step {row['step']}: validation loss {row['val_loss']:.4f}, training loss {loss}")
        self._progress.set_postfix(shown, refresh=False)
        self._progress.update(row["step"] - self._progress.n)

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
            self.rows = [row for row in self.rows if row["step"] <= step]
            self._stream.close()
            _rewrite(self._file, self.rows)
            self._stream = self._file.open("a", encoding="utf-8")

    def lacks(self, step: int) -> bool:
        """On the main process, whether the row of a step that was trained is not in the file."""
        return self._accelerator.is_main_process and step > (self.rows[-1]["step"] if self.rows else 0)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._accelerator.is_main_process:
            self._progress.write(text)

    def sync(self) -> None:
        """Have the disk hold every row written so far: a checkpoint brings its own step's row alone."""
        if self._accelerator.is_main_process:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close file and trackers, and take the bar away."""
        for tracker in self._accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                self.say(f"tracker {tracker.name} did not close ({type(error).__name__}: {error})")
        self._accelerator.trackers = []
        if self._accelerator.is_main_process:
            with suppress(OSError):  # a full disk has been reported where it was met
                self.sync()
            with suppress(OSError):
                self._stream.close()
            self._progress.close()


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


def read_rows(file: Path, last_step: int) -> list[Row]:
    """Rows of steps up to `last_step`; a line cut short by a kill, and what follows it, counts as not written."""
    rows: list[Row] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            row: Row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= last_step:
            rows.append(row)
    return rows


def _rewrite(file: Path, rows: list[Row]) -> None:
    aside = file.with_suffix(".partial")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    aside.replace(file)


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


def draw_curve(
    rows: list[Row], file: Path, title: str, unigram_entropy_nats: float, promised: Forecast | None = None, total_tokens: int = 0
) -> None:
    """Training and validation loss against tokens, token frequencies alone for scale; downstream scores below where there are.

    What a law `promised` of the run's end, after `total_tokens`, stands there with its interval, and each forecast on the way.
    """
    import matplotlib.figure

    scores = sorted({key for row in rows for key in row if "/" in key and not key.endswith("_stderr")})
    figure = matplotlib.figure.Figure(figsize=(8, 8 if scores else 5), layout="constrained")
    axes, *below = figure.subplots(2 if scores else 1, squeeze=False, sharex=True)[:, 0]
    finite = [row for row in rows if row["loss"] is not None]
    tokens = [row["tokens"] for row in finite]
    axes.plot(tokens, [row["loss"] for row in finite], color="#9db7d5", linewidth=0.8, label="training loss, each step")
    axes.plot(tokens, smoothed([row["loss"] for row in finite]), color="#1f4e8c", linewidth=1.6, label="training loss, smoothed")
    validated = [row for row in rows if row["val_loss"] is not None]
    axes.plot(
        [r["tokens"] for r in validated], [r["val_loss"] for r in validated], "o-", color="#d1495b", label="validation loss"
    )
    if promised:
        _draw_promise(axes, rows, promised, total_tokens)
    axes.axhline(unigram_entropy_nats, color="#777777", linestyle="--", linewidth=1, label="token frequencies alone")
    axes.set(ylabel="loss (nats per token)", title=title)
    for panel in below:
        _draw_scores(panel, rows, scores)
    for panel in (axes, *below):
        panel.grid(alpha=0.3)
        panel.legend()
    panel.set_xlabel("tokens")
    panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    aside = file.with_suffix(".partial.png")
    figure.savefig(aside, dpi=120)
    aside.replace(file)


def _draw_promise(axes: Any, rows: list[Row], promised: Forecast, total_tokens: int) -> None:
    """The law's prediction at the run's end, and where forecasts on the way saw that end."""
    axes.plot([total_tokens] * 2, promised.interval or [promised.loss] * 2, "_-", color="#2e8b57", markersize=8)
    axes.plot([total_tokens], [promised.loss], "D", color="#2e8b57", label="predicted by the law, 90%")
    seen = [row for row in rows if "forecast_loss" in row]
    if seen:
        tokens = [row["tokens"] for row in seen]
        axes.plot(tokens, [row["forecast_loss"] for row in seen], "--", color="#e08e0b", label="forecast of the last loss, 90%")
        bounds = ([row[key] for row in seen] for key in ("forecast_low", "forecast_high"))
        axes.fill_between(tokens, *bounds, color="#e08e0b", alpha=0.25, linewidth=0)


def _draw_scores(axes: Any, rows: list[Row], scores: list[str]) -> None:
    """Accuracies with one standard error on either side; where a task has none (perplexities), its numbers are in the rows."""
    accuracies = [key for key in scores if key.split("/")[1].startswith("acc")]
    for key in accuracies or scores:
        measured = [row for row in rows if row.get(key) is not None]
        errors = [row.get(f"{key}_stderr") or 0.0 for row in measured]
        axes.errorbar([r["tokens"] for r in measured], [r[key] for r in measured], errors, fmt="o-", markersize=4, label=key)
    axes.set_ylabel("accuracy" if accuracies else "score")


def smoothed(losses: list[float], share: float = 0.02) -> list[float]:
    """Exponential mean whose memory is `share` of the curve, started at the first value."""
    weight = 1 / max(1.0, share * len(losses))
    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else smooth[-1] + weight * (loss - smooth[-1]))
    return smooth
