"""Published laws of learning rate and batch by name, and laws in files.

Entered by `load_hyperparameter_law`. Each law's constants are its authors'; what was computed here from their published data says
so. N counts all parameters but embeddings and head.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from isoflop.config.recipe_optimizer import Schedule
from isoflop.scaling.hyperparameters import HyperparameterLaw, LossCurvature, OptimizerName, PowerOfSize
from isoflop.scaling.laws import load_hyperparameters
from isoflop.utils.errors import UserError, nearest

# Mean over 13 grids of the table that Step Law publishes (dense_lr_bs_loss.csv, smoothed loss): on each, least squares of the
# loss of the points within 0.03 nats of the least, quadratic in ln rate and ln batch. Standard deviations between grids: 0.0035,
# 0.0030, 0.0045; the curvature in the rate falls from 0.02 at 4B tokens to 0.01 at 100B.
STEP_LAW_CURVATURE = LossCurvature(
    rate=0.0153,
    batch=0.0144,
    cross=-0.0119,
    source="13 grids of arXiv:2503.04715, points within 0.03 nats of the least loss; 215M to 1.07B parameters, AdamW",
)

# The 1,000 bootstrap draws of the fit that Step Law publishes have means 0.586, -0.7129, 0.3075 (rate) and -0.544, 0.5709
# (batch): 1.797 N^-0.713 D^0.307 and 0.581 D^0.571. The covariances are those of these draws.
STEP_LAW = HyperparameterLaw(
    name="step_law",
    source="Step Law (arXiv:2503.04715), equation 1; intervals from its 1,000 published bootstrap draws",
    optimizer="adamw",
    peak_learning_rate=PowerOfSize(
        log_coefficient=math.log(1.79),
        parameters_exponent=-0.713,
        tokens_exponent=0.307,
        covariance=(
            (3.890621114877e-01, -1.355893897078e-02, -5.132493532094e-03),
            (-1.355893897078e-02, 8.914857372464e-04, -1.743317885257e-04),
            (-5.132493532094e-03, -1.743317885257e-04, 3.663118429043e-04),
        ),
    ),
    tokens_per_step=PowerOfSize(
        log_coefficient=math.log(0.58),
        tokens_exponent=0.571,
        covariance=(
            (1.91179635874e-01, 0.0, -8.151572248e-03),
            (0.0, 0.0, 0.0),
            (-8.151572248e-03, 0.0, 3.48517939e-04),
        ),
    ),
    parameters_range=(214663680, 1073741824),
    tokens_range=(4e9, 1e11),
    curvature=STEP_LAW_CURVATURE,
    schedule=Schedule(name="cosine", warmup_steps=2000, final_learning_rate=1e-5),
    weight_decay=0.1,  # as all of its runs
)


def _of_flops(coefficient: float, exponent: float) -> PowerOfSize:
    """Return coefficient C^exponent with C = 6 N D."""
    return PowerOfSize(
        log_coefficient=math.log(coefficient) + exponent * math.log(6), parameters_exponent=exponent, tokens_exponent=exponent
    )


DEEPSEEK = HyperparameterLaw(
    name="deepseek",
    source="DeepSeek LLM (arXiv:2401.02954), equation 1: 0.3118 C^-0.125 and 0.2920 C^0.3271 tokens, C = 6ND",
    optimizer="adamw",
    peak_learning_rate=_of_flops(0.3118, -0.125),
    tokens_per_step=_of_flops(0.2920, 0.3271),
    flops_range=(1e17, 2e19),
    curvature=STEP_LAW_CURVATURE,
    schedule=Schedule(name="cosine", warmup_steps=2000),
    final_share=0.1,  # its multi-step schedule ends at a tenth of the peak, with the loss of a cosine
    weight_decay=0.1,
)


class MeasuredBase(NamedTuple):
    """A run size at which the learning rate was tuned under Muon, in units of this project's Muon."""

    parameters_without_vocabulary: float
    tokens: float
    peak_learning_rate: float
    tokens_per_step: float
    weight_decay: float

    @property
    def decay_timescale(self) -> float:
        """T = B / (learning rate x weight decay x D)."""
        return self.tokens_per_step / (self.peak_learning_rate * self.weight_decay * self.tokens)


NEAR_A_BASE = 2.0  # Assumption: a base holds for N and D within this factor; beyond it its law is called extrapolated
BATCH_EXPONENT = 0.383  # of D: Power Lines (arXiv:2505.13738), as nanochat takes it


