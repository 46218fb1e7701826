"""`summary.json`: what a finished run's summary holds, and whether a file is one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from isoflop.errors import UserError
from isoflop.recipe_file import explain_errors


def _positive_or_nan(value: float) -> float:
    if not (math.isnan(value) or 0 < value < 1e300):
        raise ValueError("it is neither a positive number nor NaN")
    return value


Count = Annotated[int, Field(gt=0, lt=2**63)]
Number = Annotated[float, Field(ge=0, lt=1e300)]
Loss = Annotated[float, AfterValidator(_positive_or_nan)]


class Summary(BaseModel):
    """The keys that are read back, with their types; a number in quotes is none."""

    model_config = ConfigDict(strict=True)

    steps: Count
    tokens: Count
    parameters: Count
    flops: Annotated[float, Field(gt=0, lt=1e100)]
    loss: float | None
    val_loss: Loss
    bits_per_byte: Loss
    unigram_entropy_nats: Number
    tokens_per_s: Number
    mfu: Number | None
    predicted_memory_bytes: Number
    peak_memory_bytes: Number
    elapsed_s: Number
    samples: list[str]
    law: str | None = None
    predicted_loss: Loss | None = None
    predicted_loss_interval: Annotated[tuple[Loss, Loss], Field(strict=False)] | None = None
    prediction_error: float | None = None
    inside_interval: bool | None = None

    @model_validator(mode="after")
    def _a_law_predicts(self) -> Self:
        if self.law is not None and self.predicted_loss is None:
            raise ValueError(f"law = {self.law[:50]!r} comes with a predicted_loss")
        return self


def require_summary(file: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Return a summary as it is. Raises `UserError` where it is not as a run writes it."""
    try:
        Summary.model_validate(summary)
    except ValidationError as error:
        raise UserError(
            f"{file}: {explain_errors(error, Summary)}; delete it, and the command that trained the run writes it from the last"
            " checkpoint"
        ) from None
    return summary
