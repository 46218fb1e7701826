"""The factors of each parameter, and equality with a model that has CompleteP's multipliers."""

import json
import math

import pytest
import torch
from conftest import TOY_MODELS, weights_of
from conftest import train as train_recipe
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from isoflop.checkpoint.state import read
from isoflop.config.recipe import Recipe
from isoflop.modeling.build import RESIDUAL_PROJECTIONS, build_config, build_model, load_model
from isoflop.modeling.modeling_hybrid import HybridForCausalLM
from isoflop.train.optimizers import build_optimizer
from isoflop.train.parametrization import Scale, parameter_scales, scale_initial_values
from isoflop.train.training_model import build_training_model

WIDTH, DEPTH = 64, 4
BASE = {"name": "completep", "base_hidden_size": 16, "base_num_layers": 2}
M, D = WIDTH / 16, DEPTH / 2
STD = 0.1  # large enough that the layers matter within 20 steps
SIZES = {
    "vocab_size": 96, "max_position_embeddings": 32, "hidden_size": WIDTH, "intermediate_size": 160,
    "num_hidden_layers": DEPTH, "num_attention_heads": 4, "initializer_range": STD,
}  # fmt: skip
MODELS = {
    "llama": {"model_type": "llama", **SIZES},
    "llama tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 96, "n_positions": 32, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4,
        "initializer_range": STD,
    },
    "hybrid": {"model_type": "hybrid", **SIZES, "positions": "rope", "mlp": "swiglu", "qk_norm": True},
    "hybrid untied": {"model_type": "hybrid", "preset": "llama", **SIZES, "norm": "layernorm", "mlp_bias": True},
}  # fmt: skip
# An epsilon as large as the gradients, so that a wrong factor on it changes the training.
OPTIMIZER = {"peak_learning_rate": 1e-2, "epsilon": 1e-3, "weight_decay": 5.0}


def recipe_of(model, parametrization=BASE, depth_scaled_init=True, **optimizer):
    return Recipe.model_validate(
        {
            "model": {**(MODELS[model] if isinstance(model, str) else model), "depth_scaled_init": depth_scaled_init},
            "tokenizer": {"name": "none"},
            "data": {"source": {"kind": "python_stdlib"}, "prepared_dir": "data/none"},
            "training": {"sequence_length": 16, "tokens_per_step": 64, "micro_batch_size": 4, "max_steps": 10},
            "optimizer": OPTIMIZER | optimizer,
            "parametrization": parametrization,
            "evaluation": {"sample_tokens": 4},
            "output": {"run_dir": "runs/none"},
        }
    )


def causal_lm_of(recipe):
    config = build_config(recipe.model.model_dump(exclude={"depth_scaled_init"}), eos_token_id=0, bos_token_id=0)
    return build_model(config, recipe.model.depth_scaled_init, seed=1)


def scales_of(recipe):
    return parameter_scales(causal_lm_of(recipe), recipe)


def test_the_factors_of_each_class_of_a_llama():
    scales = scales_of(recipe_of("llama"))
    assert scales["model.embed_tokens.weight"] == Scale(1, 1, 1 / M, 1)
    assert scales["model.norm.weight"] == Scale(1, 1, 1 / M, 1)
    assert scales["lm_head.weight"] == Scale(1 / M, 1 / M, 1, M)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert scales[f"model.layers.1.{name}.weight"] == Scale(1 / math.sqrt(M), 1 / M, 1 / (M * D), M)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        initial = math.sqrt(D) / (D * math.sqrt(M))  # sqrt(D): the base's number of layers in depth_scaled_init
        assert scales[f"model.layers.1.{name}.weight"] == pytest.approx(Scale(initial, 1 / (M * D), 1 / M, M * D))
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert scales[f"model.layers.3.{name}.weight"] == Scale(1, 1, 1 / (M * D), 1)
    assert len(scales) == 3 + DEPTH * 9


