"""Fit scaling laws to measured runs. A notebook enters by `fit`, the command by `fit_command`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from isoflop.scaling.columns import FLAGS
from isoflop.scaling.hyperparameter_fit import fit_hyperparameters
from isoflop.scaling.hyperparameter_text import hyperparameters_text
from isoflop.scaling.measured import Measured
from isoflop.scaling.newton import DELTA
from isoflop.scaling.options import FitOptions
from isoflop.scaling.report import HyperparameterReport
from isoflop.scaling.result import Fit, report_files, require_own_law
from isoflop.scaling.table import read_frame, read_table
from isoflop.utils.credentials import hide_credentials
from isoflop.utils.errors import UserError
from isoflop.utils.io import atomic_write, require_own_files
from isoflop.utils.tables import table

if TYPE_CHECKING:
    import pandas

AHEAD = 10  # times the largest budget: what is predicted by default


def fit(
    runs: str | Path | pandas.DataFrame | Sequence[str | Path],
    *,
    predict: Sequence[float] = (),
    resamples: int = 1000,
    seed: int = 0,
    asymmetry: float = 0.5,
    delta: float = DELTA,
    parameters: str | None = None,
    tokens: str | None = None,
    flops: str | None = None,
    loss: str | None = None,
    where: Sequence[str] = (),
    learning_rate: str | None = None,
    batch: str | None = None,
    sequence_length: int | None = None,
) -> Fit:
    """Fit every scaling law of the literature to `runs` and return the result; print nothing.

    `runs` is a table (a pandas DataFrame, or a CSV, Parquet or JSON file), a run folder, a folder that contains run folders, or a
    sequence of such folders. The other arguments are those of `FitOptions`. Raises `UserError` for invalid runs or options.
    """
    frame = None if isinstance(runs, str | Path | Sequence) else runs
    paths = () if frame is not None else (str(runs),) if isinstance(runs, str | Path) else tuple(map(str, runs))
    options = FitOptions(
        paths, tuple(predict), resamples, seed, asymmetry, delta, parameters, tokens, flops, loss, tuple(where),
        learning_rate=learning_rate, batch=batch, sequence_length=sequence_length,
    )  # fmt: skip
    return fit_measured(read_measured(options) if frame is None else read_frame(frame, options), options)


def fit_measured(measured: Measured, options: FitOptions) -> Fit:
    """Fit every method, and the laws of learning rate and batch if the runs were sweeps over these.

    Credentials in the runs' origin do not reach the law file.
    """
    from isoflop.scaling.approaches import fit_laws  # imports scipy

    options = replace(options, predict=options.predict or (AHEAD * float(measured.points.flops.max()),))
    measured = replace(measured, origin=hide_credentials(measured.origin))
    if isinstance(measured.tuned, str):
        return fit_laws(measured, options)
    try:
        found = fit_tuned(measured, options)
    except UserError as error:  # the law of the loss needs none of them
        warning = f"no laws of learning rate and batch: {error}"
        return fit_laws(replace(measured, warnings=[*measured.warnings, warning]), options)
    result = fit_laws(measured, options)
    return replace(result, report=result.report.model_copy(update={"hyperparameters": found}))


def fit_tuned(measured: Measured, options: FitOptions) -> HyperparameterReport:
    """Fit the laws of learning rate and batch. Raises `UserError` where the runs do not determine them."""
    if isinstance(measured.tuned, str):
        raise UserError(measured.tuned)
    source = f"fitted by `isoflop fit` to {hide_credentials(measured.origin)}"
    found = fit_hyperparameters(measured.tuned, measured.optimizer, source, options.resamples, options.seed)
    law = found.law.model_copy(update={"weight_decay": measured.weight_decay})
    return found.model_copy(update={"law": law})


def read_measured(options: FitOptions) -> Measured:
    """Read one table, or the run folders. Raises `UserError`."""
    if not options.runs:
        raise UserError("no runs are given; give one table or folders of runs")
    if not any(Path(path).is_dir() for path in options.runs):
        if len(options.runs) > 1:
            raise UserError(f"{', '.join(options.runs)}: several tables; put their rows into one, or give folders of runs")
        return read_table(options.runs[0], options)
    if any(options.columns.values()) or options.where or options.sequence_length:
        raise UserError(
            f"{', '.join(FLAGS.values())}, --sequence-length and --where are about a table; runs state these themselves"
        )
    from isoflop.scaling.runs import measured_runs  # reads metrics with torch, which takes seconds to import

    return measured_runs(list(options.runs), options.hyperparameters)


def fit_command(options: FitOptions) -> int:
    """Fit, print and write; return the exit code: 1 if a law file was asked for and the fit is no law."""
    _require_own_files(options)
    if options.hyperparameters:
        return fit_tuned_command(options)
    result = fit_measured(read_measured(options), options)
    print_fit(result, options)
    return write_fit(result, options)


def fit_tuned_command(options: FitOptions) -> int:
    """Fit the laws of learning rate and batch alone, print them and write their file; return the exit code."""
    measured = read_measured(options)
    found = fit_tuned(measured, options)
    page = "\n".join([hyperparameters_text(found, table), *(f"* warning: {warning}" for warning in measured.warnings)])
    print(found.model_dump_json(indent=1) if options.as_json else page, flush=True)
    if options.out is not None:
        try:
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(Path(options.out), json.dumps({"hyperparameters": found.law.to_dict()}, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--out {options.out}: {error.strerror}; give a file that can be written") from None
        if not options.as_json:
            print(f"\nlaw: {options.out}")
    return 0


def print_fit(result: Fit, options: FitOptions) -> None:
    """Print the page, or the numbers as JSON."""
    print(result.report.to_json() if options.as_json else result.page(), flush=True)


def write_fit(result: Fit, options: FitOptions) -> int:
    """Write report and law as the options say, and print their paths; return the exit code."""
    if options.out is None and options.figures is None:
        return 0
    figure = result.save_report(*_report_place(options))
    if not options.as_json:
        print(f"\nfigure, page and numbers: {figure}, .md, {figure.stem}_report.json")
    if options.out is None:
        return 0
    if result.problem:
        alone = "; laws of learning rate and batch alone: --hyperparameters" if result.hyperparameters else ""
        print(f"error: {options.out} is not written: {result.problem}{alone}", file=sys.stderr)
        return 1
    result.law.save(options.out)
    if not options.as_json:
        flops = result.report.predict[0]
        print(f"law: {options.out}; use it by: isoflop plan budget --flops {flops:.3g} --law {options.out}")
    return 0


def _report_place(options: FitOptions) -> tuple[Path, Path | None]:
    return Path(options.out or "law.json"), None if options.figures is None else Path(options.figures)


def _require_own_files(options: FitOptions) -> None:
    """Raise `UserError` before anything is fitted if a file to be written is not a fit's."""
    if options.out is not None:
        require_own_law("--out", options.out)
    if options.out is not None or options.figures is not None:
        files = report_files(*_report_place(options))
        require_own_files(list(files), f"{files[-1].parent}", ["parametric", "predict", "warnings"])
