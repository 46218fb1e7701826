"""What a law is fitted to, from a table or from run folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from isoflop.scaling.hyperparameters import OptimizerName
from isoflop.scaling.laws import LossDecayModel
from isoflop.scaling.points import Curve, Points, TunedPoints

FEWEST_POINTS = 6  # one more than the law has coefficients


@dataclass(frozen=True)
class Measured:
    """Runs as points, with what is known about them."""

    points: Points
    curves: list[Curve] = field(default_factory=list)
    origin: str = ""
    """For the law's `source`: the file, or the runs' number, tokenizer and data."""
    counts: Literal["total", "without_vocabulary"] = "total"
    """What N counts."""
    notes: list[str] = field(default_factory=list)
    """What was derived or assumed."""
    warnings: list[str] = field(default_factory=list)
    progress: LossDecayModel | None = None
    layers: tuple[int, int] | None = None
    """Fewest and most decoder layers; None for a table, which does not state them."""
    optimizer: OptimizerName = "adamw"
    """What trained the runs; AdamW for a table that does not state it."""
    parametrization: Literal["standard", "completep"] = "standard"
    weight_decay: float | None = None
    """Of all runs; None if it varies or is not known."""
    tuned: TunedPoints | str = ""
    """All runs with their learning rates and batches, if these vary at the same N and D, where `points` are those of the least
    loss; else why there are none."""
