"""Rate: train `modern_124m` on Python sources with AdamW and with Muon for equal minutes, by the real loop; loss by wall time."""

from __future__ import annotations

import time

import torch

from gpu_parts.cases import Case, Context, Emit, metrics_of, pretrain_until, sized
from isoflop.plan import cost

MICRO_BATCHES = 4  # a step of 131,072 tokens where the recipe has 524,288: more updates in few minutes
POINTS = 100
RESERVE_S = 8  # at the end of a run, for what is in flight and for the row
REHEARSED_S = 3.0
# One learning rate for both: a Muon update has the size of an AdamW update. Neither is tuned here.
OVERRIDES = (
    "optimizer.peak_learning_rate=1e-3", "schedule.warmup_steps=20", "evaluation.validate_every=50", "evaluation.max_windows=64",
)  # fmt: skip


def plan(_: Context) -> list[Case]:
    """A run of each optimizer: AdamW has half of the part's time, Muon the rest."""
    return [
        Case("modern_124m", lambda context, emit: train(context, emit, "adamw", share=0.5), 30, to_the_end=True),
        Case("modern_124m muon", lambda context, emit: train(context, emit, "muon", share=1.0), 30, to_the_end=True),
    ]


def train(context: Context, emit: Emit, optimizer: str, share: float) -> None:
    """Train for a share of the part's remaining time, less a reserve; a constant learning rate after the warm-up."""
    overrides = (*OVERRIDES, f"optimizer.name={optimizer}")
    recipe = sized(context, "modern_124m", *overrides, micro_batches=MICRO_BATCHES)
    began = time.time()
    until = began + (REHEARSED_S if context.rehearse else share * (context.ends_at - began) - RESERVE_S)
    pretrain_until(context, recipe, lambda _: time.time() > until)
    rows = metrics_of(recipe.output.run_dir)
    kept = [rows[round(number * (len(rows) - 1) / (POINTS - 1))] for number in range(POINTS)] if len(rows) > POINTS else rows
    keys = ("elapsed_s", "step", "tokens", "loss", "val_loss")
    validated = [row for row in rows if row["val_loss"] is not None]
    emit(
        way="isoflop", optimizer=optimizer, curve=[{key: row[key] for key in keys} for row in kept],
        validation=[{key: row[key] for key in keys} for row in validated][-POINTS:], steps=len(rows),
        parameters=cost.parameters(recipe.model), tokens_per_step=recipe.training.tokens_per_step, wall_s=time.time() - began,
        overrides=list(overrides), text="Python's standard library",
        peak_memory_bytes=torch.cuda.max_memory_allocated() if context.device.type == "cuda" else None,
    )  # fmt: skip
