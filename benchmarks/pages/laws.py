"""Regenerates docs/laws.md: python benchmarks/pages/laws.py [--data DIR] (from the checkout's root; some ten minutes on two cores).

What fits reach: minimum and time beside the `chinchilla` package (where it can be imported), how often intervals
hold the truth, and the largest budgets of published runs predicted from the smaller ones (where DIR has them).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isoflop.scaling import isoflop
from isoflop.scaling.approaches import fit_laws
from isoflop.scaling.laws import INTERVAL
from isoflop.scaling.measured import Measured
from isoflop.scaling.newton import minimise, objective
from isoflop.scaling.options import FitOptions
from isoflop.scaling.parametric import Objective, _theta, bootstrap, fit_parametric, loss_of, optimum, problem_of
from isoflop.scaling.points import Points, points
from isoflop.scaling.table import read_table
from isoflop.utils.tables import markdown

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
Array = NDArray[np.float64]
HOFFMANN = np.array([1.8172, 482.01, 0.3478, 2085.43, 0.3658])  # as Besiroglu et al. 2024 refitted it
COURSE = np.array([2.69, 1606.4, 0.34, 3210.7, 0.36])  # Stanford CS336, spring 2024, assignment 3
NAMES = ("E", "A", "alpha", "B", "beta", "exponent of N", "exponent of D", "N", "D", "loss")
ROUNDS = 9  # of each timing; the median is reported


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with isoflops_curves.json, gadre_points.csv, olmo_ladder_points.csv")
    parser.add_argument("--seeds", type=int, default=500, help="of the coverage")
    given = parser.parse_args()
    parts = [HEAD, speed(), beside_chinchilla(), coverage(given.seeds)]
    if given.data:
        parts += [course(given.data), largest_left_out(given.data)]
    (DOCS / "laws.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


HEAD = """# Laws: what the fits reach

Made by `python benchmarks/pages/laws.py --data DIR` on two CPU cores. `scripts/fit.py` fits every approach of the literature in one call and
says of each how far to believe it; this page measures the fits themselves.

- **Parametric law** (approach 3 of Hoffmann et al. 2022): their objective, the sum of Huber losses (delta 1e-3) of log loss,
  by damped Newton steps on analytic second derivatives, in logarithms of the coefficients and about the means of log N and log D.
  A grid of 3,969 starts is scored at once, and the best 50 are polished side by side. The fit says whether it converged, stopped
  at a bound, ran out of iterations or is ill conditioned; only what converged is written as a law.
- **Intervals** hold 90%: the runs' residuals are drawn anew, smoothed and widened for the coefficients they were fitted with, and
  the law is refitted to each draw. A run's own interval adds the residuals of single runs.
- **IsoFLOP parabolas** (approach 2): a parabola in log N for each budget whose least point is not at the edge of its sizes, then
  power laws through their minima; drawn anew in the same way."""


def many(noise: float = 0.006, count: int = 240) -> Points:
    """As the runs of Hoffmann et al. 2022: sizes and tokens over two and a half decades, and five runs that went wrong."""
    generator = np.random.default_rng(0)
    n = np.round(np.exp(generator.uniform(np.log(4e7), np.log(1.6e10), count)))
    d = np.round(np.exp(generator.uniform(np.log(2e8), np.log(3e11), count)))
    loss = loss_of(HOFFMANN, n, d) * np.exp(generator.normal(0, noise, count))
    loss[:5] *= 1.05
    return points(n, d, loss)


def median_seconds(work: Callable[[], Any]) -> float:
    """Median of some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def speed() -> str:
    """A fit and its bootstrap, and whether all starts together find less."""
    runs = many()
    fit = fit_parametric(runs)
    problem = problem_of(runs, Objective())
    everywhere = minimise(np.array(list(_around(fit.coefficients, runs))), problem)
    rows = [
        ["fit, all starts", f"{fit.starts:,}", f"{median_seconds(lambda: fit_parametric(runs)):.2f}"],
        ["bootstrap", "1,000 resamples", f"{median_seconds(lambda: bootstrap(runs, fit, Objective(), 1000, 0)):.2f}"],
    ]
    return f"""## Minimum and time

240 points, five of them 5% too high. Medians of {ROUNDS} rounds:

{markdown(["", "", "seconds"], rows)}

Objective {fit.objective:.10f}. From 1,000 further starts within a factor of e of each coefficient, all polished, the least is
{everywhere.objective.min():.10f}."""


