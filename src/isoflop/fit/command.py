"""The command `fit`: read the runs, fit their laws, tell how far to believe them, and write the law."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from isoflop.credentials import hide_credentials
from isoflop.disk import require_own_files, write_aside
from isoflop.errors import UserError
from isoflop.fit.figures import draw, drawn_tables
from isoflop.fit.law_file import law_of, write_law
from isoflop.fit.measured import Measured
from isoflop.fit.table import Selection, read_table
from isoflop.fit.text import page
from isoflop.scaling.report import Options, Report, fit_laws
from isoflop.tables import markdown, table

FEWEST_RESAMPLES = 20  # 5th and 95th percentile are then the outermost draws
AHEAD = 10  # times the largest budget: what is predicted where nothing is asked for


class Request(NamedTuple):
    """What was typed."""

    runs: tuple[str, ...]
    out: str | None = None
    as_json: bool = False
    predict: tuple[float, ...] = ()
    resamples: int = 1000
    seed: int = 0
    asymmetry: float = 0.5
    delta: float = 1e-3
    figures: str | None = None
    selection: Selection = Selection()


def fit_command(request: Request) -> int:
    """Carry out a request; returns the exit code, 1 where a law was asked for and the fit is none."""
    _check(request)
    _require_own_files(request)
    measured = read_measured(request)
    measured = measured._replace(origin=hide_credentials(measured.origin))  # it goes into the law's file
    predict = request.predict or (AHEAD * float(measured.points.flops.max()),)
    options = Options(request.resamples, request.seed, predict, request.delta, request.asymmetry)
    report = fit_laws(measured.points, measured.curves, options)
    report.numbers["warnings"][:0] = measured.warnings
    print(as_json(report.numbers) if request.as_json else page(report.numbers, measured.notes, table), flush=True)
    if (written := _write_report(request, measured, report)) and not request.as_json:
        print(f"\n{written}")
    return 0 if request.out is None else _write_law(request.out, measured, report, quiet=request.as_json)


def read_measured(request: Request) -> Measured:
    """One table, or folders of runs."""
    if not any(Path(path).is_dir() for path in request.runs):
        if len(request.runs) > 1:
            raise UserError(f"{', '.join(request.runs)}: several tables; put their rows into one, or give folders of runs")
        return read_table(request.runs[0], request.selection)
    if any(request.selection):
        raise UserError(
            "--parameters, --tokens, --flops, --loss-column and --where are about a table; runs tell these themselves"
        )
    from isoflop.fit.runs import measured_runs  # seconds: a run's metrics are read with torch there

    return measured_runs(list(request.runs))


def as_json(numbers: Any) -> str:
    """The numbers at full precision; JSON has no word for what is not finite, as predictions of no law are."""

    def finite(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: finite(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [finite(value) for value in tree]
        return None if isinstance(tree, float) and not math.isfinite(tree) else tree

    return json.dumps(finite(numbers), indent=1)


def _check(request: Request) -> None:
    rules = [
        (f"--resamples {request.resamples}", request.resamples >= FEWEST_RESAMPLES, f"at least {FEWEST_RESAMPLES}"),
        (f"--seed {request.seed}", request.seed >= 0, "0 or more"),
        (f"--asymmetry {request.asymmetry:g}", 0 < request.asymmetry < 1, "within 0 to 1; 0.5 weighs both sides alike"),
        (f"--delta {request.delta:g}", 0 < request.delta < math.inf, "above 0; Hoffmann et al. 2022 use 1e-3"),
        *((f"--predict {flops:g}", 0 < flops < math.inf, "a budget in FLOPs, e.g. 1e21") for flops in request.predict),
    ]
    for given, holds, rule in rules:
        if not holds:
            raise UserError(f"{given}: give {rule}")


def _require_own_files(request: Request) -> None:
    """Refuse to overwrite what `fit` did not write. Raises `UserError`."""
    if request.out is not None:
        require_own_law("--out", request.out)
    if request.out is not None or request.figures is not None:
        numbers, page, figure = _report_files(request)
        require_own_files([numbers, page, figure], f"{figure.parent}", ["parametric", "predict", "warnings"])


def require_own_law(key: str, out: str) -> None:
    """Refuse to overwrite what is no law. Raises `UserError`."""
    require_own_files([Path(out)], f"{key} {out}", ["form", "coefficients", "source"])


def _report_files(request: Request) -> tuple[Path, Path, Path]:
    """Numbers, page and figure: beside the law, or in the folder asked for."""
    out = Path(request.out or "law.json")
    folder = out.parent if request.figures is None else Path(request.figures)
    return folder / f"{out.stem}_report.json", folder / f"{out.stem}.md", folder / f"{out.stem}.png"


def _write_report(request: Request, measured: Measured, report: Report) -> str:
    """Figure, page and numbers, beside the law or in the folder asked for; returns what to say of them."""
    if request.out is None and request.figures is None:
        return ""
    numbers, written, figure = _report_files(request)
    try:
        for folder in (figure.parent, Path(request.out or figure).parent):
            folder.mkdir(parents=True, exist_ok=True)
        write_aside(numbers, as_json(report.numbers) + "\n")
        draw(measured, report, figure)
        text = page(report.numbers, measured.notes, markdown)
        write_aside(written, f"{text}\n\n![the fits]({figure.name})\n\n{drawn_tables(measured, report)}\n")
    except OSError as error:
        raise UserError(f"{figure.parent}: {error.strerror}; give --out and --figures where files can be written") from None
    return f"figure, page and numbers: {figure}, .md, {numbers.name}"


def _write_law(out: str, measured: Measured, report: Report, quiet: bool) -> int:
    fit = report.numbers["parametric"]
    if fit["status"] != "converged":
        status = fit["status"].replace("_", " ")
        print(f"error: {out} is not written: the parametric fit is {status}: {fit['detail']}", file=sys.stderr)
        return 1
    write_law(law_of(measured, report), Path(out))
    if not quiet:
        print(f"law: {out}; use it by: python scripts/plan.py --flops {report.numbers['predict'][0]:.3g} --law {out}")
    return 0
