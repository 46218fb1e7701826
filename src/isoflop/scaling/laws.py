"""Scaling laws as data: published ones from `published/`, fitted ones from any file of the same form.

Entered by `load_law`. Losses are nats per token of the law's own data and tokenizer: between models they can be compared, with a
run on other data they can't, until a law is fitted there.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError
from pydantic import model_validator as checked_by

from isoflop import cost
from isoflop.errors import UserError, nearest
from isoflop.recipe import Model
from isoflop.recipe_data import Section
from isoflop.recipe_file import MOST_EXPLAINED, MOST_YAML_BYTES, parse_yaml
from isoflop.untrusted import read_text

PUBLISHED = ("hoffmann", "hoffmann-rounded", "besiroglu", "kaplan")
DEFAULT_LAW = "hoffmann"
COEFFICIENTS = {"chinchilla": ("E", "A", "alpha", "B", "beta"), "kaplan": ("N_c", "alpha_N", "D_c", "alpha_D")}
INTERVAL = (0.05, 0.95)  # percentiles of all intervals here: they hold nine times in ten
NORMAL_90 = 1.645  # standard deviations of a normal distribution on either side of the mean, for the same share
PF_DAY = 8.64e19  # FLOPs: 1e15 a second for a day, the unit of compute of Kaplan et al. 2020


Finite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Signed = Annotated[float, Field(allow_inf_nan=False)]
EXPONENTS = {"alpha", "beta", "alpha_N", "alpha_D"}
EXPONENT_RANGE = (0.001, 10.0)  # beyond it powers of N and D overflow, and no law lies there


class FittedOn(Section):
    """The range of the runs a law was fitted to, lowest and highest; beyond it the law is an extrapolation."""

    parameters: tuple[Finite, Finite] = Field(strict=False)
    tokens: tuple[Finite, Finite] = Field(strict=False)

    @checked_by(mode="after")
    def _from_low_to_high(self) -> Self:
        for name, (low, high) in (("parameters", self.parameters), ("tokens", self.tokens)):
            if low >= high:
                raise ValueError(f"{name}: [{low:g}, {high:g}] is not lowest first")
        return self


class Progress(Section):
    """How far losses on the way lie above the last one, in the runs that a law was fitted to.

    log(log(loss there / last loss)) = intercept + a (log N - center) + b (log D - center) at each share of a run's tokens: what
    the rate's fall still gains is more in larger and longer runs.
    """

    schedule: str
    """Of the learning rate, which decides it."""
    center: Annotated[tuple[Signed, Signed], Field(strict=False)]
    """Means of log N and log D."""
    covariance: list[list[Signed]]
    """(3, 3), of intercept, a and b, in units of the squared deviation."""
    gaps: list[Annotated[tuple[Signed, Signed, Signed, Signed, Signed], Field(strict=False)]]
    """Share of the tokens, intercept, a, b, and the standard deviation of a run. Shares rise."""

    def fall(self, share: float, parameters: float, tokens: float) -> tuple[float, float, float]:
        """log(loss there / last loss), and the 5th and 95th percentile of single runs; it is 0 at the end."""
        x = np.array([1.0, np.log(parameters) - self.center[0], np.log(tokens) - self.center[1]])
        shares, coefficients, deviations = (part := np.array(self.gaps))[:, 0], part[:, 1:4], part[:, 4]
        logs = coefficients @ x
        reach = NORMAL_90 * deviations * np.sqrt(1 + x @ np.array(self.covariance) @ x)
        middle, low, high = (
            float(np.interp(share, [*shares, 1.0], [*np.exp(bound), 0.0])) for bound in (logs, logs - reach, logs + reach)
        )
        return middle, low, high


class Forecast(NamedTuple):
    """A loss that is not measured yet, in nats per token, with its 90% interval."""

    loss: float
    interval: tuple[float, float] | None


class Law(Section):
    """Loss as a function of parameters N and tokens D.

    Form `chinchilla` (Hoffmann et al. 2022, equation 2): E + A / N^alpha + B / D^beta; `kaplan` (Kaplan et al. 2020, equation
    1.5): ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D. Both are a sum of two powers, the second one under a further power.
    """

    name: str = ""
    form: Literal["chinchilla", "kaplan"]
    coefficients: dict[str, Finite]
    counts: Literal["total", "without_vocabulary"]
    """What N counts: all parameters, or neither token embedding, head nor positions."""
    source: str
    fitted_on: FittedOn | None = None
    draws: list[list[Finite]] = []
    """Bootstrap draws of the coefficients, in the order of `COEFFICIENTS`; an interval comes from these."""
    residuals: list[Signed] = []
    """log(measured / fitted) of the runs it was fitted to: how far a single run falls from the law."""
    progress: Progress | None = None

    @checked_by(mode="after")
    def _coefficients_are_the_forms(self) -> Self:
        wanted = COEFFICIENTS[self.form]
        if set(self.coefficients) != set(wanted):
            raise ValueError(f"coefficients of form {self.form} are {', '.join(wanted)}; given: {', '.join(self.coefficients)}")
        if any(len(draw) != len(wanted) for draw in self.draws):
            raise ValueError(f"every draw has {len(wanted)} numbers: {', '.join(wanted)}")
        low, high = EXPONENT_RANGE
        for values in ([self.coefficients[name] for name in wanted], *self.draws):
            for name, value in zip(wanted, values, strict=True):
                if name in EXPONENTS and not low <= value <= high:
                    raise ValueError(f"{name} = {value:g} is not an exponent from {low:g} to {high:g}")
        return self

    def size(self, model: Model) -> int:
        """A model's N as this law counts it."""
        classes = cost.parameters_by_class(model)
        left_out = ("embedding", "position", "head") if self.counts == "without_vocabulary" else ()
        return sum(count for name, count in classes.items() if name not in left_out)

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> NDArray[np.float64]:
        """Loss in nats per token; `parameters` counted as `counts` says, any shapes that broadcast."""
        return self._powers(self._values()).loss(np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float))

    def promise(self, model: Model, tokens: float) -> Forecast:
        """The loss of one run; its 90% interval is over the draws and, where the law has them, the residuals of single runs."""
        size = self.size(model)
        if not self.draws:
            return Forecast(float(self.loss(size, tokens)), None)
        scattered = np.outer(self._drawn(size, tokens), np.exp(self.residuals or [0.0]))
        low, high = np.quantile(scattered, INTERVAL)
        return Forecast(float(self.loss(size, tokens)), (float(low), float(high)))

    def forecast(self, loss: float, share: float, schedule: str, model: Model, tokens: float) -> Forecast | None:
        """The last validation loss of a run over `tokens` that has `loss` after a share of them; None where the law cannot tell.

        Its runs tell from their first share on, under the same schedule of the learning rate.
        """
        if self.progress is None or schedule != self.progress.schedule or not self.progress.gaps[0][0] <= share < 1:
            return None
        middle, low, high = (loss * float(np.exp(-fall)) for fall in self.progress.fall(share, self.size(model), tokens))
        return Forecast(middle, (high, low))

    def _drawn(self, parameters: float, tokens: float) -> NDArray[np.float64]:
        return self._powers(np.asarray(self.draws).T).loss(np.asarray(parameters), np.asarray(tokens))

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of the law's own least loss at C = 6 N D (Hoffmann et al. 2022, equation 4), in closed form.

        For `kaplan` too, whose paper draws its rules from another fit (`kaplan_optimum`): they ask for more parameters.
        """
        p = self._powers(self._values())
        scale = (p.alpha * p.a / (p.beta * p.b)) ** (1 / (p.alpha + p.beta))
        parameters = scale * (flops / 6) ** (p.beta / (p.alpha + p.beta))
        return float(parameters), float(flops / 6 / parameters)

    def extrapolates(self, parameters: float, tokens: float) -> list[str]:
        """What of a run lies beyond the runs that the law was fitted to."""
        if self.fitted_on is None:
            return []
        values = {"parameters": parameters, "tokens": tokens}
        ranges = {"parameters": self.fitted_on.parameters, "tokens": self.fitted_on.tokens}
        beyond = [name for name, (low, high) in ranges.items() if not low <= values[name] <= high]
        return [f"{values[n]:.3g} {n} (fitted on {ranges[n][0]:.3g} to {ranges[n][1]:.3g})" for n in beyond]

    def _values(self) -> NDArray[np.float64]:
        return np.array([self.coefficients[name] for name in COEFFICIENTS[self.form]])

    def _powers(self, values: NDArray[np.float64]) -> _TwoPowers:
        if self.form == "chinchilla":
            e, a, alpha, b, beta = values
            return _TwoPowers(e, a, alpha, b, beta, outer=1.0)
        n_c, alpha_n, d_c, alpha_d = values
        return _TwoPowers(0.0, n_c ** (alpha_n / alpha_d), alpha_n / alpha_d, d_c, 1.0, outer=alpha_d)


class _TwoPowers(NamedTuple):
    """E + (A / N^alpha + B / D^beta)^outer, each coefficient a number or an array of draws."""

    e: Any
    a: Any
    alpha: Any
    b: Any
    beta: Any
    outer: Any

    def loss(self, parameters: NDArray[np.float64], tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        loss: NDArray[np.float64] = self.e + (self.a / parameters**self.alpha + self.b / tokens**self.beta) ** self.outer
        return loss


@cache
def load_law(name_or_path: str) -> Law:
    """A published law by its name, or one from a YAML file. Raises `UserError` where there is none or it is broken."""
    published = name_or_path in PUBLISHED
    path: Any = files(__package__) / "published" / f"{name_or_path}.yaml" if published else Path(name_or_path)
    try:
        tree = parse_yaml(read_text(path, MOST_YAML_BYTES, "give a law that scripts/fit.py wrote"))
        if not isinstance(tree, dict) or "form" not in tree:
            raise UserError(f"law {name_or_path}: not a law: a YAML mapping of form, coefficients, counts, source")
        return Law.model_validate(tree | {"name": name_or_path})
    except FileNotFoundError:
        hint = nearest(name_or_path, list(PUBLISHED))
        raise UserError(f"law {name_or_path}: neither a published law nor a file that can be read{hint}") from None
    except yaml.YAMLError:
        raise UserError(f"law {name_or_path}: not YAML; a law is a mapping of form, coefficients, counts, source") from None
    except ValidationError as error:
        errors = error.errors()[:MOST_EXPLAINED]
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in errors)
        raise UserError(f"law {name_or_path}: {faults.removeprefix(': ')}") from None


R_STAR = 15.39  # repetitions after which their worth has fallen by 1 - 1/e: Muennighoff et al. 2023, section 5


def effective_tokens(tokens: ArrayLike, unique_tokens: ArrayLike, r_star: float = R_STAR) -> NDArray[np.float64]:
    """Tokens of fresh data that `tokens` seen over `unique_tokens` are worth: D' = U + U R* (1 - exp(-R / R*)).

    R = D / U - 1 repetitions (Muennighoff et al. 2023, arXiv:2305.16264, equation 5); D itself where nothing repeats. Any
    shapes that broadcast.
    """
    seen, unique = np.asarray(tokens, dtype=float), np.asarray(unique_tokens, dtype=float)
    repetitions = np.maximum(seen / unique - 1, 0)
    worth: NDArray[np.float64] = np.minimum(seen, unique) + unique * r_star * -np.expm1(-repetitions / r_star)
    return worth


def critical_batch_tokens(loss: float) -> float:
    """Tokens per step at which a run takes twice the least steps and twice the least tokens: B = 2e8 / L^(1 / 0.21).

    Kaplan et al. 2020, equation 1.4. At B tokens a step a run needs 1 + B / B_crit times the tokens of a small-batch one.
    """
    return float(2e8 / loss ** (1 / 0.21))


class KaplanOptimum(NamedTuple):
    """What Kaplan et al. 2020 would train at a budget (appendix A, table 6)."""

    parameters: float
    """Without embeddings."""
    batch_tokens: float
    steps: float
    tokens: float
    loss: float


def kaplan_optimum(flops: float) -> KaplanOptimum:
    """N = 1.3e9 C^0.73, B = 2.0e6 C^0.24, S = 5.4e3 C^0.03, D = 2e10 C^0.27, L = (3.1e8 / C)^0.050, C in PF-days."""
    c = flops / PF_DAY
    return KaplanOptimum(1.3e9 * c**0.73, 2.0e6 * c**0.24, 5.4e3 * c**0.03, 2e10 * c**0.27, (3.1e8 / c) ** 0.050)