def _around(coefficients: Array, runs: Points) -> Iterator[Array]:
    generator = np.random.default_rng(1)
    return (_theta(coefficients * np.exp(generator.uniform(-1, 1, 5) * [0.3, 1, 0.3, 1, 0.3]), runs) for _ in range(1000))


def beside_chinchilla() -> str:
    """The same points, the same objective, the same starts."""
    try:
        from chinchilla import Chinchilla
        from chinchilla._metrics import log_huber
    except ImportError:
        return "## Beside the `chinchilla` package\n\nIt was not there: `pip install chinchilla==0.2.0`."
    runs = many()
    grid = {
        "E": [1.0, 1.5, 2.0], "a": [4.0, 7.0, 10.0], "b": [4.0, 7.0, 10.0], "alpha": [0.2, 0.5, 0.8], "beta": [0.2, 0.5, 0.8],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        other = Chinchilla(folder, param_grid=grid, loss_fn=partial(log_huber, delta=1e-3), log_level=50)
        other.visualizer.optim = lambda *_, **__: None  # its figure is no part of the fit
        for n, d, loss in zip(runs.parameters, runs.tokens, runs.loss, strict=True):
            other.database.append(N=n, D=d, loss=loss)
        started = time.perf_counter()
        other.fit(parallel=True)
        seconds = time.perf_counter() - started
    params = other.params
    theirs = np.array([params[name] for name in ("E", "A", "alpha", "B", "beta")])
    problem = problem_of(runs, Objective())
    starts = [
        _theta(np.array([e, np.exp(a), alpha, np.exp(b), beta]), runs)
        for e, a, b, alpha, beta in itertools.product(*grid.values())
    ]

    def ours() -> Any:
        theta = np.array(starts)
        return minimise(theta[np.argsort(objective(theta, problem))[:50]], problem)

    reached = float(objective(_theta(theirs, runs)[None], problem)[0])
    rows = [
        ["`chinchilla` 0.2.0 (BFGS, a process a core)", f"{seconds:.1f}", f"{reached:.8f}"],
        ["isoflop", f"{median_seconds(ours):.2f}", f"{ours().objective.min():.8f}"],
    ]
    return f"""## Beside the `chinchilla` package

The same 240 points, the same objective (Huber 1e-3 of log loss) and the same {len(starts)} starts, on {os.cpu_count()} cores:

{markdown(["", "seconds", "objective reached"], rows)}"""


def coverage(seeds: int) -> str:
    """How often 90% intervals hold the truth, over many draws of 0.5% of noise."""
    designs = {
        "72 points: nine budgets of eight sizes": profile(COURSE, np.geomspace(1e18, 1e21, 9), 8, 4.0),
        "20 points: four budgets of five sizes, within a factor of 8": profile(COURSE, np.geomspace(1e18, 8e18, 4), 5, 2.5),
    }
    shares = {name: held(design, seeds) for name, design in designs.items()}
    rows = [[name, *(f"{share[i]:.1%}" for share in shares.values())] for i, name in enumerate([*NAMES, "N by parabolas"])]
    return f"""## How often a 90% interval holds the truth

{seeds} draws of 0.5% of noise on a known law; N, D and loss are those of the best run at 1e23 FLOPs.

{markdown(["", *designs], rows)}"""


def profile(law: Array, budgets: Array, side: int, spread: float) -> Points:
    """Sizes around each budget's best one."""
    best, _ = optimum(law, budgets)
    n = (best[:, None] * np.geomspace(1 / spread, spread, side)).ravel()
    d = np.repeat(budgets, side) / 6 / n
    return points(n, d, loss_of(law, n, d))


def _quantities(coefficients: Array) -> Array:
    alpha, beta = coefficients[..., 2], coefficients[..., 4]
    n, d = optimum(coefficients, np.array(1e23))
    rest = [beta / (alpha + beta), alpha / (alpha + beta), n, d, loss_of(coefficients, n, d)]
    return np.concatenate([coefficients, np.stack(rest, axis=-1)], axis=-1)


def held(design: Points, seeds: int) -> Array:
    """Share of the draws whose intervals hold each quantity."""
    truth, hits = _quantities(COURSE), []
    laws = isoflop.laws_of(isoflop.profiles(design))
    assert laws is not None
    exact = float(laws.at(1e23)[0][0])  # what parabolas come to without noise
    for seed in range(seeds):
        noise = np.random.default_rng(seed).normal(0, 0.005, len(design.loss))
        noisy = points(design.parameters, design.tokens, design.loss * np.exp(noise), design.flops)
        low, high = np.quantile(_quantities(bootstrap(noisy, fit_parametric(noisy), Objective(), 500, seed)), INTERVAL, axis=0)
        below, above = np.quantile(isoflop.resample_profiles(isoflop.profiles(noisy), 500, seed).at(1e23)[0], INTERVAL)
        hits.append([*((low <= truth) & (truth <= high)), below <= exact <= above])
    return np.mean(hits, axis=0)


def course(data: Path) -> str:
    """The constants behind the course's points, and the lines it asks for."""
    runs = read_table(str(data / "isoflops_curves.json")).points
    numbers = fit_laws(Measured(runs), FitOptions(predict=(1e23, 1e24))).to_dict()
    found = np.array([numbers["parametric"][name] for name in NAMES[:5]])
    lines = [
        [label, *(f"{n:.4e}" for n in numbers[key]["n_opt"])]
        for key, label in (
            ("parametric", "parametric law"), ("isoflop", "IsoFLOP parabolas"), ("argmin_log", "least-loss points, line in logs"),
            ("argmin_linear", "least-loss points, k C^a in linear space"),
        )
    ]  # fmt: skip
    return f"""## A law that is known

The 72 points of Stanford's CS336 (spring 2024, assignment 3) are synthetic; the parametric fit comes within
{np.abs(found / COURSE - 1).max():.0e} of each of the five constants behind them. Best N by each method:

{markdown(["", "at 1e23 FLOPs", "at 1e24 FLOPs"], lines)}"""


def largest_left_out(data: Path) -> str:
    """Published runs: the largest ones by a fit of the smaller ones."""
    rows = []
    for name in ("c4_original", "rpj", "rw_original"):
        chosen = FitOptions(parameters="N", tokens="tokens", loss="loss_c4_val", where=(f"dataset={name}",))
        rows.append(
            _left_out(f"Gadre et al. 2024, trained on {name}, C4 loss", read_table(str(data / "gadre_points.csv"), chosen).points)
        )
    rows.append(_left_out("OLMo ladder, C4 loss", ladder(data / "olmo_ladder_points.csv")))
    header = ["runs", "fitted to", "C beyond", "runs beyond", "mean error", "largest error", "inside 90%"]
    return f"""## The largest runs, from the smaller ones

Without budgets in common, what is left out are all runs above half of the largest one's FLOPs. C beyond: the largest FLOPs over
the largest fitted.

{markdown(header, rows)}"""


def ladder(file: Path) -> Points:
    """OLMo's ladder: a run's name has its size and its tokens in multiples of 20 N, from which N follows."""
    with file.open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if not row["run"].endswith("rerun")]
    tokens = np.array([float(row["throughput/total_tokens"]) for row in rows])
    multiples = np.array([float(row["run"].split("-")[1].removesuffix("xC")) for row in rows])
    return points(tokens / (20 * multiples), tokens, np.array([float(row["c4_loss"]) for row in rows]))


def _left_out(name: str, runs: Points) -> list[str]:
    found = fit_laws(Measured(runs), FitOptions()).to_dict()["leave_largest_out"]
    if "runs" not in found:
        return [name, str(len(runs.loss)), "", "", found["reason"], "", ""]
    errors = [run["error"] for run in found["runs"]]
    inside = sum(run["inside"] for run in found["runs"])
    return [
        name, f"{found['fitted_points']} runs", f"x {runs.flops.max() / found['fitted_up_to']:.1f}", str(len(errors)),
        f"{np.mean(errors):+.2%}", f"{max(errors, key=abs):+.2%}", f"{inside} of {len(errors)}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
