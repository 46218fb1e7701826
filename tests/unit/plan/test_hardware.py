"""GPUs by the driver's name: peak, memory, bandwidths, and measured or assumed MFU."""

import itertools
import math

import pytest
from conftest import ROOT

from isoflop.config.loading import load_recipe
from isoflop.plan import cost, hardware
from isoflop.utils.errors import UserError

# As torch.cuda.get_device_name prints it: short name, peak.
DEVICES = {
    "NVIDIA RTX A6000": ("a6000", 154.85e12),
    "NVIDIA GeForce RTX 3090": ("rtx3090", 71e12),
    "NVIDIA A10": ("a10", 125e12),
    "NVIDIA A10G": ("a10g", 70e12),
    "NVIDIA A100-SXM4-80GB": ("a100", 312e12),
    "NVIDIA A100 80GB PCIe": ("a100-pcie", 312e12),
    "NVIDIA A800 80GB PCIe": ("a100-pcie", 312e12),
    "NVIDIA A100-SXM4-40GB": ("a100-40gb", 312e12),
    "A100-SXM4-40GB": ("a100-40gb", 312e12),  # drivers before 465 printed no vendor
    "NVIDIA A100-PCIE-40GB": ("a100-40gb-pcie", 312e12),
    "NVIDIA A800-SXM4-80GB": ("a800", 312e12),
    "NVIDIA GeForce RTX 4090": ("rtx4090", 165.2e12),
    "NVIDIA RTX 6000 Ada Generation": ("rtx6000-ada", 364.25e12),
    "NVIDIA L40S": ("l40s", 362.05e12),
    "NVIDIA L4": ("l4", 121e12),
    "NVIDIA H20": ("h20", 148e12),
    "NVIDIA H100 80GB HBM3": ("h100", 989e12),
    "NVIDIA H100 PCIe": ("h100-pcie", 756e12),
    "NVIDIA H800 PCIe": ("h100-pcie", 756e12),
    "NVIDIA H100 NVL": ("h100-nvl", 835.5e12),
    "NVIDIA H800": ("h800", 989e12),
    "NVIDIA H200": ("h200", 989e12),
    "NVIDIA H200 NVL": ("h200-nvl", 835.5e12),
    "NVIDIA GH200 480GB": ("gh200", 989e12),
    "NVIDIA GH200 120GB": ("gh200", 989e12),
    "NVIDIA GH200 144G HBM3e": ("gh200-144gb", 989e12),
    "NVIDIA GeForce RTX 5090": ("rtx5090", 209.5e12),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": ("rtx-pro-6000", 503.8e12),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": ("rtx-pro-6000-max-q", 438.9e12),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": ("rtx-pro-6000-server", 480e12),
    "NVIDIA B200": ("b200", 2250e12),
    "NVIDIA GB200": ("gb200", 2500e12),
}
UNKNOWN = (
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM-64GB", "NVIDIA A100X",
    "GRID A100D-80C", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 D", "NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA RTX 5000 Ada Generation", "Quadro RTX 6000",
    "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA RTX PRO 6000D Blackwell Workstation Edition", "NVIDIA RTX A1000", "NVIDIA L40",
    "NVIDIA A10M", "NVIDIA H20-3e", "NVIDIA H100", "NVIDIA H800 NVL", "NVIDIA A800 40GB Active", "NVIDIA GB10",
    "NVIDIA B300 SXM6 AC", "Tesla T4", "AMD Instinct MI300X", "",
)  # fmt: skip
SIZES = [10 ** (8 + i / 20) for i in range(31)]  # 1e8 to 3.2e9


def tokens_per_s(name, parameters):
    """Up to FLOPs per token, which no GPU changes."""
    return hardware.mfu_row(name, parameters).mfu * hardware.GPUS[name].peak_bf16_flops


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_has_the_peak_of_its_datasheet(device):
    name, peak = DEVICES[device]
    assert hardware.gpu_name(device) == hardware.gpu_name(name.upper()) == name
    assert hardware.peak_bf16_flops(device) == hardware.GPUS[name].peak_bf16_flops == peak


