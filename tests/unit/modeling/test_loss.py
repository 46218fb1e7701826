import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from isoflop.modeling import loss as loss_module
from isoflop.modeling.build import build_config, build_model
from isoflop.modeling.loss import IGNORE_INDEX, TrainingModel, linear_cross_entropy_sum

LLAMA = {
    "model_type": "llama", "attn_implementation": "sdpa", "rope_theta": 5e5, "vocab_size": 300, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "attn_implementation": "sdpa", "vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4,
    "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
HYBRID = {
    "model_type": "hybrid", "attn_implementation": "sdpa", "rope_theta": 5e5, "vocab_size": 300, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 10, "intermediate_size": 96, "norm_position": "post",
    "qk_norm": True, "mlp": "relu2", "final_logit_softcapping": 0.5,
}  # fmt: skip
MODELS = {"llama": LLAMA, "llama tied": {**LLAMA, "tie_word_embeddings": True}, "gpt2": GPT2, "hybrid": HYBRID}


@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    vocab=st.integers(2, 50),
    chunk=st.integers(1, 50),
    ignored=st.integers(0, 3),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_equal_the_plain_ones_for_any_chunk(rows, vocab, chunk, ignored, softcap, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocab, 8, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[:ignored] = IGNORE_INDEX
    logits = hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    plain = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
    expected = torch.autograd.grad(plain * 0.3, (hidden, weight))
    ours = linear_cross_entropy_sum(hidden, weight, targets, chunk_rows=chunk, softcap=softcap)
    gradients = torch.autograd.grad(ours * 0.3, (hidden, weight))
    torch.testing.assert_close(ours.double(), plain, rtol=1e-6, atol=1e-5)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


SOFTMAX_CASES = given(
    rows=st.integers(1, 40),
    vocab=st.integers(2, 50),
    ignored=st.integers(0, 3),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    want_gradient=st.booleans(),
    seed=st.integers(0, 99),
)


@settings(deadline=None)
@SOFTMAX_CASES
def test_the_softmax_for_a_compiler_is_the_blocks(rows, vocab, ignored, softcap, want_gradient, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 10 * torch.randn(rows, vocab, generator=generator)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[:ignored] = IGNORE_INDEX
    ours, theirs = logits.clone(), logits.clone()
    loss = loss_module._softmax_into_gradient(ours, targets, softcap, want_gradient)
    expected = loss_module._rows_into_gradient(theirs, targets, softcap, want_gradient)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    kept = targets != IGNORE_INDEX  # what stands in the other rows is left out of every product
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_compiled_softmax_holds_no_copy_of_the_logits():
    from torch._inductor.utils import run_and_get_code

    logits, targets = torch.randn(96, 1000, dtype=torch.bfloat16), torch.randint(0, 1000, (96,))
    eager, compiled = logits.clone(), logits.clone()
    with torch.no_grad():
        expected = loss_module._softmax_into_gradient(eager, targets, None, True)
        loss, (code,) = run_and_get_code(loss_module._compiled_softmax(), compiled, targets, None, True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(compiled, eager, rtol=0.01, atol=1e-5)
    assert "(96, 1000)" not in "".join(line for line in code.splitlines() if "empty_strided" in line)


def test_chunks_on_a_gpu_are_equal_and_large():
    rows = loss_module.rows_per_chunk
    assert rows(8 * 2048, 128_256, 2, gpu=True) == 4096  # four, of 1.05 GB
    assert rows(32 * 1024, 50_304, 2, gpu=True) == 8192
    assert rows(8 * 2048, 32_000, 2, gpu=True) == 8 * 2048  # one
    assert rows(8 * 2048, 128_256, 2, gpu=False) == 523  # 128 MiB


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(2, 300_000), st.sampled_from([2, 4]))
def test_chunks_on_a_gpu_cover_all_rows_within_their_bytes(num_rows, vocab_size, width):
    rows = loss_module.rows_per_chunk(num_rows, vocab_size, width, gpu=True)
    assert rows % 64 == 0
    assert (rows - 64) * width * vocab_size <= loss_module.GPU_CHUNK_LOGITS_BYTES
    last = num_rows % rows
    assert last == 0 or rows - last <= 64 * -(-num_rows // rows)  # no chunk much smaller than the others


def test_ligers_loss_is_called_with_what_ours_takes(monkeypatch):
    import sys
    import types

    functional, asked = types.ModuleType("liger_kernel.transformers.functional"), {}

    def fused(rows, weight, targets, **options):
        asked.update(options, rows=rows.shape, targets=targets.shape)
        logits = options["softcap"] * torch.tanh(rows @ weight.T / options["softcap"])
        return F.cross_entropy(logits, targets, reduction=options["reduction"], ignore_index=options["ignore_index"])

    functional.liger_fused_linear_cross_entropy = fused
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    model = build_model(build_config(HYBRID, 0, 0), True, seed=1)
    ids = torch.randint(0, 300, (3, 32), generator=torch.Generator().manual_seed(0))
    ours = TrainingModel(model)(ids)
    ligers = TrainingModel(model, kernels="liger")(ids)
    assert ligers.item() == pytest.approx(ours.item(), abs=1e-5)
    assert asked == {
        "rows": (96, 64),
        "targets": (96,),
        "ignore_index": IGNORE_INDEX,
        "reduction": "sum",
        "softcap": 0.5,
        "accum_dtype": torch.float32,
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("logit_rows", [5, 10_000])
def test_training_loss_is_transformers_own(name, logit_rows, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS_BYTES", 4 * 300 * logit_rows)
    model = build_model(build_config(MODELS[name], 0, 0), True, seed=1)
    ids = torch.randint(0, 300, (3, 32), generator=torch.Generator().manual_seed(0))
    stock = model(input_ids=ids, labels=ids, use_cache=False).loss
    stock.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    ours = TrainingModel(model)(ids)
    ours.backward()
    assert ours.item() == pytest.approx(stock.item(), abs=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-6)


def test_wrapping_changes_no_name_and_no_tie():
    model = build_model(build_config(MODELS["llama tied"], 0, 0), True, seed=1)
    names = list(model.state_dict())
    TrainingModel(model)
    assert list(model.state_dict()) == names
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_under_autocast_the_loss_is_fp32_and_transformers_own():
    model = build_model(build_config(LLAMA, 0, 0), True, seed=1)
    ids = torch.randint(0, 300, (3, 32), generator=torch.Generator().manual_seed(0))
    training_model = TrainingModel(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = model(input_ids=ids, labels=ids, use_cache=False).loss
        ours = training_model(ids)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(stock.item(), abs=1e-4)
    ours.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_the_full_logits_are_never_held():
    hidden, weight = torch.randn(2000, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
    targets = torch.randint(0, 5000, (2000,))
    with LargestTensor() as chunked:
        linear_cross_entropy_sum(hidden, weight, targets, chunk_rows=100).backward()
    assert chunked.elements == 100 * 5000


def test_targets_given_apart_return_the_sum_over_those_that_count():
    model = TrainingModel(build_model(build_config(GPT2, 0, 0), True, seed=1))
    ids = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    assert model(ids, targets).item() == pytest.approx(model(ids).item() * 4 * 15, rel=1e-6)
    targets[2:] = IGNORE_INDEX
    assert model(ids, targets).item() == pytest.approx(model(ids[:2]).item() * 2 * 15, rel=1e-6)


class HostReads(TorchDispatchMode):
    """Counts the operations that hand a device value to Python: each makes the host wait."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_a_micro_batch_never_waits_for_the_device(name):
    model = TrainingModel(build_model(build_config(MODELS[name], 0, None), True, seed=1))
    ids = torch.randint(0, 300, (3, 32), generator=torch.Generator().manual_seed(0))
    with HostReads() as reads:
        model(ids).backward()
    assert reads.count == 0
