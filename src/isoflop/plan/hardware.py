"""Table of GPUs: peak FLOP/s, memory, bandwidths, and measured or assumed MFU. No torch, no network."""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from typing import NamedTuple

from isoflop.utils.errors import UserError

GIB = 2**30


class Gpu(NamedTuple):
    """One GPU model by its vendor's datasheet."""

    device: str
    """Pattern of the full name that the driver reports, without "NVIDIA" and "GeForce". Variants with other clocks, memory or
    slices (Ti, D, Laptop, MIG, vGPU) report longer names, which do not match."""
    peak_bf16_flops: float
    """Dense bf16 tensor throughput with fp32 accumulation, FLOP/s: half of what a datasheet prints with sparsity."""
    memory_bytes: int
    """The advertised GB as GiB. The reserve of `usable_bytes` covers what the driver takes."""
    memory_bytes_per_s: float
    """Bandwidth of HBM or GDDR, bytes/s."""
    link_bytes_per_s: float
    """Bandwidth to the other GPUs of its node, one direction, bytes/s: NVLink where the card has it, else PCIe x16."""
    relative: str | None
    """The measured GPU whose MFU is scaled to this one; None for a measured GPU.

    It has the same architecture and memory where there is such a one. Ada and RTX Blackwell follow the A100, whose rows come
    from a tuned trainer; the A6000's do not (the L40S would reach 18% by the A6000, 35% by the A100). The L4 follows the A6000,
    because 72 W do not sustain its peak. No GPU is then predicted to be slower than one of lower peak and bandwidth.
    """
    source: str


PCIE4, PCIE5 = 32e9, 64e9  # x16, one direction, as datasheets round it: half of the 64 and 128 GB/s they print
NVLINK3, NVLINK4, NVLINK5 = 300e9, 450e9, 900e9  # half of the bidirectional 600, 900 and 1,800 GB/s of the datasheets
# Assumption: share of those that collectives of hundreds of MB reach; PCIe 4 reaches about 20 of 32 GB/s between two cards.
LINK_SHARE_REACHED = 0.6
NVLINK_EXPORT = 200e9  # A800, H800: half of 400 GB/s
H100_NVL_BRIDGE = 300e9  # half of 600 GB/s, between the two cards of a pair

