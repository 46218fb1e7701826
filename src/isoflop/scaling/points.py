"""What laws are fitted to: a point per run, and the loss curves of runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.intp]


class Points(NamedTuple):
    """Final state of runs, arrays (n,)."""

    parameters: Array
    """N."""
    tokens: Array
    """D."""
    flops: Array
    """C; default: 6 N D."""
    loss: Array
    """Nats per token."""
    weights: Array
    """Weight of each point; default: 1."""
    unique_tokens: Array | None = None
    """U of Muennighoff et al. 2023; None if not given."""

    def take(self, chosen: Any) -> Points:
        """Return the points of a mask or of indices."""
        return Points(*(None if values is None else values[chosen] for values in self))  # type: ignore[arg-type]


class TunedPoints(NamedTuple):
    """Final state of runs with their learning rates and batches, arrays (n,)."""

    parameters: Array
    """N without embeddings and head."""
    tokens: Array
    learning_rate: Array
    """Peak of the schedule."""
    tokens_per_step: Array
    loss: Array

    def take(self, chosen: Any) -> TunedPoints:
        """Return the points of a mask or of indices."""
        return TunedPoints(*(values[chosen] for values in self))


class Curve(NamedTuple):
    """Losses during one run, arrays (m,) in the order of training."""

    name: str
    parameters: float
    tokens: Array
    flops: Array
    loss: Array


def points(parameters: Any, tokens: Any, loss: Any, flops: Any = None, weights: Any = None) -> Points:
    """Return points from anything that converts to arrays; default: C = 6 N D and equal weights."""
    n, d, losses = (np.asarray(values, dtype=float) for values in (parameters, tokens, loss))
    c = 6 * n * d if flops is None else np.asarray(flops, dtype=float)
    return Points(n, d, c, losses, np.ones_like(n) if weights is None else np.asarray(weights, dtype=float))
