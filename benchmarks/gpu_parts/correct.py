"""Correct: the device's loss and gradients against fp32 on the CPU, at small width. `runs` has whole runs, at the same time.

Each row is a check: a difference, its tolerance, the reason for that, and whether it passed.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpu_parts.cases import Case, Context, Emit, lacking, small_recipe
from isoflop.modeling.documents import document_arguments
from isoflop.modeling.loss import linear_cross_entropy_sum
from isoflop.train.training_model import build_training_model

IGNORE_INDEX = -100
END = 1  # id that ends a document
ROWS, WIDTH, VOCABULARIES = 512, 256, (4096, 50304)
BATCH, LENGTH, VOCABULARY = 4, 256, 4096
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": 2, "n_head": 4},
    "llama": {
        "model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "hidden_size": WIDTH,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "hybrid": {
        "model_type": "hybrid", "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "hidden_size": WIDTH,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "positions": "rope",
        "norm_position": "post", "qk_norm": True, "mlp": "relu2", "final_logit_softcapping": 30.0,
    },
}  # fmt: skip
# Largest allowed difference and its reason, by arithmetic and quantity. Unit roundoff: fp32 2^-24 = 6e-8, bf16 2^-9 = 0.002.
TOLERANCES: dict[tuple[str, str], tuple[float, str]] = {
    ("fp32", "loss"): (5e-6, "sums of thousands of fp32 terms in another order: some 100 roundings of 6e-8"),
    ("fp32", "gradient"): (2e-5, "the same, through two layers and back; near-cancelling sums lose a digit more"),
    ("bf16", "loss"): (1e-3, "operands of products are rounded by 2^-9 = 0.002 each; the errors mostly cancel in a mean"),
    ("bf16", "gradient"): (2e-2, "some 20 roundings of 2^-9 forth and back through two layers add up like 20^0.5 x 0.002 = 0.9%;"
                                 " 0.7% seen on a CPU, three times that allowed"),
    ("bf16", "loss alone"): (2e-4, "against the same rounded operands: only the logits' own rounding, 2^-9 of each,"
                                   " and it cancels in the sum"),
    ("bf16", "gradient alone"): (8e-3, "probabilities and gradients are rounded to bf16 once or twice: 2^-9 to 2^-8 each, twice"
                                         " that allowed"),
}  # fmt: skip


def plan(_: Context) -> list[Case]:
    """Cheap checks first; those that compile many graphs last."""
    no_compiler = lacking("triton") if torch.cuda.is_available() else None
    return [
        Case("loss", loss_checks, 27),
        Case("models", lambda context, emit: model_checks(context, emit, compiled=False), 24),
        Case("documents", document_checks, 18),
        Case("models compiled", lambda context, emit: model_checks(context, emit, compiled=True), 35, no_compiler),
    ]


def check(emit: Emit, way: str, arithmetic: str, quantity: str, metric: str, difference: float, **facts: Any) -> None:
    """Write one check against its tolerance; a difference that is not a number does not pass."""
    tolerance, reason = TOLERANCES[arithmetic, quantity]
    emit(
        way=way, metric=metric, difference=difference, tolerance=tolerance, passed=difference <= tolerance, reason=reason, **facts
    )


def relative(found: Tensor, reference: Tensor) -> float:
    """|found - reference| / |reference| by the Euclidean norm, in fp64 on the CPU."""
    wide = reference.detach().cpu().double()
    return ((found.detach().cpu().double() - wide).norm() / wide.norm()).item()


def loss_checks(context: Context, emit: Emit) -> None:
    """The chunked loss and both gradients, in fp32 and bf16, one chunk and several, with ignored rows and with a soft cap."""
    rows = 64 if context.rehearse else ROWS
    for vocabulary in VOCABULARIES:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, WIDTH, generator=generator)
        weight = torch.randn(vocabulary, WIDTH, generator=generator) * 0.1
        targets = torch.randint(vocabulary, (rows,), generator=generator)
        targets[::7] = IGNORE_INDEX
        for arithmetic, softcap in itertools.product(("fp32", "bf16"), (None, 30.0)):
            torch._dynamo.reset()  # a GPU compiles the softmax of each case, and a process refuses more than some
            dtype = torch.float32 if arithmetic == "fp32" else torch.bfloat16
            reference = reference_loss(hidden.to(dtype).float(), weight.to(dtype).float(), targets, softcap)
            several = vocabulary == max(VOCABULARIES) and softcap is None
            for chunk_rows in (None, rows // 3) if several else (None,):
                found = device_loss(context.device, hidden.to(dtype), weight, targets, softcap, chunk_rows)
                way = f"{arithmetic}, vocabulary {vocabulary:,}" + (", soft cap" if softcap else "")
                way += f", chunks of {chunk_rows} rows" if chunk_rows else ""
                alone = "" if arithmetic == "fp32" else " alone"
                for quantity, one, other in zip(("loss", "gradient", "gradient"), found, reference, strict=True):
                    name = "loss" if quantity == "loss" else f"gradient of {'weight' if one.shape == weight.shape else 'hidden'}"
                    check(emit, way, arithmetic, quantity + alone, f"relative difference of {name}", relative(one, other))


def reference_loss(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum and gradients of hidden and weight by full fp32 logits on the CPU."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def device_loss(
    device: torch.device, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, chunk_rows: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the library on the device; the weight stays fp32, as in training."""
    hidden, weight = (one.to(device).requires_grad_() for one in (hidden, weight))
    loss = linear_cross_entropy_sum(hidden, weight, targets.to(device), chunk_rows, softcap)
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def some_ids() -> Tensor:
    """Windows of random ids, (batch, seq), in which a document ends every 50 tokens or so."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(END + 1, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.02, END, ids)


def loss_and_gradients(model: nn.Module, ids: Tensor, bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one micro-batch; gradients by name, on the CPU."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        loss = model(ids)
    loss.backward()
    gradients = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach().cpu(), gradients


def model_checks(context: Context, emit: Emit, compiled: bool) -> None:
    """Stock GPT-2, stock Llama and the hybrid, the same weights and ids on both, eager on the CPU."""
    for family, fields in FAMILIES.items():
        reference = reference_of(fields)
        for bf16 in (False, True):
            torch._dynamo.reset()
            recipe = small_recipe(fields, LENGTH, BATCH, compile=compiled)
            model = build_training_model(recipe, END, None, context.device)
            way = f"{family} {'bf16' if bf16 else 'fp32'}{' compiled' if compiled else ''}"
            compare(emit, way, bf16, loss_and_gradients(model, some_ids().to(context.device), bf16), reference)


def reference_of(fields: dict[str, Any], **training: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in fp32, eager, on the CPU."""
    recipe = small_recipe(fields, LENGTH, BATCH, compile=False, **training)
    return loss_and_gradients(build_training_model(recipe, END, None), some_ids(), bf16=False)