def test_every_gpu_is_matched_by_some_device():
    assert {name for name, _ in DEVICES.values()} == set(hardware.GPUS)


@pytest.mark.parametrize("device", UNKNOWN)
def test_variants_and_unknown_hardware_have_no_peak(device):
    assert hardware.peak_bf16_flops(device) is None


def test_a_gpu_by_its_short_name():
    assert [hardware.gpu_name(name) for name in ("H100", "RTX A6000", "rtx5090")] == ["h100", "a6000", "rtx5090"]
    with pytest.raises(
        UserError, match=r"--gpu a600: not a known GPU; did you mean a6000\? known are a6000, rtx3090,.*--peak-tflops"
    ):
        hardware.gpu_name("a600")


def test_memory_and_bandwidths_are_the_datasheets():
    reported = {
        name: (gpu.memory_bytes / hardware.GIB, gpu.memory_bytes_per_s / 1e9, gpu.link_bytes_per_s / 1e9)
        for name, gpu in hardware.GPUS.items()
    }
    assert reported["a6000"] == (48, 768, 32)
    assert reported["a100"] == (80, 2039, 300)
    assert reported["a100-40gb-pcie"] == (40, 1555, 32)
    assert reported["a800"] == (80, 2039, 200)
    assert reported["h20"] == (96, 4000, 450)
    assert reported["h100"] == (80, 3350, 450)
    assert reported["h100-nvl"] == (94, 3900, 300)
    assert reported["h200"] == (141, 4800, 450)
    assert reported["rtx5090"] == (32, 1792, 64)
    assert reported["b200"] == (180, 8000, 900)
    assert {link for _, _, link in reported.values()} == {32, 64, 200, 300, 450, 900}


def test_mfu_lies_between_the_measured_rows():
    assert hardware.mfu_row("a100", 1316e6).mfu == 0.5986
    assert hardware.mfu_row("a100", 100e6).mfu == 0.4479  # below the smallest row: that one's
    assert hardware.mfu_row("a6000", 9e9).source.endswith("llama3_2.2b at micro-batch 2, 2,224M parameters")
    assert hardware.mfu_row("h100", math.sqrt(760e6 * 1316e6)).mfu == pytest.approx((0.3490 + 0.4182) / 2)
    assert hardware.mfu_row("h100", 1e9).source.startswith("between 34.9% at 760M and 41.8% at 1,316M parameters: llm-foundry")
    assert all(row.gpu in hardware.GPUS and 0 < row.mfu < 1 for row in hardware.MFU_ROWS)


@pytest.mark.parametrize(("recipe", "tokens_per_s"), [("llama2_1.36b", 11_500), ("gpt2_1.36b", 13_500)])
def test_the_reported_rates_of_two_a6000_are_rows(recipe, tokens_per_s):
    model = load_recipe(ROOT / f"recipes/{recipe}.yaml").model
    row = next(
        row for row in hardware.MFU_ROWS if f" {recipe} at " in row.source and f"as {tokens_per_s / 1e3:.1f}k" in row.source
    )
    expected = tokens_per_s * cost.flops_per_token(model, 2048) / (2 * 154.85e12)
    assert (row.gpu, row.parameters, row.mfu) == (
        "a6000",
        pytest.approx(cost.parameters(model), rel=1e-3),
        pytest.approx(expected, abs=5e-5),
    )


def test_of_two_rows_at_one_size_the_slower_counts():
    """GPT-2's 41.3% at 1,405M beside LLaMA 2's 31.0% at 1,294M would be a spike in the curve down to 24.5% at 2,224M."""
    assert hardware.mfu_row("a6000", 1294e6).mfu == 0.3097
    curve = [hardware.mfu_row("a6000", size).mfu for size in SIZES]
    assert curve == sorted(curve, reverse=True)
    assert hardware.mfu_row("a6000", 1405e6).mfu == pytest.approx(0.3, abs=0.003)
    assert "gpt2_1.36b: 41.3%" in hardware.mfu_row("a6000", 1294e6).source


