"""What a model costs, exactly: parameters, FLOPs, bytes. No torch, no network.

The arithmetic is held against transformers' own modules on the meta device by the tests.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from isoflop import hardware
from isoflop.recipe import LARGEST_TRIED, Gpt2Model, HybridModel, LlamaModel, Model, Optimizer, Training

# Of `modeling.loss`, which stands alone; a test holds them equal.
CHUNK_LOGITS_BYTES, SOFTMAX_BYTES, HEAD_GRADIENT_ROWS = 128 * 2**20, 16 * 2**20, 8192
GPU_CHUNK_LOGITS_BYTES = 2**30


class Shape(NamedTuple):
    """What of a decoder its costs follow from, under common names, whichever config class it came from."""

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
    """The shape that a recipe's model section describes."""
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


def parameters_by_class(model: Model) -> dict[str, int]:
    """Parameters of each class; a tied head counts once, as the embedding."""
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
    """All parameters, tied ones once."""
    return sum(parameters_by_class(model).values())


def flops_per_token(model: Model, sequence_length: int) -> int:
    """Training FLOPs per token = 3 x forward; forward = 2 x matmul parameters + 4 S H_attention per layer.

    Matmul parameters are attention, feed-forward and the LM head (tied or not), without the input embedding; biases
    and norms are left out. Attention is not halved for causality, the convention of PaLM (Chowdhery et al. 2022, appendix B).
    """
    s = shape_of(model)
    attention = 4 * sequence_length * s.num_heads * s.head_dim * s.num_layers
    return 3 * (2 * matmul_parameters(model) + attention)


def matmul_parameters(model: Model) -> int:
    """Parameters that matrix products run over: attention, feed-forward and the head, tied or not."""
    s = shape_of(model)
    attention = 2 * s.hidden_size * s.num_heads * s.head_dim + 2 * s.hidden_size * s.num_key_value_heads * s.head_dim
    ffn = (3 if s.gated else 2) * s.hidden_size * s.intermediate_size
    return s.num_layers * (attention + ffn) + _head_parameters(model)


def _head_parameters(model: Model) -> int:
    return model.vocab_size * shape_of(model).hidden_size


def optimizer_bytes_per_parameter(optimizer: Optimizer) -> int:
    """AdamW's two moments: 8 bytes a parameter in float32, 4 in bfloat16."""
    return 8 if optimizer.moments_dtype == "float32" else 4


def checkpoint_bytes(model: Model, optimizer: Optimizer) -> int:
    """Bytes of one checkpoint: float32 weights and the optimizer's moments (a tied head is stored once)."""
    return parameters(model) * (4 + optimizer_bytes_per_parameter(optimizer))


Engine = Literal["single", "ddp", "zero1", "fsdp2"]
Reduction = Literal["step", "micro_batch"]
Arithmetic = Literal["fp32", "autocast", "bf16"]  # what a forward pass keeps; bf16: weights are bf16 themselves


class Launch(NamedTuple):
    """How a run is launched, as far as memory and time depend on it."""

    name: str
    engine: Engine
    num_processes: int = 1
    bf16: bool = True
    """Matrix products in bf16: by autocast over fp32 weights, or over the bf16 copies of ZeRO-1 and FSDP2."""
    shards: int = 1
    """Processes that the optimizer state (and under FSDP2 weights and gradients) is divided over."""
    gpu: bool = False
    """On a GPU, where `training.compile: auto` compiles and the loss takes larger chunks."""
    reduction: Reduction = "micro_batch"
    """When FSDP2 reduces gradients over the ranks; see `gradient_reduction`. The other engines always reduce once a step."""

    def compiles(self, training: Training) -> bool:
        """Whether the decoder layers are compiled."""
        return self.gpu if training.compile == "auto" else training.compile

    @property
    def arithmetic(self) -> Arithmetic:
        """What the activations of a forward pass are kept in."""
        if not self.bf16:
            return "fp32"
        return "bf16" if self.engine in ("zero1", "fsdp2") else "autocast"


class Memory(NamedTuple):
    """Bytes on one device at the moment of the peak, between forward and backward of a micro-batch after the first."""

    weights: int
    gradients: int
    moments: int
    weight_copies: int
    """bf16 copies that autocast makes and backward holds; under FSDP2 the layers that are whole at the moment."""
    activations: int
    """What layers keep for the backward pass; with checkpointing each layer's input."""
    loss: int
    """Last norm to loss: hidden states and their gradient, a chunk of logits, the head's gradient. Or, where that is more, one
    layer's backward pass (with checkpointing, its recomputed activations too)."""

    @property
    def total(self) -> int:
        """Peak bytes of the allocator; the CUDA context and fragmentation come on top (`usable_bytes`)."""
        return sum(self)


