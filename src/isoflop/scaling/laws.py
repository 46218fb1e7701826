"""Scaling laws as data: `fit` writes a `Law`, a YAML or JSON file holds it, `plan` and `pretrain` read it.

Entered by `load_law`, for a law of `published/` or a file. Losses are nats per token of the law's own data and tokenizer. They
compare between models, but not with a run on other data or with another tokenizer.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, Field, ValidationError, model_validator

from isoflop.config.loading import MOST_EXPLAINED, MOST_YAML_BYTES, parse_yaml
from isoflop.config.recipe import Model
from isoflop.config.recipe_data import Section
from isoflop.config.shipped import find
from isoflop.config.type_errors import rule_of
from isoflop.plan import cost
from isoflop.plan.shape import parameters_without_vocabulary
from isoflop.scaling.hyperparameters import HyperparameterLaw, OptimizerName
from isoflop.utils.errors import UserError, nearest
from isoflop.utils.io import atomic_write
from isoflop.utils.tables import short
from isoflop.utils.untrusted import read_text

PUBLISHED = ("hoffmann", "hoffmann-rounded", "besiroglu", "kaplan")
DEFAULT_LAW = "hoffmann"
COEFFICIENTS = {"chinchilla": ("E", "A", "alpha", "B", "beta"), "kaplan": ("N_c", "alpha_N", "D_c", "alpha_D")}
INTERVAL = (0.05, 0.95)  # quantiles of every 90% interval of this package
NORMAL_90 = 1.645  # standard deviations from the mean to the ends of a normal distribution's 90% interval
FAR = 10.0  # Assumption: a law predicts no run whose N or D lies beyond its own runs by more; `fit` tests one such step
PF_DAY = 8.64e19  # FLOPs: 1e15 per second for a day, the unit of compute of Kaplan et al. 2020

Finite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Signed = Annotated[float, Field(allow_inf_nan=False)]
EXPONENTS = {"alpha", "beta", "alpha_N", "alpha_D"}
EXPONENT_RANGE = (0.001, 10.0)  # powers of N and D overflow beyond it; published exponents lie between 0.05 and 0.6


class FittedOn(Section):
    """Ranges of the runs that a law was fitted to, lowest first; the law extrapolates beyond them."""

    parameters: tuple[Finite, Finite] = Field(strict=False)
    tokens: tuple[Finite, Finite] = Field(strict=False)
    layers: Annotated[tuple[int, int], Field(strict=False)] | None = None
    """Fewest and most decoder layers, if known. `plan` ranks no other depth by the law, since the law does not model depth."""

    @model_validator(mode="after")
    def _from_low_to_high(self) -> Self:
        for name, (low, high) in (("parameters", self.parameters), ("tokens", self.tokens)):
            if low >= high:
                raise ValueError(f"{name}: [{low:g}, {high:g}] is not lowest first")
        if self.layers and not 0 < self.layers[0] <= self.layers[1]:
            raise ValueError(f"layers: {list(self.layers)} is not lowest first")
        return self

    def far_beyond(self, parameters: float, tokens: float) -> str | None:
        """Return which of N and D lie beyond the runs by more than the factor `FAR`, in words; None if neither does."""
        below, above = [], []
        for name, value, (low, high) in (("parameters", parameters, self.parameters), ("tokens", tokens, self.tokens)):
            if value < low / FAR:
                below.append((f"{short(low)} {name}", short(value)))
            elif value > high * FAR:
                above.append((f"{short(high)} {name}", short(value)))
        sides = [(verb, zip(*found, strict=True)) for verb, found in (("begin", below), ("end", above)) if found]
        parts = [f"{verb} at {' and '.join(edges)} (here {' and '.join(here)})" for verb, (edges, here) in sides]
        return f"its data {', and '.join(parts)}" if parts else None


class LossDecayModel(Section):
    """How far validation losses during training lie above the final one, in the runs that a law was fitted to.

    log(log(loss at a share / final loss)) = intercept + a (log N - center) + b (log D - center), at each share of a run's tokens.
    The last part of the learning-rate schedule lowers the loss more in larger and longer runs.
    """

    schedule: str
    """Name of the runs' learning-rate schedule; the model holds for no other."""
    center: Annotated[tuple[Signed, Signed], Field(strict=False)]
    """Means of log N and log D."""
    covariance: list[list[Signed]]
    """(3, 3), of intercept, a and b, in units of the squared residual deviation."""
    gaps: list[Annotated[tuple[Signed, Signed, Signed, Signed, Signed], Field(strict=False)]]
    """Share of the tokens, intercept, a, b, and the residual deviation of a run. Shares ascend."""

    def log_gap(self, share: float, parameters: float, tokens: float) -> tuple[float, float, float]:
        """Return log(loss at a share / final loss) and its 5th and 95th percentile for single runs; 0 at the end of a run."""
        x = np.array([1.0, np.log(parameters) - self.center[0], np.log(tokens) - self.center[1]])
        shares, coefficients, deviations = (part := np.array(self.gaps))[:, 0], part[:, 1:4], part[:, 4]
        logs = coefficients @ x
        reach = NORMAL_90 * deviations * np.sqrt(1 + x @ np.array(self.covariance) @ x)
        middle, low, high = (
            float(np.interp(share, [*shares, 1.0], [*np.exp(bound), 0.0])) for bound in (logs, logs - reach, logs + reach)
        )
        return middle, low, high


