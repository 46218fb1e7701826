import math

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from isoflop.config.loading import load_recipe
from isoflop.modeling.build import RESIDUAL_PROJECTIONS, build_config, build_model, decoder_layers

LLAMA = {
    "model_type": "llama", "attn_implementation": "sdpa", "rope_theta": 5e5, "vocab_size": 1000, "hidden_size": 256,
    "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 512,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "attn_implementation": "sdpa", "vocab_size": 1000, "n_embd": 256, "n_layer": 8, "n_head": 4,
    "n_positions": 256,
}  # fmt: skip


@pytest.mark.parametrize("fields", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("depth_scaled", [True, False])
def test_every_parameter_is_set_with_the_deviation_the_recipe_says(fields, depth_scaled):
    model = build_model(build_config({**fields, "initializer_range": 0.03}, 0, 0), depth_scaled, seed=0)
    for name, parameter in model.named_parameters():
        module = name.rsplit(".", 2)[-2]
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            scale = math.sqrt(2 * 8) if depth_scaled and module in RESIDUAL_PROJECTIONS else 1
            assert parameter.std().item() == pytest.approx(0.03 / scale, rel=0.03), name
            assert parameter.mean().item() == pytest.approx(0, abs=0.03 * 0.02), name


TOY_WIDTHS = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64, "n_inner": 128, "n_layer": 3, "n_head": 4},
    "hybrid": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 3, "head_dim": 14,
    },
}  # fmt: skip


RECIPES = [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes/ablations").glob("*.yaml")]


@pytest.mark.parametrize("name", sorted(path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in RECIPES))
def test_every_recipe_at_toy_width_starts_as_it_says(name, tmp_path):
    section = load_recipe(ROOT / f"recipes/{name}.yaml").model
    toy = dict(TOY_WIDTHS[section.model_type])
    if section.model_type == "llama" and section.num_key_value_heads:
        toy["num_key_value_heads"] = 2
    fields = section.model_copy(update=toy).model_dump(exclude={"depth_scaled_init"})
    model = build_model(build_config(fields, 0, 0), section.depth_scaled_init, seed=0)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scale = math.sqrt(2 * 3) if parameter_name.split(".")[-2] in RESIDUAL_PROJECTIONS else 1
            assert parameter.std().item() == pytest.approx(section.initializer_range / scale, rel=0.05), parameter_name
        else:
            assert (parameter == (0 if parameter_name.endswith("bias") else 1)).all(), parameter_name
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for before in (model, reloaded):
        tied = before.get_output_embeddings().weight is before.get_input_embeddings().weight
        assert tied == section.tie_word_embeddings
    assert all(torch.equal(p, reloaded.get_parameter(n)) for n, p in model.named_parameters())


def test_weights_follow_from_the_seed_alone():
    torch.manual_seed(99)
    one = build_model(build_config(LLAMA, 0, 0), True, seed=3).state_dict()
    torch.manual_seed(7)
    again, other = (build_model(build_config(LLAMA, 0, 0), True, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("fields", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_unmasked_sdpa_is_causal_and_equals_eager(fields):
    fast = build_model(build_config(fields, 0, 0), True, seed=0).eval()
    eager = build_model(build_config({**fields, "attn_implementation": "eager"}, 0, 0), True, seed=0).eval()
    ids = torch.randint(0, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = fast(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, eager(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
        ids[:, -1] = 0
        torch.testing.assert_close(fast(input_ids=ids, use_cache=False).logits[:, :-1], logits[:, :-1])


@pytest.mark.parametrize("fields", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_decoder_layers_are_all_found(fields):
    assert len(decoder_layers(build_model(build_config(fields, 0, 0), True, seed=0))) == 8


def test_building_leaves_the_fields_and_the_rotary_base_as_given():
    fields = dict(LLAMA)
    config = build_config(fields, eos_token_id=5, bos_token_id=None)
    assert fields == LLAMA
    assert config.rope_parameters["rope_theta"] == 5e5
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (5, None, None)
