"""How cost grows: python benchmarks/growth.py step prepare loading (from the checkout's root; some ten minutes for all three).

step: seconds and memory of a micro-batch against sequence length, micro-batch, vocabulary and depth, one grown at a time.
prepare: seconds and memory of the command against the size of the corpus, up to --megabytes.
loading: the order of batches, opening and reading windows, and coming back in the middle of a run, up to 306 million windows (a
trillion and more of bytes, in files without blocks, which a file system gives for nothing).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from rows import ROOT, alone, in_turn, memory_of, parser_of, recipe_of, spread, write

from isoflop.config.recipe import Recipe
from isoflop.data.manifest import Shard
from isoflop.data.order import Order
from isoflop.data.windows import SHARD_BYTES, Windows
from isoflop.plan import cost
from isoflop.train.cpu import tune_glibc_malloc
from isoflop.train.training_model import build_training_model

# The other sizes stay: 2 windows of 256 tokens, vocabulary 8,192, 4 layers of width 256.
AXES: dict[str, tuple[int, ...]] = {
    "sequence length": (128, 256, 512, 1024, 2048),
    "micro-batch": (1, 2, 4, 8, 16),
    "vocabulary": (8192, 16384, 32768, 65536, 131072),
    "depth": (2, 4, 8, 16, 32),
}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
WINDOW, WINDOWS_A_STEP = 2048, 512
SHARD_WINDOWS, BATCH_WINDOWS = (size // (2 * WINDOW) for size in (SHARD_BYTES, 16 * 2**20))  # as prepare writes them
OPENED = 4  # times; the first finds no page of the files in memory
MOST_WINDOWS = 306_000_000  # of 2,048: 627 billion tokens, SlimPajama's


def main() -> None:
    """Measure what was named, and write its rows."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("parts", nargs="+", choices=("step", "prepare", "loading"))
    parser.add_argument("--megabytes", type=int, default=2048, help="the largest corpus of prepare")
    parser.add_argument("--windows", type=int, default=MOST_WINDOWS, help="the most of loading")
    parser.add_argument("--sizes", type=int, default=5, help="the first so many of each axis of step")
    given = parser.parse_intermixed_args()
    rows: list[dict[str, Any]] = []
    if "step" in given.parts:
        for axis, sizes in AXES.items():
            rows += step_rows(axis, sizes[: given.sizes], given.rounds)
    if "prepare" in given.parts:
        rows += prepare_rows(given.megabytes)
    if "loading" in given.parts:
        with tempfile.TemporaryDirectory() as folder:
            counts = [count for count in (10**5, 10**7, given.windows) if count <= given.windows]
            rows += [alone(loading_row, count, folder) for count in counts]
    write(given, "growth", rows)


def grown(axis: str, size: int) -> Recipe:
    """The small LLaMA with one of its sizes changed."""
    sizes = {"sequence length": 256, "micro-batch": 2, "vocabulary": 8192, "depth": 4} | {axis: size}
    values = {
        "model.hidden_size": 256, "model.intermediate_size": 704, "model.num_attention_heads": 4,
        "model.max_position_embeddings": sizes["sequence length"], "model.vocab_size": sizes["vocabulary"],
        "model.num_hidden_layers": sizes["depth"], "training.sequence_length": sizes["sequence length"],
        "training.micro_batch_size": sizes["micro-batch"],
        "training.tokens_per_step": 2 * sizes["sequence length"] * sizes["micro-batch"],  # two micro-batches: gradients stay
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return recipe_of("llama", [f"{key}={value}" for key, value in values.items()], folder)


def micro_batch(recipe: Recipe) -> Callable[[], None]:
    """Forward and backward of a micro-batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_training_model(recipe, eos_token_id=0, bos_token_id=None, device=device)
    ids = torch.randint(
        recipe.model.vocab_size, (recipe.training.micro_batch_size, recipe.training.sequence_length), device=device
    )

    def work() -> None:
        loss = model(ids)
        loss.backward()
        loss.item()

    return work


def step_rows(axis: str, sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """One axis: times in turn in one process, memory each in a process of its own."""
    seconds = alone(step_seconds, axis, sizes, rounds)
    os.environ |= GIVE_BACK
    held = [alone(step_bytes, axis, size) for size in sizes]
    for name in GIVE_BACK:
        del os.environ[name]
    rows = []
    for size, taken, peak in zip(sizes, seconds, held, strict=True):
        recipe = grown(axis, size)
        parts = cost.predicted_memory(recipe.model, recipe.training, recipe.optimizer, cost.Launch("this", "single", bf16=False))
        tokens = recipe.training.micro_batch_size * recipe.training.sequence_length
        flops = tokens * cost.flops_per_token(recipe.model, recipe.training.sequence_length)
        rows.append(
            {"case": axis, "way": f"{size}", "size": size, "seconds": spread(taken), "tokens": tokens, "flops": flops}
            | {"peak_bytes": peak, "predicted_bytes": parts.total - parts.moments}
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def step_seconds(axis: str, sizes: tuple[int, ...], rounds: int) -> list[list[float]]:
    """Seconds of a micro-batch at every size, in turn."""
    tune_glibc_malloc()
    found = in_turn({f"{size:09d}": micro_batch(grown(axis, size)) for size in sizes}, rounds)
    return [found[f"{size:09d}"] for size in sizes]


def step_bytes(axis: str, size: int) -> int:
    """Most memory of model, gradients and what a micro-batch keeps."""
    micro_batch(grown("depth", 1))()  # libraries load, threads start
    recipe = grown(axis, size)

    def work() -> None:
        step = micro_batch(recipe)
        step()
        step()

    return memory_of(work)


def prepare_rows(megabytes: int) -> list[dict[str, Any]]:
    """The command on corpora each four times the one before: 32 MB of this Python's sources, numbered copies beyond that."""
    rows = []
    texts = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    sizes = [size for size in (32, 128, 512, 2048, 8192, 32768) if size <= megabytes] or [megabytes]
    with tempfile.TemporaryDirectory() as folder:
        text, made = Path(folder) / "text", 0
        text.mkdir()
        copies = itertools.count()
        for size in sizes:
            while made < size * 10**6:
                made += write_copy(texts, text / f"{next(copies):05d}.json", min(32, megabytes) * 10**6)
            out = Path(folder) / f"windows-{size}"
            seconds, peak = run_prepare(text, out)
            windows = sum(file.stat().st_size for file in out.glob("*.arrow"))
            shutil.rmtree(out)
            row = {"case": "prepare", "way": f"{made / 1e6:.0f} MB", "size": made, "seconds": [seconds] * 3, "peak_bytes": peak}
            rows.append(row | {"bytes_written": windows})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def write_copy(texts: list[Path], file: Path, most: int) -> int:
    """JSON lines of the texts, each with the file's number in front so that no two documents are the same; their bytes."""
    size = 0
    with file.open("w", encoding="utf-8") as lines:
        for path in texts:
            try:
                text = f"# {file.stem}\n{path.read_text(encoding='utf-8')}"
            except UnicodeDecodeError:  # a few declare another encoding
                continue
            lines.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size >= most:
                break
    return size


def run_prepare(text: Path, out: Path) -> tuple[float, int]:
    """Seconds of the command on all files there, and the most that it and its children held at once."""
    source = json.dumps({"kind": "json", "files": [f"{text}/*.json"]})
    command = [
        sys.executable,
        "scripts/prepare.py",
        "recipes/quickstart.yaml",
        f"data.source={source}",
        f"data.prepared_dir={out}",
    ]
    started, peak = time.perf_counter(), 0
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            peak = max(peak, sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]))
        except psutil.NoSuchProcess:  # a worker that has just ended
            continue
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, peak


