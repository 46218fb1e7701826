"""How long a checkpoint holds training up: python benchmarks/checkpoint.py [gpt2|llama|RECIPE] (from the checkout's root).

A run of the real loop: steps, calls of the save, and steps during which the files are written in the background. Beside it what
a plain Accelerate loop does, `accelerator.save_state`, on the same model and optimizer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rows import parser_of, recipe_of, spread, write

from isoflop.plan import cost
from isoflop.prepare.run import prepare
from isoflop.train import trainer as pretrain
from isoflop.train.command import pretrain_command

EVERY = 4  # steps between two saves


def main() -> None:
    """Measure, and write a row for each way."""
    parser = parser_of(__doc__, rounds=6)
    parser.add_argument("model", nargs="?", default="gpt2", help="gpt2, llama, or a recipe")
    parser.add_argument("overrides", nargs="*", help="values of the recipe, section.key=value")
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = EVERY * (given.rounds + 1) + 1
        several = ["output.keep_last=1", f"output.checkpoint_every={EVERY}", f"training.max_steps={steps}"]
        recipe = recipe_of(given.model, [*several, *given.overrides], folder)
        prepare(recipe)
        found = measure(recipe, Path(folder))
    size = cost.checkpoint_bytes(recipe.model, recipe.optimizer)
    alone, beside = statistics.median(found["step"]), statistics.median(found["step beside a write"])
    shared = {"case": Path(given.model).stem, "checkpoint_bytes": size, "parameters": cost.parameters(recipe.model)}
    rows = [
        shared | {"way": way, "seconds": spread(taken), "first_s": taken[0], "bytes_per_s": size / statistics.median(taken[1:])}
        for way, taken in found.items()
        if way.startswith(("isoflop", "accelerate"))
    ]
    for row in rows:
        row["steps_lost"] = row["seconds"][0] / alone + (beside / alone - 1 if row["way"].startswith("isoflop") else 0)
    write(given, "checkpoint", rows)


def measure(recipe: Any, folder: Path) -> dict[str, list[float]]:
    """Seconds of what blocks training, and of steps without and beside a write."""
    found: dict[str, list[float]] = defaultdict(list)
    step, save = pretrain.train_step, pretrain.save_checkpoint

    def timed_step(job: Any, progress: Any) -> Any:
        save = job.checkpoints._saver._in_flight
        writing, started = bool(save and not save.done()), time.perf_counter()
        row = step(job, progress)
        found["step beside a write" if writing else "step"].append(time.perf_counter() - started)
        return row

    def timed_save(job: Any, log: Any, progress: Any) -> None:
        if progress.step == job.num_steps:
            save(job, log, progress)
            return
        started = time.perf_counter()
        save(job, log, progress)
        found["isoflop: the call that stages a checkpoint"].append(time.perf_counter() - started)
        if job.checkpoints._saver._in_flight.done():  # on a small model the step behind would find it written
            found["step beside a write"] += found["step"][-1:]
        saved, started = folder / "accelerate", time.perf_counter()
        job.accelerator.save_state(str(saved))
        os.sync()  # a checkpoint of isoflop is on the disk when it has its name
        found["accelerate: save_state"].append(time.perf_counter() - started)
        shutil.rmtree(saved)

    pretrain.train_step, pretrain.save_checkpoint = timed_step, timed_save
    with open(folder / "log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        pretrain_command(recipe)
    return found


if __name__ == "__main__":
    main()
