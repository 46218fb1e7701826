"""`summary.json`: the summary of a finished run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from isoflop.utils.html import html_image, html_table


def _positive_or_nan(value: float) -> float:
    if not (math.isnan(value) or 0 < value < 1e300):
        raise ValueError("it is neither a positive number nor NaN")
    return value


Count = Annotated[int, Field(gt=0, lt=2**63)]
Number = Annotated[int | float, Field(ge=0, lt=1e300)]
Loss = Annotated[int | float, AfterValidator(_positive_or_nan)]


class RunSummary(BaseModel):
    """Summary of a finished run. Losses are in nats per token; a number in quotes is refused."""

    model_config = ConfigDict(strict=True, frozen=True)

    _run_dir: Path | None = PrivateAttr(default=None)

    steps: Count
    tokens: Count
    parameters: Count
    flops: Annotated[int | float, Field(gt=0, lt=1e100)]
    loss: int | float | None
    val_loss: Loss
    bits_per_byte: Loss
    unigram_entropy_nats: Number
    tokens_per_s: Number
    mfu: Number | None
    predicted_memory_bytes: Number
    peak_memory_bytes: Number
    elapsed_s: Number
    samples: list[str]
    missing_steps: list[Annotated[tuple[int, int], Field(strict=False)]] | None = None
    """First and last of each range of steps whose rows are missing."""
    law: str | None = None
    predicted_loss: Loss | None = None
    predicted_loss_interval: Annotated[tuple[Loss, Loss], Field(strict=False)] | None = None
    prediction_error: int | float | None = None
    inside_interval: bool | None = None
    outside: str | None = None

    @property
    def run_dir(self) -> Path | None:
        """The run folder, where the summary was read from one."""
        return self._run_dir

    @classmethod
    def read(cls, values: dict[str, Any], run_dir: Path | None = None) -> Self:
        """Return the summary of these JSON values. Raises `ValidationError`."""
        summary = cls.model_validate(values)
        summary._run_dir = run_dir
        return summary

    def to_dict(self) -> dict[str, Any]:
        """Return the values under the keys of `summary.json`."""
        return self.model_dump(exclude_unset=True)

    def _repr_html_(self) -> str:
        numbers = [[key, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"] for key, value in self.to_dict().items()
                   if isinstance(value, int | float) and not isinstance(value, bool)]  # fmt: skip
        shown = html_table([], numbers, caption=str(self.run_dir or ""))
        curve = self.run_dir and self.run_dir / "loss.png"
        return shown + (html_image(curve.read_bytes(), "loss curve") if curve and curve.is_file() else "")

    @model_validator(mode="after")
    def _a_law_predicts(self) -> Self:
        if self.law is not None and self.predicted_loss is None and not self.outside:
            raise ValueError(f"law = {self.law[:50]!r} comes with a predicted_loss, or with the reason why not, outside")
        return self
