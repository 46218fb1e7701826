"""Exact memory and communication of a model in training, and its sizes from `shape`. No torch, no network."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from isoflop.config.recipe import LARGEST_TRIED, Gpt2Model, HybridModel, Model, Training
from isoflop.config.recipe_optimizer import Optimizer
from isoflop.plan import hardware
from isoflop.plan.optimizer_cost import exchanged_bytes, moments_bytes
from isoflop.plan.shape import (
    Shape,
    flops_per_token,
    head_parameters,
    matmul_parameters,
    parameters,
    parameters_by_class,
    shape_dict,
    shape_of,
)

__all__ = ["Shape", "flops_per_token", "matmul_parameters", "parameters", "parameters_by_class", "shape_dict", "shape_of"]

# Copied from `modeling.loss`, which imports nothing of this package; a test keeps them equal.
CHUNK_LOGITS_BYTES, SOFTMAX_BYTES, HEAD_GRADIENT_ROWS = 128 * 2**20, 16 * 2**20, 8192
GPU_CHUNK_LOGITS_BYTES = 2**30


def checkpoint_bytes(model: Model, optimizer: Optimizer) -> int:
    """Return the bytes of one checkpoint: float32 weights and the optimizer's moments (a tied head is stored once)."""
    return 4 * parameters(model) + moments_bytes(model, optimizer)


Engine = Literal["single", "ddp", "zero1", "fsdp2"]
Reduction = Literal["step", "micro_batch"]
Arithmetic = Literal["fp32", "autocast", "bf16"]  # dtype of kept activations; bf16: the weights are bf16, too


class Launch(NamedTuple):
    """The part of a launch config that decides memory and time."""

    name: str
    engine: Engine
    num_processes: int = 1
    bf16: bool = True
    """Matrix products in bf16: by autocast over fp32 weights, or over the bf16 copies of ZeRO-1 and FSDP2."""
    shards: int = 1
    """Ranks that the optimizer state (under FSDP2 also weights and gradients) is sharded over."""
    gpu: bool = False
    """Runs on a GPU, where `training.compile: auto` compiles and the loss takes larger chunks."""
    reduction: Reduction = "micro_batch"
    """When FSDP2 reduces gradients over the ranks; see `gradient_reduction`. The other engines always reduce once a step."""
    num_machines: int = 1

    def compiles(self, training: Training) -> bool:
        """Return whether the decoder layers are compiled."""
        return self.gpu if training.compile == "auto" else training.compile

    @property
    def arithmetic(self) -> Arithmetic:
        """Arithmetic of the forward pass, which decides the dtype of kept activations."""
        if not self.bf16:
            return "fp32"
        return "bf16" if self.engine in ("zero1", "fsdp2") else "autocast"


class Memory(NamedTuple):
    """Bytes on one device at the peak, between forward and backward of a micro-batch after the first."""

    weights: int
    gradients: int
    moments: int
    weight_copies: int
    """bf16 copies that autocast makes and backward keeps; under FSDP2 the unsharded layers."""
    activations: int
    """Tensors that layers keep for the backward pass; with activation checkpointing each layer's input."""
    loss: int
    """Last norm to loss: hidden states and their gradient, a chunk of logits, the head's gradient. One layer's backward pass
    (with checkpointing, its recomputed activations too) where that takes more."""

    @property
    def total(self) -> int:
        """Peak bytes of the allocator. The CUDA context and fragmentation are extra (`usable_bytes`)."""
        return sum(self)