def predicted_memory(model: Model, training: Training, optimizer: Optimizer, launch: Launch) -> Memory:
    """Peak memory of one device, without dropout (whose masks come on top).

    States: single and DDP hold 4 (weights) + 4 (gradients, which are DDP's buckets) + 8 bytes a parameter; ZeRO-1, as DeepSpeed
    does it with bf16 weights and fp32 accumulation, 2 + 4 and (4 + 8) / shards; FSDP2 (4 + 4 + 8) / shards, or with gradients
    reduced once a step 4 instead of 4 / shards for them. bf16 moments take 4 instead of 8.
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
        # Two layers whole (one computed, one fetched ahead), embedding and head all along, one layer's gradients in fp32.
        copies = (2 if launch.bf16 else 4) * (2 * layer + head * (1 if shape_of(model).tied else 2)) + 4 * layer
    layer_bytes = tokens * layer_activation_bytes(model, training.sequence_length, mode, compiled)
    loss, backward = _loss_bytes(model, tokens, mode, launch.gpu, compiled), _backward_bytes(model, tokens, mode)
    if compiled and launch.engine != "fsdp2":  # whose copies have them: a compiled layer hands over all its gradients at its end
        backward += (2 if mode == "bf16" else 4) * layer
    kept = shape_of(model).num_layers * layer_bytes
    if training.activation_checkpointing:
        stream = 2 if mode == "bf16" else 4
        kept = tokens * shape_of(model).num_layers * stream * shape_of(model).hidden_size
        loss = max(loss, layer_bytes + backward - copies)
    memory = Memory(weights, gradients, moments, copies, kept, max(loss, backward))
    if micro_batches == 1 and launch.engine in ("single", "fsdp2"):
        # Gradients come as activations go: the peak is before the first or after the last of them.
        before, after = memory._replace(gradients=0), memory._replace(weight_copies=0, activations=layer_bytes, loss=backward)
        return max(before, after, key=lambda moment: moment.total)
    return memory


def with_reduction(launch: Launch, model: Model, training: Training, optimizer: Optimizer, memory_bytes: int) -> Launch:
    """The launch with the gradient reduction that the recipe names; under `auto` once a step where that is predicted to fit a
    device of `memory_bytes`, since it moves 1 / accumulation of the gradients' bytes, else after every micro-batch."""
    if launch.engine != "fsdp2":
        return launch._replace(reduction="step")
    if training.gradient_reduction != "auto":
        return launch._replace(reduction=training.gradient_reduction)
    once = launch._replace(reduction="step")
    fits = predicted_memory(model, training, optimizer, once).total <= hardware.usable_bytes(memory_bytes)
    return once if fits else launch._replace(reduction="micro_batch")


def communicated_bytes(model: Model, training: Training, launch: Launch) -> int:
    """Bytes that each rank sends in an optimizer step, by rings: a gather or a reduce-scatter of x bytes sends (p - 1) / p x.

    DDP all-reduces fp32 gradients once. ZeRO-1 reduce-scatters them and gathers the updated weights. FSDP2 gathers weights for
    the forward and the backward pass of every micro-batch and reduce-scatters fp32 gradients once a step or every time; with
    replicas (HSDP) the shards of gradients are all-reduced as often.
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


# Tensors of feed-forward width beyond silu's or GELU's input and output: gelu_new is written out in seven operations, relu keeps
# its output alone. relu2 keeps relu's output, and its square as the next product's input.
_ACTIVATION_EXTRA = {"gelu_new": 3, "relu": -1}
# Bytes a dimension that a norm keeps: LayerNorm its input, RMSNorm its input in fp32 and the normed input; and of statistics.
_KEPT_BY_NORM = {
    True: {"autocast": 8, "bf16": 6, "fp32": 8},  # RMSNorm
    False: {"autocast": 4, "bf16": 2, "fp32": 4},
}


def layer_activation_bytes(model: Model, sequence_length: int, arithmetic: Arithmetic, compiled: bool = False) -> int:
    """Bytes a token that one decoder layer keeps for its backward pass, h hidden, a query width, k key width, f feed-forward.

    Counted from what each operation of transformers' own layers saves, e.g. Llama under autocast: two RMSNorms keep input and
    normed input in fp32 (8h each); q, k, v, gate and up each a bf16 copy of their input (2h each); attention q, k, v, output
    (4a + 4k); SwiGLU gate, silu, up, product (8f): 26h + 4a + 4k + 8f. And the norms' and attention's statistics. Without
    autocast projections keep their input, the norm's output, once between them. `compiled`: what torch.compile keeps instead.
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
    if model.attn_implementation == "eager":  # the scores: softmax in fp32, and its bf16 copy; keys and values for every head
        return kept + s.num_heads * sequence_length * (4 if width == 4 else 6) + width * 2 * (a - k)
    return kept + 4 * s.num_heads


