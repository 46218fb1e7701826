"""Differences between transformers 4.57 and 5 that the hybrid's model code meets, so that a published checkpoint opens in both.

Published with a checkpoint as remote code: imports torch and transformers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import generic

try:
    from transformers import initialization as init
    from transformers.utils.output_capturing import capture_outputs
except ImportError:  # transformers 4: one decorator did what two do in version 5
    VERSION_4 = True
    from torch.nn import init

    fill_in_and_capture = generic.check_model_inputs()
else:
    VERSION_4 = False

    def fill_in_and_capture(forward: Callable[..., Any]) -> Callable[..., Any]:
        """Fill in `use_cache` from the configuration, and collect hidden states and attentions where asked for."""
        decorated: Callable[..., Any] = generic.merge_with_config_defaults(capture_outputs(forward))
        return decorated


__all__ = ["attention_function", "causal_mask", "fill_in_and_capture", "init"]


def attention_function(name: str, eager: Callable[..., Any]) -> Any:
    """Return the attention function of that name."""
    return ALL_ATTENTION_FUNCTIONS.get(name, eager) if VERSION_4 else ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def causal_mask(
    config: PretrainedConfig, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None, position_ids: Tensor
) -> Any:
    """Return the causal mask of (batch, seq, hidden_size) states behind what the cache holds, in the form the attention takes."""
    given: dict[str, Any] = {
        "config": config, "attention_mask": attention_mask, "past_key_values": cache, "position_ids": position_ids,
    }  # fmt: skip
    if VERSION_4:
        seen = cache.get_seq_length() if cache is not None else 0
        given |= {"input_embeds": hidden, "cache_position": torch.arange(hidden.shape[1], device=hidden.device) + seen}
    else:
        given["inputs_embeds"] = hidden
    return masking_utils.create_causal_mask(**given)
