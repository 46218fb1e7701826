"""Between the hybrid and the stock classes: the same logits, losses and gradients, both ways."""

import pytest
import torch
from hybrids import build, some_ids
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from isoflop.modeling.configuration_hybrid import HybridConfig
from isoflop.modeling.conversion_hybrid import hybrid_weights, obstacles, stock_config, stock_preset, stock_weights
from isoflop.modeling.modeling_hybrid import HybridForCausalLM

GPT2 = {
    "vocab_size": 97, "n_positions": 48, "n_embd": 24, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2,
}  # fmt: skip
LLAMA = {
    "vocab_size": 97, "max_position_embeddings": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
STOCK = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, GPT2),
    "gpt2, head apart": (GPT2Config, GPT2LMHeadModel, {**GPT2, "tie_word_embeddings": False}),
    "gpt2, exact gelu": (GPT2Config, GPT2LMHeadModel, {**GPT2, "activation_function": "gelu", "n_inner": 40}),
    "gpt2, relu squared": (GPT2Config, GPT2LMHeadModel, {**GPT2, "activation_function": "relu2"}),
    "llama": (LlamaConfig, LlamaForCausalLM, LLAMA),
    "llama, grouped": (LlamaConfig, LlamaForCausalLM, {**LLAMA, "num_key_value_heads": 2}),
    "llama, wide heads": (LlamaConfig, LlamaForCausalLM, {**LLAMA, "num_key_value_heads": 1, "head_dim": 16}),
    "llama, biases": (LlamaConfig, LlamaForCausalLM, {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {**LLAMA, "tie_word_embeddings": True}),
}
every_stock = pytest.mark.parametrize("name", STOCK)


def stock_model(name, attention="sdpa", **fields):
    """A stock model none of whose weights is as at the start."""
    config_class, model_class, sizes = STOCK[name]
    torch.manual_seed(3)
    model = model_class(config_class(**{**sizes, **fields}, attn_implementation=attention)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits_loss_gradients(model):
    """What a batch gives, gradients by name, a tied head's under its own name too."""
    model.zero_grad()
    ids = some_ids(model)
    output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    gradients = {name: tensor.grad for name, tensor in model.state_dict(keep_vars=True).items()}
    return output.logits, output.loss, gradients


def assert_equal(hybrid, stock):
    """To 1e-5 of each tensor's size, in fp32."""
    logits, loss, gradients = logits_loss_gradients(hybrid)
    wanted_logits, wanted_loss, wanted = logits_loss_gradients(stock)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
    for name, gradient in hybrid_weights(wanted, stock.config).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for name, gradient in stock_weights(gradients, hybrid.config).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@every_stock
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_hybrid_of_a_stock_model_computes_the_same(name, attention):
    stock = stock_model(name, attention)
    hybrid = HybridForCausalLM.from_stock(stock)
    hybrid.set_attn_implementation(attention)
    assert_equal(hybrid, stock)


@every_stock
def test_there_and_back_every_weight_is_the_same_bit_for_bit(name):
    stock = stock_model(name)
    hybrid = HybridForCausalLM.from_stock(stock)
    again = hybrid.to_stock()
    assert type(again) is type(stock)
    weights, wanted = again.state_dict(), stock.state_dict()
    assert set(weights) == set(wanted)
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)
    assert again.generation_config.to_dict() == stock.generation_config.to_dict()
    assert (again.training, again.dtype) == (stock.training, stock.dtype)
    assert hybrid.num_parameters() == stock.num_parameters() == again.num_parameters()
    assert_equal(HybridForCausalLM.from_stock(again), again)