def _compiled_layer_bytes(s: Shape, arithmetic: Arithmetic) -> int:
    """The same of a compiled layer, whose min-cut partitioner keeps what it cannot recompute by element-wise operations: the
    layer's input, the attention's output projection (the sum of the two is recomputed), the products' inputs once, q, k, v and
    attention's output, gate, up and product. With norms after the sums: both norms' inputs, and the products' inputs."""
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
    """Gradients alive at the peak of a layer's backward pass, beyond what it has freed by then.

    The feed-forward's inner gradients (two for gate and up, one for GELU; of a square the gradient, twice its input and their
    product) and the residual stream's; where the head is tied, its gradient waits for the embedding's.
    """
    s = shape_of(model)
    inner = 3 if _activation(model) == "relu2" else 2 if s.gated else 1
    width = 4 if arithmetic == "fp32" else 2
    return tokens * (inner * width * s.intermediate_size + 2 * s.hidden_size) + (4 * _head_parameters(model) if s.tied else 0)


def _loss_bytes(model: Model, tokens: int, arithmetic: Arithmetic, gpu: bool, compiled: bool) -> int:
    """From the last norm to the end of the chunked cross-entropy of `modeling.loss`, with its gradients."""
    s = shape_of(model)
    # The last norm's output, the same in the matrix products' type where that is another, the gradient of that; and what the last
    # norm keeps, where a layer has not kept it already: compiled its input alone.
    per_token = {"autocast": 8, "bf16": 4, "fp32": 8}[arithmetic]
    if not s.post_norm:
        per_token += _KEPT_BY_NORM[s.rms_norm and not compiled][arithmetic]
    width, capped = 4 if arithmetic == "fp32" else 2, isinstance(model, HybridModel) and model.final_logit_softcapping
    rows = min(tokens, _chunk_rows(tokens, s.vocab_size, width, gpu))
    # A chunk's logits. On a CPU, beside them some rows' logits and probabilities in fp32, and the slope of a soft cap; on a GPU
    # the compiled softmax holds neither. Or, if more, the chunk's hidden states once more and, on a CPU, in the narrow type, the
    # gradient of a slice of the head; fp32 adds in place.
    softmax = 0 if gpu else (3 if capped else 1 if width == 4 else 2) * min(4 * rows * s.vocab_size, SOFTMAX_BYTES)
    of_head = 0 if gpu or width == 4 else 2 * min(s.vocab_size, HEAD_GRADIENT_ROWS)
    product = (width * rows + of_head) * s.hidden_size
    chunk = width * rows * s.vocab_size + max(softmax, product)
    cast = (
        2 * s.vocab_size * s.hidden_size if arithmetic == "bf16" else 0
    )  # the head's gradient, at the end, to its weight's type
    return tokens * per_token * s.hidden_size + 4 * s.vocab_size * s.hidden_size + max(chunk, cast)


def _chunk_rows(rows: int, vocab_size: int, width: int, gpu: bool) -> int:
    """`modeling.loss.rows_per_chunk`."""
    if not gpu:
        return max(1, CHUNK_LOGITS_BYTES // (width * vocab_size))
    return math.ceil(rows / math.ceil(rows * width * vocab_size / GPU_CHUNK_LOGITS_BYTES) / 64) * 64


def largest_micro_batch(model: Model, training: Training, optimizer: Optimizer, launch: Launch, memory_bytes: int) -> int | None:
    """The largest micro-batch whose prediction fits a device and that divides the step's windows; 0 where none fits.

    None where the processes do not divide the windows of a step.
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
