"""What Muon saves beside AdamW: python benchmarks/efficiency.py (from the checkout's root; about an hour, one core).

Trains stock LLaMAs of three sizes on Python's sources. Each optimizer's learning rate is tuned at each size, then three random
seeds are trained at several tokens a parameter. Each run is a row of results/efficiency.jsonl as soon as it ends; a run with a
row is not trained again, so the same command resumes. Then docs/results/efficiency.md and its figure are written; `--page` does
only that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from efficiency_parts import page
from efficiency_parts.runs import DURATIONS, OPTIMIZERS, SEEDS, SHAPES, TUNED_AT, Setting, load, time_size, train, tree_of
from pages.measured import tuned_losses
from rows import ROOT, about

from isoflop.prepare.run import prepare

LEARNING_RATES = tuple(4e-3 * 2**power for power in range(5))
FARTHEST = 3  # learning rates added beyond these, one at a time, while the lowest loss is at an end


def main() -> None:
    """Train what has no row yet, measure step times, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="train nothing, write the page from the rows that are there")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the rows")
    given = parser.parse_args()
    file = given.results / "efficiency.jsonl"
    if not given.page:
        train_and_time(file)
    page.write(file)


def train_and_time(file: Path) -> None:
    """Append a row of every run and of every size's step times that has none."""
    torch.set_num_threads(1)
    prepare(load(tree_of(Setting(*SHAPES[0], "adamw", 1e-2, 1, 0))))
    where = about()
    best = {}
    for shape in SHAPES:
        for optimizer in OPTIMIZERS:
            best[shape, optimizer] = tuned(Setting(*shape, optimizer, 0.0, TUNED_AT, SEEDS[0]), file, where)
        train_seeds(shape, best, file, where, longest=False)
    for shape in SHAPES:  # the longest runs last: half of the time, and the page can be written without them
        train_seeds(shape, best, file, where, longest=True)
        time_size(*shape, file, where)


def tuned(setting: Setting, file: Path, where: dict[str, Any]) -> float:
    """Return the learning rate of the lowest loss, the setting's own replaced by each."""
    losses = tune(lambda rate: train(setting._replace(learning_rate=rate), file, where).loss)
    return min(losses, key=lambda rate: losses[rate])


def train_seeds(
    shape: tuple[int, int], best: dict[tuple[tuple[int, int], str], float], file: Path, where: dict[str, Any], longest: bool
) -> None:
    """Train a size with both optimizers and every seed, for the longest duration or for all others."""
    for seed in SEEDS:
        for optimizer in OPTIMIZERS:  # in turn, so that both end a seed at about the same time
            durations = DURATIONS[optimizer][-1:] if longest else DURATIONS[optimizer][:-1]
            for duration in durations:
                train(Setting(*shape, optimizer, best[shape, optimizer], duration, seed), file, where)


def tune(loss_of: Callable[[float], float]) -> dict[float, float]:
    """Return losses by learning rate, with learning rates added until the lowest loss lies between two others."""
    return tuned_losses(loss_of, LEARNING_RATES, FARTHEST)


if __name__ == "__main__":
    main()
