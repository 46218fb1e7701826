"""Documents of one window do not see one another, whichever attention computes them."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from conftest import curve_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import modeling_flash_attention_utils as flash_utils

from isoflop.modeling import documents
from isoflop.modeling.build import build_config, build_model, decoder_layers
from isoflop.modeling.documents import document_arguments, document_bounds, document_mask, document_positions
from isoflop.modeling.loss import IGNORE_INDEX, TrainingModel
from isoflop.prepare.run import prepare

END, VOCAB = 7, 300
MODELS = {
    "llama": {
        "model_type": "llama", "rope_theta": 5e5, "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "initializer_range": 0.2,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2,
    },
    "hybrid": {
        "model_type": "hybrid", "rope_theta": 5e5, "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 96, "initializer_range": 0.2,
        "positions": "rope", "norm_position": "post", "qk_norm": True, "mlp": "relu2", "final_logit_softcapping": 5.0,
    },
}  # fmt: skip
LENGTHS = [[5, 1, 9, 17], [12, 20], [32]]  # of the documents in three windows; the last of a window need not end in it

every_family = pytest.mark.parametrize("family", MODELS)


def training_model(family, attention="sdpa", eos_token_id=END, **fields):
    config = build_config({**MODELS[family], "attn_implementation": attention, **fields}, END, None)
    return TrainingModel(build_model(config, True, seed=1), eos_token_id)


def packed(lengths=LENGTHS):
    """Windows of documents of these lengths, (windows, seq)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(END + 1, VOCAB, (len(lengths), sum(lengths[0])), generator=generator)
    for window, row in zip(ids, lengths, strict=True):
        for end in torch.tensor(row).cumsum(0)[:-1]:
            window[end - 1] = END
    return ids


def loss_of_rows(model, ids, window, rows):
    """Sum of the losses of the targets that these rows of a window predict."""
    targets = torch.full_like(ids[:, 1:], IGNORE_INDEX)
    targets[window, rows] = ids[window, 1:][rows]
    return model(ids, targets)


def gradient_by_token(model, loss_of):
    """Size of a loss's gradient by each token's embedding, (windows, seq)."""
    embedded = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1]))
    (gradient,) = torch.autograd.grad(loss_of(), embedded)
    hook.remove()
    return gradient.abs().sum(-1)


def reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **kwargs):
    """What torch's kernel computes, document by document; its arguments have to be ones that the kernel takes."""
    inspect.signature(varlen_attn).bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **kwargs)
    assert query.dtype == key.dtype == value.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    lengths = cu_seq_q.diff().tolist()
    assert (sum(lengths), min(max_q, max_k) >= max(lengths)) == (len(query), True)
    assert kwargs["window_size"] == (-1, 0)
    parts = zip(*(states.transpose(0, 1).split(lengths, dim=1) for states in (query, key, value)), strict=True)
    gqa = kwargs["enable_gqa"]
    return torch.cat(
        [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=kwargs["scale"], enable_gqa=gqa) for q, k, v in parts],
        dim=1,
    ).transpose(0, 1)


@pytest.fixture
def varlen_calls(monkeypatch):
    """A device that has the kernel, and the calls of it."""
    calls = []

    def count(*args, **kwargs):
        calls.append(args[0].dtype)
        return reference_varlen(*args, **kwargs)

    monkeypatch.setattr(documents, "_has_varlen_kernel", lambda device: True)
    monkeypatch.setattr(documents, "varlen_attn", count)
    return calls


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3))
def test_positions_mask_and_bounds_of_any_ids(ends):
    ids = torch.where(torch.tensor(ends), END, END + 1)
    positions = document_positions(ids, END)
    mask = document_mask(positions, torch.float32).exp()
    expected, begins = [], []
    for window, row in enumerate(ends):
        begin = 0
        for place in range(12):
            begin = place if place and row[place - 1] else begin
            expected.append(place - begin)
            begins += [window * 12 + place] if place == begin else []
            assert mask[window, 0, place].tolist() == [begin <= key <= place for key in range(12)]
    assert positions.flatten().tolist() == expected
    assert document_bounds(positions).tolist() == [*begins, 12 * len(ends)]


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_gradient_crosses_into_another_document(family, attention):
    ids, second = packed(), slice(12, 31)  # the second window's second document
    masked = training_model(family, attention)
    sizes = gradient_by_token(masked, lambda: loss_of_rows(masked, ids, 1, second))
    assert not sizes[[0, 2]].any()
    assert not sizes[1, :12].any()
    assert (sizes[1, 12:31] > 0).all()
    unmasked = training_model(family, attention, eos_token_id=None)
    assert (gradient_by_token(unmasked, lambda: loss_of_rows(unmasked, ids, 1, second))[1, :31] > 0).all()


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_is_as_one_alone(family, attention):
    model, alone = training_model(family, attention), training_model(family, attention, eos_token_id=None)
    ids = packed()
    for window, lengths in enumerate(LENGTHS):
        begin = 0
        for length in lengths:
            if length > 1:
                wanted = alone(ids[window : window + 1, begin : begin + length]) * (length - 1)
                ours = loss_of_rows(model, ids, window, slice(begin, begin + length - 1))
                assert ours.item() == pytest.approx(wanted.item(), abs=1e-5 * length)
            begin += length


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_window_of_one_document_is_as_without_masking(family, attention):
    ids = packed([[32], [32]])
    ids[:, -1] = END
    masked, unmasked = training_model(family, attention)(ids), training_model(family, attention, eos_token_id=None)(ids)
    assert masked.item() == pytest.approx(unmasked.item(), abs=1e-6)


