"""Choose learning rate, batch, weight decay and schedule for N and D by a law.

Entered by `choose`. N counts all parameters but embeddings and head. The laws are in `isoflop.scaling.hyperparameter_laws`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from isoflop.config.recipe_optimizer import Schedule
from isoflop.scaling.hyperparameter_laws import default_law, load_hyperparameter_law
from isoflop.scaling.hyperparameters import HyperparameterLaw, Interval, OptimizerName
from isoflop.scaling.laws import Law, critical_batch_tokens, load_law
from isoflop.utils.errors import UserError

WARMUP_SHARE = 0.1  # of the steps at most; the 1.3B to 2.2B recipes warm up over 2,000 of 25,000
DEFAULT_WEIGHT_DECAY = 0.1  # of a recipe, and of most published runs
DEFAULT_SCHEDULE = Schedule(name="cosine", warmup_steps=2000)
DEFAULT_FINAL_SHARE = 0.1
LOSS_LAW = "kaplan"  # of the critical batch where no loss is predicted yet: it counts N as these laws do
DIGITS, EXTRAPOLATED_DIGITS = 4, 2  # of a learning rate and a weight decay


@dataclass(frozen=True)
class Hyperparameters:
    """Learning rate, batch, weight decay and schedule of a run, as a law gives them. `print` shows each with its formula."""

    law: HyperparameterLaw
    parameters_without_vocabulary: float
    tokens: float
    by_law: tuple[Interval, Interval]
    """Peak learning rate and tokens per step before the batch was rounded."""
    peak_learning_rate: Interval
    tokens_per_step: Interval
    weight_decay: Interval
    schedule: Schedule
    critical_batch_tokens: float
    batch_unit: int | None
    """Tokens that the batch is a multiple of: sequence length x micro-batch x GPUs."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return int(self.tokens // self.tokens_per_step.value)

    @property
    def warnings(self) -> list[str]:
        """What to know before these values are used."""
        name, found = self.law.name, []
        if outside := self.law.outside(self.parameters_without_vocabulary, self.tokens):
            found.append(f"law {name} is extrapolated: {'; '.join(outside)}")
        if self.tokens_per_step.value > self.critical_batch_tokens:
            found.append(
                f"tokens_per_step = {self.tokens_per_step.value:,.0f} is above the critical batch of"
                f" {self.critical_batch_tokens:,.0f} tokens: larger steps save little time for their tokens"
            )
        by_law = self.by_law[1].value
        if not by_law / 2 <= self.tokens_per_step.value <= 2 * by_law:
            found.append(
                f"tokens_per_step = {self.tokens_per_step.value:,.0f}, a multiple of {self.batch_unit:,}, is far from the"
                f" {by_law:,.0f} of law {name}; a smaller micro-batch or fewer GPUs come closer"
            )
        return found

    @property
    def digits(self) -> int:
        """Significant digits that the learning rate and the weight decay are given to."""
        return EXTRAPOLATED_DIGITS if self.law.outside(self.parameters_without_vocabulary, self.tokens) else DIGITS

    def rounded(self, value: float) -> float:
        """Return a value at these digits."""
        return float(f"{value:.{self.digits}g}")

    def formulas(self) -> dict[str, str]:
        """Return how each value came about, by its recipe key."""
        law, (rate, batch) = self.law, self.by_law
        formulas = {
            "peak_learning_rate": f"{law.peak_learning_rate.formula()} = {spread(rate, f'.{self.digits}g')}",
            "tokens_per_step": f"{law.tokens_per_step.formula()} = {spread(batch, ',.0f')}",
            "weight_decay": self._decay_formula(),
        }
        if self.tokens_per_step.value != batch.value:
            rounded = ["to a power of two"] if law.power_of_two_batch else []
            rounded += [f"to a multiple of {self.batch_unit:,}"] if self.batch_unit else []
            formulas["tokens_per_step"] += f", rounded {' and '.join(rounded)}"
            formulas["peak_learning_rate"] += f", x (batch / the law's)^{law.batch_exponent:.3g}"
        return formulas

    def _decay_formula(self) -> str:
        if self.law.decay_timescale is not None:
            return f"batch / (learning rate x T x D), T = {self.law.decay_timescale:.3g} (arXiv:2405.13698)"
        return "that of the law's runs" if self.law.weight_decay is not None else "a recipe's default; the law has none"

    def to_dict(self) -> dict[str, Any]:
        """Return the keys and values of `--json`."""
        return {
            "law": self.law.name,
            "source": self.law.source,
            "optimizer": self.law.optimizer,
            "parameters_without_vocabulary": self.parameters_without_vocabulary,
            "tokens": self.tokens,
            "peak_learning_rate": self.peak_learning_rate._asdict(),
            "tokens_per_step": self.tokens_per_step._asdict(),
            "weight_decay": self.weight_decay._asdict(),
            "schedule": self.schedule.model_dump(),
            "steps": self.steps,
            "critical_batch_tokens": self.critical_batch_tokens,
            "formulas": self.formulas(),
            "warnings": self.warnings,
        }

    def lines(self) -> list[str]:
        """Return a line for each value with its formula and interval, for the terminal and a recipe's comment."""
        formulas, schedule = self.formulas(), self.schedule
        shape = f", decay over the last {schedule.decay_fraction:.0%}" if schedule.name == "wsd" else ""
        return [
            f"peak_learning_rate {self.rounded(self.peak_learning_rate.value):g}: {formulas['peak_learning_rate']}",
            f"tokens_per_step {self.tokens_per_step.value:,.0f}: {formulas['tokens_per_step']}; critical batch"
            f" 2e8 / loss^(1/0.21) = {self.critical_batch_tokens:,.0f}",
            f"weight_decay {self.rounded(self.weight_decay.value):g}: {formulas['weight_decay']}",
            f"schedule {schedule.name}{shape}: warm-up {schedule.warmup_steps:,} of {self.steps:,} steps, final learning rate"
            f" {self.rounded(schedule.final_learning_rate):g}",
        ]

    def __str__(self) -> str:
        n, d = self.parameters_without_vocabulary, self.tokens
        title = f"{self.law.optimizer}, N = {n:.4g} without embeddings and head, D = {d:.4g} tokens, by law {self.law.name}"
        return "\n".join([title, *self.lines(), f"law: {self.law.source}", *(f"warning: {w}" for w in self.warnings)])


