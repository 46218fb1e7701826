"""Training on a CPU as fast as it can: memory that is kept instead of given back, and what bf16 would gain.

Entered by `keep_freed_memory`, before the first large tensor, and by `describe_cpu` for the line a run starts with.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from pathlib import Path

import torch

# Of glibc's malloc.h. On its own glibc maps every buffer above 32 MiB anew and returns it when freed; the kernel then zeroes
# each page again at its first touch. Nothing is mapped apart now, the heap is never trimmed, and grows by 64 MiB at a time.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
# What speaks for an allocator that someone has chosen already, whose settings stay as they are.
_CHOSEN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
_GAIN_WORTH_A_LINE = 1.2  # assumption: below, the other operations of a step eat what the matrix products gain
_SIZE, _ROUNDS = 768, 7  # of the matrices compared: some 20 ms each on one core


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, so that a step finds its buffers in place.

    Changes no result. The process holds its peak until it ends, and holes of some buffers' size beside it.
    """
    if allocator_is_glibcs_own():
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _SETTINGS:
            mallopt(parameter, value)


def allocator_is_glibcs_own() -> bool:
    """Whether memory comes from glibc, and the environment says nothing of how (`MALLOC_...`, `GLIBC_TUNABLES`, `LD_PRELOAD`)."""
    return platform.libc_ver()[0] == "glibc" and not any(name.startswith(_CHOSEN) for name in os.environ)


def bf16_gain() -> float | None:
    """How many times as fast as fp32 this CPU multiplies bf16 matrices, now; None where it has no instructions for them.

    Without these torch does bf16 by loops a hundred times as slow as fp32. Takes a tenth of a second.
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
    """One line: the processor, what its memory does, and bf16 where it is worth a try and not in use."""
    memory = "freed memory is kept for reuse" if allocator_is_glibcs_own() else "the allocator is left as it is set up"
    gain = None if bf16 else bf16_gain()
    hint = (
        f"; bf16 matrix products are {gain:.1f} times as fast as fp32 here: accelerate_configs/cpu_bf16.yaml trains with them"
        if gain and gain > _GAIN_WORTH_A_LINE
        else ""
    )
    return f"cpu: {processor()}, {memory}{hint}"


def processor() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