def test_the_factors_of_gpt2s_biases_positions_and_tied_head():
    scales = scales_of(recipe_of("gpt2", depth_scaled_init=False))
    assert "lm_head.weight" not in scales
    for name in ("wte.weight", "wpe.weight"):
        assert scales[f"transformer.{name}"] == Scale(1, 1, 1 / M, 1)
    for name in ("ln_f.weight", "ln_f.bias"):
        assert scales[f"transformer.{name}"] == Scale(1 / M, 1 / M, 1, M)
    for name in ("attn.c_attn.bias", "mlp.c_fc.bias", "ln_1.weight", "ln_2.bias"):
        assert scales[f"transformer.h.0.{name}"] == Scale(1, 1, 1 / (M * D), 1)
    for name in ("attn.c_proj", "mlp.c_proj"):
        assert scales[f"transformer.h.0.{name}.bias"] == Scale(1 / D, 1 / D, 1 / M, D)
        assert scales[f"transformer.h.0.{name}.weight"] == Scale(1 / (D * math.sqrt(M)), 1 / (M * D), 1 / M, M * D)


def test_norms_of_queries_and_keys_are_shared_by_all_heads():
    scales = scales_of(recipe_of("hybrid"))
    assert scales["model.layers.0.self_attn.q_norm.weight"] == Scale(1, 1, 1 / D, 1)
    assert scales["model.layers.0.self_attn.k_norm.bias"] == Scale(1, 1, 1 / D, 1)


@pytest.mark.parametrize("model", MODELS)
def test_muon_changes_the_factors_of_matrices_of_the_layers_alone(model):
    adamw, muon = scales_of(recipe_of(model)), scales_of(recipe_of(model, name="muon"))
    causal_lm = causal_lm_of(recipe_of(model))
    for name, parameter in causal_lm.named_parameters():
        if parameter.dim() == 1 or not any(part in name for part in (".layers.", ".h.")):
            assert muon[name] == adamw[name]
            continue
        branch = D if name.split(".")[-2] in RESIDUAL_PROJECTIONS else 1
        assert muon[name].initial_value == adamw[name].initial_value
        assert muon[name][1:] == (1 / (math.sqrt(M) * branch), 1, math.sqrt(M) * branch)


@given(
    model=st.sampled_from(sorted(MODELS)),
    heads=st.integers(1, 8),
    layers=st.integers(1, 8),
    name=st.sampled_from(["adamw", "muon"]),
)
def test_learning_rate_times_decay_is_the_recipes_at_every_size(model, heads, layers, name):
    base = {"name": "completep", "base_hidden_size": 16 * heads, "base_num_layers": layers}
    recipe = recipe_of(model, base, name=name)
    with torch.device("meta"):
        scales = scales_of(recipe)
    assert all(scale.learning_rate * scale.weight_decay == pytest.approx(1) for scale in scales.values())


@pytest.mark.parametrize("model", MODELS)
def test_at_the_bases_size_nothing_is_scaled(model):
    base = {"name": "completep", "base_hidden_size": WIDTH, "base_num_layers": DEPTH}
    assert set(scales_of(recipe_of(model, base)).values()) == {Scale()}
    assert set(scales_of(recipe_of(model, {"name": "standard"})).values()) == {Scale()}


@pytest.mark.parametrize("model", MODELS)
def test_standard_trains_the_very_weights_that_were_built(model):
    recipe = recipe_of(model, {"name": "standard"})
    config = build_config(recipe.model.model_dump(exclude={"depth_scaled_init"}), 0, 0)
    built = dict(build_model(config, True, recipe.seed).named_parameters())
    trained = dict(build_training_model(recipe, 0, 0).causal_lm.named_parameters())
    assert all(torch.equal(trained[name], built[name]) for name in built)


