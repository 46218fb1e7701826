"""The roofline behind docs/roofline.md: FLOPs, bytes and kernels of a training step by component, and the time each takes.

Entered by `step_costs` (what a step does) and `step_times` (what it takes on some hardware). Nothing here is measured but the
constants that say so. Not modelled: tile and wave quantization of matrix products, caches, host time besides kernel launches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from isoflop.config.recipe import Recipe
from isoflop.modeling.loss import rows_per_chunk
from isoflop.plan import cost, hardware

# What devices reach of their datasheets. Matrix products and copies: measured on an H100 SXM (large bf16 products of random
# numbers, a large copy). Assumption: an A6000 reaches the same shares.
MATRIX_SHARE, MEMORY_SHARE = 790e12 / 989e12, 3.0e12 / 3.35e12
# FlashAttention-2: 35% of an H100 (Shah et al. 2024, FlashAttention-3, abstract); 50% to 73% of an A100 (Dao 2023, abstract), of
# which the lower end is assumed for the A6000.
ATTENTION_SHARE = {"h100": 0.35, "a6000": 0.50}
# PCIe 4 x16: 20 of 32 GB/s in one direction. Assumption: NVLink reaches the same share.
LINK_SHARE = 20 / 32
NVLINK_BRIDGE_BYTES_PER_S = 112.5e9 / 2  # NVIDIA RTX A6000 datasheet: 112.5 GB/s bidirectional, between two cards
LAUNCH_S = 7e-6  # assumption: host time of one kernel from Python, of the usual 5 to 10 us

# The loss as it was written for a CPU's cache: bytes of logits a chunk, of fp32 logits a softmax block, rows of the head a slice.
OLD_CHUNK_BYTES, OLD_BLOCK_BYTES, OLD_SLICE_ROWS = 128 * 2**20, 16 * 2**20, 8192
# Cast, clamp, two maxima, gather, softmax, log, two differences, fill, scatter, copy, comparison, where, sum.
OLD_KERNELS_PER_BLOCK = 15
OLD_SOFTMAX_BYTES_PER_LOGIT = 28  # fp32 copy 2 + 4, maximum 4, softmax 4 + 4, maximum 4, gradient 4 + 2
# Compiled, by the code inductor generates for an H100: read once for maximum and sum of exponentials, a kernel for the loss, read
# and written for the gradient, 2 bytes each. A soft cap takes one pass more.
SOFTMAX_BYTES_PER_LOGIT, SOFTMAX_KERNELS = 6, 3

FUSED_BLOCK_ELEMENTS, FUSED_TENSORS = 320 * 65_536, 36  # of one multi-tensor launch (ATen/native/cuda/MultiTensorApply.cuh)

PRODUCTS, ATTENTION, ELEMENTWISE = "matrix products of the layers", "attention", "norms and element-wise"
WEIGHTS, LOSS = "weight casts, gradient sums, embedding", "loss"
OPTIMIZER, COMMUNICATION = "clipping and AdamW", "communication"
COMPONENTS = (PRODUCTS, ATTENTION, ELEMENTWISE, WEIGHTS, LOSS, OPTIMIZER, COMMUNICATION)

Variant = Literal["before", "eager", "compiled"]
"""Eager layers and the old loss; eager layers and the new loss; compiled layers and the new loss."""


class Machine(NamedTuple):
    """One or two GPUs of a kind, with rates reached rather than advertised."""

    title: str
    gpu: str
    num_gpus: int
    link_bytes_per_s: float
    """Reached, one direction, per GPU."""

    @property
    def peak_flops(self) -> float:
        """Datasheet bf16 FLOP/s of one GPU."""
        return hardware.GPUS[self.gpu].peak_bf16_flops

    @property
    def memory_bytes_per_s(self) -> float:
        """Reached device memory bandwidth."""
        return MEMORY_SHARE * hardware.GPUS[self.gpu].memory_bytes_per_s

    def flops_per_s(self, component: str) -> float:
        """Reached FLOP/s."""
        return self.peak_flops * (ATTENTION_SHARE[self.gpu] if component == ATTENTION else MATRIX_SHARE)


class Work(NamedTuple):
    """Some kernels of one kind: what they compute and move. Times of several kinds add up; within one the slower of two rules."""

    component: str
    flops: float = 0.0
    """Executed on matrix units."""
    bytes: float = 0.0
    """Through device memory; of communication, over the link."""
    kernels: float = 0.0
    counted_flops: float | None = None
    """As `cost.flops_per_token` counts them, where that is not what is executed."""


class Pass(NamedTuple):
    """Element-wise kernels of one layer: bytes per token for each dimension of a width."""

    name: str
    hidden: int = 0
    heads: int = 0
    """For each dimension of queries and keys together."""
    inner: int = 0
    """For each dimension of the feed-forward layer."""
    kernels: int = 0


# Bytes that each operation of transformers' Llama layer reads and writes, summed; a test dispatches a real layer and compares.
# autocast: fp32 weights and residual stream, bf16 products. bf16: what ZeRO-1 and FSDP2 compute with.
EAGER: dict[str, tuple[Pass, ...]] = {
    "autocast": (
        Pass("two RMSNorms in fp32: pow, mean, add, rsqrt, two products", hidden=56, kernels=12),
        Pass("their backward, with the sum of the residual gradient", hidden=208, kernels=32),
        Pass("inputs of q, k, v, gate, up: a bf16 copy each", hidden=30, kernels=5),
        Pass("their gradients: cast to fp32, summed", hidden=66, kernels=8),
        Pass("two residual sums in fp32; their gradients cast to bf16", hidden=32, kernels=4),
        Pass("rotary: 2 x (product, neg, cat, product, sum, cast)", heads=36, kernels=12),
        Pass("its backward, and copies of q's and k's gradients", heads=60, kernels=26),
        Pass("SwiGLU: SiLU, product; backward: two products, SiLU's", inner=28, kernels=5),
    ),
    "bf16": (
        Pass("two RMSNorms: cast to fp32, pow, mean, add, rsqrt, product, cast, product", hidden=72, kernels=16),
        Pass("their backward, with the sum of the residual gradient", hidden=196, kernels=34),
        Pass("gradients of q's, k's, v's and of gate's, up's input: summed", hidden=18, kernels=3),
        Pass("two residual sums", hidden=12, kernels=2),
        Pass("rotary: 2 x (product, neg, cat, product, sum)", heads=20, kernels=10),
        Pass("its backward, and copies of q's and k's gradients", heads=34, kernels=20),
        Pass("SwiGLU: SiLU, product; backward: two products, SiLU's", inner=28, kernels=5),
    ),
}
# What is left where each input is read once and each output written once between two matrix products, sums over tokens (the
# gradients of the norms' weights) apart; what the backward products need of the norms and SwiGLU is computed again.
COMPILED: dict[str, tuple[Pass, ...]] = {
    "autocast": (
        Pass("first norm: stream in, bf16 out", hidden=6, kernels=1),
        Pass("residual sum and second norm", hidden=12, kernels=1),
        Pass("last residual sum", hidden=10, kernels=1),
        Pass("rotary of q and k; backward", heads=8, kernels=4),
        Pass("SwiGLU; backward with its output once more", inner=18, kernels=2),
        Pass("incoming gradient cast to bf16", hidden=6, kernels=1),
        Pass("backward of both norms with the sums", hidden=36, kernels=2),
        Pass("gradients of both norms' weights", hidden=18, kernels=4),
        Pass("both normed inputs once more", hidden=12, kernels=2),
    ),
    "bf16": (
        Pass("first norm: stream in and out", hidden=4, kernels=1),
        Pass("residual sum and second norm", hidden=8, kernels=1),
        Pass("last residual sum", hidden=6, kernels=1),
        Pass("rotary of q and k; backward", heads=8, kernels=4),
        Pass("SwiGLU; backward with its output once more", inner=18, kernels=2),
        Pass("backward of both norms with the sums", hidden=22, kernels=2),
        Pass("gradients of both norms' weights", hidden=14, kernels=2),
        Pass("both normed inputs once more", hidden=8, kernels=2),
    ),
}
# The model's last norm, compiled on its own: forward and backward, bytes per token and dimension, and kernels.
EAGER_LAST_NORM = {"autocast": (28 + 92, 6 + 15), "bf16": (36 + 92, 8 + 16)}
COMPILED_LAST_NORM = {"autocast": (8 + 20, 1 + 3), "bf16": (4 + 10, 1 + 2)}


class Case(NamedTuple):
    """A recipe on a machine."""

    name: str
    recipe: Recipe
    machine: Machine
    launch: cost.Launch

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.recipe.training.micro_batch_size * self.recipe.training.sequence_length

    @property
    def micro_batches(self) -> int:
        """Of one GPU in a step."""
        return self.recipe.training.tokens_per_step // (self.tokens * self.machine.num_gpus)

    @property
    def shape(self) -> cost.Shape:
        """The model's."""
        return cost.shape_of(self.recipe.model)

    @property
    def parameters(self) -> int:
        """The model's."""
        return cost.parameters(self.recipe.model)

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Input and output widths of a layer's matrices: q, k, v, o, gate, up, down."""
        s = self.shape
        h, a, k, f = s.hidden_size, s.num_heads * s.head_dim, s.num_key_value_heads * s.head_dim, s.intermediate_size
        return [(h, a), (h, k), (h, k), (a, h), (h, f), (h, f), (f, h)]


