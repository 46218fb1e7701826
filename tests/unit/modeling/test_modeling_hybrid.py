"""The hybrid as a transformers model: caches, kernels, saving with and without remote code, and what each choice means."""

import json
import math
import os
import subprocess
import sys
import sysconfig

import pytest
import torch
from hybrids import EVERY_CHOICE, build, fields, some_ids
from hypothesis import given, settings
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from isoflop.modeling.build import UNMASKED_SDPA, build_config, build_model
from isoflop.modeling.configuration_hybrid import HybridConfig
from isoflop.modeling.modeling_hybrid import HybridForCausalLM

every_choice = pytest.mark.parametrize("name", EVERY_CHOICE)


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@settings(max_examples=40, deadline=None)
@given(fields())
def test_any_design_is_causal_and_gives_every_weight_a_gradient(choices):
    model = build(choices)
    ids = some_ids(model, length=12)
    with torch.no_grad():
        logits = model(ids).logits
        changed = ids.clone()
        changed[:, 8:] = (changed[:, 8:] + 1) % model.config.vocab_size
        again = model(changed).logits
    assert logits.shape == (2, 12, model.config.vocab_size)
    torch.testing.assert_close(again[:, :8], logits[:, :8])
    assert not torch.equal(again[:, 8:], logits[:, 8:])
    _, gradients = loss_and_gradients(model, ids)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@settings(max_examples=25, deadline=None)
@given(fields())
def test_with_a_cache_any_design_says_what_it_says_without(choices):
    model = build(choices)
    ids = some_ids(model, length=12)
    with torch.no_grad():
        whole, cache, steps = model(ids, use_cache=False).logits, DynamicCache(config=model.config), []
        for begin, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
            steps.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


@every_choice
def test_generation_with_a_cache_equals_without(name):
    model = build(EVERY_CHOICE[name])
    ids = some_ids(model, length=5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padded on the left
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, **settings)
    assert cached.shape == (2, 25)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@every_choice
def test_a_static_cache_does_too(name):
    model = build(EVERY_CHOICE[name])
    ids = some_ids(model, length=9)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        first, second = (model(part, past_key_values=cache, use_cache=True).logits for part in (ids[:, :5], ids[:, 5:]))
        torch.testing.assert_close(torch.cat((first, second), dim=1), model(ids).logits, rtol=1e-4, atol=1e-4)


@every_choice
@pytest.mark.parametrize("attention", ["sdpa", UNMASKED_SDPA, "flex_attention"])
def test_every_attention_equals_eager(name, attention):
    ids = some_ids(build(EVERY_CHOICE[name]))
    with torch.no_grad():
        wanted = build(EVERY_CHOICE[name], "eager")(ids, use_cache=False).logits
        logits = build(EVERY_CHOICE[name], attention)(ids, use_cache=False).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@every_choice
def test_activation_checkpointing_changes_no_bit(name):
    choices = EVERY_CHOICE[name] | {"attention_dropout": 0.1, "residual_dropout": 0.1}
    plain, checkpointed = build(choices).train(), build(choices).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    results = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        results.append(loss_and_gradients(model, some_ids(plain)))
    (loss, gradients), (other, others) = results
    assert loss == other
    assert all(torch.equal(gradients[key], others[key]) for key in gradients)


@every_choice
def test_it_compiles_whole_without_a_graph_break(name):
    plain, model = build(EVERY_CHOICE[name]), build(EVERY_CHOICE[name])
    ids = some_ids(plain)
    loss, gradients = loss_and_gradients(plain, ids)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(input_ids=ids, labels=ids, use_cache=False)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    model.compile(backend="aot_eager", fullgraph=True)
    compiled, others = loss_and_gradients(model, ids)
    assert compiled == pytest.approx(loss, abs=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=1e-4, atol=1e-5)


@every_choice
def test_saved_and_loaded_every_weight_is_the_same(name, tmp_path):
    model = build(EVERY_CHOICE[name])
    model.save_pretrained(tmp_path)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path), HybridForCausalLM.from_pretrained(tmp_path)):
        assert type(again) is HybridForCausalLM  # the package's own class: no remote code is run where it is installed
        assert again.config.to_diff_dict() == model.config.to_diff_dict() | {"dtype": "float32"}
        assert all(torch.equal(parameter, again.get_parameter(key)) for key, parameter in model.named_parameters())
        tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert tied == model.config.tie_word_embeddings