def muon_law(base: MeasuredBase, **fields: Any) -> HyperparameterLaw:
    """Return nanochat's rules from a measured base: batch ~ D^0.383, rate ~ sqrt(batch / width), constant decay timescale.

    rate = rate_base (D / D_base)^(0.383 / 2) (N / N_base)^(-1 / 6): N = 12 layers width^2, and at a fixed width / layers (64 in
    nanochat) width ~ N^(1 / 3). A Muon update of root mean square 0.2 x rate has spectral norm 0.2 rate sqrt(width), which the
    spectral condition (arXiv:2310.17813) keeps the same for every width: rate ~ 1 / sqrt(width). nanochat does the same: it keeps
    the rate of an update of spectral norm 1. `fields` are those of the law that the base does not give.
    """
    n, d = math.log(base.parameters_without_vocabulary), math.log(base.tokens)
    width_exponent, half = -1 / 6, BATCH_EXPONENT / 2
    near = {"parameters_range": base.parameters_without_vocabulary, "tokens_range": base.tokens}
    ranges = {name: (value / NEAR_A_BASE, value * NEAR_A_BASE) for name, value in near.items()}
    return HyperparameterLaw(
        optimizer="muon",
        peak_learning_rate=PowerOfSize(
            log_coefficient=math.log(base.peak_learning_rate) - width_exponent * n - half * d,
            parameters_exponent=width_exponent,
            tokens_exponent=half,
        ),
        tokens_per_step=PowerOfSize(
            log_coefficient=math.log(base.tokens_per_step) - BATCH_EXPONENT * d, tokens_exponent=BATCH_EXPONENT
        ),
        decay_timescale=base.decay_timescale,
        **ranges | fields,
    )


# nanochat's model of 12 layers, width 768 (scripts/base_train.py, commit 00255c1): 12 x 12 x 768^2 parameters and a head of
# 32,768 x 768; 12 tokens for each of both; 2^19 tokens per step. Its matrix_lr = 0.02 is the rate of an update of spectral norm
# 1, that of a square matrix here is 0.2 rate sqrt(width): rate = 0.02 / (0.2 sqrt(768)). Its weight_decay = 0.28 multiplies
# matrix_lr, falls linearly to 0 (a mean of half) and acts where update and weight agree in sign (assumed: half): the mean decay
# per step is that of 0.28 x 0.02 / rate / 4 here. T is then 0.28.
_WIDTH, _LAYERS, _VOCABULARY, _TOKENS_PER_PARAMETER = 768, 12, 32_768, 12


def _nanochat_size(layers: int, width: int) -> tuple[float, float]:
    """Return N without vocabulary and D of a nanochat model."""
    matrices = 12 * layers * width**2
    return float(matrices), float(_TOKENS_PER_PARAMETER * (matrices + _VOCABULARY * width))


_NANOCHAT_RATE = 0.02 / (0.2 * math.sqrt(_WIDTH))
NANOCHAT = muon_law(
    MeasuredBase(*_nanochat_size(_LAYERS, _WIDTH), _NANOCHAT_RATE, 2**19, 0.28 * 0.02 / _NANOCHAT_RATE / 4),
    name="nanochat",
    source="nanochat's rules and its model of 12 layers (github.com/karpathy/nanochat, base_train), in this project's Muon units",
    power_of_two_batch=True,
    parameters_range=(_nanochat_size(12, 768)[0], _nanochat_size(26, 1664)[0]),  # its batch was checked at 12 and 26 layers
    tokens_range=(_nanochat_size(12, 768)[1], _nanochat_size(26, 1664)[1]),
    schedule=Schedule(name="wsd", warmup_steps=40, decay_fraction=0.65),
    final_share=0.05,
)
# Measured with the quickstart's model and data, 500 steps: validation loss 3.371, 3.320, 3.409 at 1.5e-3, 3e-3, 6e-3.
QUICKSTART_MUON = muon_law(
    MeasuredBase(2_029_632, 1_024_000, 3e-3, 2048, 0.1),
    name="quickstart_muon",
    source="nanochat's rules from the quickstart's rate: the best of 1.5e-3, 3e-3 and 6e-3; its batch was not tuned",
    schedule=Schedule(name="cosine", warmup_steps=40),
    final_share=0.1,
)

HYPERPARAMETER_LAWS = {law.name: law for law in (STEP_LAW, DEEPSEEK, NANOCHAT, QUICKSTART_MUON)}


def default_law(optimizer: OptimizerName, parameters_without_vocabulary: float, tokens: float) -> HyperparameterLaw:
    """Return Step Law under AdamW; under Muon the rules from the measured base that is nearest in ln N and ln D."""
    if optimizer == "adamw":
        return STEP_LAW

    def distance(law: HyperparameterLaw) -> float:
        pairs = ((law.parameters_range, parameters_without_vocabulary), (law.tokens_range, tokens))
        return sum(min(abs(math.log(value / end)) for end in ends) for ends, value in pairs if ends)

    return min((NANOCHAT, QUICKSTART_MUON), key=distance)


def load_hyperparameter_law(name_or_path: str | Path) -> HyperparameterLaw:
    """Return a published law by its name, or that of a law file of `fit`. Raises `UserError` where it has none."""
    if law := HYPERPARAMETER_LAWS.get(str(name_or_path)):
        return law
    try:
        found = load_hyperparameters(name_or_path)
    except UserError:
        if Path(name_or_path).is_file():
            raise
        hint = nearest(str(name_or_path), list(HYPERPARAMETER_LAWS))
        raise UserError(f"law {name_or_path}: neither a law of learning rate and batch nor a law file{hint}") from None
    if found is None:
        raise UserError(
            f"law {name_or_path} has no `hyperparameters`; fit them to runs over learning rate and batch, or name one of"
            f" {', '.join(HYPERPARAMETER_LAWS)}"
        )
    return found if found.name else found.model_copy(update={"name": str(name_or_path)})
