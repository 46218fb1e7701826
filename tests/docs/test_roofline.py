"""docs/roofline.md: the page is what its script makes, its counts are those of real layers, and its arithmetic is right."""

import math
import re

import pytest
import roofline
import roofline_model as model
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isoflop.config.recipe import LlamaModel
from isoflop.modeling import loss
from isoflop.modeling.build import build_config, build_model, decoder_layers
from isoflop.plan import cost

DOCS = ROOT / "docs"
# Operations that launch no kernel: views, allocations, questions about a tensor, and a constant that is a kernel's argument.
NO_KERNEL = {
    "_unsafe_view", "alias", "detach", "device", "empty_like", "expand", "permute", "promote_types", "scalar_tensor", "select",
    "slice", "split", "squeeze", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def variants():
    return [(case, variant) for case in roofline.cases() for variant in roofline.VARIANTS]


def test_the_page_is_what_its_script_makes():
    """After a change of the recipes, the loss's chunks or the hardware table: python benchmarks/pages/roofline.py."""
    assert (DOCS / "roofline.md").read_text(encoding="utf-8") == roofline.page()


def test_the_figure_is_drawn(tmp_path):
    roofline.draw(tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"


def test_shares_sum_to_one():
    for case, variant in variants():
        times = roofline.times(case, variant)
        assert sum(time.seconds for time in times.values()) / model.step_s(times) == pytest.approx(1)


def test_printed_shares_sum_to_100_percent():
    page = (DOCS / "roofline.md").read_text(encoding="utf-8")
    tables = page.split("## Each recipe on each machine")[1].split("## Communication")[0].split("| component |")[1:]
    assert len(tables) == 6
    for table in tables:
        rows = re.findall(r"^\| [a-z].*\| ([\d.]+)% \| \w+ \|.*\| ([\d.]+)% \| \w+ \|$", table, flags=re.MULTILINE)
        assert len(rows) >= 6
        for column in zip(*rows, strict=True):
            assert sum(map(float, column)) == pytest.approx(100, abs=0.05 * len(rows))


def test_counted_flops_are_those_of_mfu():
    """Layers, attention as counted and the loss's products: exactly `flops_per_token`, whatever is compiled."""
    for case, variant in variants():
        works = model.step_costs(case, variant)
        counted = sum(work.flops if work.counted_flops is None else work.counted_flops for work in works)
        tokens = 524_288 // case.machine.num_gpus
        assert counted == cost.flops_per_token(case.recipe.model, case.recipe.training.sequence_length) * tokens


def test_one_case_by_hand():
    """modern_124m on one H100: 16 micro-batches of 32,768 tokens; 12 layers of 768 and 2,048, 12 heads of 64, 50,304 ids."""
    case = roofline.case_of("modern_124m", roofline.H100)
    before, eager, compiled = (roofline.times(case, variant) for variant in roofline.VARIANTS)
    t, h, f, v = 32_768, 768, 2_048, 50_304
    square, wide = 2 * t * h * h / 790e12, 2 * t * h * f / 790e12  # both bound by arithmetic: 101.8 MB in 34 us, not 49
    assert compiled["matrix products of the layers"].seconds == pytest.approx(16 * 12 * 3 * (4 * square + 3 * wide))
    # 2 of 4 products halved forward and 5 backward: 3.5 x 4 T S a / 2 FLOPs at 0.35 x 989 TFLOP/s.
    assert compiled["attention"].seconds == pytest.approx(16 * 12 * 3.5 * 2 * t * 1024 * h / 346.15e12)
    assert eager["norms and element-wise"].bytes == 16 * t * (12 * (392 * h + 96 * 2 * h + 28 * f) + 120 * h)
    assert compiled["norms and element-wise"].bytes == 16 * t * (12 * (100 * h + 8 * 2 * h + 18 * f) + 28 * h)
    assert compiled["norms and element-wise"].seconds == pytest.approx(compiled["norms and element-wise"].bytes / 3.0e12)
    # 128 MiB of logits are 1,334 rows: 24 such chunks and one of 752. 16 MiB of fp32 are 83 rows: 17 and 10 blocks of 15 kernels.
    # And in a chunk 2 products, 4 small ones, 2 for the blocks' sums, 7 slices of the head's gradient with as many additions.
    assert 128 * 2**20 // (2 * v) == 1_334
    assert 16 * 2**20 // (4 * v) == 83
    kernels = 24 * (2 + 4 + 17 * 15 + 2 + 14) + (2 + 4 + 10 * 15 + 2 + 14) + 7
    assert (kernels, before["loss"].kernels, before["loss"].bound) == (6_827, 16 * 6_827, "launches")
    assert before["loss"].seconds == pytest.approx(16 * 6_827 * 7e-6)
    # Now 4 chunks of 8,192 rows: 2 products, 4 small kernels, 3 of the softmax and the addition of the head's gradient; and 7.
    assert eager["loss"].kernels == 16 * (4 * (2 + 4 + 3 + 1) + 7)
    softmax, products = 6 * t * v, 3 * 2 * t * v * h
    other = t * h * 8 + 12 * v * h + 18 * v * h + 16 * t * h
    assert eager["loss"].seconds == pytest.approx(16 * (products / 790e12 + (softmax + other) / 3.0e12))
    assert compiled["clipping and AdamW"].seconds == pytest.approx(40 * 123_587_328 / 3.0e12)


def test_what_bounds_the_loss():
    """What the loss's chunks and its softmax were changed for: launches at 50,304 ids, memory at 128,256; arithmetic now."""
    for name, was in (("modern_124m", "launches"), ("llama3_1.5b", "memory")):
        case = roofline.case_of(name, roofline.H100)
        assert [roofline.times(case, variant)["loss"].bound for variant in ("before", "eager")] == [was, "arithmetic"]


def test_traffic_by_hand():
    """llama2_1.36b, two GPUs, 16 micro-batches: each sends half of what it gathers or reduces."""
    case = roofline.case_of("llama2_1.36b", roofline.A6000_PAIR)
    n, head = 1_294_159_104, 32_000 * 2_304
    fsdp2 = model.traffic(case, "fsdp2", 2, 16)
    gathers, reductions = 16 * (2 * n - head), 16 * 2 * n
    assert fsdp2 == (gathers + reductions, gathers + 2 * n, n + 2 * n)
    assert model.traffic(case, "ddp", 2, 16).once == 4 * n
    assert model.traffic(case, "zero1", 2, 16).once == 4 * n + n
    assert model.traffic(case, "ddp", 8, 16).once == 2 * 7 / 8 * 4 * n
    times = roofline.times(case, "compiled")
    assert times["communication"].seconds == pytest.approx((gathers + reductions) / 20e9)
    assert model.step_s(times) - model.step_s(times, overlapped=True) == pytest.approx(times["communication"].seconds)


class Kernels(TorchDispatchMode):
    """Bytes and number of the kernels that run: every tensor read or written, a broadcast one once."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if name not in NO_KERNEL:
            read, written = (sum(map(size, tree_leaves(tensors))) for tensors in ((args, kwargs), out))
            if name == "slice_backward":  # zeros, and a copy into a part of them
                self.found += [(name, written), (name, 2 * read)]
            else:
                self.found.append((name, read + written))
        return out


def size(value):
    if not isinstance(value, torch.Tensor):
        return 0
    return value.element_size() * math.prod(n for n, stride in zip(value.shape, value.stride(), strict=True) if stride)


@pytest.mark.parametrize("arithmetic", ["autocast", "bf16"])
def test_the_eager_layers_traffic_is_that_of_a_real_layer(arithmetic):
    hidden, heads, key_heads, inner, tokens = 512, 8, 4, 1024, 8 * 32
    llama = LlamaModel(
        model_type="llama", vocab_size=32, max_position_embeddings=32, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=key_heads,
    )  # fmt: skip
    causal_lm = build_model(build_config(llama.model_dump(exclude={"depth_scaled_init"}), 0, 0), False, seed=0)
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    layer = decoder_layers(causal_lm)[0].to(dtype)
    if arithmetic == "autocast":  # gradients of earlier micro-batches; FSDP2 has taken its own away
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
    stream = torch.randn(8, 32, hidden, dtype=dtype).requires_grad_()
    positions = torch.arange(32)[None]
    rotary, incoming = causal_lm.base_model.rotary_emb(stream, position_ids=positions), torch.randn_like(stream)
    with Kernels() as kernels:
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(stream, position_embeddings=rotary, attention_mask=None, position_ids=positions)
        out.backward(incoming)
    heavy = [name for name, _ in kernels.found if name == "mm" or "attention" in name]
    assert len(heavy) == 3 * 7 + 2
    found = [(name, moved) for name, moved in kernels.found if name != "mm" and "attention" not in name]
    passes = model.EAGER[arithmetic]
    per_token = sum(p.hidden * hidden + p.heads * (512 + 256) + p.inner * inner for p in passes)
    number, moved = sum(p.kernels for p in passes), tokens * per_token
    if arithmetic == "autocast":  # the page has these among what is done to weights: 3 for each matrix
        matrices = hidden * (2 * 512 + 2 * 256) + 3 * hidden * inner
        number, moved = number + 3 * 7, moved + (6 + 6 + 12) * matrices
    assert len(found) == number
    # What the page leaves out, norms' weights and statistics, cosines and sines, is under a byte a dimension here: any entry of
    # the page that were off by one would show.
    left_out = sum(moved for _, moved in found) - moved
    assert 0 < left_out < tokens * hidden


def test_compiled_layers_move_less_of_everything():
    for arithmetic, passes in model.EAGER.items():
        for name in ("hidden", "heads", "inner", "kernels"):
            eager, compiled = (sum(getattr(p, name) for p in each) for each in (passes, model.COMPILED[arithmetic]))
            assert compiled < eager


def test_kernels_of_the_old_softmax_are_those_of_a_block(monkeypatch):
    """A CPU's loss still goes block by block: twice the blocks, 15 kernels more for each."""
    vocab, rows = 1000, 32
    counts = []
    for blocks in (2, 4):
        monkeypatch.setattr(loss, "SOFTMAX_BYTES", 4 * vocab * rows // blocks)
        hidden, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(vocab, 16, requires_grad=True)
        with Kernels() as kernels, torch.autocast("cpu", torch.bfloat16):
            loss.linear_cross_entropy_sum(hidden, weight, torch.arange(rows), chunk_rows=rows)
        counts.append(len(kernels.found))
    assert (counts[1] - counts[0]) / 2 == model.OLD_KERNELS_PER_BLOCK
