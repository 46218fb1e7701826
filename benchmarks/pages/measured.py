"""What pages of measurements share: rows by case, medians with their range, and the commands behind rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]


def by_case(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each case, in the order they were written."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def median_and_range(values: list[float], unit: float = 1.0) -> str:
    """Median (least to most), of three digits at least."""
    median, low, high = (f"{value:,.3g}" if abs(value) < 999.5 else f"{value:,.0f}" for value in (each / unit for each in values))
    return f"{median} ({low} to {high})"


def sources(rows: Iterable[Row]) -> str:
    """The commands behind some rows, with machine, commit and versions."""
    rows = list(rows)
    lines = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        own = [row for row in rows if row["machine"] == machine]
        commands = "; ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in own))
        commits = ", ".join(dict.fromkeys(row["commit"] for row in own))
        lines.append(f"{commands} at {commits} on {machine}; torch {own[0]['versions']['torch']},"
                     f" transformers {own[0]['versions']['transformers']}.")  # fmt: skip
    return "\n".join(lines)


def tuned_losses(loss_of: Callable[[float], float], learning_rates: Iterable[float], farthest: int) -> dict[float, float]:
    """Losses by learning rate; up to `farthest` are added, by a factor of 2, until the lowest loss lies between two others."""
    losses = {rate: loss_of(rate) for rate in learning_rates}
    for _ in range(farthest):
        best = min(losses, key=lambda rate: losses[rate])
        if best not in (min(losses), max(losses)):
            break
        added = best / 2 if best == min(losses) else best * 2
        losses[added] = loss_of(added)
    return losses