# Device names come from NVIDIA's list of supported GPUs (README of open-gpu-kernel-modules). For Blackwell and the GH200 of 144
# GB they are those that torch.cuda.get_device_name printed in public reports.
GPUS = {
    # Ampere
    "a6000": Gpu("RTX A6000", 154.85e12, 48 * GIB, 768e9, PCIE4, None, "NVIDIA RTX A6000 datasheet: 309.7 TFLOPS with sparsity"),
    "rtx3090": Gpu("RTX 3090", 71e12, 24 * GIB, 936e9, PCIE4, "a6000", "NVIDIA GA102 whitepaper, appendix A: fp32 accumulate"),
    "a10": Gpu("A10", 125e12, 24 * GIB, 600e9, PCIE4, "a6000", "NVIDIA A10 datasheet: 250 TFLOPS with sparsity"),
    "a10g": Gpu("A10G", 70e12, 24 * GIB, 600e9, PCIE4, "a6000", "NVIDIA A10G datasheet: 140 TFLOPS with sparsity"),
    "a100": Gpu("A100-SXM4-80GB", 312e12, 80 * GIB, 2039e9, NVLINK3, None, "NVIDIA A100 datasheet, SXM 80 GB"),
    "a100-pcie": Gpu("A[18]00 80GB PCIe", 312e12, 80 * GIB, 1935e9, PCIE4, "a100", "NVIDIA A100, A800 datasheets, PCIe 80 GB"),
    "a100-40gb": Gpu("A100-SXM4-40GB", 312e12, 40 * GIB, 1555e9, NVLINK3, None, "NVIDIA A100 datasheet, SXM 40 GB"),
    "a100-40gb-pcie": Gpu("A100-PCIE-40GB", 312e12, 40 * GIB, 1555e9, PCIE4, "a100-40gb", "NVIDIA A100 datasheet, PCIe 40 GB"),
    "a800": Gpu("A800-SXM4-80GB", 312e12, 80 * GIB, 2039e9, NVLINK_EXPORT, "a100", "NVIDIA A800 datasheet, SXM 80 GB"),
    # Ada
    "rtx4090": Gpu("RTX 4090", 165.2e12, 24 * GIB, 1008e9, PCIE4, "a100", "NVIDIA Ada whitepaper, appendix A: fp32 accumulate"),
    "rtx6000-ada": Gpu(
        "RTX 6000 Ada Generation", 364.25e12, 48 * GIB, 960e9, PCIE4, "a100",
        "NVIDIA RTX 6000 Ada datasheet: 1,457 TFLOPS of fp8 with sparsity, a fourth of it",
    ),
    "l40s": Gpu("L40S", 362.05e12, 48 * GIB, 864e9, PCIE4, "a100", "NVIDIA L40S datasheet: 362.05 TFLOPS, 733 with sparsity"),
    "l4": Gpu("L4", 121e12, 24 * GIB, 300e9, PCIE4, "a6000", "NVIDIA L4 datasheet: 242 TFLOPS with sparsity"),
    # Hopper
    "h20": Gpu("H20", 148e12, 96 * GIB, 4.0e12, NVLINK4, "h100", "NVIDIA H20 datasheet"),
    "h100": Gpu(
        "H100 80GB HBM3", 989e12, 80 * GIB, 3.35e12, NVLINK4, None, "NVIDIA H100 datasheet, SXM: 1,979 TFLOPS with sparsity"
    ),
    "h100-pcie": Gpu(
        "H[18]00 PCIe", 756e12, 80 * GIB, 2.0e12, PCIE5, "h100", "NVIDIA H100, H800 datasheets, PCIe: 1,513 TFLOPS with sparsity"
    ),
    "h100-nvl": Gpu(
        "H100 NVL", 835.5e12, 94 * GIB, 3.9e12, H100_NVL_BRIDGE, "h100", "NVIDIA H100 datasheet, NVL: 1,671 TFLOPS with sparsity"
    ),
    "h800": Gpu(
        "H800", 989e12, 80 * GIB, 3.35e12, NVLINK_EXPORT, "h100", "NVIDIA H800 datasheet, SXM: 1,979 TFLOPS with sparsity"
    ),
    "h200": Gpu("H200", 989e12, 141 * GIB, 4.8e12, NVLINK4, None, "NVIDIA H200 datasheet, SXM: 1,979 TFLOPS with sparsity"),
    "h200-nvl": Gpu(
        "H200 NVL", 835.5e12, 141 * GIB, 4.8e12, NVLINK4, "h200", "NVIDIA H200 datasheet, NVL: 1,671 TFLOPS with sparsity"
    ),
    "gh200": Gpu(
        "GH200 (480|120)GB", 989e12, 96 * GIB, 4.0e12, NVLINK4, "h100", "NVIDIA GH200 datasheet: 1,979 TFLOPS with sparsity"
    ),
    "gh200-144gb": Gpu(
        "GH200 144G HBM3e", 989e12, 144 * GIB, 4.9e12, NVLINK4, "h200", "NVIDIA GH200 datasheet: 1,979 TFLOPS with sparsity"
    ),
    # Blackwell
    "rtx5090": Gpu(
        "RTX 5090", 209.5e12, 32 * GIB, 1792e9, PCIE5, "a100", "NVIDIA RTX Blackwell whitepaper, appendix A: fp32 accumulate"
    ),
    "rtx-pro-6000": Gpu(
        "RTX PRO 6000 Blackwell Workstation Edition", 503.8e12, 96 * GIB, 1792e9, PCIE5, "a100",
        "NVIDIA RTX Blackwell PRO whitepaper 1.1, table 4",
    ),
    "rtx-pro-6000-max-q": Gpu(
        "RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9e12, 96 * GIB, 1792e9, PCIE5, "a100",
        "NVIDIA RTX Blackwell PRO whitepaper 1.1, table 4",
    ),
    "rtx-pro-6000-server": Gpu(
        "RTX PRO 6000 Blackwell Server Edition", 480e12, 96 * GIB, 1597e9, PCIE5, "a100",
        "NVIDIA RTX PRO 6000 Server Edition datasheet: 120 TFLOPS of fp32, times 4 as in the other two editions",
    ),
    "b200": Gpu(
        "B200", 2250e12, 180 * GIB, 8.0e12, NVLINK5, "h200",
        "NVIDIA DGX B200 datasheet: 36 PFLOPS of 8 with sparsity, 1,440 GB and 64 TB/s of 8",
    ),
    "gb200": Gpu(
        "GB200", 2500e12, 186 * GIB, 8.0e12, NVLINK5, "h200", "NVIDIA GB200 NVL72 datasheet: 5 PFLOPS a GPU with sparsity"
    ),
}  # fmt: skip