def compare(emit: Emit, way: str, bf16: bool, found: Any, reference: Any, **facts: Any) -> None:
    """Checks of a loss and of all gradients together; the parameter with the largest difference is named."""
    arithmetic = "bf16" if bf16 else "fp32"
    check(emit, way, arithmetic, "loss", "relative difference of loss", relative(found[0], reference[0]), **facts)
    assert found[1].keys() == reference[1].keys()
    flat = [torch.cat([one.flatten().double() for one in gradients.values()]) for gradients in (found[1], reference[1])]
    each = {name: relative(found[1][name], gradient) for name, gradient in reference[1].items() if gradient.any()}
    worst = max(each, key=lambda name: each[name])
    check(
        emit, way, arithmetic, "gradient", "relative difference of gradients", relative(*flat), worst_parameter=worst,
        worst_difference=each[worst], **facts,
    )  # fmt: skip


def document_checks(context: Context, emit: Emit) -> None:
    """Packed documents kept apart: the varlen kernel where this torch and GPU have it, else a mask, against a mask in fp32."""
    kernel = None
    for family, fields in FAMILIES.items():
        reference = reference_of(fields, document_masking=True)
        apart = relative(reference[0], reference_of(fields)[0])
        for bf16 in (False, True):
            recipe = small_recipe(fields, LENGTH, BATCH, compile=False, document_masking=True)
            model = build_training_model(recipe, END, None, context.device)
            ids = some_ids().to(context.device)
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
                arguments = document_arguments(ids, END, model.causal_lm.config._attn_implementation, torch.float32)
            # The kernel takes 16-bit types alone; with the bounds in hand fp32 makes its mask of them in each layer.
            kernel = "varlen" if "cu_seq_lens_q" in arguments and bf16 else "mask"
            way = f"{family} {'bf16' if bf16 else 'fp32'} {kernel}"
            facts = {"kernel": kernel, "loss_difference_without_masking": apart}
            compare(emit, way, bf16, loss_and_gradients(model, ids, bf16), reference, **facts)
    if kernel == "mask":
        emit(way="varlen kernel", skipped=f"torch {torch.__version__} on {context.device.type}: documents go through a mask")
