"""The loss and packed documents on a GPU, against fp32 on the CPU: the same weights and ids on both."""

import pytest
import torch
from gpu_parts.cases import small_recipe
from gpu_parts.correct import (
    BATCH,
    END,
    FAMILIES,
    LENGTH,
    TOLERANCES,
    VOCABULARY,
    WIDTH,
    loss_and_gradients,
    reference_loss,
    relative,
    some_ids,
)

from isoflop.modeling import documents, loss
from isoflop.modeling.loss import IGNORE_INDEX, linear_cross_entropy_sum
from isoflop.train.devices import why_no_gpu
from isoflop.train.training_model import build_training_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"needs ISOFLOP_TEST_GPU=1: {why_no_gpu()}"),
]

every_arithmetic = pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles its own graphs: a process refuses more than some of one function."""
    torch._dynamo.reset()


@every_arithmetic
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("compiled", "chunk_rows"), [(True, None), (True, 200), (False, 200)])
def test_the_chunked_loss_is_the_plain_one(arithmetic, softcap, chunk_rows, compiled, monkeypatch):
    """bf16 operands are rounded alike on both sides, so what is left is the rounding of logits and their gradient."""
    if not compiled:
        monkeypatch.setattr(loss, "_has_triton", lambda: False)
    elif not loss._has_triton():
        pytest.skip("triton is not installed")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(512, WIDTH, generator=generator), torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.1
    targets = torch.randint(VOCABULARY, (512,), generator=generator)
    targets[::7] = IGNORE_INDEX
    dtype = torch.float32 if arithmetic == "fp32" else torch.bfloat16

    expected, *expected_gradients = reference_loss(hidden.to(dtype).float(), weight.to(dtype).float(), targets, softcap)
    ours = [hidden.to("cuda", dtype).requires_grad_(), weight.cuda().requires_grad_()]
    found = linear_cross_entropy_sum(*ours, targets.cuda(), chunk_rows, softcap)
    gradients = torch.autograd.grad(found, ours)
    alone = "" if arithmetic == "fp32" else " alone"
    assert relative(found, expected) < tolerance(arithmetic, f"loss{alone}")
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative(gradient, expected_gradient) < tolerance(arithmetic, f"gradient{alone}")
    assert gradients[1].dtype == torch.float32  # never rounded to bf16, in which small parts of a sum would be lost
    assert not gradients[0][::7].any()
    assert gradients[0][1::7].any()


def tolerance(arithmetic, quantity):
    """The largest allowed difference, whose reason stands beside it."""
    return TOLERANCES[arithmetic, quantity][0]


def model_of(family, device, **training):
    recipe = small_recipe(FAMILIES[family], LENGTH, BATCH, **training)
    return build_training_model(recipe, END, None, torch.device(device))


def assert_alike(found, reference, arithmetic):
    assert relative(found[0], reference[0]) < tolerance(arithmetic, "loss")
    both = [torch.cat([gradients[name].flatten() for name in reference[1]]) for gradients in (found[1], reference[1])]
    assert relative(*both) < tolerance(arithmetic, "gradient")


@every_family
@every_arithmetic
@pytest.mark.parametrize("document_masking", [False, True])
def test_a_model_computes_what_it_computes_on_a_cpu(family, arithmetic, document_masking):
    reference = loss_and_gradients(
        model_of(family, "cpu", compile=False, document_masking=document_masking), some_ids(), bf16=False
    )
    model = model_of(family, "cuda", compile=False, document_masking=document_masking)
    assert_alike(loss_and_gradients(model, some_ids().cuda(), arithmetic == "bf16"), reference, arithmetic)


@every_family
def test_compiled_layers_compute_what_eager_ones_do_on_a_cpu(family):
    if not loss._has_triton():
        pytest.skip("triton is not installed")
    reference = loss_and_gradients(model_of(family, "cpu", compile=False), some_ids(), bf16=False)
    assert_alike(loss_and_gradients(model_of(family, "cuda"), some_ids().cuda(), bf16=True), reference, "bf16")


def varlen_or_skip():
    if not documents._has_varlen_kernel(torch.device("cuda")):
        pytest.skip(f"torch {torch.__version__} on {torch.cuda.get_device_name()} has no kernel for documents: they go by a mask")


@every_family
def test_the_kernel_for_documents_computes_what_a_mask_does(family, monkeypatch):
    varlen_or_skip()
    calls = []
    varlen = documents._attend_varlen
    monkeypatch.setattr(documents, "_attend_varlen", lambda *args: calls.append(1) or varlen(*args))
    model, ids = model_of(family, "cuda", compile=False, document_masking=True), some_ids().cuda()
    by_kernel = loss_and_gradients(model, ids, bf16=True)
    assert len(calls) == 2  # one a layer
    monkeypatch.setattr(documents, "_has_varlen_kernel", lambda device: False)
    by_mask = loss_and_gradients(model, ids, bf16=True)
    assert len(calls) == 2
    assert_alike(by_kernel, by_mask, "bf16")


@every_family
@pytest.mark.parametrize("way", ["kernel", "mask"])
def test_no_document_sees_another(family, way, monkeypatch):
    """Other ids in the first document of each window change nothing behind it, and what is in it."""
    if way == "kernel":
        varlen_or_skip()
    else:
        monkeypatch.setattr(documents, "_has_varlen_kernel", lambda device: False)
    model = model_of(family, "cuda", compile=False, document_masking=True)
    ids = some_ids()
    ids[:, 60] = END
    other = ids.clone()
    other[:, :60] = torch.where(ids[:, :60] == END, END, (ids[:, :60] + 7) % (VOCABULARY - 2) + 2)
    hidden = []
    for batch in (ids.cuda(), other.cuda()):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            attention = model.causal_lm.config._attn_implementation
            arguments = documents.document_arguments(batch, END, attention, torch.float32)
            hidden.append(model.base_model(input_ids=batch, use_cache=False, **arguments).last_hidden_state.float())
    apart = (hidden[0] - hidden[1]).abs()
    assert apart[:, :60].amax() > 0.1
    assert apart[:, 61:].amax() < 1e-3


def test_the_loss_holds_one_chunk_of_logits():
    """At the largest vocabulary of the recipes, whose logits in fp32 would be 4.2 GB."""
    rows, width = 8192, 1024
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(128256, width, device="cuda") * 0.02).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy_sum(hidden, weight, torch.randint(128256, (rows,), device="cuda")).backward()
    held = torch.cuda.max_memory_allocated() - before
    # The chunk, the head in bf16 and its fp32 gradient, the rows without ignored ones and their gradient.
    assert held < loss.GPU_CHUNK_LOGITS_BYTES * 1.1 + 128256 * width * (2 + 4) + 4 * rows * width * 2