def loading_row(count: int, folder: str) -> dict[str, Any]:
    """So many windows: opening them, a step's order and reading at the start and, as after a resume, far inside."""
    shards = write_hollow(Path(folder) / f"{count}", count)
    taken: dict[str, list[float]] = {"open": [], "order": [], "read": [], "resumed order": [], "resumed read": []}

    def work() -> None:
        for number in range(OPENED):
            started = time.perf_counter()
            windows = Windows(Path(folder) / f"{count}", shards, WINDOW)
            order = Order.of([len(windows)], [1.0], seed=number)
            taken["open"].append(time.perf_counter() - started)
            for name, step in (("", number), ("resumed ", count // WINDOWS_A_STEP // 2 + number)):
                started = time.perf_counter()
                indices = order.of_step(step, WINDOWS_A_STEP)
                taken[f"{name}order"].append(time.perf_counter() - started)
                windows.take(indices)  # from the disk, were there any
                started = time.perf_counter()
                windows.take(indices)
                taken[f"{name}read"].append(time.perf_counter() - started)

    grown_bytes = memory_of(work)
    row = {
        "case": "loading",
        "way": f"{count:,} windows",
        "size": count,
        "windows_a_step": WINDOWS_A_STEP,
        "peak_bytes": grown_bytes,
    }
    return row | {f"{name.replace(' ', '_')}_s": spread(values) for name, values in taken.items()}


def write_hollow(folder: Path, count: int) -> list[Shard]:
    """Arrow shards of so many windows as `prepare` writes them, all zeros that take no room."""
    folder.mkdir()
    schema = pa.schema([("input_ids", pa.list_(pa.uint16(), WINDOW))])
    shards = []
    for number, left in enumerate(range(count, 0, -SHARD_WINDOWS)):
        rows, file = min(left, SHARD_WINDOWS), folder / f"train-{number:05d}.arrow"
        with file.open("wb") as stream:
            stream.write(schema.serialize())
            for of_batch in [BATCH_WINDOWS] * (rows // BATCH_WINDOWS) + [rows % BATCH_WINDOWS] * (rows % BATCH_WINDOWS > 0):
                head, body = message(of_batch)
                stream.write(head)
                stream.seek(body, os.SEEK_CUR)
            stream.write(b"\xff\xff\xff\xff\x00\x00\x00\x00")  # the end of an Arrow stream
        shards.append(Shard(name=file.name, bytes=file.stat().st_size, sha256="", windows=rows))
    return shards


def message(rows: int) -> tuple[bytes, int]:
    """The description of a record batch of so many windows, and the bytes of ids behind it."""
    if rows not in _MESSAGES:
        ids = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * WINDOW, np.uint16)), WINDOW)
        whole = pa.record_batch([ids], names=["input_ids"]).serialize()
        head = 8 + int.from_bytes(whole[4:8], "little")  # continuation mark, length, description
        _MESSAGES[rows] = bytes(whole[:head]), whole.size - head
    return _MESSAGES[rows]


_MESSAGES: dict[int, tuple[bytes, int]] = {}

if __name__ == "__main__":
    main()
