"""The law as a file that `isoflop.scaling.laws.load_law` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isoflop.disk import write_aside
from isoflop.fit.measured import Measured
from isoflop.scaling.laws import COEFFICIENTS, EXPONENT_RANGE, EXPONENTS, Law
from isoflop.scaling.report import Report

NAMES = COEFFICIENTS["chinchilla"]
MOST_DRAWS = 1000  # a file of 70 KB
DIGITS = 8  # of draws and residuals: finer than any interval


def law_of(measured: Measured, report: Report) -> Law:
    """The parametric fit as a law."""
    fit, points = report.numbers["parametric"], measured.points
    tree: dict[str, Any] = {
        "form": "chinchilla",
        "coefficients": {name: fit[name] for name in NAMES},
        "counts": measured.counts,
        "source": f"fitted by scripts/fit.py to {measured.origin}",
        "fitted_on": {
            "parameters": (float(points.parameters.min()), float(points.parameters.max())),
            "tokens": (float(points.tokens.min()), float(points.tokens.max())),
        },
        "draws": [[_rounded(value) for value in draw] for draw in allowed(report.draws)[:MOST_DRAWS]],
        "residuals": [_rounded(value) for value in report.residuals],
        "progress": measured.progress,
    }
    return Law.model_validate(tree)


def write_law(law: Law, file: Path) -> None:
    """Write a law, whole or not at all; a key a line."""
    tree = law.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    write_aside(file, "{\n" + ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in tree.items()) + "\n}\n")


def allowed(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """The draws that are laws: positive, and with exponents in `EXPONENT_RANGE`."""
    low, high = EXPONENT_RANGE
    exponents = draws[:, [name in EXPONENTS for name in NAMES]]
    kept: NDArray[np.float64] = draws[np.all(draws > 0, axis=1) & np.all((exponents >= low) & (exponents <= high), axis=1)]
    return kept


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
