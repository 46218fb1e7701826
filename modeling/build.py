"""Build a transformers model, stock or hybrid, from config fields, with the initial weights of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from isoflop.modeling.configuration_hybrid import HybridConfig
from isoflop.modeling.documents import attend
from isoflop.modeling.modeling_hybrid import HybridForCausalLM

RESIDUAL_PROJECTIONS = (
    "o_proj",
    "down_proj",
    "c_proj",
)  # what each block adds to the residual stream, in Llama, the hybrid and GPT-2

# transformers' own sdpa without its mask builder, which looks for packed documents in every batch and waits for the device each
# time. Windows here have no padding, so the kernel's causal flag is the only mask; document masking adds its own.
UNMASKED_SDPA = "sdpa_unmasked"
AttentionInterface.register(UNMASKED_SDPA, attend)

# Saved hybrids then open without remote code where this package is installed.
AutoConfig.register(HybridConfig.model_type, HybridConfig)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)


def build_config(fields: dict[str, Any], eos_token_id: int, bos_token_id: int | None) -> PretrainedConfig:
    """Return a `GPT2Config`, `LlamaConfig` or `HybridConfig` from its fields (with `model_type`).

    `pad_token_id` stays unset: GPT-2 would look for padding in every batch, which waits for the device each time.
    """
    fields = dict(fields)
    fields.pop("preset", None)  # a recipe's hybrid has all of its choices written out
    model_type, attention = fields.pop("model_type"), fields.pop("attn_implementation")
    if model_type != "gpt2":
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    config_class = {"gpt2": GPT2Config, "llama": LlamaConfig, "hybrid": HybridConfig}[model_type]
    config = config_class(**fields, eos_token_id=eos_token_id, bos_token_id=bos_token_id, pad_token_id=None)
    config._attn_implementation = UNMASKED_SDPA if attention == "sdpa" else attention
    return config


def build_model(config: PretrainedConfig, depth_scaled_init: bool, seed: int) -> PreTrainedModel:
    """Return a causal LM in fp32: matrices normal(0, initializer_range), biases zero, norms one.

    With `depth_scaled_init` residual projections get initializer_range / sqrt(2 x layers) (Radford et al. 2019,
    section 2.3), otherwise initializer_range; stock GPT-2 and the hybrid always scale and stock Llama never does.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    std = config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if depth_scaled_init else 1.0)
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in RESIDUAL_PROJECTIONS:
            nn.init.normal_(module.weight, mean=0.0, std=std)
    return model


def load_model(config: PretrainedConfig, read: Callable[[dict[str, torch.Tensor]], None]) -> PreTrainedModel:
    """Return a causal LM in fp32 whose weights `read` fills by their names, tied ones once; nothing is initialized or copied."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: torch.empty(parameter.shape) for name, parameter in model.named_parameters()}
    read(weights)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks, found by the class names that transformers declares unsplittable."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


def hidden_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the matrices of the repeated blocks: attention and feed-forward, without biases and norms."""
    return [parameter for layer in decoder_layers(model) for parameter in layer.parameters() if parameter.dim() == 2]


def final_norms(model: PreTrainedModel) -> list[nn.Module]:
    """Return the norm between the last block and the head, under each class's name for it; none where blocks end with theirs."""
    base: Any = model.base_model
    norms = [getattr(base, name, None) for name in ("norm", "ln_f")]
    return [norm for norm in norms if isinstance(norm, nn.Module) and any(True for _ in norm.parameters())]


def use_liger(model: PreTrainedModel) -> None:
    """Replace a stock Llama's RMSNorm, rotary positions and SwiGLU by Liger's kernels; no weight changes its name.

    Liger replaces the rotary function in transformers' module, so for every Llama of this process.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False, model=model)
