"""Exact sizes of a model: shape, parameters, FLOPs per token. No torch, no network.

The tests compare the arithmetic with transformers' own modules on the meta device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from isoflop.config.recipe import Gpt2Model, LlamaModel, Model
from isoflop.config.recipe_optimizer import Parametrization


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


def parameters_without_vocabulary(model: Model) -> int:
    """Return a model's N without token embedding, position embedding and head."""
    classes = parameters_by_class(model)
    return sum(count for name, count in classes.items() if name not in ("embedding", "position", "head"))


def tuned_parameters(model: Model, parametrization: Parametrization) -> float:
    """Return N without vocabulary of the model that a recipe's values are for: its own, or under completep that of the base.

    The base has this model's proportions, so that N grows as layers x width^2.
    """
    n, shape = parameters_without_vocabulary(model), shape_of(model)
    width, layers = parametrization.base_hidden_size, parametrization.base_num_layers
    return n if width is None or layers is None else n * (width / shape.hidden_size) ** 2 * layers / shape.num_layers


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
    return s.num_layers * (attention + ffn) + head_parameters(model)


def head_parameters(model: Model) -> int:
    """Return the parameters of the LM head, tied or not."""
    return model.vocab_size * shape_of(model).hidden_size
