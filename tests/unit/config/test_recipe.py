import math
import re
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import HYBRID_PRESETS, HybridModel, Training, differences, gradient_accumulation_steps
from isoflop.plan import cost
from isoflop.utils.errors import UserError

EXACT_PARAMETERS = {
    "gpt2_1.36b": 1_405_452_800,
    "gpt2_1.36b_literal": 1_405_097_620,
    "llama2_1.36b": 1_294_159_104,
    "llama3_1.5b": 1_544_628_224,
    "llama3_2.2b": 2_224_154_624,
    "gpt2_124m": 124_475_904,
    "modern_124m": 123_587_328,
    "fast_124m": 123_587_328,
    "fast_350m": 359_842_816,
    "fast_1.4b": 1_439_016_960,
    "quickstart": 2_816_064,
    "quickstart_gpt2": 2_844_456,
    "laptop": 432_480,
}
FAST = ("fast_124m", "fast_350m", "fast_1.4b")
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_every_recipe_of_the_tree_is_listed_here():
    assert sorted(EXACT_PARAMETERS) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_exact_by_arithmetic_and_on_the_meta_device(name):
    import torch

    from isoflop.modeling.build import build_config, build_model

    recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
    with torch.device("meta"):
        config = build_config(recipe.model.model_dump(exclude={"depth_scaled_init"}), 0, 0)
        model = build_model(config, recipe.model.depth_scaled_init, seed=0)
    assert sum(p.numel() for p in model.parameters()) == EXACT_PARAMETERS[name]
    assert cost.parameters(recipe.model) == EXACT_PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "steps"), [("gpt2_1.36b", 53_614), ("llama2_1.36b", 49_369), ("llama3_1.5b", 58_923), ("llama3_2.2b", 84_845)]
)
def test_twenty_tokens_per_parameter_take_the_published_steps(name, steps):
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml", ["training.tokens_per_parameter=20"])
    assert recipe.training.max_steps is None
    assert recipe.training.num_steps(cost.parameters(recipe.model)) == steps


def test_the_six_shapes_train_as_stated():
    for name in sorted(set(RECIPES) - {"quickstart", "quickstart_gpt2", "laptop", *FAST}):
        recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
        assert recipe.training.tokens_per_step == 524_288
        assert (recipe.optimizer.beta1, recipe.optimizer.beta2) == (0.9, 0.95)
        assert (recipe.optimizer.weight_decay, recipe.optimizer.max_grad_norm) == (0.1, 1.0)
    large = [
        load_recipe(ROOT / f"recipes/{name}.yaml")
        for name in ("gpt2_1.36b", "gpt2_1.36b_literal", "llama2_1.36b", "llama3_1.5b", "llama3_2.2b")
    ]
    for recipe in large:
        assert recipe.training.sequence_length == 2048
        assert recipe.training.max_steps == 25_000
        assert recipe.optimizer.peak_learning_rate == 3e-4
        assert (recipe.schedule.warmup_steps, recipe.schedule.final_learning_rate) == (2000, 3e-5)


@pytest.mark.parametrize("name", FAST)
def test_a_fast_recipe_has_the_values_that_the_plan_chooses(name):
    """By nanochat's rules for Muon at the base's size, which CompleteP scales to this one's; 20 tokens a parameter."""
    from isoflop.plan.hyperparameters import choose, law_for
    from isoflop.plan.shape import parameters_without_vocabulary, tuned_parameters

    recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
    training, tokens = recipe.training, recipe.training.num_steps(0) * recipe.training.tokens_per_step
    assert tokens == pytest.approx(20 * cost.parameters(recipe.model), rel=2e-3)
    base = load_recipe(ROOT / "recipes/fast_124m.yaml").model
    assert tuned_parameters(recipe.model, recipe.parametrization) == pytest.approx(parameters_without_vocabulary(base), rel=0.03)
    unit = training.sequence_length * training.micro_batch_size
    header = Path(ROOT / f"recipes/{name}.yaml").read_text().split("model:")[0]
    asked = float(re.search(r"--tokens (\S+)", header)[1])
    assert asked == pytest.approx(tokens, rel=1e-3)
    assert f"--micro-batch-size {training.micro_batch_size}" in header
    chosen = choose(law_for("muon", 84934656, asked), 84934656, asked, batch_unit=unit)
    assert recipe.optimizer.name == "muon"
    assert recipe.optimizer.peak_learning_rate == chosen.rounded(chosen.peak_learning_rate.value)
    assert recipe.optimizer.weight_decay == chosen.rounded(chosen.weight_decay.value)
    assert (training.tokens_per_step, training.max_steps) == (chosen.tokens_per_step.value, chosen.steps)
    schedule = recipe.schedule
    assert schedule == chosen.schedule.model_copy(update={"final_learning_rate": schedule.final_learning_rate})
    assert schedule.final_learning_rate == chosen.rounded(chosen.schedule.final_learning_rate)
    for line in (chosen.formulas()["peak_learning_rate"].split(" (no")[0], chosen.formulas()["weight_decay"]):
        assert line in header


