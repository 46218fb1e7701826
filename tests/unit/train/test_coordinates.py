"""Coordinate check: sizes of activations and of their changes in training, over widths and depths."""

import math

import numpy as np
import pytest
import torch

from isoflop.config.recipe import Recipe
from isoflop.modeling.build import build_config, build_model, final_norms
from isoflop.train.optimizers import build_optimizer
from isoflop.train.parametrization import parameter_scales, scale_initial_values

WIDTHS, DEPTHS = (32, 64, 128, 256, 512), (2, 4, 8, 16)
VOCABULARY, STEPS = 64, 10
PEAK = {"adamw": 2e-3, "muon": 8e-3}
CASES = {  # optimizer, model
    "llama": ("adamw", {"model_type": "llama"}),
    "gpt2": ("adamw", {"model_type": "gpt2"}),
    "hybrid": ("adamw", {"model_type": "hybrid", "positions": "rope", "mlp": "swiglu", "qk_norm": True}),
    "llama muon": ("muon", {"model_type": "llama"}),
}


def recipe_of(case, parametrization, width, layers):
    optimizer, model = CASES[case]
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
    }
    sizes["max_position_embeddings"] = 32
    if model["model_type"] == "gpt2":
        names = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
                 "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}  # fmt: skip
        sizes = {names[key]: value for key, value in sizes.items()}
    base = {"base_hidden_size": WIDTHS[0], "base_num_layers": 1} if parametrization == "completep" else {}
    return Recipe.model_validate(
        {
            "model": {**model, **sizes, "vocab_size": VOCABULARY},
            "tokenizer": {"name": "none"},
            "data": {"source": {"kind": "python_stdlib"}, "prepared_dir": "data/none"},
            "training": {"sequence_length": 16, "tokens_per_step": 128, "micro_batch_size": 8, "max_steps": STEPS},
            "optimizer": {"name": optimizer, "peak_learning_rate": PEAK[optimizer]},
            "parametrization": {"name": parametrization, **base},
            "evaluation": {"sample_tokens": 4},
            "output": {"run_dir": "runs/none"},
        }
    )


def observe(model, ids):
    """The residual stream before the last norm, and the logits beyond their mean over the vocabulary."""
    seen = []
    hook = final_norms(model)[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].clone()))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    hook.remove()
    return seen[0], logits - logits.mean(-1, keepdim=True)


def sizes_of(recipe):
    """Sizes after some steps on one batch: of the stream, of its change, and the mean rise of the logits of the right ids.

    The mean rise is the part of the logits' change that a batch agrees on. Their root mean square has random terms between
    different ids, whose embeddings are orthogonal only in the limit of large width: they fall as 1 / sqrt(width).
    """
    model = build_model(build_config(recipe.model.model_dump(exclude={"depth_scaled_init"}), 0, 0), True, seed=0)
    scales = parameter_scales(model, recipe)
    scale_initial_values(model, scales)
    optimizer = build_optimizer(model, recipe.optimizer, torch.device("cpu"), scales)
    ids = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    stream, logits = observe(model, ids)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stream_after, logits_after = observe(model, ids)
    rise = (logits_after - logits)[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    return stream_after.square().mean().sqrt().item(), (stream_after - stream).square().mean().sqrt().item(), rise.item()


def slopes(case, parametrization, shapes):
    """Exponents of width or depth in the sizes, by a straight line through their logarithms."""
    sizes = [sizes_of(recipe_of(case, parametrization, width, layers)) for width, layers in shapes]
    grown = [math.log(width * layers) for width, layers in shapes]
    return [float(np.polyfit(grown, np.log(column), 1)[0]) for column in zip(*sizes, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_sizes_do_not_depend_on_width(case):
    # Muon's products make the widest model as slow as all the others together.
    shapes = [(width, DEPTHS[0]) for width in (WIDTHS[:-1] if "muon" in case else WIDTHS)]
    assert slopes(case, "completep", shapes) == pytest.approx([0, 0, 0], abs=0.05)
    stream, change, rise = slopes(case, "standard", shapes)
    assert stream > 0.3
    assert change > 0.3
    assert rise > 0.3


@pytest.mark.parametrize("case", CASES)
def test_sizes_do_not_depend_on_depth(case):
    shapes = [(2 * WIDTHS[0], layers) for layers in DEPTHS]
    assert slopes(case, "completep", shapes) == pytest.approx([0, 0, 0], abs=0.05)
    stream, change, _ = slopes(case, "standard", shapes)
    assert stream > 0.15
    assert change > 0.15


def gradients_by_epsilon(recipe, steps):
    """Logarithm of the gradients' root mean square by epsilon, the mean over the parameters of each class."""
    model = build_model(build_config(recipe.model.model_dump(exclude={"depth_scaled_init"}), 0, 0), True, seed=0)
    scales = parameter_scales(model, recipe)
    scale_initial_values(model, scales)
    optimizer = build_optimizer(model, recipe.optimizer, torch.device("cpu"), scales)
    ids = torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
    for step in range(steps + 1):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if step < steps:
            optimizer.step()
    classes = {}
    for name, parameter in model.named_parameters():
        layer = any(part in name for part in (".layers.", ".h."))
        kind = "head norm" if "q_norm.weight" in name or "k_norm.weight" in name else f"{parameter.dim()}d {layer}"
        if "q_norm.bias" not in name and "k_norm.bias" not in name:  # their heads' gradients have random signs: 1 / sqrt(m) less
            classes.setdefault(kind, []).append(parameter.grad.square().mean().log().item() / 2 - math.log(scales[name].epsilon))
    return {kind: float(np.mean(values)) for kind, values in classes.items()}


@pytest.mark.parametrize(("case", "steps"), [("llama", 0), ("gpt2", 0), ("hybrid", 0), ("hybrid", 3)])
def test_epsilon_is_the_same_share_of_the_gradient_at_every_size(case, steps):
    for shapes in ([(width, DEPTHS[0]) for width in WIDTHS[:-1]], [(2 * WIDTHS[0], layers) for layers in DEPTHS]):
        found = [gradients_by_epsilon(recipe_of(case, "completep", width, layers), steps) for width, layers in shapes]
        grown = [math.log(width * layers) for width, layers in shapes]
        slopes_of = {kind: float(np.polyfit(grown, [each[kind] for each in found], 1)[0]) for kind in found[0]}
        if steps == 0:  # at the start the heads' gradients have random signs, afterwards they agree
            slopes_of.pop("head norm", None)
        assert len(slopes_of) >= 4
        assert slopes_of == pytest.approx(dict.fromkeys(slopes_of, 0), abs=0.12)
