"""Exact parameters, FLOPs and bytes of a model. No torch, no network.

The tests compare the arithmetic with transformers' own modules on the meta device.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from isoflop.config.recipe import LARGEST_TRIED, Gpt2Model, HybridModel, LlamaModel, Model, Training
from isoflop.config.recipe_optimizer import Optimizer
from isoflop.plan import hardware

# Copied from `modeling.loss`, which imports nothing of this package; a test keeps them equal.
CHUNK_LOGITS_BYTES, SOFTMAX_BYTES, HEAD_GRADIENT_ROWS = 128 * 2**20, 16 * 2**20, 8192
GPU_CHUNK_LOGITS_BYTES = 2**30


class Shape(NamedTuple):
    """Sizes of a decoder that decide its cost, under common names for every config class."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    positions: int = 0
    """Rows of a learned position embedding."""
    gated: bool = True
    """Three matrices in the feed-forward layer instead of two."""
    rms_norm: bool = True
    norm_bias: bool = False
    post_norm: bool = False
    """Norms after each sum: the last layer's is the model's last."""
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def shape_of(model: Model) -> Shape:
    """Return the shape that a recipe's model section describes."""
    if isinstance(model, Gpt2Model):
        inner = model.n_inner or 4 * model.n_embd
        heads, head_dim = model.n_head, model.n_embd // model.n_head
        return Shape(
            model.n_layer, model.n_embd, heads, heads, head_dim, inner, model.vocab_size, model.tie_word_embeddings,
            positions=model.n_positions, gated=False, rms_norm=False, norm_bias=True, attention_bias=True, mlp_bias=True,
        )  # fmt: skip
    heads = model.num_attention_heads
    shape = Shape(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_heads=heads,
        num_key_value_heads=model.num_key_value_heads or heads,
        head_dim=model.head_dim or model.hidden_size // heads,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        tied=model.tie_word_embeddings,
    )
    if isinstance(model, LlamaModel):
        return shape
    return shape._replace(
        positions=model.max_position_embeddings if model.positions == "learned" else 0, gated=model.mlp == "swiglu",
        rms_norm=model.norm == "rmsnorm", norm_bias=model.norm_bias, post_norm=model.norm_position == "post",
        attention_bias=model.attention_bias, mlp_bias=model.mlp_bias, qk_norm=model.qk_norm,
    )  # fmt: skip


def shape_dict(model: Model) -> dict[str, Any]:
    """Return a shape under transformers' LLaMA names, for JSON, whichever config class it is."""
    s = shape_of(model)
    return {
        "model_type": model.model_type,
        "num_hidden_layers": s.num_layers,
        "hidden_size": s.hidden_size,
        "num_attention_heads": s.num_heads,
        "num_key_value_heads": s.num_key_value_heads,
        "head_dim": s.head_dim,
        "intermediate_size": s.intermediate_size,
        "vocab_size": s.vocab_size,
        "tie_word_embeddings": s.tied,
    }


def parameters_by_class(model: Model) -> dict[str, int]:
    """Return the parameters of each class; a tied head counts once, as the embedding."""
    s = shape_of(model)
    h, a, k, f = s.hidden_size, s.num_heads * s.head_dim, s.num_key_value_heads * s.head_dim, s.intermediate_size
    matrices = 3 if s.gated else 2
    per_norm = 2 if s.norm_bias else 1  # parameters for each dimension
    return {
        "embedding": s.vocab_size * h,
        "position": s.positions * h,
        "attention": s.num_layers * (2 * h * a + 2 * h * k + (a + 2 * k + h if s.attention_bias else 0)),
        "ffn": s.num_layers * (matrices * h * f + ((matrices - 1) * f + h if s.mlp_bias else 0)),
        "norm": per_norm * (s.num_layers * (2 * h + (2 * s.head_dim if s.qk_norm else 0)) + (0 if s.post_norm else h)),
        "head": 0 if s.tied else s.vocab_size * h,
    }


def parameters(model: Model) -> int:
    """Return the number of all parameters; tied ones count once."""
    return sum(parameters_by_class(model).values())


def flops_per_token(model: Model, sequence_length: int) -> int:
    """Return training FLOPs per token = 3 x forward; forward = 2 x matmul parameters + 4 S H_attention per layer.

    Matmul parameters are attention, feed-forward and the LM head (tied or not), without the input embedding; biases
    and norms are left out. Attention is not halved for causality, the convention of PaLM (Chowdhery et al. 2022, appendix B).
    """
    s = shape_of(model)
    attention = 4 * sequence_length * s.num_heads * s.head_dim * s.num_layers
    return 3 * (2 * matmul_parameters(model) + attention)


def matmul_parameters(model: Model) -> int:
    """Return the parameters of matrix products: attention, feed-forward and the LM head, tied or not."""
    s = shape_of(model)
    attention = 2 * s.hidden_size * s.num_heads * s.head_dim + 2 * s.hidden_size * s.num_key_value_heads * s.head_dim
    ffn = (3 if s.gated else 2) * s.hidden_size * s.intermediate_size
    return s.num_layers * (attention + ffn) + _head_parameters(model)


def _head_parameters(model: Model) -> int:
    return model.vocab_size * shape_of(model).hidden_size


def optimizer_bytes_per_parameter(optimizer: Optimizer) -> int:
    """Return the bytes per parameter of AdamW's two moments: 8 in float32, 4 in bfloat16."""
    return 8 if optimizer.moments_dtype == "float32" else 4


def checkpoint_bytes(model: Model, optimizer: Optimizer) -> int:
    """Return the bytes of one checkpoint: float32 weights and the optimizer's moments (a tied head is stored once)."""
    return parameters(model) * (4 + optimizer_bytes_per_parameter(optimizer))


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

    bf16 moments take 4 instead of 8.
    """
    n, shards, mode, compiled = parameters(model), launch.shards, launch.arithmetic, launch.compiles(training)
    moments = n * optimizer_bytes_per_parameter(optimizer) // shards
    matrices = matmul_parameters(model)
    layer, head = (matrices - _head_parameters(model)) // shape_of(model).num_layers, _head_parameters(model)
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


def communicated_bytes(model: Model, training: Training, launch: Launch) -> int:
    """Return the bytes that each rank sends in an optimizer step over rings.

    A gather or a reduce-scatter of x bytes sends (p - 1) / p x. DDP all-reduces fp32 gradients once. ZeRO-1 reduce-scatters them
    and gathers the updated weights. FSDP2 gathers weights for the forward and the backward pass of every micro-batch. It
    reduce-scatters fp32 gradients once a step or every micro-batch; with replicas (HSDP) it all-reduces the shards as often.
    """
    n, p, width = parameters(model), launch.num_processes, 2 if launch.bf16 else 4
    if launch.engine == "single":
        return 0
    if launch.engine == "ddp":
        return 2 * 4 * n * (p - 1) // p
    if launch.engine == "zero1":
        return (4 + width) * n * (p - 1) // p
    micro_batches = training.tokens_per_step // (training.micro_batch_size * training.sequence_length * p)
    reductions = 1 if launch.reduction == "step" else micro_batches
    shards, replicas = launch.shards, p // launch.shards
    gathered = 2 * width * n * (shards - 1) // shards
    reduced = 4 * n * (shards - 1) // shards + 2 * 4 * n // shards * (replicas - 1) // replicas
    return micro_batches * gathered + reductions * reduced


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
    return tokens * (inner * width * s.intermediate_size + 2 * s.hidden_size) + (4 * _head_parameters(model) if s.tied else 0)


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