def predicted_memory(model: Model, training: Training, optimizer: Optimizer, launch: Launch) -> Memory:
    """Return the peak memory of one device, without dropout masks.

    Bytes per parameter of weights, gradients and moments:

        single, DDP  4 + 4 + 8; DDP's gradients are its buckets
        ZeRO-1       2 + 4 + (4 + 8) / shards, as DeepSpeed keeps bf16 weights and accumulates in fp32
        FSDP2        (4 + 4 + 8) / shards; gradients take 4 instead of 4 / shards where they are reduced once a step

    Muon keeps 4 instead of 8 for the layers' matrices; bf16 moments take half.
    """
    n, shards, mode, compiled = parameters(model), launch.shards, launch.arithmetic, launch.compiles(training)
    moments = moments_bytes(model, optimizer) // shards
    matrices = matmul_parameters(model)
    layer, head = (matrices - head_parameters(model)) // shape_of(model).num_layers, head_parameters(model)
    tokens = training.micro_batch_size * training.sequence_length
    micro_batches = training.tokens_per_step // (tokens * launch.num_processes)
    weights, gradients, copies = 4 * n, 4 * n, 2 * matrices if mode == "autocast" else 0
    if launch.engine == "zero1":
        weights = (2 if launch.bf16 else 4) * n + (4 * n // shards if launch.bf16 else 0)
    elif launch.engine == "fsdp2":
        weights = 4 * n // shards
        gradients = 4 * n if launch.reduction == "step" and micro_batches > 1 else 4 * n // shards
        # Unsharded: two layers (one computed, one prefetched), embedding and head throughout, one layer's fp32 gradients.
        copies = (2 if launch.bf16 else 4) * (2 * layer + head * (1 if shape_of(model).tied else 2)) + 4 * layer
    layer_bytes = tokens * layer_activation_bytes(model, training.sequence_length, mode, compiled)
    loss, backward = _loss_bytes(model, tokens, mode, launch.gpu, compiled), _backward_bytes(model, tokens, mode)
    if compiled and launch.engine != "fsdp2":  # counted in its copies; a compiled layer returns all its gradients at its end
        backward += (2 if mode == "bf16" else 4) * layer
    kept = shape_of(model).num_layers * layer_bytes
    if training.activation_checkpointing:
        stream = 2 if mode == "bf16" else 4
        kept = tokens * shape_of(model).num_layers * stream * shape_of(model).hidden_size
        if compiled and mode == "autocast":  # a compiled layer makes its own copies, and makes them again in the backward pass
            copies = 2 * head
        loss = max(loss, layer_bytes + backward - copies)
    memory = Memory(weights, gradients, moments, copies, kept, max(loss, backward))
    if micro_batches == 1 and launch.engine in ("single", "fsdp2"):
        return _without_accumulation(memory, layer_bytes, backward)
    return memory


def _without_accumulation(memory: Memory, layer_bytes: int, backward_bytes: int) -> Memory:
    """Return the peak without accumulation: before the first or after the last gradient, as activations are freed meanwhile."""
    before = memory._replace(gradients=0)
    after = memory._replace(weight_copies=0, activations=layer_bytes, loss=backward_bytes)
    return max(before, after, key=lambda moment: moment.total)


def with_reduction(launch: Launch, model: Model, training: Training, optimizer: Optimizer, memory_bytes: int) -> Launch:
    """Return the launch with the recipe's gradient reduction.

    `auto` reduces once a step where that is predicted to fit a device of `memory_bytes`, because it sends 1 / accumulation of the
    gradients' bytes; else after every micro-batch.
    """
    if launch.engine != "fsdp2":
        return launch._replace(reduction="step")
    if training.gradient_reduction != "auto":
        return launch._replace(reduction=training.gradient_reduction)
    once = launch._replace(reduction="step")
    fits = predicted_memory(model, training, optimizer, once).total <= hardware.usable_bytes(memory_bytes)
    return once if fits else launch._replace(reduction="micro_batch")


def communicated_bytes(model: Model, training: Training, launch: Launch, optimizer: Optimizer) -> int:
    """Return the bytes that each rank sends in an optimizer step over rings, with what Muon exchanges.

    A gather or a reduce-scatter of x bytes sends (p - 1) / p x. DDP all-reduces fp32 gradients once. ZeRO-1 reduce-scatters them
    and gathers the updated weights. FSDP2 gathers weights for the forward and the backward pass of every micro-batch. It
    reduce-scatters fp32 gradients once a step or every micro-batch; with replicas (HSDP) it all-reduces the shards as often.
    """
    n, p, width = parameters(model), launch.num_processes, 2 if launch.bf16 else 4
    exchanged = exchanged_bytes(model, optimizer, p, launch.shards if launch.engine == "fsdp2" else 1, launch.gpu)
    if launch.engine == "single":
        return 0
    if launch.engine == "ddp":
        return 2 * 4 * n * (p - 1) // p + exchanged
    if launch.engine == "zero1":
        return (4 + width) * n * (p - 1) // p
    micro_batches = training.tokens_per_step // (training.micro_batch_size * training.sequence_length * p)
    reductions = 1 if launch.reduction == "step" else micro_batches
    shards, replicas = launch.shards, p // launch.shards
    gathered = 2 * width * n * (shards - 1) // shards
    reduced = 4 * n * (shards - 1) // shards + 2 * 4 * n // shards * (replicas - 1) // replicas
    return micro_batches * gathered + reductions * reduced + exchanged


# Tensors of feed-forward width beyond silu's or GELU's input and output: gelu_new is seven operations, relu keeps its
# output alone. relu2 keeps relu's output, and its square as the next product's input.
_ACTIVATION_EXTRA = {"gelu_new": 3, "relu": -1}
# Bytes per dimension that a norm keeps: LayerNorm its input, RMSNorm its input in fp32 and the normed input.
_KEPT_BY_NORM = {
    True: {"autocast": 8, "bf16": 6, "fp32": 8},  # RMSNorm
    False: {"autocast": 4, "bf16": 2, "fp32": 4},
}


def layer_activation_bytes(model: Model, sequence_length: int, arithmetic: Arithmetic, compiled: bool = False) -> int:
    """Return the bytes per token that one decoder layer keeps for its backward pass.

    Counted from what each operation of transformers' layers saves. Widths: h hidden, a queries, k keys, f feed-forward. Llama
    under autocast keeps 26h + 4a + 4k + 8f and the statistics of norms and attention:

        two RMSNorms        input and normed input in fp32, 8h each
        q, k, v, gate, up   a bf16 copy of their input, 2h each
        attention           q, k, v and output, 4a + 4k
        SwiGLU              gate, silu, up and product, 8f

    Without autocast, projections share one copy of their input. `compiled`: as torch.compile keeps them.
    """
    s = shape_of(model)
    h, a, k, f = s.hidden_size, s.num_heads * s.head_dim, s.num_key_value_heads * s.head_dim, s.intermediate_size
    width = 4 if arithmetic == "fp32" else 2
    if compiled and model.attn_implementation != "eager":
        return _compiled_layer_bytes(s, arithmetic)
    by_norm, statistics = _KEPT_BY_NORM[s.rms_norm][arithmetic], 4 if s.rms_norm else 8
    projections = (1 if isinstance(model, Gpt2Model) else 3) + (2 if s.gated else 1)  # GPT-2's q, k and v are one
    inputs = projections if arithmetic == "autocast" else 2
    kept = (2 * by_norm + inputs * width) * h + width * (2 * a + 2 * k + (4 if s.gated else 2) * f) + 2 * statistics
    if s.qk_norm:  # its input is bf16 under autocast too, and so RMSNorm's normed input
        by_head_norm = _KEPT_BY_NORM[s.rms_norm]["bf16" if s.rms_norm and width == 2 else arithmetic]
        kept += by_head_norm * (a + k) + statistics * (s.num_heads + s.num_key_value_heads)
    kept += _ACTIVATION_EXTRA.get(_activation(model), 0) * width * f
    if model.attn_implementation == "eager":  # scores: fp32 softmax and its bf16 copy; keys and values repeated for every head
        return kept + s.num_heads * sequence_length * (4 if width == 4 else 6) + width * 2 * (a - k)
    return kept + 4 * s.num_heads


def _compiled_layer_bytes(s: Shape, arithmetic: Arithmetic) -> int:
    """Return the bytes per token that a compiled layer keeps.

    The min-cut partitioner keeps what element-wise operations cannot recompute: the layer's input, the attention's output
    projection (their sum is recomputed), each product's input once, q, k, v and attention's output, gate, up and product. With
    post-norm: both norms' inputs, and the products' inputs.
    """
    h, a, k, f = s.hidden_size, s.num_heads * s.head_dim, s.num_key_value_heads * s.head_dim, s.intermediate_size
    width, stream, statistics = 4 if arithmetic == "fp32" else 2, 2 if arithmetic == "bf16" else 4, 4 if s.rms_norm else 8
    residual = 2 * stream + 2 * width if s.post_norm else stream + 3 * width
    kept = residual * h + width * (2 * a + 2 * k + (3 if s.gated else 2) * f) + 2 * statistics + 4 * s.num_heads
    if s.qk_norm:
        kept += width * (a + k) + statistics * (s.num_heads + s.num_key_value_heads)
    return kept


def _activation(model: Model) -> str:
    if isinstance(model, HybridModel):
        return model.mlp
    return model.activation_function if isinstance(model, Gpt2Model) else model.hidden_act


def _backward_bytes(model: Model, tokens: int, arithmetic: Arithmetic) -> int:
    """Return the bytes of gradients at the peak of a layer's backward pass, less what it has freed by then.

    The feed-forward's inner gradients (gate and up: two; GELU: one; a square: its gradient, twice its input and their product)
    and the residual stream's. A tied head's gradient is kept for the embedding's.
    """
    s = shape_of(model)
    inner = 3 if _activation(model) == "relu2" else 2 if s.gated else 1
    width = 4 if arithmetic == "fp32" else 2
    return tokens * (inner * width * s.intermediate_size + 2 * s.hidden_size) + (4 * head_parameters(model) if s.tied else 0)


def _loss_bytes(model: Model, tokens: int, arithmetic: Arithmetic, gpu: bool, compiled: bool) -> int:
    """Return the bytes from the last norm to the end of the chunked cross-entropy of `modeling.loss`, with its gradients."""
    s = shape_of(model)
    # The last norm's output, its copy in the matrix products' dtype, and the gradient of that. The last norm's kept input,
    # where no layer keeps it already; a compiled norm keeps only its input.
    per_token = {"autocast": 8, "bf16": 4, "fp32": 8}[arithmetic]
    if not s.post_norm:
        per_token += _KEPT_BY_NORM[s.rms_norm and not compiled][arithmetic]
    width, capped = 4 if arithmetic == "fp32" else 2, isinstance(model, HybridModel) and model.final_logit_softcapping
    rows = min(tokens, _chunk_rows(tokens, s.vocab_size, width, gpu))
    # A chunk's logits. A CPU also keeps some rows' logits and probabilities in fp32, and the slope of a soft cap; a GPU's
    # compiled softmax keeps neither. If more: a copy of the chunk's hidden states and, on a CPU in bf16, the gradient of a slice
    # of the head.
    softmax = 0 if gpu else (3 if capped else 1 if width == 4 else 2) * min(4 * rows * s.vocab_size, SOFTMAX_BYTES)
    of_head = 0 if gpu or width == 4 else 2 * min(s.vocab_size, HEAD_GRADIENT_ROWS)
    product = (width * rows + of_head) * s.hidden_size
    chunk = width * rows * s.vocab_size + max(softmax, product)
    cast = (
        2 * s.vocab_size * s.hidden_size if arithmetic == "bf16" else 0
    )  # the head's gradient in its weight's dtype, at the end
    return tokens * per_token * s.hidden_size + 4 * s.vocab_size * s.hidden_size + max(chunk, cast)


def _chunk_rows(rows: int, vocab_size: int, width: int, gpu: bool) -> int:
    """Return the rows of a chunk as `modeling.loss.rows_per_chunk` does."""
    if not gpu:
        return max(1, CHUNK_LOGITS_BYTES // (width * vocab_size))
    return math.ceil(rows / math.ceil(rows * width * vocab_size / GPU_CHUNK_LOGITS_BYTES) / 64) * 64


def largest_micro_batch(model: Model, training: Training, optimizer: Optimizer, launch: Launch, memory_bytes: int) -> int | None:
    """Return the largest micro-batch that divides the step's windows and is predicted to fit a device; 0 where none fits.

    None where the ranks do not divide the windows of a step.
    """
    windows, rest = divmod(training.tokens_per_step // training.sequence_length, launch.num_processes)
    if rest or not windows:
        return None
    fitting = 0
    for size in (m for m in range(1, min(windows, LARGEST_TRIED) + 1) if windows % m == 0):
        changed = training.model_copy(update={"micro_batch_size": size})
        chosen = with_reduction(launch, model, changed, optimizer, memory_bytes)
        if predicted_memory(model, changed, optimizer, chosen).total <= hardware.usable_bytes(memory_bytes):
            fitting = size
    return fitting
