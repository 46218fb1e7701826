"""Choices and sizes of the hybrid: what follows from others, what is refused, what is saved."""

import pytest

from isoflop.modeling.configuration_hybrid import CHOICES, PRESETS, HybridConfig


def test_sizes_that_are_not_given_follow_from_others():
    config = HybridConfig(hidden_size=96, num_attention_heads=6)
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (16, 6, 384)
    assert config.rope_parameters is None


def test_the_literal_gpt2_that_stock_classes_refuse():
    config = HybridConfig(hidden_size=2432, num_attention_heads=18, head_dim=135, norm_position="post")
    assert (config.num_attention_heads * config.head_dim, config.intermediate_size) == (2430, 9728)


def test_a_preset_sets_every_choice_and_fields_change_it():
    assert set(PRESETS["gpt2"]) == set(PRESETS["llama"]) >= set(CHOICES)
    for name, choices in PRESETS.items():
        config = HybridConfig.from_preset(name)
        assert {key: getattr(config, key) for key in choices} == choices
    assert HybridConfig.from_preset("llama", mlp="relu2", vocab_size=7).mlp == "relu2"
    assert HybridConfig().to_dict() == HybridConfig.from_preset("gpt2").to_dict()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_configuration_reads_back_equal(preset, tmp_path):
    config = HybridConfig.from_preset(preset, rope_theta=5e5, num_attention_heads=3, head_dim=10, final_logit_softcapping=30.0)
    config.save_pretrained(tmp_path)
    again = HybridConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.rope_parameters == (None if preset == "gpt2" else {"rope_type": "default", "rope_theta": 5e5})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"positions": "alibi"}, r"positions = 'alibi': not a choice; take one of learned, rope, none"),
        ({"norm": "batchnorm"}, r"norm = 'batchnorm': not a choice; take one of layernorm, rmsnorm"),
        ({"norm_position": "both"}, r"norm_position = 'both': not a choice; take one of pre, post"),
        ({"mlp": "geglu"}, r"mlp = 'geglu': not a choice; take one of gelu, gelu_tanh, swiglu, relu2"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads = 5: .* num_attention_heads = 12; take one of 1, 2, 3, 4, 6, 12"),
        ({"positions": "rope", "head_dim": 135}, r"head_dim = 135: positions = 'rope' turns pairs.*take 134 or 136, or other"),
        ({"positions": "rope", "head_dim": 1}, r"head_dim = 1: .*take 2 or 2"),
        (
            {"hidden_size": 2432, "num_attention_heads": 18},
            r"num_attention_heads = 18: hidden_size = 2432 is not a multiple .* set head_dim, .*\(135 is nearest\)",
        ),
        ({"hidden_size": 0}, r"hidden_size = 0: has to be positive; take 1 or more"),
        ({"num_attention_heads": 0}, r"num_attention_heads = 0: has to be positive"),
        ({"final_logit_softcapping": 0.0}, r"final_logit_softcapping = 0.0: a bound on logits is positive; take 30.0, or None"),
        (
            {"positions": "rope", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            r"rope_type = 'linear': positions are not rescaled here; take 'default'",
        ),
    ],
)
def test_what_does_not_fit_names_key_value_rule_and_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig(**fields)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset = 'bert': not a preset; take one of gpt2, llama"):
        HybridConfig.from_preset("bert")
