"""Document masking in packed windows: attention within a document, positions counted from its beginning.

The ids show where documents end, so nothing else is stored. `document_arguments` makes the arguments of a stock model's forward
pass, once per batch; `attend` is the attention function that uses them best.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def document_positions(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """Return the position of each id in its document, from 0, (batch, seq). A document includes its end; windows start at 0."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device)  # (seq,)
    follows_end = input_ids.roll(1, dims=1) == eos_token_id  # the id rolled to the front is at index 0, a beginning in any case
    return index - torch.where(follows_end, index, 0).cummax(dim=1).values


def document_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask added to the scores (batch, 1, query, key): 0 from the start of a query's document to itself, else -inf.

    Not boolean: sdpa would make each layer a copy in `dtype`, and keep all of them for the backward pass.
    """
    index = torch.arange(positions.shape[1], device=positions.device)
    begins = index - positions  # (batch, seq), where each one's document begins
    seen = (begins.unsqueeze(-1) <= index).tril()  # (batch, query, key)
    return torch.where(seen, 0.0, -math.inf).to(dtype).unsqueeze(1)


def document_bounds(positions: Tensor) -> Tensor:
    """Return where the documents of all windows begin, and the end of the last: (documents + 1,), int32 as kernels need it.

    Their number is a shape, for which the host would wait for a GPU: in training they are computed on the host.
    """
    begins = (positions.flatten() == 0).nonzero().squeeze(1)
    return F.pad(begins, (0, 1), value=positions.numel()).int()


def document_arguments(
    input_ids: Tensor, eos_token_id: int, attention: str, dtype: torch.dtype, cu_seq_lens: Tensor | None = None
) -> dict[str, Any]:
    """Return arguments of a stock model's forward pass that separate the documents of (batch, seq) ids, without a cache.

    `attention` is the name of the model's implementation, `dtype` that of its weights, `cu_seq_lens` the documents'
    bounds where these are known. Eager attention needs only the positions, from which transformers makes its mask.
    """
    positions = document_positions(input_ids, eos_token_id)
    arguments: dict[str, Any] = {"position_ids": positions}
    if attention == "eager":
        return arguments
    if not attention.startswith("flash") and not _has_varlen_kernel(input_ids.device):
        return arguments | {"attention_mask": document_mask(positions, _computed_in(input_ids.device, dtype))}
    bounds = document_bounds(positions) if cu_seq_lens is None else cu_seq_lens
    longest = input_ids.shape[1]  # an upper bound is enough for the kernels; the host would wait for the exact value
    return arguments | {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _has_varlen_kernel(device: torch.device) -> bool:
    # FlashAttention-2 needs compute capability 8.0; grouped-query attention came to varlen_attn with torch 2.12.
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and torch.__version__ >= "2.12"


def _computed_in(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run transformers' sdpa, or torch's kernel for sequences of several lengths where the documents' bounds are given.

    query (batch, heads, seq, head_dim), key and value (batch, key_value_heads, seq, head_dim); returns (batch, seq, heads,
    head_dim). What that kernel cannot do (fp32, dropout, head_dim beyond 192, for which not every GPU has a backward) uses
    a mask made here, in every layer: 1 / (heads x head_dim) of the attention's own arithmetic.
    """
    if (bounds := kwargs.get("cu_seq_lens_q")) is not None:
        # Unlike sdpa the kernel ignores autocast, under which rotary positions leave query and key in fp32.
        dtype, head_dim = _computed_in(query.device, query.dtype), query.shape[-1]
        if dtype in (torch.bfloat16, torch.float16) and not dropout and head_dim % 8 == 0 and head_dim <= 192:
            return _attend_varlen(query.to(dtype), key.to(dtype), value.to(dtype), bounds, kwargs["max_length_q"], scaling), None
        attention_mask = document_mask(kwargs["position_ids"], dtype)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    return output, None


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None) -> Tensor:
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # (batch x seq, heads, head_dim)
    causal = (-1, 0)  # any number of keys to the left, none to the right
    output: Tensor = varlen_attn(  # type: ignore[assignment]  # a pair where auxiliary output is asked for
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=causal, enable_gqa=True
    )
    return output.reshape(query.shape[0], longest, *output.shape[1:])
