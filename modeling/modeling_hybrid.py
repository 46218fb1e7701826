"""The hybrid: one decoder whose positions, norms, MLP, heads and biases are chosen by `HybridConfig`.

Published with a checkpoint as remote code: imports torch, transformers and the files beside it. With the `gpt2` preset it
computes what `GPT2LMHeadModel` does, with `llama` what `LlamaForCausalLM` does; `from_stock` and `to_stock` go to and fro.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .compatibility_hybrid import attention_function, causal_mask, fill_in_and_capture, init
from .configuration_hybrid import ACTIVATIONS, HybridConfig
from .conversion_hybrid import hybrid_config, hybrid_weights, stock_config, stock_weights


class HybridRMSNorm(nn.Module):
    """x / rms(x) over the last dimension, computed in fp32 as LLaMA's, times a weight and, where asked for, plus a bias."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., size) to (..., size)."""
        wide = hidden.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(hidden.dtype) * self.weight
        return normed if self.bias is None else normed + self.bias


def build_norm(config: HybridConfig, size: int) -> nn.Module:
    """The chosen kind of norm over `size` dimensions."""
    if config.norm == "rmsnorm":
        return HybridRMSNorm(size, config.norm_eps, config.norm_bias)
    return nn.LayerNorm(size, config.norm_eps, bias=config.norm_bias)


def rotary_factors(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x theta^(-2i / head_dim), (batch, 1, seq, head_dim) each, of (batch, seq) positions.

    From the positions at every forward, a millionth of its arithmetic: no buffer that a cast or a meta device could spoil.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float, device=positions.device) / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / theta**exponents)  # (batch, 1, seq, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dimension i with i + head_dim / 2, as LLaMA does: (batch, heads, seq, head_dim) to the same."""
    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-right, left), dim=-1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: query (batch, heads, seq, head_dim), key and value (batch, key_value_heads, keys, head_dim).

    Returns (batch, seq, heads, head_dim) and the weights (batch, heads, seq, keys).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ResidualLinear(nn.Linear):
    """A projection whose output is added to the stream; a class of its own, so that its weights begin smaller."""


class HybridAttention(nn.Module):
    """Causal attention with heads of any number and size."""

    is_causal = True

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads  # read by attention functions
        width, key_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = ResidualLinear(width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, seq, hidden_size) to the same, and the attention's weights where its kernel gives them."""
        by_head = (*hidden.shape[:-1], -1, self.head_dim)  # (batch, seq, heads, head_dim)
        query = self.q_norm(self.q_proj(hidden).view(by_head)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).view(by_head)).transpose(1, 2)
        value = self.v_proj(hidden).view(by_head).transpose(1, 2)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = attention_function(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.head_dim**-0.5, **kwargs
        )  # (batch, seq, heads, head_dim)
        return self.o_proj(output.flatten(-2)), weights


class HybridMLP(nn.Module):
    """Two matrices around an activation; with SwiGLU a third one as its gate."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.mlp == "swiglu" else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = ResidualLinear(inner, hidden, bias=bias)
        self.activation = ACT2FN[ACTIVATIONS[config.mlp]]

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, seq, hidden_size) to the same."""
        if self.gate_proj is None:
            inner = self.activation(self.up_proj(hidden))
        else:
            inner = self.activation(self.gate_proj(hidden)) * self.up_proj(hidden)
        output: Tensor = self.down_proj(inner)
        return output


class HybridDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each added to the stream, with a norm before each or after each sum."""

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.attention_norm = build_norm(config, config.hidden_size)
        self.self_attn = HybridAttention(config, layer_idx)
        self.mlp_norm = build_norm(config, config.hidden_size)
        self.mlp = HybridMLP(config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(batch, seq, hidden_size) to the same."""
        entering = hidden if self.post_norm else self.attention_norm(hidden)
        attended, _ = self.self_attn(entering, rotary, attention_mask, past_key_values, **kwargs)
        hidden = hidden + self.dropout(attended)
        if self.post_norm:
            hidden = self.attention_norm(hidden)
            hidden = self.mlp_norm(hidden + self.dropout(self.mlp(hidden)))
        else:
            hidden = hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))
        return hidden


class HybridPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the class, and its initial weights."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": HybridDecoderLayer, "attentions": HybridAttention}

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a module: matrices normal(0, initializer_range), biases zero, norms one, residual projections scaled.

        The scale is 1 / sqrt(2 x layers), for the two sums of each layer (Radford et al. 2019, section 2.3). The projections have
        their own class because transformers skips modules without parameters of their own.
        """
        super()._init_weights(module)
        if isinstance(module, ResidualLinear):
            init.normal_(
                module.weight, mean=0.0, std=self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            )


class HybridModel(HybridPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        learned = config.positions == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(HybridDecoderLayer(config, number) for number in range(config.num_hidden_layers))
        self.norm = build_norm(config, config.hidden_size) if config.norm_position == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @fill_in_and_capture
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states (batch, seq, hidden_size) of (batch, seq) ids, or of their embeddings.

        Default positions continue after the cache. Positions that restart separate the documents of one window.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen).unsqueeze(0)
        mask = causal_mask(self.config, hidden, attention_mask, past_key_values, position_ids)
        rotary = None
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(position_ids)
        elif (rope := self.config.rope_parameters) is not None:
            rotary = rotary_factors(position_ids, self.config.head_dim, rope["rope_theta"], hidden.dtype)
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(
                hidden, rotary=rotary, attention_mask=mask, past_key_values=past_key_values, position_ids=position_ids,
                use_cache=use_cache, **kwargs,
            )  # fmt: skip
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """The decoder with its head: next-token logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, seq, vocab_size); with `labels` (batch, seq), which are shifted here, their mean loss in nats too."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0: all
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip

    @classmethod
    def from_stock(cls, stock: PreTrainedModel) -> HybridForCausalLM:
        """A copy of a `GPT2LMHeadModel` or `LlamaForCausalLM`, in its dtype and mode.

        Raises `ValueError` for what has no counterpart here.
        """
        model: HybridForCausalLM = cls(hybrid_config(stock.config)).to(stock.dtype).train(stock.training)
        model.load_state_dict(hybrid_weights(stock.state_dict(), stock.config))
        model.generation_config = copy.deepcopy(stock.generation_config)
        return model

    def to_stock(self) -> PreTrainedModel:
        """A copy as `GPT2LMHeadModel` or `LlamaForCausalLM`, in this model's dtype and mode.

        Raises `ValueError` where the choices amount to neither, with each choice that stands in the way.
        """
        stock = AutoModelForCausalLM.from_config(stock_config(self.config), dtype=self.dtype).train(self.training)
        stock.load_state_dict(stock_weights(self.state_dict(), self.config))
        stock.generation_config = copy.deepcopy(self.generation_config)
        return stock


HybridForCausalLM.register_for_auto_class("AutoModelForCausalLM")
