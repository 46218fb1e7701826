"""Hybrids for tests: any design of tiny sizes, and a few that between them have every choice."""

import torch
from hypothesis import strategies as st

from isoflop.modeling.configuration_hybrid import CHOICES, HybridConfig
from isoflop.modeling.modeling_hybrid import HybridForCausalLM

SIZES = {
    "vocab_size": 97, "max_position_embeddings": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
}  # fmt: skip
EVERY_CHOICE = {
    "gpt2": {"num_key_value_heads": 4, "head_dim": 6},
    "literal": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 7, "norm_position": "post"},
    "llama": {
        "positions": "rope", "norm": "rmsnorm", "norm_bias": False, "mlp": "swiglu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    "rope post": {"positions": "rope", "norm": "rmsnorm", "norm_position": "post", "mlp": "gelu", "mlp_bias": False},
    "no positions": {"positions": "none", "norm_bias": False, "mlp": "relu2", "qk_norm": True, "final_logit_softcapping": 5.0},
    "qk-norm": {"positions": "rope", "norm": "rmsnorm", "qk_norm": True, "mlp": "swiglu", "num_key_value_heads": 1},
}  # fmt: skip


@st.composite
def fields(draw):
    """Sizes and choices under the names that configuration and recipe share."""
    positions = draw(st.sampled_from(CHOICES["positions"]))
    key_value_heads = draw(st.integers(1, 3))
    return {
        "vocab_size": draw(st.integers(10, 300)),
        "max_position_embeddings": draw(st.integers(64, 96)),
        "hidden_size": draw(st.integers(4, 40)),
        "intermediate_size": draw(st.integers(1, 64)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": key_value_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": key_value_heads,
        "head_dim": 2 * draw(st.integers(1, 8)) if positions == "rope" else draw(st.integers(1, 16)),
        "positions": positions,
        "norm": draw(st.sampled_from(CHOICES["norm"])),
        "norm_bias": draw(st.booleans()),
        "norm_position": draw(st.sampled_from(CHOICES["norm_position"])),
        "mlp": draw(st.sampled_from(CHOICES["mlp"])),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "final_logit_softcapping": draw(st.sampled_from([None, 5.0])),
        "tie_word_embeddings": draw(st.booleans()),
    }


def build(choices, attention="sdpa", seed=0, **sizes):
    """A hybrid with weights of which none is as at the start: norms and biases count too."""
    torch.manual_seed(seed)
    config = HybridConfig(**{**SIZES, "initializer_range": 0.2, **choices, **sizes})
    config._attn_implementation = attention
    model = HybridForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def some_ids(model, batch=2, length=20, seed=0):
    """Ids of the model's vocabulary, (batch, length)."""
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
