"""What laws are fitted to: one point a run, and the curves of runs on their way."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.intp]


class Points(NamedTuple):
    """Runs at their ends, arrays of (n,)."""

    parameters: Array
    """N."""
    tokens: Array
    """D."""
    flops: Array
    """C as given; 6 N D where it was not."""
    loss: Array
    """Nats per token."""
    weights: Array
    """How much each point counts; 1 where nothing else is said."""
    unique_tokens: Array | None = None
    """U of Muennighoff et al. 2023; None where not given."""

    def take(self, chosen: Any) -> Points:
        """The points of a mask or of indices."""
        return Points(*(None if values is None else values[chosen] for values in self))  # type: ignore[arg-type]


class Curve(NamedTuple):
    """One run's losses on its way, arrays of (m,) in the order of training."""

    name: str
    parameters: float
    tokens: Array
    flops: Array
    loss: Array


def points(parameters: Any, tokens: Any, loss: Any, flops: Any = None, weights: Any = None) -> Points:
    """Points from what can be read as arrays; C = 6 N D and equal weights where not given."""
    n, d, losses = (np.asarray(values, dtype=float) for values in (parameters, tokens, loss))
    c = 6 * n * d if flops is None else np.asarray(flops, dtype=float)
    return Points(n, d, c, losses, np.ones_like(n) if weights is None else np.asarray(weights, dtype=float))