def test_an_unmeasured_gpu_takes_its_relatives_mfu_scaled():
    # 1 + (1 / 0.4182 - 1) x 1 x 3.35 / 4.0
    gh200 = hardware.mfu_row("gh200", 1316e6)
    assert gh200.mfu == pytest.approx(1 / (1 + (1 / 0.4182 - 1) * 3.35 / 4.0))
    assert gh200.mfu == pytest.approx(0.4619, abs=5e-5)
    assert gh200.source.startswith(
        "assumed from h100: 41.8% there, scaled by 1.00x its peak and 1.19x its memory bandwidth; give --mfu, or add --measure"
        " there; h100 is llm-foundry"
    )
    assert hardware.mfu_row("rtx4090", 1316e6).mfu == pytest.approx(1 / (1 + (1 / 0.5986 - 1) * (165.2 / 312) * (2039 / 1008)))
    assert hardware.mfu_row("a800", 3e8).mfu == hardware.mfu_row("a100", 3e8).mfu


def test_no_assumed_mfu_is_above_the_highest_measured_one():
    assert hardware.mfu_row("h20", 1316e6).mfu == 0.6211  # by memory alone it would be 85%
    assert all(0 < hardware.mfu_row(name, size).mfu <= 0.6211 for name in hardware.GPUS for size in SIZES)


def test_relatives_are_measured_gpus():
    measured = {row.gpu for row in hardware.MFU_ROWS}
    assert measured == {name for name, gpu in hardware.GPUS.items() if gpu.relative is None}
    assert {gpu.relative for gpu in hardware.GPUS.values()} <= measured | {None}


def test_a_gpu_with_no_less_peak_and_bandwidth_is_predicted_to_be_no_slower():
    pairs = [
        (better, worse)
        for (better, a), (worse, b) in itertools.permutations(hardware.GPUS.items(), 2)
        if a.peak_bf16_flops >= b.peak_bf16_flops and a.memory_bytes_per_s >= b.memory_bytes_per_s
    ]
    assert len(pairs) > 200
    for better, worse in pairs:
        assert all(tokens_per_s(better, size) >= tokens_per_s(worse, size) * (1 - 1e-12) for size in SIZES), (better, worse)


@pytest.mark.parametrize(
    ("better", "worse"),
    [("h200", "h100"), ("h100", "h100-pcie"), ("a100", "a100-40gb"), ("b200", "h200"), ("rtx5090", "rtx4090")],
)
def test_the_faster_of_two_well_known_cards_is_predicted_to_be_faster(better, worse):
    assert all(tokens_per_s(better, size) > tokens_per_s(worse, size) for size in SIZES)


@pytest.mark.parametrize(
    ("known", "scaled", "within"),
    [("a100", "h100", 0.17), ("h100", "a100", 0.11), ("a100", "a100-40gb", 0.11), ("h100", "h200", 0.12)],
)
def test_the_rule_predicts_measured_gpus_from_one_another(known, scaled, within, monkeypatch):
    rows = [row for row in hardware.MFU_ROWS if row.gpu == scaled]
    monkeypatch.setattr(hardware, "MFU_ROWS", tuple(row for row in hardware.MFU_ROWS if row.gpu != scaled))
    monkeypatch.setitem(hardware.GPUS, scaled, hardware.GPUS[scaled]._replace(relative=known))
    smallest = min(row.parameters for row in hardware.MFU_ROWS if row.gpu == known)
    compared = [row for row in rows if row.parameters >= smallest]
    assert len(compared) >= 2
    errors = [abs(hardware.mfu_row(scaled, row.parameters).mfu / row.mfu - 1) for row in compared]
    assert within - 0.01 < max(errors) < within


def test_hours_are_flops_over_mfu_peak_and_gpus():
    assert hardware.train_hours(3.6e18, peak_flops=1e15, num_gpus=2, mfu=0.5) == pytest.approx(1.0)