def step_costs(case: Case, variant: Variant) -> list[Work]:
    """What one GPU does in an optimizer step."""
    micro_batch = [*layers(case, variant), *weights(case), *outside_layers(case, variant), *loss(case, variant)]
    return [repeated(work, case.micro_batches) for work in micro_batch] + [*update(case), *communication(case)]


def repeated(work: Work, times: int) -> Work:
    """The same several times."""
    counted = None if work.counted_flops is None else work.counted_flops * times
    return Work(work.component, work.flops * times, work.bytes * times, work.kernels * times, counted)


def product(component: str, rows: int, inner: int, columns: int, output_bytes: int = 2) -> Work:
    """(rows, inner) @ (inner, columns) of bf16 matrices; `output_bytes` 8: read and written in fp32."""
    moved = 2 * (rows * inner + inner * columns) + output_bytes * rows * columns
    return Work(component, 2 * rows * inner * columns, moved, 1)


def layers(case: Case, variant: Variant) -> Iterator[Work]:
    """Matrix products, attention and element-wise kernels of all layers, for one micro-batch."""
    s, tokens = case.shape, case.tokens
    a, k, number = s.num_heads * s.head_dim, s.num_key_value_heads * s.head_dim, s.num_layers
    for wide, out in case.matrices:  # forward, gradient of the input, gradient of the weight: the same sizes turned
        yield repeated(product(PRODUCTS, tokens, wide, out), 3 * number)
    # Two products forward, counted whole; a causal kernel does half of them. Five backward, since scores are computed again,
    # where four are counted. q, k, v and o are bf16; backward reads them with o's gradient and writes those of q, k and v.
    pair = 4 * tokens * case.recipe.training.sequence_length * a
    yield repeated(Work(ATTENTION, pair / 2, 2 * tokens * (2 * a + 2 * k), 1, pair), number)
    yield repeated(Work(ATTENTION, 2.5 * pair / 2, 2 * tokens * (4 * a + 4 * k), 3, 2 * pair), number)
    passes = COMPILED if variant == "compiled" else EAGER
    for each in passes[case.launch.arithmetic]:
        per_token = each.hidden * s.hidden_size + each.heads * (a + k) + each.inner * s.intermediate_size
        yield repeated(Work(ELEMENTWISE, 0, tokens * per_token, each.kernels), number)