class Prediction(NamedTuple):
    """Predicted loss of a run in nats per token, with its 90% interval."""

    loss: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        interval = f"90%: {self.interval[0]:.4f} to {self.interval[1]:.4f}" if self.interval else "no interval"
        return f"{self.loss:.4f} ({interval})"


class NoPrediction(NamedTuple):
    """Why a law predicts no loss of a run."""

    reason: str

    def __str__(self) -> str:
        return f"no prediction: {self.reason}"


def prediction_json(predicted: Prediction | NoPrediction) -> dict[str, Any]:
    """Return a prediction under its JSON keys; `outside` is the reason if there is none, else None."""
    if isinstance(predicted, NoPrediction):
        return {"predicted_loss": None, "predicted_loss_interval": None, "outside": predicted.reason}
    return {"predicted_loss": predicted.loss, "predicted_loss_interval": predicted.interval, "outside": None}


class Law(Section):
    """Loss as a function of parameters N and tokens D.

    Form `chinchilla` (Hoffmann et al. 2022, equation 2): E + A / N^alpha + B / D^beta. Form `kaplan` (Kaplan et al. 2020,
    equation 1.5): ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D. Both are E + (two powers)^outer, see `_TwoPowers`.
    """

    name: str = ""
    form: Literal["chinchilla", "kaplan"]
    coefficients: dict[str, Finite]
    counts: Literal["total", "without_vocabulary"]
    """What N counts: all parameters, or all but token embedding, position embedding and head."""
    source: str
    optimizer: OptimizerName = "adamw"
    """What trained the runs. AdamW for the published laws, and for files from before `fit` recorded it."""
    parametrization: Literal["standard", "completep"] = "standard"
    """Of the runs, by the recipe's name for it."""
    fitted_on: FittedOn | None = None
    draws: list[list[Finite]] = []
    """Bootstrap draws of the coefficients in the order of `COEFFICIENTS`; prediction intervals come from them."""
    residuals: list[Signed] = []
    """log(measured / fitted) of the runs that the law was fitted to; they widen the interval to that of a single run."""
    progress: LossDecayModel | None = None
    """Model of the loss during training, by which `forecast` predicts a run's final loss."""
    hyperparameters: HyperparameterLaw | None = None
    """Laws of the learning rate and the batch, where the runs were sweeps over them."""

    @model_validator(mode="after")
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

    def model_size(self, model: Model) -> int:
        """Return a model's N as this law counts it."""
        return parameters_without_vocabulary(model) if self.counts == "without_vocabulary" else cost.parameters(model)

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> NDArray[np.float64]:
        """Return the formula's loss in nats per token at any N (counted as in `counts`) and D; arrays broadcast.

        Show users `predict` instead, which refuses runs far beyond the law's own.
        """
        return self._powers(self._values()).loss(np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float))

    def predict(self, model: Model | float, tokens: float, optimizer: str | None = None) -> Prediction | NoPrediction:
        """Return the predicted loss of one run, or the reason why there is none.

        `model` is a recipe's model section, or N as the law counts it; `optimizer` is the run's, by the recipe's name for it.
        The 90% interval spans the bootstrap draws and, if the
        law holds them, the residuals of single runs.
        """
        size, vocab_size = (self.model_size(model), model.vocab_size) if isinstance(model, BaseModel) else (model, None)
        if reason := self.outside(size, tokens, vocab_size, optimizer):
            return NoPrediction(reason)
        loss = float(self.loss(size, tokens))
        if not self.draws:
            return Prediction(loss, None)
        scattered = np.outer(self._drawn(size, tokens), np.exp(self.residuals or [0.0]))
        low, high = np.quantile(scattered, INTERVAL)
        return Prediction(loss, (float(low), float(high)))

    def describe(self, model: Model, tokens: float, optimizer: str | None = None) -> str:
        """Return a sentence with the predicted loss of one run and how far it extrapolates, or with the reason for none."""
        predicted = self.predict(model, tokens, optimizer)
        if isinstance(predicted, NoPrediction):
            return f"{self.name}: {predicted}"
        beyond = "; ".join(self.extrapolates(self.model_size(model), tokens, cost.shape_of(model).num_layers))
        return f"{self.name} predicts a final validation loss of {predicted}" + (
            f"; an extrapolation: {beyond}" if beyond else ""
        )

    def outside(
        self, parameters: float, tokens: float, vocab_size: int | None = None, optimizer: str | None = None
    ) -> str | None:
        """Return why the law predicts no loss of such a run; None if it predicts one.

        It refuses another optimizer than that of its own runs, an N or D far beyond theirs, and a loss above that of guessing
        uniformly among `vocab_size` tokens.
        """
        if optimizer not in (None, self.optimizer):
            return f"its runs were trained with {self.optimizer}, and this one's optimizer.name is {optimizer}"
        if self.fitted_on and (reason := self.fitted_on.far_beyond(parameters, tokens)):
            return reason
        loss, guessing = float(self.loss(parameters, tokens)), math.log(vocab_size) if vocab_size else math.inf
        return f"it gives {loss:.2f} nats, more than guessing: ln(vocabulary) = {guessing:.2f}" if loss > guessing else None

    def forecast(
        self, loss: float, share: float, schedule: str, model: Model, tokens: float, optimizer: str | None = None
    ) -> Prediction | None:
        """Return the predicted final validation loss of a run over `tokens` that has `loss` after a share of them.

        None before the first share of `progress.gaps`, at the end of the run, under another learning-rate schedule or optimizer,
        and for a law without `progress`.
        """
        if optimizer not in (None, self.optimizer):
            return None
        if self.progress is None or schedule != self.progress.schedule or not self.progress.gaps[0][0] <= share < 1:
            return None
        middle, low, high = (loss * float(np.exp(-gap)) for gap in self.progress.log_gap(share, self.model_size(model), tokens))
        return Prediction(middle, (high, low))

    def _drawn(self, parameters: float, tokens: float) -> NDArray[np.float64]:
        return self._powers(np.asarray(self.draws).T).loss(np.asarray(parameters), np.asarray(tokens))

    def optimum(self, flops: float) -> tuple[float, float]:
        """Return N and D of the law's least loss at C = 6 N D, in closed form (Hoffmann et al. 2022, equation 4).

        For `kaplan` too; the paper's own rules (`kaplan_optimum`) come from another fit and give more parameters.
        """
        p = self._powers(self._values())
        scale = (p.alpha * p.a / (p.beta * p.b)) ** (1 / (p.alpha + p.beta))
        parameters = scale * (flops / 6) ** (p.beta / (p.alpha + p.beta))
        return float(parameters), float(flops / 6 / parameters)

    def extrapolates(self, parameters: float, tokens: float, layers: int | None = None) -> list[str]:
        """Return which of N, D and depth lie outside the ranges of the law's own runs, in words."""
        if self.fitted_on is None:
            return []
        on = self.fitted_on
        values: list[tuple[str, float, tuple[float, float]]] = [
            ("parameters", parameters, on.parameters),
            ("tokens", tokens, on.tokens),
        ]
        if layers and on.layers:
            values.append(("layers", layers, on.layers))
        beyond = [(name, value, ends) for name, value, ends in values if not ends[0] <= value <= ends[1]]
        return [f"{value:.3g} {name} (fitted on {low:.3g} to {high:.3g})" for name, value, (low, high) in beyond]

    def save(self, path: str | Path) -> None:
        """Write the law to a JSON file, one key per line, for `load_law`. The write is atomic."""
        tree = self.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
        tree = {"optimizer": self.optimizer, "parametrization": self.parametrization} | tree
        lines = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in tree.items())
        atomic_write(Path(path), f"{{\n{lines}\n}}\n")

    def _values(self) -> NDArray[np.float64]:
        return np.array([self.coefficients[name] for name in COEFFICIENTS[self.form]])

    def _powers(self, values: NDArray[np.float64]) -> _TwoPowers:
        if self.form == "chinchilla":
            e, a, alpha, b, beta = values
            return _TwoPowers(e, a, alpha, b, beta, outer=1.0)
        n_c, alpha_n, d_c, alpha_d = values
        return _TwoPowers(0.0, n_c ** (alpha_n / alpha_d), alpha_n / alpha_d, d_c, 1.0, outer=alpha_d)


