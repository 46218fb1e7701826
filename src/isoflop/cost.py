"""What a model costs, exactly: parameters, FLOPs, bytes, and what hardware can give. No torch, no network.

The arithmetic is held against transformers' own modules on the meta device by the tests.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from isoflop.recipe import Gpt2Model, LlamaModel, Optimizer

# Peak dense bf16 tensor throughput in FLOP/s, by a pattern of the device's name, from the vendors' datasheets (without
# structured sparsity). Variants with other clocks (NVL, D, Laptop) are not these cards: they have no MFU, never a guess.
PEAK_BF16_FLOPS = {
    r"\bH100 PCIe\b": 756e12,
    r"\bH100\b(?! (PCIe|NVL))": 989e12,
    r"\bH200\b(?! NVL)": 989e12,
    r"\bH20\b": 148e12,
    r"\bB200\b": 2250e12,
    r"\bA100\b": 312e12,
    r"\bRTX A6000\b": 154.85e12,
    r"\bRTX 4090\b(?! (D|Laptop))": 165.2e12,
    r"\bRTX 5090\b(?! (D|Laptop))": 209.5e12,
}


class Shape(NamedTuple):
    """A decoder's dimensions under common names, whichever config class they came from."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool


def shape_of(model: Gpt2Model | LlamaModel) -> Shape:
    """The shape that a recipe's model section describes."""
    if isinstance(model, Gpt2Model):
        inner = model.n_inner or 4 * model.n_embd
        heads, head_dim = model.n_head, model.n_embd // model.n_head
        return Shape(model.n_layer, model.n_embd, heads, heads, head_dim, inner, model.vocab_size, model.tie_word_embeddings)
    heads = model.num_attention_heads
    return Shape(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_heads=heads,
        num_key_value_heads=model.num_key_value_heads or heads,
        head_dim=model.head_dim or model.hidden_size // heads,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        tied=model.tie_word_embeddings,
    )


def parameters_by_class(model: Gpt2Model | LlamaModel) -> dict[str, int]:
    """Parameters of each class; a tied head counts once, as the embedding."""
    s = shape_of(model)
    attention_width = s.num_heads * s.head_dim
    attention = 2 * s.hidden_size * attention_width + 2 * s.hidden_size * s.num_key_value_heads * s.head_dim
    if isinstance(model, Gpt2Model):  # two-matrix feed-forward, LayerNorm, a bias everywhere, learned positions
        position = model.n_positions * s.hidden_size
        attention += 4 * s.hidden_size
        ffn = 2 * s.hidden_size * s.intermediate_size + s.intermediate_size + s.hidden_size
        norm = 2 * s.hidden_size
    else:  # gate, up and down without biases, RMSNorm, rotary positions
        position = 0
        ffn = 3 * s.hidden_size * s.intermediate_size
        norm = s.hidden_size
    return {
        "embedding": s.vocab_size * s.hidden_size,
        "position": position,
        "attention": s.num_layers * attention,
        "ffn": s.num_layers * ffn,
        "norm": (2 * s.num_layers + 1) * norm,
        "head": 0 if s.tied else s.vocab_size * s.hidden_size,
    }


def parameters(model: Gpt2Model | LlamaModel) -> int:
    """All parameters, tied ones once."""
    return sum(parameters_by_class(model).values())


def flops_per_token(model: Gpt2Model | LlamaModel, sequence_length: int) -> int:
    """Training FLOPs per token = 3 x forward; forward = 2 x matmul parameters + 4 S H_attention per layer.

    Matmul parameters are attention, feed-forward and the LM head (tied or not), without the input embedding; biases
    and norms are left out. Attention is not halved for causality, the convention of PaLM (Chowdhery et al. 2022, appendix B).
    """
    s = shape_of(model)
    attention_width = s.num_heads * s.head_dim
    matrices = 3 if isinstance(model, LlamaModel) else 2
    per_layer = 2 * s.hidden_size * attention_width + 2 * s.hidden_size * s.num_key_value_heads * s.head_dim
    per_layer += matrices * s.hidden_size * s.intermediate_size
    matmul_parameters = s.num_layers * per_layer + s.vocab_size * s.hidden_size
    return 3 * (2 * matmul_parameters + 4 * sequence_length * attention_width * s.num_layers)


def optimizer_bytes_per_parameter(optimizer: Optimizer) -> int:
    """AdamW's two moments: 8 bytes a parameter in float32, 4 in bfloat16."""
    return 8 if optimizer.moments_dtype == "float32" else 4


def checkpoint_bytes(model: Gpt2Model | LlamaModel, optimizer: Optimizer) -> int:
    """Bytes of one checkpoint: float32 weights and the optimizer's moments (a tied head is stored once)."""
    return parameters(model) * (4 + optimizer_bytes_per_parameter(optimizer))


def peak_bf16_flops(device_name: str) -> float | None:
    """Datasheet peak of a device by its name, in FLOP/s; None where the name is not known."""
    return next((peak for pattern, peak in PEAK_BF16_FLOPS.items() if re.search(pattern, device_name, re.IGNORECASE)), None)
