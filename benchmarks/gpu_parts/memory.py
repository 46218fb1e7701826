"""Memory: `isoflop.plan.cost.predicted_memory` against what the allocator held, for four recipes, two micro-batches, with
activation checkpointing and without, eager and compiled."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import torch

from gpu_parts.cases import RECIPES, Case, Context, Emit, lacking, sized
from isoflop.config.recipe import Recipe
from isoflop.plan import cost
from isoflop.plan.step_benchmark import tracked_memory_bytes
from isoflop.train.optimizers import build_optimizer
from isoflop.train.training_model import build_training_model

MICRO_BATCHES = 2  # of a step: gradients of the first are there during the second
NEEDS_S = {False: 12.0, True: 20.0}  # of four measurements; compiling is most of it


def plan(_: Context) -> list[Case]:
    """Eager first, which takes seconds; then compiled, which is what runs by default on a GPU."""
    no_compiler = lacking("triton") if torch.cuda.is_available() else None
    return [
        Case(
            f"{name} {'compiled' if compiled else 'eager'}",
            lambda context, emit, name=name, compiled=compiled: measure(context, emit, name, compiled),  # type: ignore[misc]
            NEEDS_S[compiled],
            no_compiler if compiled else None,
        )
        for compiled in (False, True)
        for name in RECIPES
    ]


def measure(context: Context, emit: Emit, name: str, compiled: bool) -> None:
    """One model on the device, at two micro-batches with and without checkpointing."""
    on_gpu = context.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    recipe = sized(context, name, f"training.compile={str(compiled).lower()}")
    with context.device:  # weights are initialized there: their values do not matter here
        model = build_training_model(recipe, eos_token_id=0, bos_token_id=None, device=context.device)
    optimizer = build_optimizer(model, recipe.optimizer, context.device)
    launch = cost.Launch("1gpu", "single", gpu=on_gpu)
    settings = list(itertools.product((False, True), (1.0, 0.5)))
    if context.rehearse:  # the tracker takes seconds for each
        settings = [(True, 1.0)] if compiled else [(False, 1.0), (True, 0.5)]
    for checkpointing, scale in settings:
        if checkpointing:
            model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        size = max(1, int(recipe.training.micro_batch_size * scale))
        changed = {"micro_batch_size": size, "activation_checkpointing": checkpointing}
        changed["tokens_per_step"] = MICRO_BATCHES * size * recipe.training.sequence_length
        own = recipe.model_copy(update={"training": recipe.training.model_copy(update=changed)})
        predicted = cost.predicted_memory(own.model, own.training, own.optimizer, launch)
        way = f"micro-batch {size}" + (" checkpointed" if checkpointing else "")
        facts = {"way": way, "micro_batch_size": size, "checkpointing": checkpointing, "compiled": compiled}
        if on_gpu and predicted.total > torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved():
            emit(**facts, skipped=f"{predicted.total:,} bytes predicted, more than this GPU has left")
            continue
        allocated, reserved = peak_of_steps(model, optimizer, own, context.device)
        measured_by = "torch.cuda.max_memory_allocated"
        if not on_gpu:
            allocated, measured_by = (
                tracked_memory_bytes(own, bf16=True),
                "torch's tracker over an eager model without storage",
            )
        emit(
            **facts, predicted_bytes=predicted.total, parts=predicted._asdict(), allocated_bytes=allocated - before,
            reserved_bytes=reserved, held_before_bytes=before, measured_by=measured_by,
        )  # fmt: skip


def peak_of_steps(model: Any, optimizer: torch.optim.Optimizer, recipe: Recipe, device: torch.device) -> tuple[int, int]:
    """Most bytes allocated and reserved in a step behind one that compiled and made the moments."""
    torch._dynamo.reset()  # a second batch size would be compiled for any size
    for _ in range(2):
        forget_peak(device)
        for _ in range(MICRO_BATCHES):
            shape = (recipe.training.micro_batch_size, recipe.training.sequence_length)
            ids = torch.randint(recipe.model.vocab_size, shape, device=device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(ids) / MICRO_BATCHES
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def forget_peak(device: torch.device) -> None:
    """Give back what is cached, and begin a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
