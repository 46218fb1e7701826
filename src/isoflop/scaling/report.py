"""The numbers of a fit, as they stand in its report file; every part is frozen and typed.

`FitReport.to_dict` gives the JSON of `LAW_report.json`; `FitReport.model_validate` reads it back. A method that the runs do not
suit has the status "not fitted", a reason and no numbers: keys without a value are absent from the JSON.
"""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import BaseModel, ConfigDict

from isoflop.scaling.hyperparameters import HyperparameterLaw

Interval = list[float]
"""5th and 95th percentile."""
NOT_FITTED = "not fitted"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Method(_Part):
    status: str
    reason: str | None = None
    """Why the method was not fitted."""


class LeastSum(_Part):
    """Coefficients of the parametric law that minimise some sum, and how the minimum was found."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    exponent_n: float
    """a of N ~ C^a along the compute-optimal frontier."""
    exponent_d: float
    objective: float
    status: str
    detail: str
    condition: float
    """Condition number of J^T J, its columns scaled to 1."""
    starts: int
    seconds: float
    residual_std: float

    @property
    def converged(self) -> bool:
        """Whether the coefficients are a law; else powers of them may overflow."""
        return self.status == "converged"

    @property
    def coefficients(self) -> tuple[float, float, float, float, float]:
        """E, A, alpha, B, beta."""
        return self.E, self.A, self.alpha, self.B, self.beta


class Parametric(LeastSum):
    """The parametric law with its bootstrap; lists have an entry per budget of `FitReport.predict`."""

    resamples: int
    intervals: dict[str, Interval] | None
    """By coefficient and exponent; None if the fit is no law."""
    n_opt: list[float]
    n_opt_interval: list[Interval] | None = None
    d_opt: list[float]
    d_opt_interval: list[Interval] | None = None
    loss: list[float]
    loss_interval: list[Interval] | None = None
    bootstrap_seconds: float


class Profile(_Part):
    """A budget's parabola and its minimum."""

    flops: float
    points: int
    used: bool
    reason: str | None
    """Why the budget is left out."""
    polynomial: list[float] | None
    """c2, c1, c0 of loss = c2 z^2 + c1 z + c0, z = ln N."""
    n_opt: float | None
    d_opt: float | None
    loss: float | None


class Least(_Part):
    """The least loss measured at a budget."""

    flops: float
    parameters: float
    loss: float


class PowerLaw(_Method):
    """N, D and least loss as powers of C, by the minima of several budgets; lists as in `Parametric`."""

    exponent_n: float | None = None
    coefficient_n: float | None = None
    exponent_d: float | None = None
    coefficient_d: float | None = None
    loss_law: str | None = None
    n_opt: list[float] = []
    d_opt: list[float] = []
    loss: list[float] = []
    n_opt_interval: list[Interval] | None = None
    d_opt_interval: list[Interval] | None = None
    loss_interval: list[Interval] | None = None
    resamples: int | None = None
    intervals: dict[str, Interval] | None = None
    profiles: list[Profile] = []
    """Of the IsoFLOP parabolas."""
    points: list[Least] = []
    """Of the envelope and the least-loss lines."""

    @property
    def power_n(self) -> tuple[float, float] | None:
        """k and a of N = k C^a; None if not fitted."""
        return None if self.coefficient_n is None or self.exponent_n is None else (self.coefficient_n, self.exponent_n)

    @property
    def power_d(self) -> tuple[float, float] | None:
        """k and b of D = k C^b; None if not fitted."""
        return None if self.coefficient_d is None or self.exponent_d is None else (self.coefficient_d, self.exponent_d)


class SingleLaw(_Method):
    """Loss = (scale / x)^exponent, of N, D or C alone (Kaplan et al. 2020, equations 1.1 to 1.3)."""

    exponent: float | None = None
    scale: float | None = None
    residual_std: float | None = None
    points: int | None = None


class Repeated(_Method):
    """Worth of repeated tokens (Muennighoff et al. 2023), fitted together with the law of fresh ones."""

    r_star: float | None = None
    objective: float | None = None
    points: int | None = None
    E: float | None = None
    A: float | None = None
    alpha: float | None = None
    B: float | None = None
    beta: float | None = None


class HeldOutRun(_Part):
    """A run of the largest budget and its prediction from the smaller budgets."""

    flops: float
    parameters: float
    tokens: float
    measured: float
    predicted: float
    interval: Interval
    """Of a single run."""
    error: float
    """predicted / measured - 1."""
    inside: bool


class HeldOutSize(_Part):
    """N of least loss at the largest budget: by its own parabola, and predicted by those of the smaller budgets."""

    flops: float
    measured: float
    predicted: float
    interval: Interval
    error: float


class HeldOutBudget(_Method):
    """The largest budget as predicted by a fit to the smaller ones."""

    fitted_up_to: float | None = None
    """Largest FLOPs of the fitted runs."""
    fitted_points: int | None = None
    runs: list[HeldOutRun] = []
    inside: float | None = None
    """Share of the runs inside their 90% interval."""
    mean_absolute_error: float | None = None
    n_opt: HeldOutSize | None = None


class Ranges(_Part):
    """Number and ranges of the fitted runs."""

    count: int
    parameters: tuple[float, float]
    tokens: tuple[float, float]
    flops: tuple[float, float]
    budgets: list[float]


class TunedGrid(_Part):
    """Runs of one N and D over learning rates and batches, and what the laws choose for them."""

    parameters: float
    """Without embeddings and head."""
    tokens: float
    runs: int
    """Distinct pairs of learning rate and batch; runs that differ only in their seed count once, by their mean loss."""
    best_learning_rate: float
    """Of the run with the least loss."""
    best_tokens_per_step: float
    best_loss: float
    learning_rate: float
    """By the law."""
    tokens_per_step: float
    cost: float
    """Loss of the run nearest to the law's values, less the least loss; in nats."""
    held_out_cost: float | None
    """The same by laws fitted without this grid; None if the other grids do not determine them."""
    at_edge: list[str]
    """Which of learning rate and batch is the largest or smallest of the grid in its best run."""


class HyperparameterReport(_Part):
    """Laws of learning rate and batch, and what they cost at each grid that they were fitted to."""

    law: HyperparameterLaw
    resamples: int
    """Bootstrap draws behind the intervals."""
    grids: list[TunedGrid]
    notes: list[str]
    warnings: list[str]


class FitReport(_Part):
    """Every method's numbers."""

    predict: list[float]
    """Budgets in FLOPs."""
    points: Ranges
    warnings: list[str]
    parametric: Parametric
    parametric_lad: LeastSum
    """Least absolute deviations."""
    parametric_square: LeastSum
    """Least squares of the loss."""
    isoflop: PowerLaw
    argmin_log: PowerLaw
    argmin_linear: PowerLaw
    envelope: PowerLaw
    kaplan: dict[str, SingleLaw]
    """By N, D and C."""
    repeated: Repeated
    leave_largest_out: HeldOutBudget
    hyperparameters: HyperparameterReport | None = None
    """Where the runs were sweeps over learning rates or batches."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object; numbers that are not finite, which JSON lacks, become None."""
        tree: dict[str, Any] = _finite(self.model_dump(mode="json", exclude_unset=True))
        return tree

    def to_json(self) -> str:
        """Return the JSON text at full precision."""
        return json.dumps(self.to_dict(), indent=1)


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