def weights(case: Case) -> Iterator[Work]:
    """What is done to the layers' weights and gradients in every micro-batch, whatever its size; compiling changes none of it."""
    matrices = sum(wide * out for wide, out in case.matrices)
    number, n, shards = case.shape.num_layers, case.parameters, case.launch.shards
    if case.launch.arithmetic == "autocast":
        yield repeated(Work(WEIGHTS, 0, 6 * matrices, 7), number)  # fp32 weights to bf16
        yield repeated(Work(WEIGHTS, 0, 6 * matrices, 7), number)  # bf16 gradients to fp32
        yield repeated(Work(WEIGHTS, 0, 12 * matrices, 7), number)  # added to what is there
        return
    # FSDP2: shards cast to bf16 and packed, and unpacked when they have come; twice, for forward and backward.
    yield Work(WEIGHTS, 0, 2 * (6 * n / shards + 4 * n), 4 * (number + 2))
    # Gradients packed in fp32, and the reduced ones added to the shards, tensor by tensor.
    yield Work(WEIGHTS, 0, 6 * n + 12 * n / shards, (1 + 9) * number)


def outside_layers(case: Case, variant: Variant) -> Iterator[Work]:
    """Embedding and last norm."""
    hidden, table = case.shape.hidden_size, case.shape.vocab_size * case.shape.hidden_size
    width = 4 if case.launch.arithmetic == "autocast" else 2
    last_norm = COMPILED_LAST_NORM if variant == "compiled" else EAGER_LAST_NORM
    norm_bytes, norm_kernels = last_norm[case.launch.arithmetic]
    yield Work(ELEMENTWISE, 0, case.tokens * norm_bytes * hidden, norm_kernels)
    yield Work(WEIGHTS, 0, 2 * width * case.tokens * hidden, 1)  # gather
    yield Work(WEIGHTS, 0, width * (table + 2 * case.tokens * hidden), 8)  # zeros, sorted ids, sums
    if case.launch.arithmetic == "autocast":
        yield Work(WEIGHTS, 0, 12 * table, 1)  # added to what is there, or to the tied head's