# Neither this package nor what installed it: site-packages without its .pth files, and the name blocked besides.
CLEAN = """
import sys
sys.path.append(sys.argv[2])
sys.modules["isoflop"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__, type(model)
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)) is type(model.config)
saved = torch.load(f"{folder}/expected.pt", weights_only=True)
with torch.no_grad():
    assert torch.equal(model(saved["ids"]).logits, saved["logits"])
mask = torch.ones_like(saved["ids"])
again = model.generate(saved["ids"], attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
assert torch.equal(again, saved["generated"])
model.save_pretrained(sys.argv[3])
print(type(model).__name__, len([name for name in sys.modules if name.startswith("isoflop.")]))
"""


@pytest.mark.parametrize("name", ["literal", "qk-norm"])
def test_with_remote_code_it_opens_where_this_package_is_not(name, tmp_path):
    model, saved, resaved = build(EVERY_CHOICE[name]), tmp_path / "saved-1.0", tmp_path / "again"
    model.save_pretrained(saved)
    ids = some_ids(model)
    with torch.no_grad():
        logits = model(ids).logits
    mask = torch.ones_like(ids)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    torch.save({"ids": ids, "logits": logits, "generated": generated}, saved / "expected.pt")
    code = ["compatibility_hybrid.py", "configuration_hybrid.py", "conversion_hybrid.py", "modeling_hybrid.py"]
    assert sorted(path.name for path in saved.glob("*.py")) == code
    assert json.loads((saved / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_hybrid.HybridConfig",
        "AutoModelForCausalLM": "modeling_hybrid.HybridForCausalLM",
    }
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CLEAN, saved, sysconfig.get_paths()["purelib"], resaved],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["HybridForCausalLM", "0"]
    assert sorted(path.name for path in resaved.glob("*.py")) == code  # and it can be saved from there as well
    again = AutoModelForCausalLM.from_pretrained(resaved)
    assert all(torch.equal(parameter, again.get_parameter(key)) for key, parameter in model.named_parameters())


@every_choice
def test_the_vocabulary_is_resized(name, tmp_path):
    model = build(EVERY_CHOICE[name])
    ids = some_ids(model)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(120)
        after = model(ids).logits
    assert (model.config.vocab_size, *after.shape) == (120, 2, 20, 120)
    assert torch.equal(after[..., :97], before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, after)


@pytest.mark.parametrize("name", EVERY_CHOICE)
def test_it_begins_as_gpt2_did(name):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 500}
    model = HybridForCausalLM(HybridConfig(**{**EVERY_CHOICE[name], **sizes, "num_attention_heads": 4, "num_key_value_heads": 2}))
    for key, parameter in model.named_parameters():
        module = key.split(".")[-2]
        if parameter.dim() == 1:
            assert (parameter == (0 if key.endswith("bias") else 1)).all(), key
        else:
            std = 0.02 / math.sqrt(2 * 4) if module in ("o_proj", "down_proj") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), key


def test_built_on_the_meta_device_it_is_filled_and_initialized():
    model = build(EVERY_CHOICE["qk-norm"])
    with torch.device("meta"):
        empty = HybridForCausalLM(model.config)
    assert not list(empty.buffers())
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    ids = some_ids(model)
    with torch.no_grad():
        assert torch.equal(empty.eval()(ids).logits, model(ids).logits)


def test_the_literal_gpt2_has_the_parameters_that_its_table_gives():
    config = HybridConfig(
        vocab_size=50304, max_position_embeddings=2048, hidden_size=2432, num_hidden_layers=18, num_attention_heads=18,
        head_dim=135, norm_position="post",
    )  # fmt: skip
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    # Of 19 heads of 128 it lacks 2 of 2,432 dimensions in four matrices and three biases, and the last norm.
    assert model.num_parameters() == 1_405_452_800 - 18 * (4 * 2 * 2432 + 3 * 2) - 2 * 2432 == 1_405_097_620
    with pytest.raises(ValueError, match=r"norm_position = 'post', not 'pre', 18 heads x head_dim 135 = 2430, not hidden_size"):
        model.to_stock()