@every_family
def test_every_target_counts_the_first_id_of_a_document_too(family):
    model, ids = training_model(family), packed()
    assert model(ids).item() == pytest.approx(model(ids, ids[:, 1:]).item() / (3 * 31), rel=1e-6)
    sizes = gradient_by_token(model, lambda: loss_of_rows(model, ids, 1, slice(11, 12)))  # the end predicts the next one's first
    assert (sizes[1, :12] > 0).all()
    assert not sizes[1, 12:].any()


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(ids)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(ours, wanted, **tolerance):
    assert ours[0] == pytest.approx(wanted[0], abs=tolerance["atol"])
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, wanted[1][name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activation_checkpointing_changes_nothing(family, attention):
    plain, checkpointed = training_model(family, attention).train(), training_model(family, attention).train()
    checkpointed.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(loss_and_gradients(checkpointed, packed()), loss_and_gradients(plain, packed()), rtol=0, atol=0)


@every_family
def test_compiled_layers_compute_the_same(family):
    plain, compiled = training_model(family), training_model(family)
    for layer in decoder_layers(compiled.causal_lm):
        layer.compile(backend="aot_eager", fullgraph=True)
    for lengths in (LENGTHS, [[32], [1, 31], [30, 1, 1]]):
        assert_same(
            loss_and_gradients(compiled, packed(lengths)), loss_and_gradients(plain, packed(lengths)), rtol=1e-4, atol=1e-5
        )


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_under_autocast_nothing_crosses_and_the_loss_is_close(family, attention):
    model, ids = training_model(family, attention), packed()
    fp32 = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids).item() == pytest.approx(fp32.item(), rel=0.01)
        sizes = gradient_by_token(model, lambda: loss_of_rows(model, ids, 1, slice(12, 31)))
    assert not sizes[1, :12].any()
    assert (sizes[1, 12:31] > 0).all()


@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_varlen_kernel_computes_the_same(family, checkpointing, varlen_calls, monkeypatch):
    model, ids = training_model(family).train(), packed()
    if checkpointing:
        model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    fp32 = loss_and_gradients(model, ids)
    assert not varlen_calls  # which computes in 16 bits alone: a mask made in the layer instead
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss_and_gradients(model, ids)
    assert varlen_calls == [torch.bfloat16] * 2 * (1 + checkpointing)
    monkeypatch.setattr(documents, "_has_varlen_kernel", lambda device: False)
    assert_same(loss_and_gradients(model, ids), fp32, rtol=1e-6, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(ours, loss_and_gradients(model, ids), rtol=0.05, atol=0.01)


@every_family
def test_the_varlen_kernel_in_weights_of_16_bits(family, varlen_calls, monkeypatch):
    model, ids = training_model(family).bfloat16(), packed()  # as FSDP2 and DeepSpeed have them, without autocast
    ours = loss_and_gradients(model, ids)
    assert varlen_calls == [torch.bfloat16] * 2
    monkeypatch.setattr(documents, "_has_varlen_kernel", lambda device: False)
    assert_same(ours, loss_and_gradients(model, ids), rtol=0.1, atol=0.05)


def test_dropout_goes_through_a_mask(varlen_calls):
    model, ids = training_model("llama", attention_dropout=0.5).bfloat16().train(), packed()
    sizes = gradient_by_token(model, lambda: loss_of_rows(model, ids, 1, slice(12, 31)))
    assert not sizes[1, :12].any()
    assert not varlen_calls
    model.eval()(ids)
    assert len(varlen_calls) == 2


@every_family
@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_gets_the_documents(family, attention, monkeypatch):
    def flash_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
        assert causal
        settings = {"scale": softmax_scale, "window_size": (-1, 0), "enable_gqa": True}
        return reference_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **settings)

    def arguments(max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, **others):
        lengths = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        return {**lengths, "softmax_scale": softmax_scale, "causal": is_causal}

    functions = ((None, flash_varlen, None, None, None), (arguments, None))
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda name: functions)
    model, ids = training_model(family).bfloat16(), packed()
    wanted = loss_and_gradients(model, ids)
    model.causal_lm.config._attn_implementation_internal = attention  # set as it is where the package is installed
    assert_same(loss_and_gradients(model, ids), wanted, rtol=0.1, atol=0.05)
    assert document_arguments(ids, END, attention, torch.bfloat16)["max_length_q"] == 32


def test_the_recipe_switch_reaches_the_model_and_not_the_export(corpus, toy_recipe, run_in_process, tmp_path):
    paragraphs = {"kind": "text", "files": [f"{corpus}/*.txt"], "sample_by": "paragraph"}  # several in a window
    data = {"data__source": paragraphs, "data__prepared_dir": str(tmp_path / "prepared"), "training__max_steps": 2}
    recipes = [toy_recipe(f"masked {on}", training__document_masking=on, **data) for on in (False, True)]
    assert recipes[0].identity_fields() != recipes[1].identity_fields()
    prepare(recipes[0])
    for recipe in recipes:
        assert run_in_process(recipe) == 0
    plain, masked = (curve_of(recipe) for recipe in recipes)
    assert plain[0][1] != masked[0][1]  # losses in training
    assert plain[-1][2] != masked[-1][2]  # and validation
    configs = [json.loads((Path(recipe.output.run_dir) / "model/config.json").read_text()) for recipe in recipes]
    assert configs[0] == configs[1]
    assert not {key for key in configs[0] if "document" in key or "attn_impl" in key}
