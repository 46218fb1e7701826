"""Result of a fit: the law, every method's numbers, a page and a figure of them, and how far to trust the law."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isoflop.scaling.hyperparameters import HyperparameterLaw
from isoflop.scaling.laws import COEFFICIENTS, EXPONENT_RANGE, EXPONENTS, FittedOn, Law
from isoflop.scaling.measured import Measured
from isoflop.scaling.points import Array
from isoflop.scaling.report import FitReport
from isoflop.utils.errors import UserError
from isoflop.utils.html import html_image
from isoflop.utils.io import atomic_write, has_keys, require_own_files
from isoflop.utils.tables import markdown, table

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

NAMES = COEFFICIENTS["chinchilla"]
MOST_DRAWS = 1000  # a file of 70 KB
DIGITS = 8  # of draws and residuals in a law file, finer than any interval


@dataclass(frozen=True)
class Fit:
    """All methods fitted to the same runs. A notebook shows it as the page and the figure."""

    measured: Measured
    report: FitReport
    """Every number of the page."""
    draws: Array
    """Resampled coefficients of the parametric law, (k, 5) in the order of `NAMES`."""
    residuals: Array
    """log(measured / fitted) of the points, (n,)."""

    @property
    def hyperparameters(self) -> HyperparameterLaw | None:
        """Laws of learning rate and batch, if the runs were sweeps over these."""
        return self.report.hyperparameters.law if self.report.hyperparameters else None

    @property
    def problem(self) -> str | None:
        """Why the parametric fit is no law; None if it is one."""
        fit = self.report.parametric
        return None if fit.converged else f"the parametric fit is {fit.status.replace('_', ' ')}: {fit.detail}"

    @cached_property
    def law(self) -> Law:
        """The parametric law. Raises `UserError` if the fit has not converged to one."""
        if self.problem:
            raise UserError(f"there is no law: {self.problem}")
        points = self.measured.points
        return Law(
            form="chinchilla",
            coefficients=dict(zip(NAMES, self.report.parametric.coefficients, strict=True)),
            counts=self.measured.counts,
            optimizer=self.measured.optimizer,
            parametrization=self.measured.parametrization,
            source=f"fitted by scripts/fit.py to {self.measured.origin}",
            fitted_on=FittedOn(
                parameters=(float(points.parameters.min()), float(points.parameters.max())),
                tokens=(float(points.tokens.min()), float(points.tokens.max())),
                layers=self.measured.layers,
            ),
            draws=[[_rounded(value) for value in draw] for draw in valid_draws(self.draws)[:MOST_DRAWS]],
            residuals=[_rounded(value) for value in self.residuals],
            progress=self.measured.progress,
            hyperparameters=self.hyperparameters,
        )

    @property
    def verdict(self) -> str:
        """Whether to trust the law, and each reason."""
        from isoflop.scaling.verdict import verdict_of

        return verdict_of(self.report)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as the report file holds them."""
        return self.report.to_dict()

    def to_frame(self) -> pandas.DataFrame:
        """Return a row per run: N, D, C, loss, predicted loss and residual, log(measured / predicted)."""
        import pandas

        points = self.measured.points
        columns = {"parameters": points.parameters, "tokens": points.tokens, "flops": points.flops, "loss": points.loss}
        fitted = points.loss / np.exp(self.residuals)
        return pandas.DataFrame(columns | {"predicted_loss": fitted, "residual": self.residuals})

    def page(self, as_markdown: bool = False) -> str:
        """Return the report as text, its tables padded for a terminal or in Markdown."""
        from isoflop.scaling.text import page_of

        return page_of(self.report, self.measured.notes, markdown if as_markdown else table)

    def figure(self) -> matplotlib.figure.Figure:
        """Return the figure: IsoFLOP profiles, optima against compute, loss contours and residuals."""
        from isoflop.scaling.figures import figure_of

        return figure_of(self)

    def _repr_html_(self) -> str:
        from html import escape

        png = io.BytesIO()
        self.figure().savefig(png, dpi=80, format="png")
        return f"<pre>{escape(self.page())}</pre>{html_image(png.getvalue(), 'the fits')}"

    def save(self, path: str | Path) -> None:
        """Write the law to `path`, and beside it LAW_report.json, LAW.md and LAW.png.

        Raises `UserError` if there is no law, a file there is not a fit's, or the folder cannot be written.
        """
        law = self.law
        require_own_law("path", str(path))
        self.save_report(Path(path))
        law.save(path)

    def save_report(self, law_file: Path, folder: Path | None = None) -> Path:
        """Write numbers, page and figure, named after a law file; return the figure's path. Default folder: the law's."""
        from isoflop.scaling.figures import drawn_tables

        numbers, page, figure = files = report_files(law_file, folder)
        require_own_files(list(files), f"{figure.parent}", ["parametric", "predict", "warnings"])
        try:
            for parent in (figure.parent, law_file.parent):
                parent.mkdir(parents=True, exist_ok=True)
            atomic_write(numbers, self.report.to_json() + "\n")
            self.figure().savefig(figure, dpi=120)
            atomic_write(page, f"{self.page(as_markdown=True)}\n\n![the fits]({figure.name})\n\n{drawn_tables(self)}\n")
        except OSError as error:
            raise UserError(f"{figure.parent}: {error.strerror}; give --out and --figures where files can be written") from None
        return figure


def report_files(law_file: Path, folder: Path | None = None) -> tuple[Path, Path, Path]:
    """Return the paths of numbers, page and figure: beside the law, or in `folder`."""
    folder = folder or law_file.parent
    return folder / f"{law_file.stem}_report.json", folder / f"{law_file.stem}.md", folder / f"{law_file.stem}.png"


def require_own_law(key: str, out: str) -> None:
    """Raise `UserError` if `out` exists and is no law file; `key` names it in the message."""
    if not has_keys(Path(out), ["hyperparameters"]):
        require_own_files([Path(out)], f"{key} {out}", ["form", "coefficients", "source"])


def valid_draws(draws: Array) -> Array:
    """Return the draws that are laws: positive, and with exponents in `EXPONENT_RANGE`."""
    low, high = EXPONENT_RANGE
    exponents = draws[:, [name in EXPONENTS for name in NAMES]]
    kept: Array = draws[np.all(draws > 0, axis=1) & np.all((exponents >= low) & (exponents <= high), axis=1)]
    return kept


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
