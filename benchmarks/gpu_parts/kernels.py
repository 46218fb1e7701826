"""Speed of single operations: what the machine reaches, the loss, attention, the optimizer's update, each by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from rows import machine as machine_name
from rows import spread
from step import GPU_MATRIX, matmul_flops, seconds_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.loss.loss_utils import ForCausalLMLoss

from gpu_parts import results
from gpu_parts.cases import OUT_OF_MEMORY, Context, Emit, lacking, sized
from isoflop.config.recipe import Recipe
from isoflop.modeling import loss as library_loss
from isoflop.modeling.build import hidden_matrices
from isoflop.plan import cost
from isoflop.train.optimizers import build_optimizer
from isoflop.train.training_model import build_training_model

COPIED_BYTES = 4 * 2**30
TOY_MATRIX = 512
TFLOPS = "TFLOP/s"


def machine(context: Context, emit: Emit) -> None:
    """bf16 matrix products and device-to-device copies."""
    size = TOY_MATRIX if context.rehearse else GPU_MATRIX
    flops = matmul_flops(True, size)
    emit(way=f"bf16 matrix product of {size:,}", figure=flops / 1e12, unit=TFLOPS, matrix=size)
    source = torch.empty((2**26 if context.rehearse else COPIED_BYTES) // 4, device=context.device).normal_()
    target = torch.empty_like(source)
    seconds = spread(seconds_of(lambda: target.copy_(source), 20))
    moved = 2 * source.numel() * source.element_size()
    emit(way="device copy, read and written", figure=moved / seconds[0] / 1e9, unit="GB/s", seconds=seconds, bytes=moved)


def matmul_flops_of(context: Context) -> float | None:
    """What `machine` measured on a machine like this; None where it has not."""
    here = machine_name()
    rates = [row["figure"] for row in results.read(context.out) if (row.get("unit"), row["machine"]) == (TFLOPS, here)]
    return 1e12 * rates[-1] if rates else None


def timed(context: Context, emit: Emit, way: str, work: Callable[[], object], rounds: int = 10, **facts: Any) -> None:
    """One row: milliseconds of some work, and the memory it takes beyond what is there."""
    on_gpu = context.device.type == "cuda"
    try:
        work()
        before = 0
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = spread(seconds_of(work, 2 if context.rehearse else rounds, warmup=2))
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        emit(way=way, skipped=OUT_OF_MEMORY, **facts)
        return
    extra = torch.cuda.max_memory_allocated() - before if on_gpu else None
    emit(way=way, figure=seconds[0] * 1e3, unit="ms", seconds=seconds, extra_bytes=extra, **facts)


def loss(context: Context, emit: Emit, name: str) -> None:
    """Hidden states to both gradients at a recipe's micro-batch: the library's loss compiled and eager, Liger's, the stock."""
    recipe = sized(context, name)
    shape, training = cost.shape_of(recipe.model), recipe.training
    rows = training.micro_batch_size * training.sequence_length
    device = context.device
    hidden = torch.randn(rows, shape.hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size, device=device) * 0.02)
    targets = torch.randint(shape.vocab_size, (rows,), device=device)
    facts = {"rows": rows, "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "recipe": name}

    def work(loss_of: Callable[[], Tensor]) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            value = loss_of()
        value.backward()
        hidden.grad = weight.grad = None

    def library() -> None:
        work(lambda: library_loss.linear_cross_entropy_sum(hidden, weight, targets))

    compiled = device.type == "cuda" and lacking("triton") is None
    timed(context, emit, f"{name}: library" + (", compiled softmax" if compiled else ""), library, **facts)
    with mock.patch.object(library_loss, "_has_triton", return_value=False):
        timed(context, emit, f"{name}: library, eager softmax", library, **facts)
    liger = lacking("liger_kernel") or (None if device.type == "cuda" else "Liger's kernels run on GPUs")
    if liger:
        emit(way=f"{name}: Liger's fused linear cross-entropy", skipped=liger)
    else:
        timed(
            context, emit, f"{name}: Liger's fused linear cross-entropy",
            lambda: work(lambda: library_loss.liger_cross_entropy_sum(hidden, weight, targets)), **facts,
        )  # fmt: skip
    timed(
        context, emit, f"{name}: transformers, full logits",
        lambda: work(lambda: ForCausalLMLoss(F.linear(hidden, weight)[None], targets[None], shape.vocab_size)), **facts,
    )  # fmt: skip


def attention(context: Context, emit: Emit, name: str) -> None:
    """Forward and backward of causal attention at a recipe's micro-batch, by torch's kernels."""
    recipe = sized(context, name)
    shape, training = cost.shape_of(recipe.model), recipe.training
    batch, length = training.micro_batch_size, training.sequence_length
    inputs = [
        torch.randn(batch, heads, length, shape.head_dim, device=context.device, dtype=torch.bfloat16).requires_grad_()
        for heads in (shape.num_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    ]
    # Forward 2 products of 2 S^2 d a head, backward 5; half of them by causality.
    flops = 7 * batch * shape.num_heads * length**2 * shape.head_dim

    def work() -> None:
        output = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=shape.num_heads != shape.num_key_value_heads)
        torch.autograd.grad(output, inputs, torch.ones_like(output))

    kernels = [None, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    for kernel in kernels:
        way = f"{name}: {'chosen by torch' if kernel is None else kernel.name.lower()}"
        try:
            if kernel is None:
                timed(context, emit, way, work, flops=flops, recipe=name)
            else:
                with sdpa_kernel(kernel):
                    timed(context, emit, way, work, flops=flops, recipe=name)
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            emit(way=way, skipped="no such kernel for this device and shape")


def optimizer(context: Context, emit: Emit, name: str) -> None:
    """The update of all weights, fused, by foreach and with bf16 moments; clipping by itself."""
    recipe = sized(context, name, "training.compile=false")
    with context.device:
        model = build_training_model(recipe, eos_token_id=0, bos_token_id=None, device=context.device)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    bf16 = recipe.optimizer.model_copy(update={"moments_dtype": "bfloat16"})
    rounds, facts = 5, {"recipe": name, "parameters": cost.parameters(recipe.model)}
    for way, build in {
        "AdamW fused": lambda: build_optimizer(model, recipe.optimizer, context.device),
        "AdamW foreach": lambda: foreach(recipe, model),
        "AdamW bf16 moments": lambda: build_optimizer(model, bf16, context.device),
    }.items():
        timed(context, emit, f"{name}: {way}", build().step, rounds, **facts)
    parameters = list(model.parameters())
    timed(context, emit, f"{name}: clipping", lambda: nn.utils.clip_grad_norm_(parameters, 1.0), rounds, **facts)


def muon(context: Context, emit: Emit, name: str) -> None:
    """The library's Muon and torch's over the matrices of the layers: four and five Newton-Schulz steps in bf16."""
    recipe = sized(context, name, "training.compile=false", "optimizer.name=muon")
    with context.device:
        model = build_training_model(recipe, eos_token_id=0, bos_token_id=None, device=context.device)
    layers = hidden_matrices(model.causal_lm)
    for parameter in layers:
        parameter.grad = torch.randn_like(parameter)  # other weights have none, so that no optimizer updates them
    facts = {"recipe": name, "parameters": sum(p.numel() for p in layers), "matrices": len(layers)}
    for way, build in {
        "library's Muon": lambda: build_optimizer(model.causal_lm, recipe.optimizer, context.device),
        "torch.optim.Muon": lambda: torch.optim.Muon(layers),
    }.items():
        timed(context, emit, f"{name}: {way}", build().step, 5, **facts)


def foreach(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The library's AdamW by lists of tensors instead of its fused kernel."""
    fused = build_optimizer(model, recipe.optimizer, torch.device("cpu"))
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in fused.param_groups]
    settings = recipe.optimizer
    return torch.optim.AdamW(
        groups, lr=settings.peak_learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, foreach=True
    )
