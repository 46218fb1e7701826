import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from isoflop import cost
from isoflop.modeling.build import build_config, build_model
from isoflop.recipe import Gpt2Model, LlamaModel, Optimizer


@st.composite
def shapes(draw):
    heads, head_dim = draw(st.sampled_from([1, 2, 4, 6])), draw(st.sampled_from([4, 8, 16]))
    common = {"vocab_size": draw(st.integers(10, 500)), "tie_word_embeddings": draw(st.booleans())}
    layers, inner = draw(st.integers(1, 3)), draw(st.integers(1, 96))
    if draw(st.booleans()):
        return Gpt2Model(
            model_type="gpt2", n_positions=draw(st.integers(64, 128)), n_embd=heads * head_dim, n_layer=layers, n_head=heads,
            n_inner=draw(st.sampled_from([None, inner])), **common,
        )  # fmt: skip
    kv = draw(st.sampled_from([k for k in (1, 2, 3, 6) if heads % k == 0]))
    return LlamaModel(
        model_type="llama", max_position_embeddings=128, hidden_size=heads * head_dim, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        head_dim=draw(st.sampled_from([None, 2, 32])), **common,
    )  # fmt: skip


def build(model, device):
    with torch.device(device):
        return build_model(build_config(model.model_dump(exclude={"depth_scaled_init"}), 0, 0), True, seed=0)


@settings(max_examples=40, deadline=None)
@given(shapes())
def test_parameters_equal_transformers_own(shape):
    assert cost.parameters(shape) == sum(p.numel() for p in build(shape, "meta").parameters())


@settings(max_examples=15, deadline=None)
@given(shapes())
def test_flops_equal_a_dispatched_count_of_the_real_model(shape):
    eager = build(shape.model_copy(update={"attn_implementation": "eager"}), "cpu")
    ids = torch.zeros((2, 64), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        eager(input_ids=ids, use_cache=False)
    forward = counter.get_total_flops()
    if isinstance(shape, LlamaModel):  # the rotary angles, an outer product, are counted as a matrix product
        forward -= 64 * 2 * (cost.shape_of(shape).head_dim // 2)
    assert 3 * forward == pytest.approx(cost.flops_per_token(shape, 64) * ids.numel(), rel=0.005)


def test_classes_add_up_as_published():
    llama2 = LlamaModel(
        model_type="llama", vocab_size=32000, max_position_embeddings=2048, hidden_size=2304, intermediate_size=6144,
        num_hidden_layers=18, num_attention_heads=18,
    )  # fmt: skip
    classes = cost.parameters_by_class(llama2)
    assert classes["attention"] // 18 == 21_233_664  # the 21.23M and 42.47M a layer that the founding table got wrong
    assert classes["ffn"] // 18 == 42_467_328
    assert classes["embedding"] == classes["head"] == 73_728_000
    assert sum(classes.values()) == 1_294_159_104


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H20", 148e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA RTX A6000", 154.85e12), ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA B200", 2250e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A1000", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H100 NVL", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks_are_the_datasheets_and_unknown_hardware_has_none(device, peak):
    assert cost.peak_bf16_flops(device) == peak


def test_checkpoint_bytes_follow_the_moments():
    shape = LlamaModel(
        model_type="llama", vocab_size=10, max_position_embeddings=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    n = cost.parameters(shape)
    assert cost.checkpoint_bytes(shape, Optimizer(peak_learning_rate=1e-3)) == 12 * n
    assert cost.checkpoint_bytes(shape, Optimizer(peak_learning_rate=1e-3, moments_dtype="bfloat16")) == 8 * n
