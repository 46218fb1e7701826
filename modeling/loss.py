"""Next-token cross-entropy from hidden states, without ever holding the logits of a whole batch.

At vocabulary 128,256 the fp32 logits of 8 windows of 2,048 tokens are 8.4 GB; transformers' own loss holds them about
three times (logits, their fp32 copy, their gradient). Here rows go through in chunks, and each chunk's gradient is taken
while its logits are still there, so that nothing is recomputed: the cost is the same matrix products as the plain loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.modeling.documents import document_arguments

IGNORED = -100  # target of a row that carries no loss: the convention of torch and transformers
# Bytes of logits held at once, in the type of the matrix products; their gradient is written over them. Each chunk adds to the
# gradient of the whole head, so larger ones are faster; this is little beside the activations of the models it serves.
CHUNK_LOGITS_BYTES = 128 * 2**20
# Bytes of fp32 logits that go through the softmax at once: few enough to stay in a CPU's cache, and enough to keep a GPU busy.
SOFTMAX_BYTES = 16 * 2**20
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
            kept = (goal != IGNORED).unsqueeze(-1)  # applied where a row has hidden_size columns, not vocab
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
    """Loss sum of (rows, vocab) logits, whose gradient is written over them, some rows at a time."""
    rows = max(1, SOFTMAX_BYTES // (4 * logits.shape[1]))
    blocks = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    return torch.stack([_rows_into_gradient(*block, softcap, want_gradient) for block in blocks]).sum()


def _rows_into_gradient(logits: Tensor, targets: Tensor, softcap: float | None, want_gradient: bool) -> Tensor:
    """The same of a few rows (some gradient is written to rows of `IGNORED` too); softmax in fp32.

    One exponential a logit: the largest probability, at least 1 / vocab, gives log Z back without loss. With `softcap` c the
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
    return torch.where(targets != IGNORED, log_z - of_target, 0.0).sum()


def _add_product(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """total (vocab, hidden_size) += grad (rows, vocab)^T @ rows (rows, hidden_size), products in the dtype of the two."""
    if total.dtype == rows.dtype:
        total.addmm_(grad.T, rows)
        return
    for start in range(0, len(total), GRADIENT_ROWS):
        total[start : start + GRADIENT_ROWS] += grad[:, start : start + GRADIENT_ROWS].T @ rows


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None, softcap: float | None = None
) -> Tensor:
    """Sum of next-token losses in nats, fp32, holding at most `chunk_rows` rows of logits.

    hidden (..., hidden_size), weight (vocab, hidden_size), targets (...) of ids or `IGNORED`. Under autocast the matrix
    products run in its dtype, as transformers' head does; the softmax is always fp32. First-order gradients only. With `softcap`
    c the logits are c tanh(logits / c).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    rows = hidden.reshape(-1, hidden.shape[-1])
    chunk = chunk_rows or max(1, CHUNK_LOGITS_BYTES // (rows.element_size() * weight.shape[0]))
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _ChunkedCrossEntropySum.apply(  # type: ignore[no-untyped-call]
            rows, weight, targets.reshape(-1), chunk, softcap
        )
    return loss


class LossHead(nn.Linear):
    """An LM head that, given targets, returns the loss sum instead of logits; its weight keeps its name.

    `softcap` bounds the logits of that loss; those it returns are bounded by the model, as its own head's are.
    """

    softcap: float | None = None

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """(..., hidden_size) to logits (..., vocab), or with targets (...) to a loss sum ()."""
        if targets is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy_sum(hidden, self.weight, targets, softcap=self.softcap)


class TrainingModel(nn.Module):
    """A causal LM whose forward is the training loss.

    The head is called as a module and the whole goes through this forward, so that the hooks of DDP and FSDP2 run.
    What FSDP2 shards apart (layers, embeddings, last norm and head) Accelerate finds by transformers' names, passed on here.

    With `document_end`, the id that ends each document, attention stays within documents and positions restart at each.
    The first id of a document is still predicted, at the end of the one before: as many targets as without, so losses compare.
    """

    base_model_prefix = "base_model"

    def __init__(self, causal_lm: nn.Module, document_end: int | None = None) -> None:
        super().__init__()
        stock: Any = causal_lm
        head = stock.get_output_embeddings()
        loss_head = LossHead(head.in_features, head.out_features, bias=False, device="meta")
        loss_head.weight = head.weight  # the very parameter: ties and names stay as they were
        loss_head.softcap = getattr(stock.config, "final_logit_softcapping", None)
        stock.set_output_embeddings(loss_head)
        self.causal_lm = stock
        self.document_end = document_end
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

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mean loss in nats over the targets of (batch, seq) ids: each id predicts the next one of its window.

        `targets` (batch, seq - 1) replaces `input_ids[:, 1:]`; rows of `IGNORED` carry no loss, and with it the sum is
        returned instead of the mean, so that batches of different sizes can be added.
        """
        documents = {}
        if self.document_end is not None:
            attention, dtype = self.causal_lm.config._attn_implementation, self.causal_lm.get_input_embeddings().weight.dtype
            documents = document_arguments(input_ids, self.document_end, attention, dtype)
        hidden = self.causal_lm.base_model(input_ids=input_ids, use_cache=False, **documents).last_hidden_state
        # A window's last id predicts nothing. It goes through the head all the same: leaving it out would copy what is left, and
        # odd numbers of rows multiply slower (13% at vocabulary 4,096 in bf16) than one more.
        followed_by = F.pad(input_ids[:, 1:] if targets is None else targets, (0, 1), value=IGNORED)
        loss_sum: Tensor = self.causal_lm.get_output_embeddings()(hidden, followed_by)
        return loss_sum / (input_ids.numel() - len(input_ids)) if targets is None else loss_sum
