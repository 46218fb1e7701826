"""Compare a recipe's own learning rate, batch and weight decay with those of a law, and estimate what the difference costs.

Entered by `compare_hyperparameters`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from isoflop.config.recipe import Recipe
from isoflop.plan.hyperparameters import Hyperparameters, choose, law_of
from isoflop.plan.shape import tuned_parameters
from isoflop.scaling.laws import DEFAULT_LAW, FAR, Law, load_law
from isoflop.utils.errors import UserError
from isoflop.utils.tables import short

# On the 13 grids of Step Law's table the loss above each grid's least was 0.5 to 3 times the estimate (90% of the points where it
# is 0.01 to 0.03 nats). Beyond 0.1 nats runs diverge, which no quadratic describes.
COST_SPREAD = (0.5, 3.0)
MOST_NATS = 0.1
NO_DIFFERENCE = 0.001  # nats: less than random seed noise


@dataclass(frozen=True)
class HyperparameterComparison:
    """A recipe's learning rate, batch and weight decay beside a law's. `lines` shows them as text."""

    peak_learning_rate: float
    tokens_per_step: int
    weight_decay: float
    law: Hyperparameters | None
    """What the law gives; None where it says nothing about this recipe."""
    outside: str | None
    """Why the law says nothing."""
    nats: float | None
    """Estimated loss above that of the law's values; None without a curvature, and above `MOST_NATS`."""
    nats_above: float | None
    """`MOST_NATS`, where the estimate is above it."""
    compute_share: float | None
    """Share of the FLOPs that would reach the same loss with the law's values less: 1 - exp(-nats / -dL/dlnC)."""

    @property
    def nats_interval(self) -> tuple[float, float] | None:
        """90% interval of the estimated cost."""
        return None if self.nats is None else (COST_SPREAD[0] * self.nats, COST_SPREAD[1] * self.nats)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        own = {
            "peak_learning_rate": self.peak_learning_rate,
            "tokens_per_step": self.tokens_per_step,
            "weight_decay": self.weight_decay,
        }
        by_law = self.law.to_dict() if self.law else None
        return {
            "recipe": own,
            "by_law": by_law,
            "ratio": {key: value / by_law[key]["value"] if by_law[key]["value"] else None for key, value in own.items()}
            if by_law
            else None,
            "outside": self.outside,
            "estimated_cost_nats": self.nats,
            "estimated_cost_nats_interval": self.nats_interval,
            "estimated_cost_nats_above": self.nats_above,
            "estimated_cost_compute_share": self.compute_share,
        }

    def summary(self) -> str:
        """Return the comparison in one line."""
        if self.law is None:
            return f"learning rate and batch: not compared, {str(self.outside).split(':')[0]}"
        found = self.law
        beyond = ", extrapolated" if found.law.outside(found.parameters_without_vocabulary, found.tokens) else ""
        return (
            f"learning rate {self.peak_learning_rate:g}, batch {short(self.tokens_per_step)}, decay {self.weight_decay:g}; by"
            f" {found.law.name}{beyond}: {found.peak_learning_rate.value:.2g}, {short(found.tokens_per_step.value)},"
            f" {found.weight_decay.value:.2g}, {self.cost()}"
        )

    def cost(self) -> str:
        """Return in words how much lower the loss would be with the law's values."""
        if self.nats_above is not None:
            return f"more than {self.nats_above:g} nats lower"
        if self.nats is None:
            return "no estimate of the cost"
        if self.nats < NO_DIFFERENCE:
            return f"the same within {NO_DIFFERENCE:g} nats"
        share = "" if self.compute_share is None else f" ({float(f'{self.compute_share:.1g}'):.0%} of compute)"
        return f"some {self.nats:.1g} nats lower{share}"

    def lines(self) -> list[str]:
        """Return the comparison with each of the law's formulas."""
        if self.law is None:
            return [self.summary()]
        found, interval = self.law, self.nats_interval
        own = {
            "peak_learning_rate": f"{self.peak_learning_rate:g}",
            "tokens_per_step": f"{self.tokens_per_step:,}",
            "weight_decay": f"{self.weight_decay:g}",
        }
        estimate = f" ({interval[0]:.1g} to {interval[1]:.1g} nats, 90%)" if interval else ""
        curvature, outside = found.law.curvature, found.law.outside(found.parameters_without_vocabulary, found.tokens)
        return [
            f"learning rate, batch and decay beside law {found.law.name}: {found.law.source}",
            *(
                f"  {key} {value}; {formula}"
                for (key, value), formula in zip(own.items(), found.formulas().values(), strict=True)
            ),
            f"  with the law's: {self.cost()}{estimate}",
            *([f"  extrapolated: {'; '.join(outside)}"] if outside else []),
            *([f"  nats = {curvature.formula()}; compute share = 1 - exp(-nats / -dL/dlnC)"] if curvature else []),
        ]


def compare_hyperparameters(recipe: Recipe, tokens: int, law: Law) -> HyperparameterComparison:
    """Compare a recipe's values with the law of learning rate and batch of its own loss law, else its optimizer's default.

    Under completep the values are those of the base, and so is the N that the law is read at.
    """
    n, optimizer = tuned_parameters(recipe.model, recipe.parametrization), recipe.optimizer
    own = (optimizer.peak_learning_rate, recipe.training.tokens_per_step, optimizer.weight_decay)
    of_law = law_of(law, optimizer.name, n, tokens)
    if outside := of_law.outside(n, tokens, factor=FAR):
        reason = f"law {of_law.name} is far from its runs: {'; '.join(outside)}"
        return HyperparameterComparison(*own, None, reason, None, None, None)
    try:
        found = choose(of_law, n, tokens)
    except UserError as error:
        return HyperparameterComparison(*own, None, str(error), None, None, None)
    if of_law.curvature is None:
        return HyperparameterComparison(*own, found, None, None, None, None)
    nats = of_law.curvature.nats(own[0] / found.peak_learning_rate.value, own[1] / found.tokens_per_step.value)
    if nats > MOST_NATS:
        return HyperparameterComparison(*own, found, None, None, MOST_NATS, None)
    return HyperparameterComparison(*own, found, None, nats, None, _compute_share(nats, recipe, tokens, law))


def _compute_share(nats: float, recipe: Recipe, tokens: int, law: Law) -> float | None:
    """Return the share of compute that nats are worth by the slope of a law where N and D grow alike; None where it has none.

    The slope is the law's, or the default law's where the law predicts no such run.
    """
    for known in (law, load_law(DEFAULT_LAW)):
        n = known.model_size(recipe.model)
        if known.outside(n, tokens, recipe.model.vocab_size, recipe.optimizer.name) is None:
            step = math.sqrt(1.01)  # N and D each, so that C = 6ND grows by 1%
            slope = float(known.loss(n / step, tokens / step) - known.loss(n * step, tokens * step)) / (2 * math.log(1.01))
            return 1 - math.exp(-nats / slope)
    return None
