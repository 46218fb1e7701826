"""Configuration of the hybrid: a decoder in which each choice between GPT-2 and LLaMA is made by itself, so that its worth shows.

Published with a checkpoint as remote code, so it imports transformers alone.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from transformers import PretrainedConfig

CHOICES = {
    "positions": ("learned", "rope", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "mlp": ("gelu", "gelu_tanh", "swiglu", "relu2"),
}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "swiglu": "silu", "relu2": "relu2"}  # transformers' names
PRESETS: dict[str, dict[str, Any]] = {
    # Radford et al. 2019, by the code: pre-norm (section 2.3), tanh approximation of GELU, a bias everywhere, head tied.
    "gpt2": {
        "positions": "learned", "norm": "layernorm", "norm_bias": True, "norm_position": "pre", "mlp": "gelu_tanh",
        "attention_bias": True, "mlp_bias": True, "qk_norm": False, "final_logit_softcapping": None, "tie_word_embeddings": True,
    },
    # Touvron et al. 2023 (arXiv:2302.13971), section 2.2.
    "llama": {
        "positions": "rope", "norm": "rmsnorm", "norm_bias": False, "norm_position": "pre", "mlp": "swiglu",
        "attention_bias": False, "mlp_bias": False, "qk_norm": False, "final_logit_softcapping": None,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


class _Version4Config(PretrainedConfig):
    """What transformers 5 gives every configuration, for version 4: annotated fields are arguments, then `__post_init__`."""

    def __init__(self, **fields: Any) -> None:
        for name in type(self).__annotations__:
            setattr(self, name, fields.pop(name, getattr(type(self), name)))
        self.__post_init__(**fields)

    def __post_init__(self, **kwargs: Any) -> None:
        own = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
        super().__init__(**{name: getattr(self, name) for name in own}, **kwargs)


class HybridConfig(PretrainedConfig if is_dataclass(PretrainedConfig) else _Version4Config):  # type: ignore[misc]
    """Sizes under transformers' LLaMA names, and the choices; as constructed the choices are GPT-2's.

    positions: `learned` embeddings, `rope` (Su et al. 2021) or `none`, where the causal mask alone tells order (Haviv et al.
    2022). norm: `layernorm` or `rmsnorm`. norm_position: `pre` norms what enters attention and MLP, and the last stream; `post`
    norms the stream after each, as Vaswani et al. 2017 and GPT-1 did, which leaves nothing for a last norm. mlp: `gelu`,
    `gelu_tanh` (its tanh approximation), `swiglu` (Shazeer 2020, three matrices) or `relu2` (So et al. 2021).
    head_dim: any size; hidden_size / num_attention_heads where None. num_key_value_heads: as many as heads where None.
    intermediate_size: width of the MLP; 4 x hidden_size where None. qk_norm: each head's queries and keys go through a norm of
    the chosen kind before positions (Henry et al. 2020). final_logit_softcapping: logits become c tanh(logits / c) (Gemma 2).

    Raises `ValueError` that names key, value, rule and remedy.
    """

    model_type = "hybrid"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    max_position_embeddings: int = 1024
    hidden_size: int = 768
    # These three are numbers once constructed.
    intermediate_size: int = None  # type: ignore[assignment]
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    positions: str = "learned"
    rope_parameters: dict[str, Any] | None = None
    norm: str = "layernorm"
    norm_bias: bool = True
    norm_position: str = "pre"
    norm_eps: float = 1e-5
    mlp: str = "gelu_tanh"
    attention_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    final_logit_softcapping: float | None = None
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the sizes that follow from others, and refuse what does not fit."""
        if self.head_dim is None:
            self.head_dim = self._whole_head_dim()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)
        if self.positions != "rope":
            self.rope_parameters = None  # transformers fills it in for everyone
        self._require_known_choices()
        self._require_sizes_that_fit()

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> HybridConfig:
        """The choices of `gpt2` or `llama`, with sizes and single changes from `fields`."""
        if name not in PRESETS:
            raise ValueError(f"preset = {name!r}: not a preset; take one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **fields})

    def _whole_head_dim(self) -> int:
        size, rest = divmod(self.hidden_size, max(1, self.num_attention_heads))
        if rest:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads}: hidden_size = {self.hidden_size} is not a multiple of it;"
                f" take another number, or set head_dim, which is free here ({max(1, size)} is nearest)"
            )
        return size

    def _require_known_choices(self) -> None:
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key} = {getattr(self, key)!r}: not a choice; take one of {', '.join(known)}")
        if self.rope_parameters and self.rope_parameters["rope_type"] != "default":
            raise ValueError(
                f"rope_parameters.rope_type = {self.rope_parameters['rope_type']!r}: positions are not rescaled here; take"
                " 'default', with a rope_theta for the length wanted"
            )

    def _require_sizes_that_fit(self) -> None:
        sizes = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers")
        for key in (*sizes, "num_attention_heads", "num_key_value_heads", "head_dim"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)}: has to be positive; take 1 or more")
        if self.num_attention_heads % self.num_key_value_heads:
            divisors = [d for d in range(1, self.num_attention_heads + 1) if self.num_attention_heads % d == 0]
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads}: each is shared by equally many of num_attention_heads ="
                f" {self.num_attention_heads}; take one of {', '.join(map(str, divisors))}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(
                f"head_dim = {self.head_dim}: positions = 'rope' turns pairs of dimensions; take {self.head_dim - 1 or 2} or"
                f" {self.head_dim + 1}, or other positions"
            )
        if self.final_logit_softcapping is not None and not self.final_logit_softcapping > 0:
            raise ValueError(
                f"final_logit_softcapping = {self.final_logit_softcapping}: a bound on logits is positive; take 30.0, or None"
            )


HybridConfig.register_for_auto_class()
