"""Between the hybrid and the stock classes: which choices amount to GPT-2 or LLaMA, and where each weight goes.

Weights go by name in dictionaries, so that gradients can go the same way: every step is a renaming, a transposition or a cut.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from .configuration_hybrid import ACTIVATIONS, PRESETS, HybridConfig

# What a stock class lets be chosen, beside its preset's own value.
FREE: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {"mlp": ("gelu", "gelu_tanh", "relu2"), "tie_word_embeddings": (True, False)},
    "llama": {"attention_bias": (True, False), "mlp_bias": (True, False), "tie_word_embeddings": (True, False)},
}
STOCK = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}
SHARED = ("vocab_size", "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
# LLaMA's own names are those here.
SIZES = (
    "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "attention_dropout",
)  # fmt: skip
GPT2_NAMES = {
    "max_position_embeddings": "n_positions", "hidden_size": "n_embd", "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head", "norm_eps": "layer_norm_epsilon", "attention_dropout": "attn_pdrop",
    "residual_dropout": "resid_pdrop", "embedding_dropout": "embd_pdrop",
}  # fmt: skip


def obstacles(config: HybridConfig, preset: str) -> list[str]:
    """The choices that a stock class does not offer, each with what it has instead."""
    found = []
    for key, value in PRESETS[preset].items():
        offered = FREE[preset].get(key, (value,))
        if getattr(config, key) not in offered:
            found.append(f"{key} = {getattr(config, key)!r}, not {' or '.join(map(repr, offered))}")
    heads, width = config.num_attention_heads, config.num_attention_heads * config.head_dim
    if preset == "gpt2" and width != config.hidden_size:
        found.append(f"{heads} heads x head_dim {config.head_dim} = {width}, not hidden_size = {config.hidden_size}")
    if preset == "gpt2" and config.num_key_value_heads != heads:
        found.append(f"num_key_value_heads = {config.num_key_value_heads}, not num_attention_heads = {heads}")
    if preset == "llama" and config.hidden_size % heads:
        found.append(f"hidden_size = {config.hidden_size}, not a multiple of num_attention_heads = {heads}")
    if preset == "llama":
        dropouts = {key: getattr(config, key) for key in ("residual_dropout", "embedding_dropout")}
        found += [f"{key} = {value}, not 0.0" for key, value in dropouts.items() if value]
    return found


def stock_preset(config: HybridConfig) -> str | None:
    """The preset whose stock class computes what this configuration says; None where neither does."""
    return next((preset for preset in PRESETS if not obstacles(config, preset)), None)


def stock_config(config: HybridConfig) -> PretrainedConfig:
    """The `GPT2Config` or `LlamaConfig` of the same model; where there is none, `ValueError` with what stands in the way."""
    fields = {key: getattr(config, key) for key in SHARED}
    preset = stock_preset(config)
    if preset == "gpt2":
        fields |= {theirs: getattr(config, ours) for ours, theirs in GPT2_NAMES.items()}
        return GPT2Config(**fields, n_inner=config.intermediate_size, activation_function=ACTIVATIONS[config.mlp])
    if preset == "llama":
        fields |= {key: getattr(config, key) for key in SIZES}
        return LlamaConfig(
            **fields, rms_norm_eps=config.norm_eps, rope_parameters=copy.deepcopy(config.rope_parameters), hidden_act="silu"
        )
    reasons = "; ".join(f"{STOCK[preset]} has other choices: {', '.join(obstacles(config, preset))}" for preset in PRESETS)
    raise ValueError(f"no stock class computes this; {reasons}. Change these, or publish it with remote code by save_pretrained")


def hybrid_config(stock: PretrainedConfig) -> HybridConfig:
    """The configuration of the same model here. Raises `ValueError` for what has no counterpart."""
    fields = {key: getattr(stock, key) for key in SHARED}
    if stock.model_type == "gpt2":
        _require(stock, scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,))
        _require(stock, activation_function=tuple(GPT2_ACTIVATIONS))
        fields |= {ours: getattr(stock, theirs) for ours, theirs in GPT2_NAMES.items()}
        fields |= {"intermediate_size": stock.n_inner, "mlp": GPT2_ACTIVATIONS[stock.activation_function]}
    elif stock.model_type == "llama":
        _require(stock, hidden_act=("silu",))
        fields |= {key: getattr(stock, key) for key in SIZES}
        fields |= {"norm_eps": stock.rms_norm_eps, "rope_parameters": dict(stock.rope_parameters)}
    else:
        raise ValueError(f"model_type = {stock.model_type!r}: no stock class that has a counterpart here; take gpt2 or llama")
    return HybridConfig.from_preset(stock.model_type, **fields)


def _require(stock: PretrainedConfig, **offered: tuple[Any, ...]) -> None:
    for key, values in offered.items():
        if getattr(stock, key) not in values:
            wanted = " or ".join(map(repr, values))
            raise ValueError(f"{key} = {getattr(stock, key)!r}: has no counterpart here; take a checkpoint with {wanted}")


LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
# Of one layer: GPT-2's name, ours side by side in it, and whether its Conv1D stores a matrix (in, out).
GPT2_LAYER = (
    ("ln_1", ("attention_norm",), False),
    ("attn.c_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), True),
    ("attn.c_proj", ("self_attn.o_proj",), True),
    ("ln_2", ("mlp_norm",), False),
    ("mlp.c_fc", ("mlp.up_proj",), True),
    ("mlp.c_proj", ("mlp.down_proj",), True),
)
GPT2_OUTER = {
    "transformer.wte.weight": "model.embed_tokens.weight", "transformer.wpe.weight": "model.embed_positions.weight",
    "transformer.ln_f.weight": "model.norm.weight", "transformer.ln_f.bias": "model.norm.bias",
    "lm_head.weight": "lm_head.weight",
}  # fmt: skip


def stock_weights(weights: dict[str, Tensor], config: HybridConfig) -> dict[str, Tensor]:
    """Weights (or gradients) of the hybrid under the names and in the layout of the stock class of its choices."""
    if stock_preset(config) == "llama":
        return {_renamed(name, LLAMA_NORMS): tensor for name, tensor in weights.items()}
    stock = {theirs: weights[ours] for theirs, ours in GPT2_OUTER.items() if ours in weights}
    for number in range(config.num_hidden_layers):
        for theirs, parts, transposed in GPT2_LAYER:
            for kind in ("weight", "bias"):
                whole = torch.cat([weights[f"model.layers.{number}.{part}.{kind}"] for part in parts])
                stock[f"transformer.h.{number}.{theirs}.{kind}"] = (
                    whole.T.contiguous() if transposed and kind == "weight" else whole
                )
    return stock


def hybrid_weights(stock: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """Weights (or gradients) of a stock model under the hybrid's names and in its layout."""
    if config.model_type == "llama":
        return {_renamed(name, {theirs: ours for ours, theirs in LLAMA_NORMS.items()}): w for name, w in stock.items()}
    weights = {ours: stock[theirs] for theirs, ours in GPT2_OUTER.items() if theirs in stock}
    for number in range(config.num_hidden_layers):
        for theirs, parts, transposed in GPT2_LAYER:
            for kind in ("weight", "bias"):
                whole = stock[f"transformer.h.{number}.{theirs}.{kind}"]
                pieces = (whole.T if transposed and kind == "weight" else whole).chunk(len(parts))
                weights |= {f"model.layers.{number}.{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)}
    return weights


def _renamed(name: str, parts: dict[str, str]) -> str:
    return ".".join(parts.get(part, part) for part in name.split("."))
