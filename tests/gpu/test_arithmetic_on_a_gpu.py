"""The loss and packed documents on a GPU, against fp32 on the CPU: the same weights and ids on both."""

import pytest
import torch
from torch.nn import functional as F

from isoflop.devices import why_no_gpu
from isoflop.modeling import documents, loss
from isoflop.modeling.loss import IGNORED, linear_cross_entropy_sum
from isoflop.recipe import Recipe
from isoflop.training_model import build_training_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"needs ISOFLOP_TEST_GPU=1: {why_no_gpu()}"),
]

END = 1  # id that ends a document
BATCH, LENGTH, VOCABULARY, WIDTH = 4, 256, 4096, 256
FAMILIES = {
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
# Unit roundoff: fp32 2^-24 = 6e-8, summed in another order; bf16 2^-9 = 0.002, some 20 of them through two layers and back.
LOSS_TOLERANCE = {"fp32": 5e-6, "bf16": 1e-3}
GRADIENT_TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}

every_arithmetic = pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles its own graphs: a process refuses more than some of one function."""
    torch._dynamo.reset()


def relative(found, reference):
    """|found - reference| / |reference| by the Euclidean norm, in fp64 on the CPU."""
    wide = reference.detach().cpu().double()
    return ((found.detach().cpu().double() - wide).norm() / wide.norm()).item()


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
    targets[::7] = IGNORED
    dtype = torch.float32 if arithmetic == "fp32" else torch.bfloat16

    plain = [hidden.to(dtype).float().requires_grad_(), weight.to(dtype).float().requires_grad_()]
    logits = plain[0] @ plain[1].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, plain)

    ours = [hidden.to("cuda", dtype).requires_grad_(), weight.cuda().requires_grad_()]
    found = linear_cross_entropy_sum(*ours, targets.cuda(), chunk_rows, softcap)
    gradients = torch.autograd.grad(found, ours)
    assert relative(found, expected) < {"fp32": 5e-6, "bf16": 2e-4}[arithmetic]
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative(gradient, expected_gradient) < {"fp32": 2e-5, "bf16": 8e-3}[arithmetic]
    assert gradients[1].dtype == torch.float32  # never rounded to bf16, in which small parts of a sum would be lost
    assert not gradients[0][::7].any()
    assert gradients[0][1::7].any()


def model_of(family, device, **training):
    recipe = Recipe.model_validate(
        {
            "model": FAMILIES[family],
            "tokenizer": {"train_vocab_size": VOCABULARY},
            "data": {"source": {"kind": "python_stdlib"}, "prepared_dir": "none"},
            "training": {
                "sequence_length": LENGTH, "tokens_per_step": LENGTH * BATCH, "micro_batch_size": BATCH, "max_steps": 1,
                **training,
            },
            "optimizer": {"peak_learning_rate": 3e-4},
            "output": {"run_dir": "none"},
        }
    )  # fmt: skip
    return build_training_model(recipe, END, None, torch.device(device))


def some_ids():
    """Windows of random ids, (batch, seq), in which a document ends every 50 tokens or so."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(END + 1, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.02, END, ids)


def loss_and_gradients(model, ids, arithmetic):
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=arithmetic == "bf16"):
        value = model(ids)
    value.backward()
    gradients = torch.cat([parameter.grad.detach().cpu().flatten() for _, parameter in sorted(model.named_parameters())])
    model.zero_grad(set_to_none=True)
    return value.detach().cpu(), gradients


def assert_alike(found, reference, arithmetic):
    assert relative(found[0], reference[0]) < LOSS_TOLERANCE[arithmetic]
    assert relative(found[1], reference[1]) < GRADIENT_TOLERANCE[arithmetic]


@every_family
@every_arithmetic
@pytest.mark.parametrize("document_masking", [False, True])
def test_a_model_computes_what_it_computes_on_a_cpu(family, arithmetic, document_masking):
    reference = loss_and_gradients(model_of(family, "cpu", compile=False, document_masking=document_masking), some_ids(), "fp32")
    model = model_of(family, "cuda", compile=False, document_masking=document_masking)
    assert_alike(loss_and_gradients(model, some_ids().cuda(), arithmetic), reference, arithmetic)


@every_family
def test_compiled_layers_compute_what_eager_ones_do_on_a_cpu(family):
    if not loss._has_triton():
        pytest.skip("triton is not installed")
    reference = loss_and_gradients(model_of(family, "cpu", compile=False), some_ids(), "fp32")
    assert_alike(loss_and_gradients(model_of(family, "cuda"), some_ids().cuda(), "bf16"), reference, "bf16")


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
    by_kernel = loss_and_gradients(model, ids, "bf16")
    assert len(calls) == 2  # one a layer
    monkeypatch.setattr(documents, "_has_varlen_kernel", lambda device: False)
    by_mask = loss_and_gradients(model, ids, "bf16")
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
