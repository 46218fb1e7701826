"""What all benchmarks share: recipes of a size, programs in turn, processes alone, and the rows of docs/performance.md."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe
from isoflop.train.cpu import processor

ROOT = Path(__file__).parent.parent
LIBRARIES = ("isoflop", "torch", "transformers", "accelerate", "datasets", "numpy")
# 30M parameters each, so that a step takes a second or two on two cores; the head is most of it, as in all small models.
FAMILIES = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 50304, "n_positions": 256, "n_embd": 384, "n_layer": 6, "n_head": 6},
    "llama": {
        "model_type": "llama", "vocab_size": 50304, "max_position_embeddings": 256, "hidden_size": 384, "num_hidden_layers": 6,
        "num_attention_heads": 6, "intermediate_size": 1024, "tie_word_embeddings": True,
    },
}  # fmt: skip


def parser_of(doc: str | None, rounds: int) -> ArgumentParser:
    """The options that every benchmark has."""
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"each way once a round (default {rounds})")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the rows")
    return parser


def recipe_of(family_or_file: str, overrides: list[str], run_dir: str = "runs/benchmark") -> Recipe:
    """A recipe that trains for as long as it is let, over this Python's own sources, with a family's model or another recipe's.

    Nothing but steps: no validation, samples or checkpoints before a step that is never reached.
    """
    quickstart = load_recipe(ROOT / "recipes/quickstart.yaml").model_dump(exclude_defaults=True)
    training: dict[str, Any] = {"sequence_length": 256, "tokens_per_step": 2048, "micro_batch_size": 4}
    model: Any = FAMILIES.get(family_or_file)
    if model is None:
        tree = load_recipe(family_or_file).model_dump(exclude_defaults=True)
        model, training = tree["model"], tree["training"] | {"max_tokens": None, "tokens_per_parameter": None}
    never = 10**6
    tree = quickstart | {
        "model": model,
        "training": training | {"max_steps": never},
        "optimizer": {"peak_learning_rate": 3e-4},
        "schedule": {"name": "constant"},
        "evaluation": {"validate_every": never},
        "output": {"run_dir": run_dir, "checkpoint_every": never},
    }
    tree["data"] = tree["data"] | {"prepared_dir": f"data/benchmark_{training['sequence_length']}"}
    file = Path(run_dir) / "benchmark.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tree), encoding="utf-8")
    return load_recipe(file, overrides)


def in_turn(ways: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each way in each round, the rounds there and back; the first ones are not counted."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(-warmup, rounds):
        for way in sorted(ways, reverse=number % 2 == 1):
            started = time.perf_counter()
            ways[way]()
            if number >= 0:
                seconds[way].append(time.perf_counter() - started)
    return seconds


def spread(values: list[float]) -> list[float]:
    """Median, least and most."""
    return [float(f"{value:.6g}") for value in (statistics.median(values), min(values), max(values))]


def paired(values: list[float], base: list[float]) -> list[float]:
    """Spread of the ratios of two ways, round by round."""
    return spread([one / other for one, other in zip(values, base, strict=True)])


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, whose memory is nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def memory_of(work: Callable[[], object]) -> int:
    """Bytes that the resident set of this process grows by at the most while it does a piece of work. Linux alone says so."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew (proc_pid_clear_refs(5))
    before = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """A line of /proc/self/status. A process's own, where getrusage(2) starts a child with its parent's peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def machine() -> str:
    """Processor, cores and memory, and the GPU where there is one."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    memory = psutil.virtual_memory().total / 2**30
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {' '.join(platform.libc_ver())}{gpu}"


def commit() -> str:
    """This checkout's, with `+changes` where what is measured, or measures, differs from it; `unknown` for a copy without git."""
    git, rooms = ["git", "-C", str(ROOT)], ("src", "modeling", "scripts", "recipes", "accelerate_configs", "benchmarks")
    status = ["status", "--porcelain", "--untracked-files=no", "--", *rooms, ":!benchmarks/results"]
    try:
        head, changes = (
            subprocess.run([*git, *arguments], capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "--short=12", "HEAD"], status)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changes else "")


def about(commit_name: str | None = None) -> dict[str, Any]:
    """What every row says of where it is from: machine, commit, versions and command."""
    return {
        "machine": machine(),
        "commit": commit_name or commit(),
        "versions": {name: version(name) for name in LIBRARIES},
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def write(given: Namespace, benchmark: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to a benchmark's file, in the place of those of the same case on the same machine, and print them."""
    where = about()
    file = given.results / f"{benchmark}.jsonl"
    kept = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    cases = {row["case"] for row in rows}
    kept = [row for row in kept if row["case"] not in cases or row["machine"] != where["machine"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *(row | where for row in rows)]), encoding="utf-8")
    for row in rows:
        print(json.dumps(row), flush=True)
