"""What a compiled layer keeps for its backward pass, counted from the partitioner that torch.compile uses on any device."""

import itertools

import pytest
import torch
from conftest import ROOT

from isoflop.config.loading import load_recipe
from isoflop.modeling.build import build_config, build_model, decoder_layers
from isoflop.plan import cost

BATCH, LENGTH = 3, 96  # no product of these is a width below, so that no tensor is taken for another
LLAMA = ["model.hidden_size=256", "model.intermediate_size=704", "model.num_attention_heads=4", "model.head_dim=32"]
SHAPES = {
    "llama": ("llama2_1.36b", [*LLAMA, "model.num_key_value_heads=2"]),
    "gpt2": ("gpt2_1.36b", ["model.n_embd=256", "model.n_head=4", "model.n_inner=704"]),
    "gpt2 gelu_new": ("gpt2_1.36b", ["model.n_embd=256", "model.n_head=4", "model.activation_function=gelu_new"]),
    "hybrid, norms after the sums": ("gpt2_1.36b_literal", LLAMA),
    "hybrid relu2": (
        "gpt2_1.36b_literal",
        [
            *LLAMA,
            "model.mlp=relu2",
            "model.qk_norm=true",
            "model.norm=rmsnorm",
            "model.norm_position=pre",
            "model.positions=rope",
        ],
    ),
}


def kept_bytes(model, arithmetic):
    """Bytes of the tensors that the forward pass of compiled layers saves, parameters and buffers left out."""
    torch._dynamo.reset()
    causal_lm = build_model(build_config(model.model_dump(exclude={"depth_scaled_init"}), 0, None), True, seed=0)
    if arithmetic == "bf16":
        causal_lm = causal_lm.to(torch.bfloat16)
    for layer in decoder_layers(causal_lm):
        layer.compile(backend="aot_eager_decomp_partition")
    own = {tensor.untyped_storage().data_ptr() for tensor in (*causal_lm.parameters(), *causal_lm.buffers())}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 100, (BATCH, LENGTH))
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        causal_lm.train().base_model(input_ids=ids, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("arithmetic", ["autocast", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_compiled_layer_keeps_what_is_predicted(name, arithmetic):
    recipe, overrides = SHAPES[name]
    depth = "model.n_layer" if name.startswith("gpt2") else "model.num_hidden_layers"
    models = [
        load_recipe(
            ROOT / f"recipes/{recipe}.yaml", [*overrides, "model.vocab_size=512", "tokenizer.name=x", f"{depth}={layers}"]
        ).model
        for layers in (2, 3)
    ]
    few, many = (kept_bytes(model, arithmetic) for model in models)
    copies = 0
    if arithmetic == "autocast":  # bf16 copies of the layer's matrices, which `Memory.weight_copies` has
        copies = 2 * (cost.matmul_parameters(models[1]) - cost.matmul_parameters(models[0]))
    predicted = BATCH * LENGTH * cost.layer_activation_bytes(models[0], LENGTH, arithmetic, compiled=True)
    assert many - few - copies == pytest.approx(predicted, rel=0.02)


def test_compiling_keeps_less_than_not():
    for (name, overrides), arithmetic in itertools.product(SHAPES.values(), ("autocast", "bf16", "fp32")):
        model = load_recipe(ROOT / f"recipes/{name}.yaml", overrides).model
        eager, compiled = (cost.layer_activation_bytes(model, 2048, arithmetic, flag) for flag in (False, True))
        assert compiled <= eager


@pytest.mark.parametrize(
    ("recipe", "micro_batch_size", "compiled", "allocated"),
    [
        ("llama2_1.36b", 8, True, 25_517_465_600), ("llama2_1.36b", 4, True, 23_370_596_352),
        ("llama3_1.5b", 8, True, 30_246_772_736), ("llama3_1.5b", 4, True, 28_837_322_752),
        ("llama2_1.36b", 8, False, 27_962_220_544), ("llama3_1.5b", 8, False, 32_419_422_208),
    ],
)  # fmt: skip
def test_checkpointed_layers_take_what_an_h200_allocated(recipe, micro_batch_size, compiled, allocated):
    """bf16 autocast, two micro-batches a step: eager layers keep bf16 copies of their weights, compiled ones do not."""
    loaded = load_recipe(ROOT / f"recipes/{recipe}.yaml")
    tokens_per_step = 2 * micro_batch_size * loaded.training.sequence_length
    changed = {"micro_batch_size": micro_batch_size, "tokens_per_step": tokens_per_step, "compile": compiled}
    training = loaded.training.model_copy(update=changed | {"activation_checkpointing": True})
    launch = cost.Launch("1gpu", "single", gpu=True)
    predicted = cost.predicted_memory(loaded.model, training, loaded.optimizer, launch).total
    assert predicted == pytest.approx(allocated, rel=0.005)
    assert 64e6 < allocated - predicted < 80e6  # two workspaces of 32 MiB for matrix products, and inputs