def loss(case: Case, variant: Variant) -> Iterator[Work]:
    """From the last norm's output to the gradients of it and of the head, chunk by chunk."""
    vocab, hidden, tokens = case.shape.vocab_size, case.shape.hidden_size, case.tokens
    table, autocast, old = vocab * hidden, case.launch.arithmetic == "autocast", variant == "before"
    chunk = OLD_CHUNK_BYTES // (2 * vocab) if old else rows_per_chunk(tokens, vocab, 2, gpu=True)
    for start in range(0, tokens, chunk):
        rows = min(chunk, tokens - start)
        yield product(LOSS, rows, hidden, vocab)
        yield product(LOSS, rows, vocab, hidden)
        yield Work(LOSS, 0, 8 * rows * hidden, 4)  # rows without a target set to zero; the chunk's loss added
        if not old:
            yield Work(LOSS, 0, SOFTMAX_BYTES_PER_LOGIT * rows * vocab, SOFTMAX_KERNELS)
            yield product(LOSS, vocab, rows, hidden, output_bytes=8)
            continue
        blocks, slices = math.ceil(rows / (OLD_BLOCK_BYTES // (4 * vocab))), math.ceil(vocab / OLD_SLICE_ROWS)
        yield Work(LOSS, 0, OLD_SOFTMAX_BYTES_PER_LOGIT * rows * vocab, OLD_KERNELS_PER_BLOCK * blocks + 2)
        yield product(LOSS, vocab, rows, hidden)._replace(kernels=slices)
        yield Work(LOSS, 0, 10 * table, slices)  # the bf16 product added to the fp32 sum
    yield Work(LOSS, 0, 4 * table + 8 * table, 2)  # zeros; scaled by the incoming gradient
    if autocast:  # head and hidden states to bf16; their gradients: to fp32, and added to what is there
        yield Work(LOSS, 0, (6 + 12) * table, 2)
        yield Work(LOSS, 0, (6 + 4 + 6) * tokens * hidden, 3)
    else:  # the head's gradient to bf16
        yield Work(LOSS, 0, 6 * table + 4 * tokens * hidden, 2)


def update(case: Case) -> Iterator[Work]:
    """Clipping (norm, scale) and fused AdamW (weights, gradients and two moments read, all but gradients written)."""
    held = case.parameters / case.launch.shards
    tensors = 9 * case.shape.num_layers + (2 if case.shape.tied else 3)
    launches = math.ceil(held / FUSED_BLOCK_ELEMENTS) + math.ceil(tensors / FUSED_TENSORS)
    yield Work(OPTIMIZER, 0, (4 + 8) * held, 2 * launches)
    yield Work(OPTIMIZER, 0, 28 * held, launches)
    if case.launch.engine == "ddp":  # buckets divided by the number of ranks, and set to zero
        yield Work(OPTIMIZER, 0, (8 + 4) * held, 2 * launches)


class Traffic(NamedTuple):
    """Bytes that a GPU sends (and receives) in a step."""

    each_micro_batch: float
    """Gradients reduced after every micro-batch."""
    once: float
    """Gradients reduced once a step."""
    kept: float
    """And FSDP2's weights gathered once a step."""


def traffic(case: Case, engine: cost.Engine, num_gpus: int, micro_batches: int) -> Traffic:
    """Ring collectives: of B bytes each GPU sends (n - 1) / n in a gather or a reduce-scatter, twice that in an all-reduce.

    DDP and DeepSpeed's ZeRO-1 all-reduce fp32 gradients, which ZeRO-1 follows by a gather of bf16 weights. FSDP2 gathers bf16
    weights for forward and again for backward, the head once, and reduce-scatters fp32 gradients.
    """
    ring, n = (num_gpus - 1) / num_gpus, case.parameters
    if engine != "fsdp2":
        reduced, after = 2 * ring * 4 * n, 2 * ring * n if engine == "zero1" else 0.0
        return Traffic(micro_batches * reduced + after, reduced + after, reduced + after)
    head = case.shape.vocab_size * case.shape.hidden_size
    gathered, reduced = ring * 2 * (2 * n - head), ring * 4 * n
    return Traffic(micro_batches * (gathered + reduced), micro_batches * gathered + reduced, ring * 2 * n + reduced)


def communication(case: Case) -> Iterator[Work]:
    """As it was: FSDP2 reduces after every micro-batch, the others once a step."""
    launch, m = case.launch, case.micro_batches
    if launch.num_processes == 1:
        return
    moved = traffic(case, launch.engine, launch.num_processes, m)
    if launch.engine == "fsdp2":
        yield Work(COMMUNICATION, 0, moved.each_micro_batch, 3 * m * (case.shape.num_layers + 2))
    else:
        yield Work(COMMUNICATION, 0, moved.once, math.ceil(4 * case.parameters / (25 * 2**20)))  # DDP's buckets of 25 MiB


class Time(NamedTuple):
    """A component's part in a step of one GPU."""

    flops: float
    bytes: float
    kernels: float
    device_s: float
    """Without launches."""
    seconds: float
    bound: str
    """`arithmetic`, `memory`, `launches` or `link`."""


def step_times(machine: Machine, works: Iterable[Work]) -> dict[str, Time]:
    """Time by component: the longer of arithmetic and traffic for each kind of kernel, and at least the component's launches.

    Launches bind where the host cannot keep ahead. That is asked of each component, since the queue that one with long kernels
    fills holds about a thousand kernels.
    """
    works, times = list(works), {}
    for component in COMPONENTS:
        own = [work for work in works if work.component == component]
        if not own:
            continue
        bytes_per_s = machine.link_bytes_per_s if component == COMMUNICATION else machine.memory_bytes_per_s
        pairs = [(work.flops / machine.flops_per_s(component), work.bytes / bytes_per_s) for work in own]
        device = sum(max(pair) for pair in pairs)
        kernels = sum(work.kernels for work in own)
        slow = "link" if component == COMMUNICATION else "memory"
        by_arithmetic = sum(arithmetic for arithmetic, moved in pairs if arithmetic >= moved)
        bound = "launches" if kernels * LAUNCH_S > device else "arithmetic" if by_arithmetic > device / 2 else slow
        sums = (sum(work.flops for work in own), sum(work.bytes for work in own))
        times[component] = Time(*sums, kernels, device, max(device, kernels * LAUNCH_S), bound)
    return times


def step_s(times: dict[str, Time], overlapped: bool = False) -> float:
    """Seconds of a step; communication beside everything else or after it."""
    compute = sum(time.seconds for component, time in times.items() if component != COMMUNICATION)
    wire = times[COMMUNICATION].seconds if COMMUNICATION in times else 0.0
    return max(compute, wire) if overlapped else compute + wire


def mfu(case: Case, seconds: float) -> float:
    """Counted FLOPs of a step over what the datasheet allows in that time."""
    training = case.recipe.training
    flops = training.tokens_per_step * cost.flops_per_token(case.recipe.model, training.sequence_length)
    return flops / (seconds * case.machine.num_gpus * case.machine.peak_flops)