def test_a_run_starts_from_the_scaled_weights():
    recipe = recipe_of("llama tied")
    with torch.no_grad():
        causal_lm = build_training_model(recipe, 0, 0).causal_lm
    weights = dict(causal_lm.named_parameters())
    deviation = STD / math.sqrt(M)
    assert weights["model.layers.0.mlp.up_proj.weight"].std().item() == pytest.approx(deviation, rel=0.03)
    residual = deviation / (D * math.sqrt(2 * DEPTH / D))
    assert weights["model.layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(residual, rel=0.03)
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(STD, rel=0.03)
    assert torch.equal(weights["model.norm.weight"], torch.full((WIDTH,), 1 / M))


def explicit(recipe):
    """The model with CompleteP's multipliers, and its parameters by the classes of the papers' table."""
    model = causal_lm_of(recipe)
    layers = model.transformer.h if recipe.model.model_type == "gpt2" else model.model.layers
    classes = {"matrix": [], "head norm": [], "inner": [], "outer": []}
    std = STD / math.sqrt(M)
    for layer in layers:
        for branch in (layer.attn if hasattr(layer, "attn") else layer.self_attn, layer.mlp):
            branch.register_forward_hook(lambda _, __, out: (out[0] / D, *out[1:]) if isinstance(out, tuple) else out / D)
        for name, parameter in layer.named_parameters():
            kind = "matrix" if parameter.dim() == 2 else "head norm" if "q_norm" in name or "k_norm" in name else "inner"
            classes[kind].append(parameter)
    model.lm_head.register_forward_hook(lambda _, __, logits: logits / M)
    inner = {id(parameter) for parameters in classes.values() for parameter in parameters}
    classes["outer"] = [parameter for parameter in model.parameters() if id(parameter) not in inner]
    with torch.no_grad():
        for layer in layers:
            for name, parameter in layer.named_parameters():
                if parameter.dim() == 2:  # to the initial values of the base's depth, narrower by the width
                    residual = name.split(".")[-2] in RESIDUAL_PROJECTIONS
                    built = STD / (math.sqrt(2 * DEPTH) if residual else 1)
                    parameter.mul_(std / (math.sqrt(2 * DEPTH / D) if residual else 1) / built)
    rate, epsilon, decay = OPTIMIZER["peak_learning_rate"], OPTIMIZER["epsilon"], OPTIMIZER["weight_decay"]
    factors = {
        "matrix": (1 / M, 1 / (M * D), M),
        "head norm": (1, 1 / D, 0),
        "inner": (1, 1 / (M * D), 0),
        "outer": (1, 1 / M, 1),
    }
    groups = [
        {"params": [p for p in classes[kind] if p.dim() == dim], "lr": rate * f[0], "eps": epsilon * f[1],
         "weight_decay": decay * f[2] * (dim == 2)}
        for kind, f in factors.items() for dim in (1, 2)
    ]  # fmt: skip
    return model, torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))


def folded(recipe):
    """The stock model with the factors in its initial values and its optimizer."""
    model = causal_lm_of(recipe)
    scales = parameter_scales(model, recipe)
    scale_initial_values(model, scales)
    return model, build_optimizer(model, recipe.optimizer, torch.device("cpu"), scales)


