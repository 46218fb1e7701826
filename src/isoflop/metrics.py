"""What a run writes down about itself: `metrics.jsonl`, trackers, the progress bar and the loss curve."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

Row = dict[str, Any]


class MetricsLog:
    """One JSON object a step, on the main process; the same scalars to any tracker."""

    def __init__(self, file: Path, accelerator: Accelerator, resumed_step: int, num_steps: int) -> None:
        self._accelerator = accelerator
        self.rows: list[Row] = []
        if not accelerator.is_main_process:
            return
        self.rows = read_rows(file, resumed_step)
        _rewrite(file, self.rows)  # steps after the checkpoint are trained again
        self._stream = file.open("a", encoding="utf-8")
        self._progress = tqdm(total=num_steps, initial=resumed_step, unit="step", desc="pretrain", file=sys.stdout, mininterval=1)

    def write(self, row: Row) -> None:
        """Append one step's row."""
        self._accelerator.log({key: value for key, value in row.items() if isinstance(value, int | float)}, step=row["step"])
        if not self._accelerator.is_main_process:
            return
        self.rows.append(row)
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        shown = {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_s']:,.0f}"}
        if row["val_loss"] is not None:
            self._progress.write(f"step {row['step']}: validation loss {row['val_loss']:.4f}, training loss {row['loss']:.4f}")
        self._progress.set_postfix(shown, refresh=False)
        self._progress.update(row["step"] - self._progress.n)

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
        """Close the file and take the bar away."""
        if self._accelerator.is_main_process:
            self.sync()
            self._stream.close()
            self._progress.close()


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


def layer_norms(model: nn.Module) -> dict[str, dict[str, float]]:
    """L2 norms of gradients and parameters by layer; what lies outside the layers stands under its own module's name."""
    squares: dict[str, dict[str, list[torch.Tensor]]] = {"grad_norms": {}, "param_norms": {}}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        numbered = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
        layer = ".".join(parts[numbered - 1 : numbered + 1]) if parts[numbered].isdigit() else parts[numbered]
        squares["param_norms"].setdefault(layer, []).append(parameter.detach().float().square().sum())
        if parameter.grad is not None:
            squares["grad_norms"].setdefault(layer, []).append(parameter.grad.float().square().sum())
    return {
        kind: {layer: math.sqrt(float(torch.stack(values).sum())) for layer, values in layers.items()}
        for kind, layers in squares.items()
    }


def draw_curve(rows: list[Row], file: Path, title: str, unigram_entropy_nats: float) -> None:
    """Training and validation loss against tokens, with the loss of token frequencies alone for scale."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    tokens = [row["tokens"] for row in rows]
    axes.plot(tokens, [row["loss"] for row in rows], color="#9db7d5", linewidth=0.8, label="training loss, each step")
    axes.plot(tokens, _smoothed([row["loss"] for row in rows]), color="#1f4e8c", linewidth=1.6, label="training loss, smoothed")
    validated = [row for row in rows if row["val_loss"] is not None]
    axes.plot(
        [r["tokens"] for r in validated], [r["val_loss"] for r in validated], "o-", color="#d1495b", label="validation loss"
    )
    axes.axhline(unigram_entropy_nats, color="#777777", linestyle="--", linewidth=1, label="token frequencies alone")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    aside = file.with_suffix(".partial.png")
    figure.savefig(aside, dpi=120)
    aside.replace(file)


def _smoothed(losses: list[float], share: float = 0.02) -> list[float]:
    """Exponential mean whose memory is `share` of the curve, started at the first value."""
    weight = 1 / max(1.0, share * len(losses))
    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else smooth[-1] + weight * (loss - smooth[-1]))
    return smooth
