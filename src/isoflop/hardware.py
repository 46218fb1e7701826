"""What hardware can give: peak FLOP/s, memory, and the MFU that was measured on it. No torch, no network."""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from typing import NamedTuple

from isoflop.errors import UserError

GIB = 2**30


class Gpu(NamedTuple):
    """One kind of GPU, from its vendor's datasheet."""

    device: str
    """Pattern of the name that the driver gives it. Variants with other clocks (NVL, D, Laptop) are not these cards."""
    peak_bf16_flops: float
    """Dense bf16 tensor throughput with fp32 accumulation, FLOP/s; datasheets that print the sparse figure are halved."""
    memory_bytes: int
    """The advertised GB as GiB; what the driver keeps of it is within the reserve of `usable_bytes`."""
    memory_bytes_per_s: float
    """Bandwidth of its HBM or GDDR, bytes/s."""
    link_bytes_per_s: float
    """To the other GPUs of its node, one direction, bytes/s: NVLink where the card has it built in, else PCIe x16."""
    source: str


PCIE4, PCIE5 = 32e9, 64e9  # x16, one direction, as datasheets round it: half of the 64 and 128 GB/s they print
NVLINK3, NVLINK4, NVLINK5 = 300e9, 450e9, 900e9  # half of the bidirectional 600, 900 and 1,800 GB/s of the datasheets

GPUS = {
    "a6000": Gpu(r"\bRTX A6000\b", 154.85e12, 48 * GIB, 768e9, PCIE4, "NVIDIA RTX A6000 datasheet: 309.7 TFLOPS with sparsity"),
    "a100": Gpu(r"\bA100\b.*80GB", 312e12, 80 * GIB, 2039e9, NVLINK3, "NVIDIA A100 datasheet, 80 GB"),
    "a100-40gb": Gpu(r"\bA100\b", 312e12, 40 * GIB, 1555e9, NVLINK3, "NVIDIA A100 datasheet, 40 GB"),
    "h20": Gpu(r"\bH20\b", 148e12, 96 * GIB, 4.0e12, NVLINK4, "NVIDIA H20 datasheet"),
    "h100": Gpu(
        r"\bH100\b(?! (PCIe|NVL))", 989e12, 80 * GIB, 3.35e12, NVLINK4, "NVIDIA H100 datasheet, SXM: 1,979 TFLOPS with sparsity"
    ),
    "h100-pcie": Gpu(
        r"\bH100 PCIe\b", 756e12, 80 * GIB, 2.0e12, PCIE5, "NVIDIA H100 datasheet, PCIe: 1,513 TFLOPS with sparsity"
    ),
    "h200": Gpu(
        r"\bH200\b(?! NVL)", 989e12, 141 * GIB, 4.8e12, NVLINK4, "NVIDIA H200 datasheet, SXM: 1,979 TFLOPS with sparsity"
    ),
    "b200": Gpu(
        r"\bB200\b", 2250e12, 180 * GIB, 8.0e12, NVLINK5, "NVIDIA DGX B200 datasheet: 36 PFLOPS of 8 with sparsity, 1,440 GB of 8"
    ),
    "rtx4090": Gpu(
        r"\bRTX 4090\b(?! (D|Laptop))", 165.2e12, 24 * GIB, 1008e9, PCIE4, "NVIDIA Ada architecture whitepaper, appendix A"
    ),
    "rtx5090": Gpu(
        r"\bRTX 5090\b(?! (D|Laptop))",
        209.5e12,
        32 * GIB,
        1792e9,
        PCIE5,
        "NVIDIA RTX Blackwell architecture whitepaper, appendix A",
    ),
}