def gpu_name(described: str) -> str:
    """Return a GPU's short name from its short name or the driver's. Raises `UserError` with the known ones for another."""
    name = described.lower() if described.lower() in GPUS else _name_of_device(described)
    if name is None:
        close = get_close_matches(described.lower(), GPUS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ";"
        raise UserError(
            f"--gpu {described}: not a known GPU{hint} known are {', '.join(GPUS)}; for another one give --peak-tflops"
        )
    return name


def _name_of_device(device_name: str) -> str | None:
    model = re.sub(r"^(NVIDIA )?(GeForce )?", "", device_name.strip(), flags=re.IGNORECASE)
    return next((name for name, gpu in GPUS.items() if re.fullmatch(gpu.device, model, re.IGNORECASE)), None)


def peak_bf16_flops(device_name: str) -> float | None:
    """Return the datasheet peak of a device in FLOP/s by the driver's name for it; None for an unknown GPU."""
    name = _name_of_device(device_name)
    return GPUS[name].peak_bf16_flops if name else None


def usable_bytes(gpu_memory_bytes: int) -> int:
    """Return the bytes that a run may use: all but 1 GiB for CUDA context and NCCL, and 5% for fragmentation (assumptions)."""
    return int(0.95 * (gpu_memory_bytes - GIB))


class MfuRow(NamedTuple):
    """One measured MFU: throughput as a share of the peak, by the FLOP count of `flops_per_token`."""

    gpu: str
    parameters: float
    mfu: float
    source: str
    """Machine, commit and command."""


_FOUNDRY = "llm-foundry 4952183, scripts/train/benchmarking/sweep.sh, seq 2048, {}"
_REPORTED = "reported by users of these recipes without commit or command, 2x A6000, ZeRO-1, {}"
_HERE = "benchmarks/gpu.py on one H200, torch 2.11, layers compiled, {}"
_LLAMA2 = "llama2_1.36b at 10-13k tokens/s, taken as 11.5k (gpt2_1.36b: 41.3%)"
MFU_ROWS = (
    MfuRow("a100", 125e6, 0.4479, _FOUNDRY.format("8x A100 80GB")),
    MfuRow("a100", 356e6, 0.5162, _FOUNDRY.format("8x A100 80GB")),
    MfuRow("a100", 760e6, 0.5685, _FOUNDRY.format("8x A100 80GB")),
    MfuRow("a100", 1316e6, 0.5986, _FOUNDRY.format("8x A100 80GB")),
    MfuRow("a100", 2652e6, 0.6211, _FOUNDRY.format("8x A100 80GB")),
    MfuRow("a100-40gb", 125e6, 0.4275, _FOUNDRY.format("8x A100 40GB, pure bf16")),
    MfuRow("a100-40gb", 356e6, 0.4917, _FOUNDRY.format("8x A100 40GB, pure bf16")),
    MfuRow("a100-40gb", 760e6, 0.5289, _FOUNDRY.format("8x A100 40GB, pure bf16")),
    MfuRow("a100-40gb", 1316e6, 0.5623, _FOUNDRY.format("8x A100 40GB, pure bf16")),
    MfuRow("a100-40gb", 2652e6, 0.5782, _FOUNDRY.format("8x A100 40GB, pure bf16")),
    MfuRow("h100", 760e6, 0.3490, _FOUNDRY.format("8x H100 80GB")),
    MfuRow("h100", 1316e6, 0.4182, _FOUNDRY.format("8x H100 80GB")),
    MfuRow("h100", 2652e6, 0.4373, _FOUNDRY.format("16x H100 80GB")),
    MfuRow("h200", 124e6, 0.4431, _HERE.format("modern_124m at 512,802 tokens/s")),
    MfuRow("h200", 1294e6, 0.5698, _HERE.format("llama2_1.36b at 67,555 tokens/s")),
    MfuRow("h200", 1545e6, 0.5748, _HERE.format("llama3_1.5b at 66,127 tokens/s")),
    MfuRow("a6000", 1294e6, 0.3097, _REPORTED.format(_LLAMA2)),
    MfuRow("a6000", 1405e6, 0.4130, _REPORTED.format("gpt2_1.36b at 12-15k tokens/s, taken as 13.5k")),
    MfuRow("a6000", 2224e6, 0.245, _REPORTED.format("llama3_2.2b at micro-batch 2")),
)
SAME_SIZE = 1.1  # ratio; rows nearer in size differ by architecture, and a curve through both would have a spike
HIGHEST_MFU = max(row.mfu for row in MFU_ROWS)


def mfu_row(name: str, parameters: float) -> MfuRow:
    """Return the MFU of a GPU at a model size, and its source.

    A measured GPU interpolates its rows by log size; beyond them the outermost row holds. Another GPU takes its relative's MFU,
    scaled (`_scaled`), and the source says that this is an assumption.
    """
    rows, relative = _measured_rows(name), GPUS[name].relative
    return _between(rows, parameters) if rows or relative is None else _scaled(name, mfu_row(relative, parameters))


def _measured_rows(name: str) -> list[MfuRow]:
    """Return the rows of a GPU by size; of rows at about one size only the slowest, so that no plan is too short.

    On the A6000 these are LLaMA 2 and GPT-2 at 1.3B. All recipes but GPT-2's have LLaMA's layers.
    """
    rows = sorted((row for row in MFU_ROWS if row.gpu == name), key=lambda row: row.parameters)
    return [
        row
        for row in rows
        if not any(other.mfu < row.mfu and 1 / SAME_SIZE < other.parameters / row.parameters < SAME_SIZE for other in rows)
    ]


def _between(rows: list[MfuRow], parameters: float) -> MfuRow:
    below = max((row for row in rows if row.parameters <= parameters), key=lambda row: row.parameters, default=rows[0])
    above = min((row for row in rows if row.parameters >= parameters), key=lambda row: row.parameters, default=rows[-1])
    if below is above:
        return below._replace(source=f"{below.source}, {below.parameters / 1e6:,.0f}M parameters")
    share = math.log(parameters / below.parameters) / math.log(above.parameters / below.parameters)
    sizes = f"{below.mfu:.1%} at {below.parameters / 1e6:,.0f}M and {above.mfu:.1%} at {above.parameters / 1e6:,.0f}M parameters"
    source = below.source if below.source == above.source else f"{below.source}; {above.source}"
    return MfuRow(below.gpu, parameters, below.mfu + share * (above.mfu - below.mfu), f"between {sizes}: {source}")


def _scaled(name: str, measured: MfuRow) -> MfuRow:
    """Scale a relative's MFU to another GPU by peak and memory bandwidth.

    Seconds per FLOP = 1 / peak (matrix products at the peak) + overhead. The relative's overhead is (1 / MFU - 1) / peak.
    Assumption: all of the overhead is memory traffic, so it shrinks with the bandwidth. Then

        1 / MFU' = 1 + (1 / MFU - 1) x (peak' / peak) x (bandwidth / bandwidth').

    A GPU with no less of either is never predicted to be slower. The MFU is at most the highest measured one: memory does not
    limit the H20. Checked on the measured rows: the A100's predict the H100's within 17%, and those of the A100 of 40 GB within
    11%; the H100's predict the A100's at the same sizes within 11%, and this library's own on an H200 within 12%.
    """
    gpu, relative = GPUS[name], GPUS[measured.gpu]
    peak, bandwidth = gpu.peak_bf16_flops / relative.peak_bf16_flops, gpu.memory_bytes_per_s / relative.memory_bytes_per_s
    mfu = min(1 / (1 + (1 / measured.mfu - 1) * peak / bandwidth), HIGHEST_MFU)
    source = (
        f"assumed from {measured.gpu}: {measured.mfu:.1%} there, scaled by {peak:.2f}x its peak and {bandwidth:.2f}x its memory"
        f" bandwidth; give --mfu, or add --measure there; {measured.gpu} is {measured.source}"
    )
    return MfuRow(name, measured.parameters, mfu, source)


# torch.optim.Muon on one H200 in bf16 took 31 ms for the 84 matrices of modern_124m and 144 ms for the 126 of llama2_1.36b
# (benchmarks/results/gpu.jsonl), in five Newton-Schulz steps: two equations for a time per matrix, spent on small kernels, and
# for a share of the peak.
MUON_SECONDS_PER_MATRIX = 0.34e-3
MUON_PEAK_SHARE = 0.68


def update_seconds(muon_flops: int, muon_matrices: int, peak_flops: float, num_gpus: int) -> float:
    """Return the seconds that Muon's matrix products add to a step; the GPUs share the matrices."""
    return (MUON_SECONDS_PER_MATRIX * muon_matrices + muon_flops / (MUON_PEAK_SHARE * peak_flops)) / num_gpus


def train_hours(flops: float, peak_flops: float, num_gpus: int, mfu: float) -> float:
    """Return the hours of training = FLOPs / (MFU x peak x GPUs) / 3600."""
    return flops / (mfu * peak_flops * num_gpus) / 3600
