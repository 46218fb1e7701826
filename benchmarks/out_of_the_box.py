"""What a user gets: nanoGPT's train.py and isoflop, each by its own command: python benchmarks/out_of_the_box.py --nanogpt PATH.

The same GPT-2 shape and tokens a step on a CPU (as shipped it has no biases there, fp32, its own allocator and AdamW), whole
processes in turn, the step times that each prints. The first three steps of each run are not counted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rows import ROOT, paired, parser_of, recipe_of, spread, write

from isoflop.config.recipe import Recipe
from isoflop.data.manifest import read_manifest
from isoflop.data.windows import Windows
from isoflop.plan import cost
from isoflop.prepare.run import prepare

SKIPPED = 3  # steps at the start of each run: allocation, moments, compilation


def main() -> None:
    """Measure, and write a row for each way."""
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("overrides", nargs="*", help="values of the recipe, section.key=value")
    given = parser.parse_intermixed_args()
    seconds: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of("gpt2", [*given.overrides, f"training.max_steps={given.steps}"], folder)
        prepare(recipe)
        checkout = copy_nanogpt(given.nanogpt, recipe, Path(folder))
        for number in range(given.rounds):
            for way, taken in {
                "nanoGPT: train.py": nanogpt(checkout, recipe, given.steps, compiled=True),
                "nanoGPT: train.py --compile=False": nanogpt(checkout, recipe, given.steps, compiled=False),
                "isoflop: cpu.yaml": isoflop("cpu", recipe, Path(folder) / f"cpu-{number}", given.overrides),
                "isoflop: cpu.yaml, glibc as it is": isoflop(
                    "cpu", recipe, Path(folder) / f"glibc-{number}", given.overrides, {"MALLOC_TOP_PAD_": "131072"}
                ),
                "isoflop: cpu_bf16.yaml": isoflop("cpu_bf16", recipe, Path(folder) / f"bf16-{number}", given.overrides),
            }.items():
                seconds.setdefault(way, []).append(taken[SKIPPED:])
                print(f"round {number}: {way}: {statistics.median(taken[SKIPPED:]):.3f} s", file=sys.stderr, flush=True)
    medians = {way: [statistics.median(one) for one in runs] for way, runs in seconds.items()}
    base, tokens = medians["nanoGPT: train.py"], recipe.training.tokens_per_step
    facts = {"case": "gpt2", "parameters": cost.parameters(recipe.model), "tokens_per_step": tokens, "rounds": given.rounds}
    rows = [
        facts | {"way": way, "step_s": spread(taken), "tokens_per_s": spread([tokens / one for one in taken])}
        | {"speed_of_nanogpt": paired(base, taken)}
        for way, taken in medians.items()
    ]  # fmt: skip
    write(given, "out_of_the_box", rows)


def copy_nanogpt(checkout: Path, recipe: Recipe, folder: Path) -> Path:
    """Its three files beside the same tokens in its own format; the checkout stays as it is."""
    copied = folder / "nanogpt"
    data = copied / "data/benchmark"
    data.mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(checkout / name, copied)
    manifest = read_manifest(recipe.data.prepared_dir)
    for split, file in (("train", "train.bin"), ("validation", "val.bin")):
        windows = Windows(recipe.data.prepared_dir, manifest.shards(split), manifest.sequence_length)
        windows.take(np.arange(len(windows))).astype(np.uint16).tofile(data / file)
    return copied


def nanogpt(checkout: Path, recipe: Recipe, steps: int, compiled: bool) -> list[float]:
    """Seconds of each step, as it prints them."""
    model, training = recipe.model, recipe.training
    accumulation = training.tokens_per_step // (training.sequence_length * training.micro_batch_size)
    values = {
        "device": "cpu", "dataset": "benchmark", "block_size": training.sequence_length, "batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation, "n_layer": model.n_layer, "n_head": model.n_head, "n_embd": model.n_embd,
        "max_iters": steps, "eval_iters": 1, "eval_interval": 10**6, "always_save_checkpoint": False, "compile": compiled,
    }  # fmt: skip
    command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in values.items())]
    printed = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout
    return [float(found) / 1e3 for found in re.findall(r"^iter \d+: .* time ([\d.]+)ms", printed, flags=re.MULTILINE)]


def isoflop(
    config: str, recipe: Recipe, run_dir: Path, overrides: list[str], environment: dict[str, str] | None = None
) -> list[float]:
    """Seconds of each step, from the metrics that the command writes.

    glibc's own default, said in the environment, is a setting that `pretrain` leaves alone.
    """
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet", "--config_file"]
    own = [*overrides, f"training.max_steps={recipe.training.max_steps}", f"output.run_dir={run_dir}"]
    file = Path(recipe.output.run_dir) / "benchmark.yaml"
    command = [*launch, f"accelerate_configs/{config}.yaml", "scripts/pretrain.py", str(file), *own]
    subprocess.run(command, cwd=ROOT, env=os.environ | (environment or {}), capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [recipe.training.tokens_per_step / row["tokens_per_s"] for row in rows]


if __name__ == "__main__":
    main()