def test_rotary_positions_are_relative_and_learned_ones_are_not():
    for name, same in (("llama", True), ("qk-norm", True), ("gpt2", False)):
        model = build(EVERY_CHOICE[name])
        ids, places = some_ids(model), torch.arange(20)[None]
        with torch.no_grad():
            here, there = (model(ids, position_ids=places + offset).logits for offset in (0, 7))
        assert torch.allclose(here, there, rtol=1e-3, atol=1e-3) == same


def test_without_positions_the_last_token_sees_a_bag_of_tokens():
    for positions, same in (("none", True), ("learned", False), ("rope", False)):
        model = build({"positions": positions}, num_hidden_layers=1)
        ids = some_ids(model)
        shuffled = torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), dim=1)
        with torch.no_grad():
            one, other = (model(given).logits[:, -1] for given in (ids, shuffled))
        assert torch.allclose(one, other, atol=1e-4) == same


def test_soft_capped_logits_are_the_cap_times_a_tanh():
    plain, capped = build({}), build({"final_logit_softcapping": 2.0})
    ids = some_ids(plain)
    with torch.no_grad():
        logits = plain(ids).logits
        torch.testing.assert_close(capped(ids).logits, 2 * torch.tanh(logits / 2))
        loss = F.cross_entropy(2 * torch.tanh(logits[:, :-1] / 2).flatten(0, 1), ids[:, 1:].flatten())
        assert capped(ids, labels=ids).loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert logits.abs().max() > 2


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_post_norm_ends_in_its_last_norm_and_the_stream_is_normed_throughout(norm):
    model = build({"norm": norm, "norm_position": "post"})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp_norm.weight.fill_(1.0)
            layer.mlp_norm.bias.zero_()
        hidden = model.model(some_ids(model), output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    for stream in hidden[1:]:
        torch.testing.assert_close(stream.pow(2).mean(-1), torch.ones(2, 20), rtol=1e-3, atol=1e-3)
    assert isinstance(model.model.norm, torch.nn.Identity)


def test_qk_norm_takes_the_size_of_queries_and_keys_away():
    model = build({"qk_norm": True, "attention_bias": False})
    ids = some_ids(model)
    with torch.no_grad():
        before = model(ids).logits
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(100)
            layer.self_attn.k_proj.weight.mul_(100)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)


def test_attentions_and_hidden_states_are_returned_where_asked_for():
    model = build(EVERY_CHOICE["literal"], "eager")
    output = model(some_ids(model), output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in output.attentions] == [(2, 3, 20, 20)] * 2
    assert [hidden.shape for hidden in output.hidden_states] == [(2, 20, 24)] * 3


def test_only_the_logits_asked_for_are_made():
    model = build(EVERY_CHOICE["gpt2"])
    ids = some_ids(model)
    with torch.no_grad():
        logits = model(ids).logits
        for kept, wanted in ((1, logits[:, -1:]), (torch.tensor([2, 5]), logits[:, [2, 5]])):
            torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, wanted)


def test_embeddings_can_be_given_instead_of_ids():
    model = build(EVERY_CHOICE["gpt2"])
    ids = some_ids(model)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 20, 24)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


@every_choice
def test_a_recipe_builds_it_with_its_own_initial_weights(name):
    section = {"model_type": "hybrid", "attn_implementation": "sdpa", "rope_theta": 500.0, **EVERY_CHOICE[name], "vocab_size": 97}
    config = build_config(section, eos_token_id=3, bos_token_id=None)
    assert (config._attn_implementation, config.eos_token_id) == (UNMASKED_SDPA, 3)
    assert config.rope_parameters in (None, {"rope_type": "default", "rope_theta": 500.0})
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 96, 2, 192
    for depth_scaled, std in ((True, 0.01), (False, 0.02)):
        model = build_model(config, depth_scaled, seed=0)
        assert model.model.layers[1].mlp.down_proj.weight.std().item() == pytest.approx(std, rel=0.05)
        assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
