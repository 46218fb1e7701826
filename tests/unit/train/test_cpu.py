"""What is chosen on a CPU, in processes of its own: the allocator's settings last as long as they do."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import run_command

from isoflop.train import cpu

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's allocator has no mallopt")
# A buffer of 64 MiB, made and let go ten times: how often the kernel had to hand out a page meanwhile. The first ones leave
# holes a little too small for the next (glibc asks for more to align it), until small pieces between them are joined.
FAULTS = """
import resource, torch
from isoflop.train import cpu
cpu.tune_glibc_malloc()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fill(): torch.empty(2**24).fill_(1.0)
for _ in range(20): fill()
before = faults()
for _ in range(10): fill()
print(cpu.allocator_is_glibcs_own(), faults() - before)
"""


def faults(**environment):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(cpu._CHOSEN)}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=plain | environment, capture_output=True, text=True, timeout=120, check=True
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@glibc
def test_a_buffer_that_was_freed_is_found_in_place():
    kept, count = faults()
    assert kept
    assert count < 100
    kept, alone = faults(MALLOC_ARENA_MAX="8")
    assert not kept  # the environment has the last word
    assert alone > 10 * 16  # at the least: ten times 64 MiB, in huge pages where the kernel gives them


@pytest.mark.parametrize("variable", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_an_allocator_that_was_chosen_is_left_alone(variable, monkeypatch):
    monkeypatch.setattr(cpu.ctypes, "CDLL", None)  # would be called
    monkeypatch.setenv(variable, "")
    cpu.tune_glibc_malloc()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu.ctypes, "CDLL", None)
    monkeypatch.setattr(cpu.platform, "libc_ver", lambda: ("", ""))
    cpu.tune_glibc_malloc()


def test_bf16_is_compared_where_the_processor_has_it(monkeypatch):
    gain = cpu.bf16_gain()
    assert (gain is None) == (not torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert gain is None or 0.1 < gain < 100


@pytest.mark.parametrize(
    ("bf16", "kept", "gain", "line"),
    [
        (False, True, 2.345, "cpu: x, freed memory is kept for reuse; bf16 matrix products are 2.3 times as fast as fp32 here:"
                             " accelerate_configs/cpu_bf16.yaml trains with them"),
        (False, True, 1.1, "cpu: x, freed memory is kept for reuse"),
        (False, False, None, "cpu: x, the allocator is left as it is set"),
        (True, True, 2.3, "cpu: x, freed memory is kept for reuse"),
    ],
)  # fmt: skip
def test_one_line_says_what_was_chosen(bf16, kept, gain, line, monkeypatch):
    monkeypatch.setattr(cpu, "bf16_gain", lambda: gain)
    monkeypatch.setattr(cpu, "allocator_is_glibcs_own", lambda: kept)
    monkeypatch.setattr(cpu, "processor", lambda: "x")
    assert cpu.describe_cpu(bf16) == line


def test_the_start_of_a_run_says_it_and_bf16_trains(write_recipe):
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu_bf16.yaml", "scripts/pretrain.py"]
    printed = run_command(*command, write_recipe(), "--dry-run").stdout
    assert "bf16 matrix products, 1 CPU thread(s) each" in printed
    assert f"cpu: {cpu.processor()}, " in printed
    assert "one step: loss" in printed
