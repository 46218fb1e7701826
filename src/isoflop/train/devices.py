"""GPUs of this machine as torch sees them, or the reason why it sees none.

`python -m isoflop.train.devices` prints the launch config for one process here: `make quickstart` trains with it.
"""

from __future__ import annotations

import sys

import torch

# Least driver of each major CUDA version (CUDA release notes, minor version compatibility).
_DRIVERS = {"11": 450, "12": 525, "13": 580}


def gpu_names() -> list[str]:
    """Return the usable GPUs by the driver's names; none with a driver too old for torch, though torch counts them."""
    if not torch.cuda.is_available():
        return []
    try:
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except RuntimeError:  # PYTORCH_NVML_BASED_CUDA_CHECK=1: then `is_available` counts by the driver's library too
        return []


def why_no_gpu() -> str | None:
    """Return why torch can use no GPU here, with the remedy; None where it can."""
    if gpu_names():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for the CPU alone; install one built for CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        if "too old" not in reason:
            return reason
        needed = _DRIVERS.get(str(torch.version.cuda).split(".", maxsplit=1)[0])
        least = f"driver {needed} or newer" if needed else "a newer driver"
        return f"the NVIDIA driver is too old for torch's CUDA {torch.version.cuda}, which needs {least} (nvidia-smi prints it)"
    return "no device is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES"


def lacks_bf16() -> str | None:
    """Return the name of this process's GPU if it cannot multiply bf16 matrices (before compute capability 8.0), else None."""
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return str(torch.cuda.get_device_name())
    return None


def launch_config() -> tuple[str, str]:
    """Return a config of accelerate_configs/ for one process on this machine, and the reason for it."""
    if reason := why_no_gpu():
        return "cpu", f"training on the CPU: {reason}"
    name = gpu_names()[0]
    if lacks_bf16():
        return "1gpu_fp32", f"training on {name} in fp32, since it has no bf16 arithmetic"
    return "1gpu", f"training on {name}; `make quickstart CONFIG=cpu` trains on the CPU"


if __name__ == "__main__":
    config, reason = launch_config()
    print(reason, file=sys.stderr)
    print(config)
