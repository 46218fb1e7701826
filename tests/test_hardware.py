"""What hardware can give: by name, its peak, memory and measured MFU."""

import math

import pytest

from isoflop import hardware
from isoflop.errors import UserError


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
    assert hardware.peak_bf16_flops(device) == peak


def test_a_gpu_by_its_short_name():
    assert hardware.GPUS["a6000"].peak_bf16_flops == 154.85e12
    assert hardware.GPUS["h20"].memory_bytes == 96 * 2**30
    assert [hardware.gpu_name(name) for name in ("H100", "NVIDIA RTX A6000", "rtx5090")] == ["h100", "a6000", "rtx5090"]
    with pytest.raises(
        UserError, match=r"--gpu a600: not a known GPU; did you mean a6000\? known are a6000, a100,.*--peak-tflops"
    ):
        hardware.gpu_name("a600")


def test_mfu_lies_between_the_measured_rows_or_says_that_it_is_an_assumption():
    assert hardware.mfu_row("a100", 1316e6).mfu == 0.5986
    assert hardware.mfu_row("a100", 100e6).mfu == 0.4479  # below the smallest row: that one's
    assert hardware.mfu_row("a6000", 9e9).source.endswith("llama3_2.2b at micro-batch 2, 2,224M parameters")
    assert hardware.mfu_row("h100", math.sqrt(760e6 * 1316e6)).mfu == pytest.approx((0.3490 + 0.4182) / 2)
    assert hardware.mfu_row("h100", 1e9).source.startswith("between 34.9% at 760M and 41.8% at 1,316M parameters: llm-foundry")
    assert hardware.mfu_row("rtx5090", 1e9).source.startswith("assumption: not measured")
    assert all(row.gpu in hardware.GPUS and 0 < row.mfu < 1 for row in hardware.MFU_ROWS)


def test_hours_are_flops_over_mfu_peak_and_gpus():
    assert hardware.train_hours(3.6e18, peak_flops=1e15, num_gpus=2, mfu=0.5) == pytest.approx(1.0)