@every_stock
def test_a_configuration_comes_back_as_it_was(name):
    config_class, _, sizes = STOCK[name]
    config = config_class(**sizes)
    wanted = config.to_dict() | {"n_inner": sizes.get("n_inner", 96)} if name.startswith("gpt2") else config.to_dict()
    if wanted.get("activation_function") == "gelu_new":  # the same formula, in one fused kernel
        wanted["activation_function"] = "gelu_pytorch_tanh"
    assert stock_config(HybridForCausalLM.from_stock(stock_model(name)).config).to_dict() == wanted


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_preset_exports_a_stock_checkpoint(preset, tied, tmp_path):
    config = HybridConfig.from_preset(
        preset, vocab_size=97, max_position_embeddings=48, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    hybrid = HybridForCausalLM(config).eval()
    hybrid.to_stock().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[preset]
    assert_equal(hybrid, stock)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_with_dropout_too_a_step_is_the_same(name):
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3} if name == "gpt2" else {"attention_dropout": 0.3}
    stock = stock_model(name, "eager", **rates).train()
    hybrid = HybridForCausalLM.from_stock(stock)
    hybrid.set_attn_implementation("eager")
    ids, losses = some_ids(stock), []
    for model in (stock, hybrid, hybrid.to_stock()):
        torch.manual_seed(5)
        model.set_attn_implementation("eager")
        assert model.training
        losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss.item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert losses[0] != pytest.approx(stock.eval()(input_ids=ids, labels=ids, use_cache=False).loss.item(), rel=1e-3)


def test_the_dtype_is_kept():
    stock = stock_model("llama").bfloat16()
    hybrid = HybridForCausalLM.from_stock(stock)
    assert {p.dtype for p in hybrid.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in hybrid.to_stock().parameters()} == {torch.bfloat16}


FITS = {"num_key_value_heads": 4, "head_dim": 6}
LLAMA_CHOICES = {"positions": "rope", "norm": "rmsnorm", "norm_bias": False, "mlp": "swiglu"}


@pytest.mark.parametrize(
    ("choices", "preset", "reasons"),
    [
        ({"positions": "none"}, "gpt2", ["positions = 'none', not 'learned'"]),
        ({"norm": "rmsnorm"}, "gpt2", ["norm = 'rmsnorm', not 'layernorm'"]),
        ({"norm_bias": False}, "gpt2", ["norm_bias = False, not True"]),
        ({"norm_position": "post"}, "gpt2", ["norm_position = 'post', not 'pre'"]),
        ({"mlp": "swiglu"}, "gpt2", ["mlp = 'swiglu', not 'gelu' or 'gelu_tanh' or 'relu2'"]),
        ({"mlp_bias": False}, "gpt2", ["mlp_bias = False, not True"]),
        ({"qk_norm": True}, "gpt2", ["qk_norm = True, not False"]),
        ({"final_logit_softcapping": 30.0}, "gpt2", ["final_logit_softcapping = 30.0, not None"]),
        ({"num_key_value_heads": 2}, "gpt2", ["num_key_value_heads = 2, not num_attention_heads = 4"]),
        ({"head_dim": 7}, "gpt2", ["4 heads x head_dim 7 = 28, not hidden_size = 24"]),
        ({**LLAMA_CHOICES, "mlp": "gelu"}, "llama", ["mlp = 'gelu', not 'swiglu'"]),
        ({**LLAMA_CHOICES, "norm_bias": True}, "llama", ["norm_bias = True, not False"]),
        ({**LLAMA_CHOICES, "residual_dropout": 0.1}, "llama", ["residual_dropout = 0.1, not 0.0"]),
        ({**LLAMA_CHOICES, "num_attention_heads": 5, "num_key_value_heads": 5}, "llama", ["hidden_size = 24, not a multiple of"]),
    ],
)
def test_a_choice_that_stands_in_the_way_is_named(choices, preset, reasons):
    hybrid = build({**FITS, **choices})
    found = obstacles(hybrid.config, preset)
    assert len(found) == len(reasons)
    assert all(line.startswith(reason) for line, reason in zip(found, reasons, strict=True))
    assert stock_preset(hybrid.config) is None
    with pytest.raises(ValueError, match="no stock class computes this; GPT2LMHeadModel has other choices: ") as error:
        hybrid.to_stock()
    assert found[0] in str(error.value)
    assert "LlamaForCausalLM has other choices: " in str(error.value)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt2", {"activation_function": "silu"}, r"activation_function = 'silu': has no counterpart here; take .*'gelu_new' or"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx = True: .* with False"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act = 'gelu': has no counterpart here; take a checkpoint with 'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, r"positions are not rescaled"),
    ],
)
def test_a_stock_model_without_a_counterpart_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        HybridForCausalLM.from_stock(stock_model(name, **fields))


def test_other_classes_are_refused():
    model = build({})
    with pytest.raises(ValueError, match=r"model_type = 'hybrid': no stock class .*take gpt2 or llama"):
        HybridForCausalLM.from_stock(model)
