"""Options of a fit: from the command line or a notebook to the fit, unchanged."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isoflop.scaling.newton import DELTA, Objective
from isoflop.utils.errors import UserError

FEWEST_RESAMPLES = 20  # the 5th and 95th percentile are then the outermost draws
COLUMN_OPTIONS = ("parameters", "tokens", "flops", "loss", "learning_rate", "batch")


@dataclass(frozen=True)
class FitOptions:
    """What is fitted, how, and what the command writes. Raises `UserError` for a value out of range."""

    runs: tuple[str, ...] = ()
    """One table, or run folders, or folders that contain run folders."""
    predict: tuple[float, ...] = ()
    """Budgets in FLOPs; default: 10 times the largest measured one."""
    resamples: int = 1000
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the bootstrap."""
    asymmetry: float = 0.5
    """Weight of losses above the law; those below weigh 1 - asymmetry."""
    delta: float = DELTA
    """Threshold of the Huber loss, in log loss."""
    parameters: str | None = None
    """The table's column of N; default, as for the next columns: found by its name."""
    tokens: str | None = None
    """The table's column of D."""
    flops: str | None = None
    """The table's column of C."""
    loss: str | None = None
    """The table's column of losses."""
    where: tuple[str, ...] = ()
    """COLUMN=VALUE; only the table's rows that match all of them are fitted."""
    out: str | None = None
    """Law file to write; figure, page and numbers go beside it. Default: nothing is written."""
    figures: str | None = None
    """Folder for figure, page and numbers. Default: that of `out`."""
    as_json: bool = False
    """Print the numbers as JSON instead of the page."""
    hyperparameters: bool = False
    """Fit laws of learning rate and batch, and none of the loss. Otherwise both, where the runs are sweeps over these."""
    learning_rate: str | None = None
    """The table's column of peak learning rates."""
    batch: str | None = None
    """The table's column of batches: in tokens if its name says so, else in sequences of `sequence_length`."""
    sequence_length: int | None = None
    """Tokens of a sequence, for a table whose batches are in sequences."""

    def __post_init__(self) -> None:
        rules = [
            (f"resamples {self.resamples}", self.resamples >= FEWEST_RESAMPLES, f"at least {FEWEST_RESAMPLES}"),
            (f"seed {self.seed}", self.seed >= 0, "0 or more"),
            (f"asymmetry {self.asymmetry:g}", 0 < self.asymmetry < 1, "within 0 to 1; 0.5 weighs both sides alike"),
            (
                f"sequence-length {self.sequence_length}",
                self.sequence_length is None or self.sequence_length > 0,
                "the tokens of a sequence, e.g. 2048",
            ),
            (f"delta {self.delta:g}", 0 < self.delta < math.inf, "above 0; Hoffmann et al. 2022 use 1e-3"),
            *((f"predict {flops:g}", 0 < flops < math.inf, "a budget in FLOPs, e.g. 1e21") for flops in self.predict),
        ]
        for given, holds, rule in rules:
            if not holds:
                raise UserError(f"--{given}: give {rule}")

    @property
    def objective(self) -> Objective:
        """The sum that the parametric fit minimises."""
        return Objective(self.delta, self.asymmetry)

    @property
    def columns(self) -> dict[str, str | None]:
        """The columns that were named, by what they hold."""
        return {name: getattr(self, name) for name in COLUMN_OPTIONS}