def train(model, optimizer, steps=20):
    """Losses over steps of batches that are the same for every model."""
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        ids = torch.randint(0, 32, (4, 16), generator=generator) * 3
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("model", MODELS)
def test_folded_factors_train_as_explicit_multipliers_do(model):
    recipe = recipe_of(model)
    (reference, by_rules), (stock, by_scales) = explicit(recipe), folded(recipe)
    expected, losses = train(reference, by_rules), train(stock, by_scales)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.3  # it has learned something
    scales, weights = parameter_scales(stock, recipe), dict(reference.named_parameters())
    for name, parameter in stock.named_parameters():
        residual = name.split(".")[-2] in RESIDUAL_PROJECTIONS
        multiplier = 1 / D if residual else 1 / M if scales[name].learning_rate == 1 / M and "lm_head" in name else 1
        multiplier = 1 / M if recipe.model.tie_word_embeddings and ("ln_f" in name or "model.norm" in name) else multiplier
        torch.testing.assert_close(parameter, weights[name] * multiplier, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_under_muon_folded_factors_train_as_explicit_multipliers_do(model):
    recipe = recipe_of(model, name="muon")
    reference, by_rules = explicit(recipe)
    of_adamw = {id(p): group for group in by_rules.param_groups for p in group["params"]}
    rules = {}
    for name, parameter in reference.named_parameters():
        epsilon = of_adamw[id(parameter)]["eps"] / OPTIMIZER["epsilon"]
        in_a_layer = any(part in name for part in (".layers.", ".h."))
        matrix = in_a_layer and parameter.dim() == 2
        rules[name] = Scale(1, 1 / math.sqrt(M), 1, math.sqrt(M)) if matrix else Scale(epsilon=epsilon)
    expected = train(reference, build_optimizer(reference, recipe.optimizer, torch.device("cpu"), rules))
    assert train(*folded(recipe)) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.3


@pytest.mark.parametrize("field", ["initial_value", "learning_rate", "epsilon", "weight_decay"])
def test_the_equality_sees_a_wrong_factor(field, monkeypatch):
    recipe = recipe_of("llama tied")
    expected = train(*explicit(recipe))

    def wrong(model, recipe, rules=parameter_scales):
        scales = rules(model, recipe)
        name = "model.layers.1.mlp.down_proj.weight"
        return scales | {name: scales[name]._replace(**{field: 1.2 * getattr(scales[name], field)})}

    monkeypatch.setitem(folded.__globals__, "parameter_scales", wrong)
    assert (train(*folded(recipe)) - expected).abs().max() > 1e-5


def test_an_exported_model_carries_nothing_extra(toy_tree, tmp_path):
    smaller = {"name": "completep", "base_hidden_size": 8, "base_num_layers": 1}
    same = {"name": "completep", "base_hidden_size": 32, "base_num_layers": 2}
    keys, weights = {}, {}
    for name, parametrization in (("standard", {}), ("same", same), ("completep", smaller)):
        tree = {**toy_tree, "model": TOY_MODELS["gpt2"], "parametrization": parametrization}
        weights[name] = weights_of(train_recipe(tree, tmp_path / name))
        exported = tmp_path / name / "model"
        keys[name] = {file: set(json.loads((exported / file).read_text())) for file in ("config.json", "generation_config.json")}
    assert keys["completep"] == keys["standard"]
    assert weights["same"] == weights["standard"]  # bit for bit: at the base's size nothing is scaled
    assert weights["completep"] != weights["standard"]
    reopened = AutoModelForCausalLM.from_pretrained(exported)
    assert type(reopened) is GPT2LMHeadModel
    trained = load_model(
        reopened.config,
        lambda weights: read(
            tmp_path / name / "checkpoints/step-10", {f"model.causal_lm.{key}": tensor for key, tensor in weights.items()}
        ),
    )
    ids = torch.arange(32).reshape(2, 16)
    assert torch.equal(reopened(ids).logits, trained.eval()(ids).logits)


def test_a_post_norm_hybrid_has_no_rule():
    with pytest.raises(ValidationError, match=r"no rule for model.norm_position = 'post'.*parametrization.name=standard"):
        recipe_of({"model_type": "hybrid", **SIZES, "norm_position": "post"})
    assert recipe_of({"model_type": "hybrid", **SIZES, "norm_position": "post"}, {"name": "standard"})


@pytest.mark.parametrize(("base", "nearest"), [(24, "16 and 32"), (8, "16;"), (100, "96 and 112")])
@pytest.mark.parametrize("model", ["llama", "gpt2", "hybrid"])
def test_a_base_width_of_other_heads_is_refused_with_the_nearest(model, base, nearest):
    parametrization = {"name": "completep", "base_hidden_size": base, "base_num_layers": 2}
    with pytest.raises(ValidationError, match=rf"base_hidden_size = {base} is not a multiple of 16.*widths: {nearest}"):
        recipe_of(model, parametrization)


def test_heads_of_a_free_size_grow_in_number_with_the_width():
    """Six heads of 10 on a width of 48: three on 24, none on 20."""
    model = {"model_type": "hybrid", **SIZES, "hidden_size": 48, "num_attention_heads": 6, "head_dim": 10}
    assert recipe_of(model, {"name": "completep", "base_hidden_size": 24, "base_num_layers": 2})
    with pytest.raises(ValidationError, match=r"multiple of 8.*nearest widths: 16 and 24"):
        recipe_of(model, {"name": "completep", "base_hidden_size": 20, "base_num_layers": 2})


def test_a_hybrid_becomes_the_stock_class_with_the_same_logits():
    recipe = recipe_of({"model_type": "hybrid", "preset": "gpt2", **SIZES})
    model = causal_lm_of(recipe)
    assert isinstance(model, HybridForCausalLM)
    scale_initial_values(model, parameter_scales(model, recipe))
    ids = torch.arange(16).reshape(1, 16)
    torch.testing.assert_close(model.to_stock()(ids).logits, model(ids).logits)