def test_the_two_quickstarts_differ_in_their_model_alone():
    llama, gpt2 = (load_recipe(ROOT / f"recipes/{name}.yaml").model_dump() for name in ("quickstart", "quickstart_gpt2"))
    assert (llama.pop("model")["model_type"], gpt2.pop("model")["model_type"]) == ("llama", "gpt2")
    assert (llama.pop("output")["run_dir"], gpt2.pop("output")["run_dir"]) == ("runs/quickstart", "runs/quickstart_gpt2")
    assert gpt2 == llama
    assert abs(EXACT_PARAMETERS["quickstart_gpt2"] / EXACT_PARAMETERS["quickstart"] - 1) < 0.011


HYBRID = {
    "model_type": "hybrid", "vocab_size": 320, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def test_a_hybrids_choices_are_its_presets_but_for_those_given():
    from isoflop.modeling.configuration_hybrid import PRESETS

    assert HYBRID_PRESETS == PRESETS
    for preset, choices in PRESETS.items():
        changed = HybridModel(**HYBRID, preset=preset, norm="rmsnorm", final_logit_softcapping=30.0)
        expected = choices | {"norm": "rmsnorm", "final_logit_softcapping": 30.0}
        assert {key: getattr(changed, key) for key in choices} == expected
        assert HybridModel.model_validate(changed.model_dump()) == changed  # written out, nothing is the preset's any more
    assert HybridModel(**HYBRID) == HybridModel(**HYBRID, preset="gpt2", **PRESETS["gpt2"])


def test_recipe_and_configuration_have_the_same_fields():
    from isoflop.modeling.build import build_config

    section = HybridModel(**HYBRID, preset="llama", rope_theta=5e5, head_dim=10, attention_dropout=0.1)
    config = build_config(section.model_dump(exclude={"depth_scaled_init"}), eos_token_id=7, bos_token_id=None)
    shared = section.model_dump(exclude={"depth_scaled_init", "preset", "attn_implementation", "rope_theta"})
    assert {key: getattr(config, key) for key in shared} == shared | {"num_key_value_heads": 4}
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert "preset" not in config.to_dict()


@given(
    sequence_length=st.integers(2, 4096),
    micro_batch_size=st.integers(1, 64),
    num_processes=st.integers(1, 64),
    tokens_per_step=st.integers(1, 2**21),
)
def test_accumulation_makes_exactly_the_tokens_per_step_or_is_refused(
    sequence_length, micro_batch_size, num_processes, tokens_per_step
):
    training = Training.model_construct(
        sequence_length=sequence_length, micro_batch_size=micro_batch_size, tokens_per_step=tokens_per_step
    )
    unit = sequence_length * micro_batch_size * num_processes
    if tokens_per_step % unit == 0:
        assert gradient_accumulation_steps(training, num_processes) * unit == tokens_per_step
    else:
        with pytest.raises(UserError, match=str(tokens_per_step)):
            gradient_accumulation_steps(training, num_processes)


def test_what_does_not_divide_names_the_nearest_values_that_do():
    with pytest.raises(ValidationError) as error:
        Training(sequence_length=2048, micro_batch_size=7, tokens_per_step=524_288, max_steps=1)
    assert "nearest that are: 516096 and 530432" in str(error.value)
    assert "set training.micro_batch_size to 4 or 8" in str(error.value)


@given(tokens=st.integers(1, 10**13), tokens_per_step=st.integers(1, 10**7))
def test_a_duration_in_tokens_is_reached_within_a_step(tokens, tokens_per_step):
    training = Training.model_construct(max_steps=None, max_tokens=tokens, tokens_per_step=tokens_per_step)
    steps = training.num_steps(parameters=1)
    assert (steps - 1) * tokens_per_step < tokens <= steps * tokens_per_step
    assert steps == math.ceil(tokens / tokens_per_step) or tokens > 2**53


def test_a_run_folder_belongs_to_what_decides_the_weights(toy_recipe):
    base = toy_recipe().identity_fields()
    assert toy_recipe(training__micro_batch_size=8, output__keep_last=7, evaluation__validate_every=1).identity_fields() == base
    assert toy_recipe(optimizer__peak_learning_rate=1e-3).identity_fields() != base
    assert toy_recipe(training__max_steps=11).identity_fields() != base


def test_recipes_state_their_hardware_and_source():
    for name in RECIPES:
        header = Path(ROOT / f"recipes/{name}.yaml").read_text().split("model:")[0]
        assert header.startswith("# yaml-language-server: $schema=schema.json\n")
        assert "# Hardware: " in header


# --- recipes/ablations ----------------------------------------------------------------------------------------

ABLATIONS = {path.stem: load_recipe(path) for path in sorted((ROOT / "recipes/ablations").glob("124m_*.yaml"))}
BASELINE = ABLATIONS["124m_baseline"]


def spent(recipe):
    """Tokens and FLOPs of a run."""
    tokens = recipe.training.num_steps(cost.parameters(recipe.model)) * recipe.training.tokens_per_step
    return tokens, tokens * cost.flops_per_token(recipe.model, recipe.training.sequence_length)


def test_the_baseline_of_the_ablations_is_gpt2_as_it_was():
    stock = load_recipe(ROOT / "recipes/gpt2_124m.yaml")
    assert cost.shape_of(BASELINE.model) == cost.shape_of(stock.model)
    changes = differences(BASELINE.identity_fields(), stock.identity_fields())
    assert all(change.startswith("model.") for change in changes)


def test_all_changes_together_are_the_modern_recipe():
    modern, together = load_recipe(ROOT / "recipes/modern_124m.yaml"), ABLATIONS["124m_all_three"]
    without_biases = together.model.model_copy(update={"attention_bias": False, "mlp_bias": False})
    assert cost.shape_of(without_biases) == cost.shape_of(modern.model)
    faster, longer = ABLATIONS["124m_learning_rate"], ABLATIONS["124m_epochs"]
    assert (faster.optimizer, faster.schedule, longer.training) == (modern.optimizer, modern.schedule, modern.training)


@pytest.mark.parametrize("name", [name for name in ABLATIONS if name != "124m_baseline"])
def test_an_ablation_changes_what_its_table_says_and_nothing_else(name):
    table = (ROOT / "recipes/ablations/README.md").read_text()
    changed, parameters, tokens, flops = re.search(rf"^\| `{name}` \| (.+) \| (.+) \| (.+)B \| (.+) \|$", table, re.M).groups()
    found = differences(BASELINE.identity_fields(), ABLATIONS[name].identity_fields())
    keys = {change.split(":")[0].split(".")[-1] for change in found}
    if ABLATIONS[name].data.prepared_dir != BASELINE.data.prepared_dir:
        keys.add("prepared_dir")
    assert keys == set(changed.split(", "))
    assert f"{cost.parameters(ABLATIONS[name].model):,}" == parameters
    spent_tokens, spent_flops = spent(ABLATIONS[name])
    assert (f"{spent_tokens / 1e9:.1f}", f"{spent_flops:.3e}") == (tokens, flops)
    header = (ROOT / f"recipes/ablations/{name}.yaml").read_text().split("model:")[0]
    assert header.startswith("# yaml-language-server: $schema=../schema.json\n")
    assert (
        f"# {parameters} parameters; {flops} FLOPs in {ABLATIONS[name].training.max_steps:,} steps, {tokens}B tokens.\n" in header
    )


def test_one_set_spends_equal_tokens_and_the_other_equal_flops():
    tokens, flops = spent(BASELINE)
    for name, recipe in ABLATIONS.items():
        if "equal_flops" in name:  # to half a step
            assert spent(recipe)[1] == pytest.approx(flops, rel=0.5 / recipe.training.max_steps)
        else:
            assert spent(recipe) == ((2 * tokens, 2 * flops) if name == "124m_epochs" else (tokens, flops))