def choose(
    law: HyperparameterLaw,
    parameters_without_vocabulary: float,
    tokens: float,
    *,
    loss: float | None = None,
    batch_unit: int | None = None,
) -> Hyperparameters:
    """Return a law's values for N and D.

    loss: the predicted final loss, for the critical batch. batch_unit: the batch becomes the nearest multiple of it; the learning
    rate follows the batch by the law's `batch_exponent`. Raises `UserError` where the tokens are less than a step.
    """
    n, d = parameters_without_vocabulary, tokens
    rate, batch = law.peak_learning_rate.at(n, d), law.tokens_per_step.at(n, d)
    size = 2.0 ** round(math.log2(batch.value)) if law.power_of_two_batch else batch.value
    if batch_unit:
        size = float(max(1, round(size / batch_unit)) * batch_unit)
    if size > d:
        raise UserError(f"{d:,.0f} tokens are less than one step of {size:,.0f}: a larger budget is needed")
    follows = (size / batch.value) ** law.batch_exponent
    peak = Interval(rate.value * follows, rate.low and rate.low * follows, rate.high and rate.high * follows)
    if law.decay_timescale is not None:
        decay = size / (peak.value * law.decay_timescale * d)
    else:
        decay = DEFAULT_WEIGHT_DECAY if law.weight_decay is None else law.weight_decay
    return Hyperparameters(
        law=law,
        parameters_without_vocabulary=n,
        tokens=d,
        by_law=(rate, batch),
        peak_learning_rate=peak,
        tokens_per_step=batch._replace(value=size),
        weight_decay=Interval(decay),
        schedule=_schedule(law, peak.value, int(d // size)),
        critical_batch_tokens=critical_batch_tokens(float(load_law(LOSS_LAW).loss(n, d)) if loss is None else loss),
        batch_unit=batch_unit,
    )


def _schedule(law: HyperparameterLaw, peak: float, steps: int) -> Schedule:
    """Return the law's schedule with a warm-up of at most a tenth of the steps."""
    schedule, share = law.schedule or DEFAULT_SCHEDULE, law.final_share
    if share is None and law.schedule is None:
        share = DEFAULT_FINAL_SHARE
    final = min(schedule.final_learning_rate, peak) if share is None else share * peak
    warmup = min(schedule.warmup_steps, int(WARMUP_SHARE * steps))
    return schedule.model_copy(update={"warmup_steps": warmup, "final_learning_rate": final})


def law_of(law: Law, optimizer: OptimizerName, n: float, tokens: float, named: str | None = None) -> HyperparameterLaw:
    """Return the law of learning rate and batch that was named, else that of a loss law's file, else the optimizer's default."""
    fitted = law.hyperparameters
    if named is None and fitted and fitted.optimizer == optimizer:
        return fitted if fitted.name else fitted.model_copy(update={"name": law.name})
    return law_for(optimizer, n, tokens, named)


def law_for(
    optimizer: OptimizerName, parameters_without_vocabulary: float, tokens: float, law: str | None = None
) -> HyperparameterLaw:
    """Return the law that was named, else the optimizer's default. Raises `UserError` for a law of the other optimizer."""
    if law is None:
        return default_law(optimizer, parameters_without_vocabulary, tokens)
    found = load_hyperparameter_law(law)
    if found.optimizer != optimizer:
        own = default_law(optimizer, parameters_without_vocabulary, tokens)
        raise UserError(
            f"law {law} is of optimizer {found.optimizer}, and {optimizer} was asked for; give --optimizer {found.optimizer}, or"
            f" a law of {optimizer} such as {own.name}"
        )
    return found


def spread(interval: Interval, form: str) -> str:
    """Return a value with its 90% interval as text."""
    value, low, high = interval
    if low is None or high is None:
        return f"{value:{form}} (no interval)"
    return f"{value:{form}} (90%: {low:{form}} to {high:{form}})"
