"""Benchmark a training step: a few micro-batches on this machine, and PyTorch's own memory count over fake tensors.

Entered by `benchmark_step`. Prepared data are not needed, because speed and memory do not depend on token ids. (Under document
masking a GPU is faster with more documents per window; random ids make hardly any, so the slowest case is measured.)
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from tqdm import tqdm

from isoflop.config.recipe import Recipe, gradient_accumulation_steps
from isoflop.plan import cost, hardware
from isoflop.train.cpu import tune_glibc_malloc
from isoflop.train.metrics import peak_memory_bytes
from isoflop.train.optimizers import build_optimizer
from isoflop.train.training_model import build_training_model
from isoflop.utils.errors import UserError

WARMUP, TIMED = 2, 5  # micro-batches; the first ones allocate memory, select kernels and compile


@dataclass(frozen=True)
class StepBenchmark:
    """Speed and memory of a recipe's steps on one device of this machine."""

    device: str
    arithmetic: cost.Arithmetic
    micro_batches: int
    micro_batch_size: int
    sequence_length: int
    micro_batch_s: float
    """Forward and backward pass, median."""
    optimizer_step_s: float
    """Clipping and update, median."""
    tokens_per_s: float
    flops_per_s: float
    mfu: float | None
    """None for a device whose peak is not known."""
    predicted_memory_bytes: int
    tracked_memory_bytes: int
    peak_memory_bytes: int
    peak_memory_kind: str

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON."""
        return asdict(self)


def benchmark_step(recipe: Recipe) -> StepBenchmark:
    """Return tokens per second and memory on one device of this machine.

    A GPU runs bf16 autocast as accelerate_configs/1gpu.yaml does, a CPU fp32 as cpu.yaml. Raises `UserError` where the predicted
    memory does not fit the device, before anything is allocated.
    """
    training = recipe.training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    launch = cost.Launch("this", "single", bf16=device.type == "cuda", gpu=device.type == "cuda")
    predicted = cost.predicted_memory(recipe.model, training, recipe.optimizer, launch).total
    _require_room(recipe, predicted, device)
    before = peak_memory_bytes(device)
    if device.type == "cpu":
        tune_glibc_malloc()
    micro_s, update_s = _time_steps(recipe, device, launch)
    peak = peak_memory_bytes(device) - before
    tokens_per_s = training.tokens_per_step / (gradient_accumulation_steps(recipe.training, num_processes=1) * micro_s + update_s)
    flops_per_s = tokens_per_s * cost.flops_per_token(recipe.model, training.sequence_length)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    hardware_peak = hardware.peak_bf16_flops(name)
    return StepBenchmark(
        device=name,
        arithmetic=launch.arithmetic,
        micro_batches=TIMED,
        micro_batch_size=training.micro_batch_size,
        sequence_length=training.sequence_length,
        micro_batch_s=micro_s,
        optimizer_step_s=update_s,
        tokens_per_s=tokens_per_s,
        flops_per_s=flops_per_s,
        mfu=hardware_peak and flops_per_s / hardware_peak,
        predicted_memory_bytes=predicted,
        tracked_memory_bytes=tracked_memory_bytes(recipe, bf16=launch.bf16),
        peak_memory_bytes=peak,
        peak_memory_kind="allocator's peak" if device.type == "cuda" else "growth of the process",
    )


def _require_room(recipe: Recipe, predicted: int, device: torch.device) -> None:
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    if predicted > free:
        raise UserError(
            f"--measure: training.micro_batch_size = {recipe.training.micro_batch_size} needs {predicted:,} bytes and {free:,}"
            f" are free on this {device.type}; set training.micro_batch_size=1, or training.activation_checkpointing=true"
        )


def _time_steps(recipe: Recipe, device: torch.device, launch: cost.Launch) -> tuple[float, float]:
    """Return median seconds of a micro-batch (forward and backward) and of an update with clipping."""
    model = build_training_model(recipe, eos_token_id=0, bos_token_id=None, device=device)
    optimizer = build_optimizer(model, recipe.optimizer, device)
    shape = (recipe.training.micro_batch_size, recipe.training.sequence_length)
    ids = torch.randint(recipe.model.vocab_size, shape, device=device)
    micro_s, update_s = [], []
    for _ in tqdm(range(WARMUP + TIMED), desc="measure", unit="micro-batch"):
        started = _now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=launch.bf16):
            loss = model(ids)
        loss.backward()
        finished = _now(device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
        optimizer.step()
        if gradient_accumulation_steps(recipe.training, num_processes=1) == 1:
            optimizer.zero_grad()
        micro_s.append(finished - started)
        update_s.append(_now(device) - finished)
    return statistics.median(micro_s[WARMUP:]), statistics.median(update_s[WARMUP:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def tracked_memory_bytes(recipe: Recipe, bf16: bool) -> int:
    """Return the peak bytes of a micro-batch by PyTorch's MemTracker, which runs the model on tensors without storage.

    Every operation of forward, loss, backward and update is dispatched, so this counts what the formulas of `cost` predict, in
    seconds. Arithmetic is fp32, or bf16 autocast.
    """
    training, device = recipe.training, torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        eager = recipe.model_copy(update={"training": training.model_copy(update={"compile": False})})
        model = build_training_model(eager, eos_token_id=0, bos_token_id=None)
        optimizer = build_optimizer(model, recipe.optimizer, device)
        ids = torch.zeros((training.micro_batch_size, training.sequence_length), dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):  # moments exist after the first update, gradients after the first backward pass
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model(ids)
                loss.backward()
                del loss
                optimizer.step()
                if gradient_accumulation_steps(recipe.training, num_processes=1) == 1:
                    optimizer.zero_grad()
                tracker.reset_mod_stats()
        return int(tracker.get_tracker_snapshot("peak")[device]["Total"])
