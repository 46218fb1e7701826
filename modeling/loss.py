"""Next-token cross-entropy from hidden states, without ever holding the logits of a full batch.

At vocabulary 128,256 the fp32 logits of 8 windows of 2,048 tokens are 8.4 GB; transformers' own loss holds them about
three times (logits, their fp32 copy, their gradient). Here rows are processed in chunks, and each chunk's gradient is
computed while its logits exist, so nothing is recomputed: the cost is the same matrix products as the plain loss.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.modeling.documents import document_arguments

IGNORE_INDEX = -100  # target of a row that carries no loss: the convention of torch and transformers
# Bytes of logits in memory at once, in the dtype of the matrix products; their gradient overwrites them. Each chunk adds to the
# full gradient of the head, so larger ones are faster; this is little compared with the activations of these models.
CHUNK_LOGITS_BYTES = 128 * 2**20
# The same on a GPU. Each chunk reads and writes the head's fp32 gradient (2.1 GB at 128,256 x 2,048, 0.7 ms on an H100) and costs
# some 100 kernel launches; 1 GiB makes the products 4,000 rows and more, and is 1% to 4% of the cards this is trained on.
GPU_CHUNK_LOGITS_BYTES = 2**30
# Bytes of fp32 logits per softmax call: few enough to stay in a CPU's cache.
SOFTMAX_BYTES = 16 * 2**20
# The same on a GPU without Triton: about 12 kernels per so many bytes, each longer than its launch.
GPU_SOFTMAX_BYTES = 256 * 2**20
# Rows of the head whose gradient a narrow product gives at once, before it is added to the fp32 sum: 32 MiB at width 2,048,
# where that of all 128,256 rows would be 0.5 GB.
GRADIENT_ROWS = 8192


class _ChunkedCrossEntropySum(torch.autograd.Function):
    """sum over rows of cross_entropy(hidden @ weight.T, targets); gradients are computed in the forward pass.

    Products run in hidden's dtype, whatever the weight is kept in. An fp32 weight's gradient is summed over the chunks in
    fp32 and never rounded to a narrower type.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, softcap: float | None) -> Tensor:
        # hidden (rows, hidden_size), weight (vocab, hidden_size), targets (rows,)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        summed_in = torch.promote_types(torch.float32, hidden.dtype)
        grad_weight = torch.zeros_like(weight, dtype=summed_in) if need_weight else None
        narrow = weight.to(hidden.dtype)
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows, goal = hidden[start : start + chunk_rows], targets[start : start + chunk_rows]
            grad = rows @ narrow.T  # logits, which their gradient is written over
            loss_sum += _loss_into_gradient(grad, goal, softcap, need_hidden or need_weight)
            kept = (goal != IGNORE_INDEX).unsqueeze(-1)  # applied where a row has hidden_size columns, not vocab
            if grad_hidden is not None:
                torch.mm(grad, narrow, out=grad_hidden[start : start + chunk_rows]).mul_(kept)
            if grad_weight is not None:
                _add_product(grad_weight, grad, rows * kept)
            del grad  # before the next chunk's logits are made
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss_sum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grad_outputs
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(scale)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _loss_into_gradient(logits: Tensor, targets: Tensor, softcap: float | None, want_gradient: bool) -> Tensor:
    """Return the loss sum of (rows, vocab) logits and overwrite them with their gradient.

    One compiled kernel does it where the device has a compiler; else it goes some rows at a time.
    """
    on_gpu = logits.device.type == "cuda"
    if on_gpu and _has_triton():
        return _compiled_softmax()(logits, targets, softcap, want_gradient)
    rows = max(1, (GPU_SOFTMAX_BYTES if on_gpu else SOFTMAX_BYTES) // (4 * logits.shape[1]))
    blocks = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    return torch.stack([_rows_into_gradient(*block, softcap, want_gradient) for block in blocks]).sum()


def _rows_into_gradient(logits: Tensor, targets: Tensor, softcap: float | None, want_gradient: bool) -> Tensor:
    """Do so for a few rows, with the softmax in fp32. Rows of `IGNORE_INDEX` get some gradient too.

    One exponential per logit: log Z follows from the largest probability, which is at least 1 / vocab. With `softcap` c the
    logits become c tanh(logits / c), whose slope is 1 - tanh^2.
    """
    wide, slope = logits.float(), None
    if softcap is not None:
        wide = wide.div(softcap).tanh_()
        slope = wide.square().neg_().add_(1)
        wide = wide.mul_(softcap)
    index = targets.clamp(min=0).unsqueeze(-1)
    largest, of_target = wide.amax(-1), wide.gather(-1, index).squeeze(-1)
    probabilities = torch.softmax(wide, dim=-1)
    log_z = largest - probabilities.amax(-1).log_()
    if want_gradient:  # softmax - onehot
        probabilities.scatter_add_(-1, index, torch.full_like(index, -1, dtype=probabilities.dtype))
        logits.copy_(probabilities if slope is None else probabilities.mul_(slope))
    return torch.where(targets != IGNORE_INDEX, log_z - of_target, 0.0).sum()


def _softmax_into_gradient(logits: Tensor, targets: Tensor, softcap: float | None, want_gradient: bool) -> Tensor:
    """Do so for all rows at once, for `torch.compile`: every line fuses into two passes over the logits, without a copy.

    The one-hot is a comparison, since a scatter would not fuse. Eager it would need several fp32 copies.
    """
    wide, slope = logits.float(), None
    if softcap is not None:
        tanh = torch.tanh(wide / softcap)
        wide, slope = tanh * softcap, 1 - tanh.square()
    index = targets.clamp(min=0).unsqueeze(-1)
    # Not torch.logsumexp, whose guard against infinities keeps the compiler from its one-pass softmax. Logits are shifted before
    # log Z is subtracted: its rounding at a logit of 40 would change all probabilities by a factor of 2e-6.
    shifted = wide - wide.amax(-1, keepdim=True)
    log_z = shifted.exp().sum(-1, keepdim=True).log()
    loss = torch.where(targets != IGNORE_INDEX, (log_z - shifted.gather(-1, index)).squeeze(-1), 0.0).sum()
    if want_gradient:  # softmax - onehot
        gradient = torch.exp(shifted - log_z) - (torch.arange(logits.shape[1], device=logits.device) == index).float()
        logits.copy_(gradient if slope is None else gradient * slope)
    return loss


@functools.cache
def _compiled_softmax() -> Callable[[Tensor, Tensor, float | None, bool], Tensor]:
    return torch.compile(_softmax_into_gradient, fullgraph=True)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _add_product(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """Add grad (rows, vocab)^T @ rows (rows, hidden_size) to total (vocab, hidden_size), with products in their dtype."""
    if total.dtype == rows.dtype:
        total.addmm_(grad.T, rows)
        return
    if _adds_wide_products(total.device):
        torch.addmm(total, grad.T, rows, out_dtype=total.dtype, out=total)
        return
    for start in range(0, len(total), GRADIENT_ROWS):
        total[start : start + GRADIENT_ROWS] += grad[:, start : start + GRADIENT_ROWS].T @ rows


def _adds_wide_products(device: torch.device) -> bool:
    """Return whether a product of bf16 matrices can be added to an fp32 matrix without rounding or storing it first."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None, softcap: float | None = None
) -> Tensor:
    """Return the sum of next-token losses in nats, fp32, with at most `chunk_rows` rows of logits in memory.

    hidden (..., hidden_size), weight (vocab, hidden_size), targets (...) of ids or `IGNORE_INDEX`. Under autocast the matrix
    products run in its dtype, as in transformers' head; the softmax is always fp32. First-order gradients only. With `softcap`
    c the logits are c tanh(logits / c).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    rows = hidden.reshape(-1, hidden.shape[-1])
    chunk = chunk_rows or rows_per_chunk(len(rows), weight.shape[0], rows.element_size(), gpu=hidden.device.type == "cuda")
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _ChunkedCrossEntropySum.apply(  # type: ignore[no-untyped-call]
            rows, weight, targets.reshape(-1), chunk, softcap
        )
    return loss


def rows_per_chunk(num_rows: int, vocab_size: int, element_bytes: int, gpu: bool) -> int:
    """Return the rows of logits in memory at once.

    On a GPU all chunks have one size, a multiple of 64 rows, so that one compiled kernel fits all and matrix products tile.
    """
    if not gpu:
        return max(1, CHUNK_LOGITS_BYTES // (element_bytes * vocab_size))
    chunks = math.ceil(num_rows * element_bytes * vocab_size / GPU_CHUNK_LOGITS_BYTES)
    return math.ceil(num_rows / chunks / 64) * 64


def liger_cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """Return the same sum by Liger's fused linear cross-entropy (`pip install liger-kernel`), on a GPU."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    rows = hidden.reshape(-1, hidden.shape[-1])
    loss: Tensor = liger_fused_linear_cross_entropy(
        rows, weight, targets.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum", softcap=softcap, accum_dtype=torch.float32
    )
    return loss


class LossHead(nn.Linear):
    """An LM head that, given targets, returns the loss sum instead of logits; its weight keeps its name.

    `softcap` bounds the logits of that loss; returned logits are bounded by the model, as with its own head. `kernels` is
    `torch` for the chunked cross-entropy of this module, `liger` for Liger's.
    """

    softcap: float | None = None
    kernels: Literal["torch", "liger"] = "torch"

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Map (..., hidden_size) to logits (..., vocab), or with targets (...) to a loss sum ()."""
        if targets is None:
            return F.linear(hidden, self.weight)
        if self.kernels == "liger":
            return liger_cross_entropy_sum(hidden, self.weight, targets, self.softcap)
        return linear_cross_entropy_sum(hidden, self.weight, targets, softcap=self.softcap)


class TrainingModel(nn.Module):
    """A causal LM whose forward is the training loss.

    The head is called as a module, inside this forward pass, so that the hooks of DDP and FSDP2 run. Accelerate finds what FSDP2
    shards separately (layers, embeddings, last norm, head) by transformers' names, which this class passes on.

    With `eos_token_id`, the id that ends each document, attention stays within documents and positions restart at each.
    The first id of a document is still predicted, from the end of the previous one, so there are as many targets as without.
    """

    base_model_prefix = "base_model"

    def __init__(
        self, causal_lm: nn.Module, eos_token_id: int | None = None, kernels: Literal["torch", "liger"] = "torch"
    ) -> None:
        super().__init__()
        stock: Any = causal_lm
        head = stock.get_output_embeddings()
        loss_head = LossHead(head.in_features, head.out_features, bias=False, device="meta")
        loss_head.weight = head.weight  # the same parameter: ties and names are unchanged
        loss_head.softcap = getattr(stock.config, "final_logit_softcapping", None)
        loss_head.kernels = kernels
        stock.set_output_embeddings(loss_head)
        self.causal_lm = stock
        self.eos_token_id = eos_token_id
        self._no_split_modules = stock._no_split_modules

    @property
    def base_model(self) -> nn.Module:
        """The stock model without its head."""
        base: nn.Module = self.causal_lm.base_model
        return base

    def get_input_embeddings(self) -> nn.Module:
        """The stock model's token embedding."""
        embedding: nn.Module = self.causal_lm.get_input_embeddings()
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        head: nn.Module = self.causal_lm.get_output_embeddings()
        return head

    def forward(self, input_ids: Tensor, targets: Tensor | None = None, cu_seq_lens: Tensor | None = None) -> Tensor:
        """Return the mean loss in nats over the targets of (batch, seq) ids: each id predicts the next one of its window.

        `targets` (batch, seq - 1) replaces `input_ids[:, 1:]`; rows of `IGNORE_INDEX` carry no loss, and with it the sum is
        returned instead of the mean, so that batches of different sizes can be added. `cu_seq_lens` are the
        documents' bounds, where known: finding them here makes the host wait for a GPU.
        """
        documents = {}
        if self.eos_token_id is not None:
            attention, dtype = self.causal_lm.config._attn_implementation, self.causal_lm.get_input_embeddings().weight.dtype
            documents = document_arguments(input_ids, self.eos_token_id, attention, dtype, cu_seq_lens)
        hidden = self.causal_lm.base_model(input_ids=input_ids, use_cache=False, **documents).last_hidden_state
        # A window's last id predicts nothing. It goes through the head all the same: dropping it would copy the others, and odd
        # numbers of rows multiply slower (13% at vocabulary 4,096 in bf16) than one more.
        followed_by = F.pad(input_ids[:, 1:] if targets is None else targets, (0, 1), value=IGNORE_INDEX)
        loss_sum: Tensor = self.causal_lm.get_output_embeddings()(hidden, followed_by)
        return loss_sum / (input_ids.numel() - len(input_ids)) if targets is None else loss_sum
