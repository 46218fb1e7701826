"""Laws of the learning rate and the batch: `fit` writes a `HyperparameterLaw`, a law file holds it, `plan` reads it.

N counts all parameters but embeddings and head, D is in tokens, a batch is in tokens per step. The published laws are in
`isoflop.scaling.hyperparameter_laws`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from isoflop.config.recipe_data import Section
from isoflop.config.recipe_optimizer import Schedule

NORMAL_90 = 1.645  # standard deviations from the mean to the ends of a normal distribution's 90% interval
SQUARE_ROOT_RULE = 0.5

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Row = Annotated[tuple[Number, Number, Number], Field(strict=False)]
Range = Annotated[tuple[Positive, Positive], Field(strict=False)]
OptimizerName = Literal["adamw", "muon"]


class Interval(NamedTuple):
    """A value, and the ends of its 90% interval where its law has one."""

    value: float
    low: float | None = None
    high: float | None = None


class PowerOfSize(Section):
    """exp(log_coefficient) N^parameters_exponent D^tokens_exponent; an exponent is 0 where a law has no such term."""

    log_coefficient: Number
    parameters_exponent: Number = 0.0
    tokens_exponent: Number = 0.0
    covariance: Annotated[tuple[Row, Row, Row], Field(strict=False)] | None = None
    """Of log_coefficient, parameters_exponent and tokens_exponent, as estimated; the interval is log-normal by it."""

    @model_validator(mode="after")
    def _require_covariance(self) -> Self:
        if self.covariance is None:
            return self
        matrix = np.array(self.covariance)
        if not np.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-12):
            raise ValueError("covariance is not symmetric; its rows are log_coefficient, parameters_exponent, tokens_exponent")
        if np.linalg.eigvalsh(matrix).min() < -1e-9 * max(1.0, float(np.trace(matrix))):
            raise ValueError("covariance has a negative eigenvalue, so it is that of no estimate")
        return self

    def at(self, parameters_without_vocabulary: float, tokens: float) -> Interval:
        """Return the value at N and D with its 90% interval: exp(ln value -+ 1.645 sqrt(x' C x)), x = (1, ln N, ln D)."""
        x = np.array([1.0, math.log(parameters_without_vocabulary), math.log(tokens)])
        log_value = float(x @ [self.log_coefficient, self.parameters_exponent, self.tokens_exponent])
        if self.covariance is None:
            return Interval(math.exp(log_value))
        reach = NORMAL_90 * math.sqrt(max(float(x @ np.array(self.covariance) @ x), 0.0))
        return Interval(math.exp(log_value), math.exp(log_value - reach), math.exp(log_value + reach))

    def formula(self) -> str:
        """Return the formula as text, such as `1.79 N^-0.713 D^0.307`."""
        powers = (("N", self.parameters_exponent), ("D", self.tokens_exponent))
        return " ".join([f"{math.exp(self.log_coefficient):.4g}", *(f"{x}^{power:.4g}" for x, power in powers if power)])


class LossCurvature(Section):
    """How the loss rises around the best learning rate and batch, in nats per squared natural log of the ratio to the best.

    loss - least loss = rate r^2 + batch b^2 + cross r b, with r = ln(rate / best rate) and b = ln(batch / best batch).
    """

    rate: Positive
    batch: Positive
    cross: Number = 0.0
    source: str = ""

    @model_validator(mode="after")
    def _require_a_minimum(self) -> Self:
        if 4 * self.rate * self.batch <= self.cross**2:
            raise ValueError(f"cross = {self.cross:g} is too large: 4 rate batch > cross^2 makes the best point a minimum")
        return self

    def nats(self, rate_ratio: float, batch_ratio: float) -> float:
        """Return the loss above the least, where rate and batch are these multiples of the best ones."""
        r, b = math.log(rate_ratio), math.log(batch_ratio)
        return self.rate * r * r + self.batch * b * b + self.cross * r * b

    def formula(self) -> str:
        """Return the formula as text."""
        return f"{self.rate:g} r^2 + {self.batch:g} b^2 {self.cross:+g} r b, r and b = ln(recipe's / law's) of rate and batch"


class HyperparameterLaw(Section):
    """Peak learning rate and tokens per step as powers of N and D, for one optimizer."""

    name: str = ""
    source: str
    optimizer: OptimizerName
    peak_learning_rate: PowerOfSize
    tokens_per_step: PowerOfSize
    power_of_two_batch: bool = False
    """Whether the law's authors take the nearest power of two tokens for the batch."""
    parameters_range: Range | None = None
    """Fewest and most parameters of the runs that the law was fitted to."""
    tokens_range: Range | None = None
    flops_range: Range | None = None
    """Least and most 6 N D of those runs, where their N and D are not known."""
    curvature: LossCurvature | None = None
    schedule: Schedule | None = None
    """Schedule of the runs that the law was fitted to; without one, a recipe keeps its own."""
    final_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Final over peak learning rate; instead of the schedule's final_learning_rate."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Weight decay of those runs, the same for every N and D."""
    decay_timescale: Positive | None = None
    """T = B / (learning rate x weight decay x D): over which share of a run weights are averaged; it is kept for every N and D
    (arXiv:2405.13698). Instead of weight_decay."""

    @model_validator(mode="after")
    def _from_low_to_high(self) -> Self:
        for name in ("parameters_range", "tokens_range", "flops_range"):
            if (ends := getattr(self, name)) and ends[0] > ends[1]:
                raise ValueError(f"{name}: [{ends[0]:g}, {ends[1]:g}] is not lowest first")
        if self.weight_decay is not None and self.decay_timescale is not None:
            raise ValueError("weight_decay and decay_timescale both give the weight decay; leave one out")
        return self

    @property
    def batch_exponent(self) -> float:
        """Exponent of the batch in the best learning rate at another batch than the law's, -cross / (2 rate) of the curvature.

        Without a curvature 0.5, the square-root rule for Adam (Malladi et al. 2022, arXiv:2205.10287).
        """
        return SQUARE_ROOT_RULE if self.curvature is None else -self.curvature.cross / (2 * self.curvature.rate)

    def outside(self, parameters_without_vocabulary: float, tokens: float, factor: float = 1.0) -> list[str]:
        """Return which of N and D lie beyond the runs that the law was fitted to by more than a factor, in words."""
        values = (
            ("N", parameters_without_vocabulary, self.parameters_range, "parameters without vocabulary"),
            ("D", tokens, self.tokens_range, "tokens"),
            ("6ND", 6 * parameters_without_vocabulary * tokens, self.flops_range, "FLOPs"),
        )
        return [
            f"{name} = {value:.3g} {unit} (fitted on {ends[0]:.3g} to {ends[1]:.3g})"
            for name, value, ends, unit in values
            if ends and not ends[0] / factor <= value <= ends[1] * factor
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the law as a law file holds it under `hyperparameters`."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> HyperparameterLaw:
        """Return the law of a law file's `hyperparameters`. Raises pydantic's `ValidationError`."""
        return cls.model_validate(tree)
