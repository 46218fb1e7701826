"""Anomalous steps: a loss or gradient norm that is not finite, or far above its recent values."""

from __future__ import annotations

import math
import statistics

from isoflop.config.recipe import Anomalies

# As in OLMo-core's SkipStepOptimizer: a rolling interval of 128 steps, used from half of it on.
WINDOW_STEPS = 128
LEAST_STEPS = WINDOW_STEPS // 2

History = list[list[float]]
"""[loss, gradient norm] of the last steps whose update was kept, oldest first."""


def find_anomaly(history: History, loss: float, grad_norm: float, policy: Anomalies) -> str | None:
    """Return what is wrong with a step, in words; None for an ordinary step.

    A pure function of numbers that all ranks share and a checkpoint holds, so a resumed run decides as an uninterrupted one.
    """
    for column, (name, value) in enumerate((("loss", loss), ("gradient norm", grad_norm))):
        if not math.isfinite(value):
            return f"{name} {value}"
        if policy.spike_sigmas is None or len(history) < LEAST_STEPS:
            continue
        recent = [step[column] for step in history]
        mean, sigma = statistics.fmean(recent), statistics.stdev(recent)
        if value > mean + policy.spike_sigmas * sigma:
            return (
                f"{name} {value:.4g} is over {policy.spike_sigmas:g} standard deviations ({sigma:.3g}) above its mean {mean:.4g}"
            )
    return None


def remember(history: History, loss: float, grad_norm: float) -> None:
    """Append a step whose update was kept, and drop the oldest."""
    history.append([loss, grad_norm])
    del history[:-WINDOW_STEPS]
