"""Training on a CPU: an allocator that keeps freed memory, and the gain of bf16.

Entered by `tune_glibc_malloc`, before the first large tensor, and by `describe_cpu` for a line that a run starts with.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from pathlib import Path

import torch

# From glibc's malloc.h. By default glibc maps every buffer above 32 MiB again and unmaps it when freed, and the kernel zeroes
# each page at its first use. With these values nothing is mapped separately, and the heap grows by 64 MiB and is never trimmed.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
# Signs of an allocator or settings that the user has chosen, which stay as they are.
_CHOSEN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
_GAIN_WORTH_A_LINE = 1.2  # assumption: below it the other operations of a step outweigh the gain of the matrix products
_SIZE, _ROUNDS = 768, 7  # of the matrices compared: about 20 ms each on one core


def tune_glibc_malloc() -> None:
    """Have glibc keep freed memory for reuse. Process-wide.

    It changes no result. The process keeps its peak until it ends, plus some fragmentation.
    """
    if allocator_is_glibcs_own():
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _SETTINGS:
            mallopt(parameter, value)


def allocator_is_glibcs_own() -> bool:
    """Return whether glibc allocates, with no setting in the environment (`MALLOC_...`, `GLIBC_TUNABLES`, `LD_PRELOAD`)."""
    return platform.libc_ver()[0] == "glibc" and not any(name.startswith(_CHOSEN) for name in os.environ)


def bf16_gain() -> float | None:
    """Measure how many times as fast as fp32 this CPU multiplies bf16 matrices; None where it has no instructions for them.

    Without these torch uses loops a hundred times as slow as fp32. It takes a tenth of a second.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    matrices = {dtype: torch.ones(_SIZE, _SIZE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratios = []
    for _ in range(_ROUNDS):
        seconds = []
        for matrix in matrices.values():
            started = time.perf_counter()
            matrix @ matrix
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def describe_cpu(bf16: bool) -> str:
    """Return a line on the processor, its allocator, and bf16 where it would be faster and is not in use."""
    memory = "freed memory is kept for reuse" if allocator_is_glibcs_own() else "the allocator is left as it is set"
    gain = None if bf16 else bf16_gain()
    hint = (
        f"; bf16 matrix products are {gain:.1f} times as fast as fp32 here: accelerate_configs/cpu_bf16.yaml trains with them"
        if gain and gain > _GAIN_WORTH_A_LINE
        else ""
    )
    return f"cpu: {processor()}, {memory}{hint}"


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