class _TwoPowers(NamedTuple):
    """E + (A / N^alpha + B / D^beta)^outer; each coefficient is a number or an array of draws."""

    e: Any
    a: Any
    alpha: Any
    b: Any
    beta: Any
    outer: Any

    def loss(self, parameters: NDArray[np.float64], tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        loss: NDArray[np.float64] = self.e + (self.a / parameters**self.alpha + self.b / tokens**self.beta) ** self.outer
        return loss


def load_law(name_or_path: str | Path) -> Law:
    """Return a published law by its name, or the law in a YAML or JSON file. Raises `UserError` if it is missing or invalid."""
    found = _found(name_or_path)
    if isinstance(found, HyperparameterLaw):
        raise UserError(
            f"law {name_or_path}: of learning rate and batch, and none of the loss; fit one without --hyperparameters"
        )
    return found


def load_hyperparameters(name_or_path: str | Path) -> HyperparameterLaw | None:
    """Return the laws of learning rate and batch in a file, with a law of the loss or alone; None if it has none of them.

    Raises `UserError` as `load_law` does.
    """
    found = _found(name_or_path)
    return found if isinstance(found, HyperparameterLaw) else found.hyperparameters


def _found(name_or_path: str | Path) -> Law | HyperparameterLaw:
    path = Path(name_or_path)
    if str(name_or_path) not in PUBLISHED and not os.path.isfile(path):
        with contextlib.suppress(UserError):
            path = find("recipes", str(name_or_path))
    return _load_law(str(name_or_path), path, os.stat(path).st_mtime_ns if os.path.isfile(path) else 0)


@cache
def _load_law(name: str, file: Path, changed_ns: int) -> Law | HyperparameterLaw:
    """Load a law of the loss, or those of rate and batch alone, once; a file written again has another `changed_ns`."""
    path: Any = files(__package__) / "published" / f"{name}.yaml" if name in PUBLISHED else file
    try:
        tree = parse_yaml(read_text(path, MOST_YAML_BYTES, "give a law that `isoflop fit` wrote"))
        if isinstance(tree, dict) and set(tree) == {"hyperparameters"}:
            return HyperparameterLaw.model_validate(tree["hyperparameters"])
        if not isinstance(tree, dict) or "form" not in tree:
            raise UserError(f"law {name}: not a law: a YAML mapping of form, coefficients, counts, source")
        return Law.model_validate(tree | {"name": name})
    except FileNotFoundError:
        hint = nearest(name, list(PUBLISHED))
        raise UserError(f"law {name}: neither a published law nor a file that can be read{hint}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"law {name}: not YAML; a law is a mapping of form, coefficients, counts, source ({reason})") from None
    except ValidationError as error:
        errors = error.errors()[:MOST_EXPLAINED]
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {rule_of(e)}" for e in errors)
        raise UserError(f"law {name}: {faults.removeprefix(': ')}") from None


R_STAR = 15.39  # repetitions after which a further one is worth 1/e of fresh tokens: Muennighoff et al. 2023, section 5


def effective_tokens(tokens: ArrayLike, unique_tokens: ArrayLike, r_star: float = R_STAR) -> NDArray[np.float64]:
    """Return how many fresh tokens D tokens over U unique ones are worth: D' = U + U R* (1 - exp(-R / R*)).

    R = D / U - 1 repetitions (Muennighoff et al. 2023, arXiv:2305.16264, equation 5); D itself if nothing repeats. Arrays
    broadcast.
    """
    seen, unique = np.asarray(tokens, dtype=float), np.asarray(unique_tokens, dtype=float)
    repetitions = np.maximum(seen / unique - 1, 0)
    worth: NDArray[np.float64] = np.minimum(seen, unique) + unique * r_star * -np.expm1(-repetitions / r_star)
    return worth


def critical_batch_tokens(loss: float) -> float:
    """Return the tokens per step at which a run takes twice the fewest steps and twice the fewest tokens.

    B_crit = 2e8 / L^(1 / 0.21) (Kaplan et al. 2020, equation 1.4). At B tokens per step a run needs 1 + B / B_crit times the
    tokens of one with a small batch.
    """
    return float(2e8 / loss ** (1 / 0.21))


class KaplanOptimum(NamedTuple):
    """Compute-efficient run at a budget by Kaplan et al. 2020 (appendix A, table 6)."""

    parameters: float
    """Without embeddings."""
    batch_tokens: float
    steps: float
    tokens: float
    loss: float


def kaplan_optimum(flops: float) -> KaplanOptimum:
    """Return N = 1.3e9 C^0.73, B = 2.0e6 C^0.24, S = 5.4e3 C^0.03, D = 2e10 C^0.27, L = (3.1e8 / C)^0.050, C in PF-days."""
    c = flops / PF_DAY
    return KaplanOptimum(1.3e9 * c**0.73, 2.0e6 * c**0.24, 5.4e3 * c**0.03, 2e10 * c**0.27, (3.1e8 / c) ** 0.050)
