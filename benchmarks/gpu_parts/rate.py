"""Rate: train `modern_124m` on Python sources for the minutes that are left, by the real loop; loss by wall time."""

from __future__ import annotations

import time

import torch

from gpu_parts.cases import Case, Context, Emit, metrics_of, pretrain_until, sized
from isoflop.plan import cost

MICRO_BATCHES = 4  # a step of 131,072 tokens where the recipe has 524,288: more updates in few minutes
POINTS = 100
RESERVE_S = 8  # at the end, for what is in flight and for the row
REHEARSED_S = 5.0
OVERRIDES = (
    "optimizer.peak_learning_rate=1e-3", "schedule.warmup_steps=20", "evaluation.validate_every=50", "evaluation.max_windows=64",
)  # fmt: skip


def plan(_: Context) -> list[Case]:
    """One run."""
    return [Case("modern_124m", train, 30, to_the_end=True)]


def train(context: Context, emit: Emit) -> None:
    """Train until the part's time is up, less a reserve; a constant learning rate after the warm-up."""
    recipe = sized(context, "modern_124m", *OVERRIDES, micro_batches=MICRO_BATCHES)
    began = time.time()
    until = began + REHEARSED_S if context.rehearse else context.ends_at - RESERVE_S
    pretrain_until(context, recipe, lambda _: time.time() > until)
    rows = metrics_of(recipe.output.run_dir)
    kept = [rows[round(number * (len(rows) - 1) / (POINTS - 1))] for number in range(POINTS)] if len(rows) > POINTS else rows
    keys = ("elapsed_s", "step", "tokens", "loss", "val_loss")
    validated = [row for row in rows if row["val_loss"] is not None]
    emit(
        way="isoflop", curve=[{key: row[key] for key in keys} for row in kept],
        validation=[{key: row[key] for key in keys} for row in validated][-POINTS:], steps=len(rows),
        parameters=cost.parameters(recipe.model), tokens_per_step=recipe.training.tokens_per_step, wall_s=time.time() - began,
        overrides=list(OVERRIDES), text="Python's standard library",
        peak_memory_bytes=torch.cuda.max_memory_allocated() if context.device.type == "cuda" else None,
    )  # fmt: skip
