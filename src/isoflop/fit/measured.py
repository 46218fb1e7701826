"""What a law is fitted to, from a table or from run folders."""

from __future__ import annotations

from typing import Literal, NamedTuple

from isoflop.scaling.laws import Progress
from isoflop.scaling.points import Curve, Points

FEWEST_POINTS = 6  # one more than the law has coefficients


class Measured(NamedTuple):
    """Runs as points, and what is known of them."""

    points: Points
    curves: list[Curve]
    origin: str
    """For the law's `source`: file or folders, and of runs their tokenizer and data."""
    counts: Literal["total", "without_vocabulary"]
    """What N counts."""
    notes: list[str]
    """What was derived or taken for granted."""
    warnings: list[str]
    progress: Progress | None = None
