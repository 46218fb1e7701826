"""Regenerates docs/memory.md: python benchmarks/pages/memory.py (from the checkout's root; about ten minutes and 8 GB on a CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from isoflop.config.loading import load_recipe
from isoflop.plan import cost
from isoflop.plan.step_benchmark import tracked_memory_bytes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = Path("benchmarks/results")  # from the checkout's root, as all paths here
TRACKED = ("llama2_1.36b", "gpt2_1.36b", "llama3_1.5b", "llama3_2.2b", "gpt2_124m", "modern_124m", "quickstart")
MEASURED = (("quickstart", 8), ("quickstart", 32), ("gpt2_124m", 1), ("gpt2_124m", 2), ("modern_124m", 1), ("modern_124m", 2))
# glibc then gives freed memory back at once, so that the process holds what its tensors hold.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def tracked() -> list[str]:
    """bf16 autocast, as on one GPU: the prediction against PyTorch's tracker over fake tensors."""
    rows = []
    for name in TRACKED:
        for micro, checkpointing in ((1, False), (4, False), (4, True)):
            recipe = load_recipe(
                f"recipes/{name}.yaml",
                [
                    "optimizer.name=adamw",
                    f"training.micro_batch_size={micro}",
                    f"training.activation_checkpointing={str(checkpointing).lower()}",
                ],
            )
            launch = cost.Launch("1gpu", "single")
            predicted = cost.predicted_memory(recipe.model, recipe.training, recipe.optimizer, launch).total
            rows.append(
                row(f"`{name}`", micro, "yes" if checkpointing else "no", predicted, tracked_memory_bytes(recipe, bf16=True))
            )
    return table("recipe | micro-batch | checkpointing | predicted, bytes | tracked, bytes | predicted / tracked - 1", rows)


def measured() -> list[str]:
    """fp32 on a CPU: the prediction against the growth of a real process that really trains."""
    rows = []
    for name, micro in MEASURED:
        command = [
            sys.executable,
            "scripts/plan.py",
            f"recipes/{name}.yaml",
            f"training.micro_batch_size={micro}",
            "optimizer.name=adamw",
        ]
        if name == "quickstart":
            command.append(f"training.tokens_per_step={2 * micro * 256}")  # two micro-batches: gradients live on, as elsewhere
        done = subprocess.run(
            [*command, "--measure", "--json"], env=os.environ | GIVE_BACK, capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout)["measured"]
        rows.append(row(f"`{name}`", micro, "no", found["predicted_memory_bytes"], found["peak_memory_bytes"]))
    return table("recipe | micro-batch | checkpointing | predicted, bytes | process, bytes | predicted / process - 1", rows)


def on_gpus(file: Path) -> list[str]:
    """bf16 autocast on GPUs: today's prediction against what torch's allocator held, from the rows of benchmarks/gpu.py."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    rows = [row for row in rows if row["part"] == "memory" and not row["rehearsal"] and "predicted_bytes" in row]
    if not rows:
        return [
            "No GPU has been measured yet: no row of one is in `benchmarks/results`. On a machine with a GPU",
            "`python benchmarks/gpu.py --only memory` makes them: four recipes at two micro-batches, with checkpointing and",
            "without, eager and compiled. The aim is 5%.",
        ]
    lines = [
        "Against `torch.cuda.max_memory_allocated`; reserved is what the allocator took of the GPU for it. All predictions are 37 to",
        "104 MB too low: cuBLAS's and cuBLASLt's workspaces, 32 MiB each on this GPU, and inputs. When they were measured, compiled layers",
        "with checkpointing were predicted 1.9 to 9.5% too high: such a layer makes its bf16 copies itself, and keeps none.",
    ]
    for machine in dict.fromkeys(row["machine"] for row in rows):
        own = [row for row in rows if row["machine"] == machine]
        cells = [
            [f"`{row['case']}`", row["way"], f"{predicted:,}", f"{row['allocated_bytes']:,}", f"{row['reserved_bytes']:,}",
             f"{predicted / row['allocated_bytes'] - 1:+.2%}"]
            for row in own for predicted in (predicted_of(row),)
        ]  # fmt: skip
        header = "case | setting | predicted, bytes | allocated, bytes | reserved, bytes | predicted / allocated - 1"
        commands = ", ".join(
            f"`{command}` at {commit}" for command, commit in {(row["command"], row["commit"]): 0 for row in own}
        )
        versions = own[0]["versions"]
        lines += ["", f"**{machine}**: {commands}; torch {versions['torch']}, transformers {versions['transformers']}.", ""]
        lines += table(header, cells)
    return lines


def predicted_of(measured: dict[str, Any]) -> int:
    """The prediction for a row: two micro-batches of a recipe on one GPU."""
    recipe = load_recipe(f"recipes/{measured['case'].split()[0]}.yaml")
    size, length = measured["micro_batch_size"], recipe.training.sequence_length
    changed = {"micro_batch_size": size, "tokens_per_step": 2 * size * length, "compile": measured["compiled"]}
    training = recipe.training.model_copy(update=changed | {"activation_checkpointing": measured["checkpointing"]})
    return cost.predicted_memory(recipe.model, training, recipe.optimizer, cost.Launch("1gpu", "single", gpu=True)).total


def row(name: str, micro: int, checkpointing: str, predicted: int, found: int) -> list[str]:
    """One comparison."""
    return [name, str(micro), checkpointing, f"{predicted:,}", f"{found:,}", f"{predicted / found - 1:+.2%}"]


def table(header: str, rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    cells = [cell.strip() for cell in header.split("|")]
    return [f"| {' | '.join(line)} |" for line in [cells, ["---"] * len(cells), *rows]]


def page() -> str:
    """The whole page."""
    lines = [
        "# Memory: predicted, tracked, measured",
        "",
        "Regenerated by `python benchmarks/pages/memory.py`. The prediction (`isoflop.plan.cost.predicted_memory`) sums what each operation",
        "of the stock layers keeps; it takes no torch and no time.",
        "",
        "## bf16 autocast, as on one GPU",
        "",
        "Against PyTorch's `MemTracker`, which dispatches every operation of forward, chunked loss, backward and AdamW update",
        "over tensors without storage. It sees no kernel's inner workspace.",
        "",
        *tracked(),
        "",
        "## fp32 on a CPU",
        "",
        "Against the growth of a real process while it trains, with `MALLOC_MMAP_THRESHOLD_=65536 MALLOC_ARENA_MAX=1`, so that",
        "glibc gives freed memory back at once (without it a process holds up to 40% more, for reuse). What importing freed is",
        "filled first and what libraries load on first use is added: some 50 MB either way, so the smallest recipe says little.",
        "",
        *measured(),
        "",
        "## On a GPU",
        "",
        *on_gpus(RESULTS / "gpu.jsonl"),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (DOCS / "memory.md").write_text(page(), encoding="utf-8")