def gpu_name(described: str) -> str:
    """A GPU's short name, from itself or from the driver's name for it. Raises `UserError`, which lists the known ones."""
    name = described.lower() if described.lower() in GPUS else _name_of_device(described)
    if name is None:
        close = get_close_matches(described.lower(), GPUS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ";"
        raise UserError(
            f"--gpu {described}: not a known GPU{hint} known are {', '.join(GPUS)}; for another one give --peak-tflops"
        )
    return name


def _name_of_device(device_name: str) -> str | None:
    return next((name for name, kind in GPUS.items() if re.search(kind.device, device_name, re.IGNORECASE)), None)


def peak_bf16_flops(device_name: str) -> float | None:
    """Datasheet peak of a device by the driver's name for it, in FLOP/s; None where it is not known."""
    name = _name_of_device(device_name)
    return GPUS[name].peak_bf16_flops if name else None


def usable_bytes(gpu_memory_bytes: int) -> int:
    """What a plan may fill of a device: without 1 GiB for CUDA context and NCCL, and 5% for fragmentation (assumptions)."""
    return int(0.95 * (gpu_memory_bytes - GIB))


class MfuRow(NamedTuple):
    """One measured throughput, as a share of the peak by the FLOP count of `flops_per_token`."""

    gpu: str
    parameters: float
    mfu: float
    source: str
    """Machine, commit and command."""


_FOUNDRY = "llm-foundry 4952183, scripts/train/benchmarking/sweep.sh, seq 2048, {}"
_REPORTED = "reported by users of these recipes without commit or command, 2x A6000, ZeRO-1, {}"
MFU_ROWS = (
    MfuRow("a100", 125e6, 0.4479, _FOUNDRY.format("8x A100 80GB")),
    MfuRow("a100", 356e6, 0.5162, _FOUNDRY.format("8x A100 80GB")),
    MfuRow("a100", 760e6, 0.5685, _FOUNDRY.format("8x A100 80GB")),
    MfuRow("a100", 1316e6, 0.5986, _FOUNDRY.format("8x A100 80GB")),
    MfuRow("a100", 2652e6, 0.6211, _FOUNDRY.format("8x A100 80GB")),
    MfuRow("a100-40gb", 356e6, 0.4917, _FOUNDRY.format("8x A100 40GB, pure bf16")),
    MfuRow("a100-40gb", 760e6, 0.5289, _FOUNDRY.format("8x A100 40GB, pure bf16")),
    MfuRow("a100-40gb", 1316e6, 0.5623, _FOUNDRY.format("8x A100 40GB, pure bf16")),
    MfuRow("a100-40gb", 2652e6, 0.5782, _FOUNDRY.format("8x A100 40GB, pure bf16")),
    MfuRow("h100", 760e6, 0.3490, _FOUNDRY.format("8x H100 80GB")),
    MfuRow("h100", 1316e6, 0.4182, _FOUNDRY.format("8x H100 80GB")),
    MfuRow("h100", 2652e6, 0.4373, _FOUNDRY.format("16x H100 80GB")),
    MfuRow("a6000", 1294e6, 0.364, _REPORTED.format("llama2_1.36b at 12-15k tokens/s, taken as 13.5k")),
    MfuRow("a6000", 2224e6, 0.245, _REPORTED.format("llama3_2.2b at micro-batch 2")),
)
ASSUMED_MFU = 0.35  # assumption, for known hardware without a row: the low end of what is reported for 1B models in bf16


def mfu_row(name: str, parameters: float) -> MfuRow:
    """MFU of a GPU at a model size, between its measured rows by log size, at the ends the last one's.

    An assumption, which says so, where none was measured.
    """
    rows = sorted((row for row in MFU_ROWS if row.gpu == name), key=lambda row: row.parameters)
    if not rows:
        source = "assumption: not measured on this hardware; give --mfu, or add --measure there"
        return MfuRow(name, parameters, ASSUMED_MFU, source)
    below = max((row for row in rows if row.parameters <= parameters), key=lambda row: row.parameters, default=rows[0])
    above = min((row for row in rows if row.parameters >= parameters), key=lambda row: row.parameters, default=rows[-1])
    if below is above:
        return below._replace(source=f"{below.source}, {below.parameters / 1e6:,.0f}M parameters")
    share = math.log(parameters / below.parameters) / math.log(above.parameters / below.parameters)
    sizes = f"{below.mfu:.1%} at {below.parameters / 1e6:,.0f}M and {above.mfu:.1%} at {above.parameters / 1e6:,.0f}M parameters"
    source = below.source if below.source == above.source else f"{below.source}; {above.source}"
    return MfuRow(name, parameters, below.mfu + share * (above.mfu - below.mfu), f"between {sizes}: {source}")


def train_hours(flops: float, peak_flops: float, num_gpus: int, mfu: float) -> float:
    """Hours of training = FLOPs / (MFU x peak x GPUs) / 3600."""
    return flops / (mfu * peak_flops * num_gpus) / 3600
