"""docs/results/efficiency.md and its figure, from the rows of efficiency.py."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
from matplotlib.axes import Axes
from pages.measured import sources
from rows import ROOT

from efficiency_parts.arithmetic import LEVEL, Interval, growth_by_doubling, interval, saved, vertex
from efficiency_parts.runs import (
    DURATIONS,
    OPTIMIZERS,
    SEEDS,
    SEQUENCE_LENGTH,
    SHAPES,
    TOKENS_PER_STEP,
    TUNED_AT,
    VOCABULARY,
    Row,
    read,
    row_of,
)
from isoflop.utils.tables import markdown

DOCS = ROOT / "docs/results"
NAMES = {"adamw": "AdamW", "muon": "Muon"}
COLORS = {"adamw": "#d1495b", "muon": "#2e6f95"}
Curve = dict[int, float]
"""Final loss by tokens a parameter."""


class Size(NamedTuple):
    """What was measured of one model."""

    width: int
    layers: int
    parameters: int
    rates: dict[str, dict[float, float]]
    """Loss by learning rate of each optimizer, where it was tuned."""
    curves: dict[str, dict[int, Curve]]
    """Of each optimizer and seed, at the best learning rate."""
    timed: dict[str, Any] | None
    """The row of step times."""

    def best_rate(self, optimizer: str) -> float:
        """The learning rate of the lowest loss."""
        return min(self.rates[optimizer], key=lambda rate: self.rates[optimizer][rate])

    def mean_curve(self, optimizer: str) -> Curve:
        """Mean over the seeds that have each duration."""
        found: dict[int, list[float]] = {}
        for curve in self.curves[optimizer].values():
            for duration, loss in curve.items():
                found.setdefault(duration, []).append(loss)
        return {duration: statistics.fmean(losses) for duration, losses in sorted(found.items())}

    def factors(self, duration: int) -> list[float]:
        """AdamW's tokens over Muon's at equal loss, of every seed that has both."""
        found = []
        for seed, adamw in self.curves["adamw"].items():
            muon = self.curves["muon"].get(seed, {})
            if duration in adamw and len(muon) > 1 and (factor := saved(adamw, muon, duration)) is not None:
                found.append(factor)
        return found


class Saving(NamedTuple):
    """What Muon saves at AdamW's loss after a duration, at one size."""

    size: Size
    duration: int
    seeds: int
    tokens: Interval
    """AdamW's tokens over Muon's: the factor of compute without orthogonalization."""

    def over(self, ratio: float) -> Interval:
        """The factor where a step of Muon costs so many times a step of AdamW."""
        return Interval(*(each / ratio for each in self.tokens))

    def over_time(self) -> Interval | None:
        """The factor of time; None where steps were not timed."""
        return self.over(self.size.timed["time_of_adamw"][0]) if self.size.timed else None


def write(file: Path, folder: Path = DOCS) -> None:
    """Write the page and its figure."""
    sizes = sizes_of([row_of(row) for row in read(file, "run")], list(read(file, "time")))
    folder.mkdir(parents=True, exist_ok=True)
    draw(sizes, folder / "efficiency.png")
    where = sources([*read(file, "run"), *read(file, "time")])
    text = page(sizes, where, gpu_is_measured(), four_steps(file, sizes))
    (folder / "efficiency.md").write_text(text, encoding="utf-8")


def four_steps(file: Path, sizes: list[Size]) -> str:
    """What the runs that took five Newton-Schulz steps are compared with; nothing where there are none of four beside them."""
    again = [row_of(row) for row in read(file, "run with four steps")]
    if not again or not sizes:
        return ""
    setting = again[0].setting
    five = statistics.fmean(sizes[0].curves["muon"][row.setting.seed][setting.tokens_per_parameter] for row in again)
    return (
        "\nThe runs took five steps of Jordan's polynomial an update; times and FLOPs are of the four that Muon takes here now."
        f"\nWith these the smallest model's mean loss at {setting.tokens_per_parameter} tokens a parameter is"
        f" {statistics.fmean(row.loss for row in again):.3f} instead of {five:.3f} ({len(again)} seeds)."
    )


def sizes_of(rows: list[Row], times: list[dict[str, Any]]) -> list[Size]:
    """Sizes with runs of both optimizers, the smallest first."""
    sizes = []
    for width, layers in SHAPES:
        own = [row for row in rows if (row.setting.width, row.setting.layers) == (width, layers)]
        rates: dict[str, dict[float, float]] = {}
        for row in own:
            if (row.setting.tokens_per_parameter, row.setting.seed) == (TUNED_AT, SEEDS[0]):
                rates.setdefault(row.setting.optimizer, {})[row.setting.learning_rate] = row.loss
        if set(rates) != set(OPTIMIZERS):
            continue
        curves: dict[str, dict[int, Curve]] = {name: {} for name in OPTIMIZERS}
        for row in own:
            setting = row.setting
            if setting.learning_rate == min(rates[setting.optimizer], key=lambda rate: rates[setting.optimizer][rate]):
                curves[setting.optimizer].setdefault(setting.seed, {})[setting.tokens_per_parameter] = row.loss
        timed = next((row for row in times if (row["width"], row["layers"]) == (width, layers)), None)
        sizes.append(Size(width, layers, own[0].parameters, rates, curves, timed))
    return sizes


def savings_of(sizes: list[Size]) -> list[Saving]:
    """Every size and duration at which Muon's curve reaches AdamW's loss."""
    found = []
    for size in sizes:
        for duration in DURATIONS["adamw"]:
            if factors := size.factors(duration):
                found.append(Saving(size, duration, len(factors), interval(factors)))
    return found


def gpu_is_measured(folder: Path = ROOT / "benchmarks/results") -> bool:
    """Whether gpu.py has a run of both optimizers."""
    file = folder / "gpu.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()
    return any(row["case"] == "modern_124m muon" and "curve" in row and not row["rehearsal"] for row in rows)


def draw(sizes: list[Size], file: Path) -> None:
    """Final loss by tokens a parameter above, loss by learning rate below, a column for each size."""
    figure = matplotlib.figure.Figure(figsize=(3.6 * len(sizes) + 0.6, 6.4), layout="constrained")
    grid = figure.subplots(2, len(sizes), squeeze=False, sharey="row")
    for place, size in enumerate(sizes):
        _draw_durations(grid[0][place], size)
        _draw_rates(grid[1][place], size)
    grid[0][0].set_ylabel("final validation loss (nats per token)")
    grid[1][0].set_ylabel(f"the same at {TUNED_AT} tokens a parameter")
    grid[0][0].legend(frameon=False)
    figure.savefig(file, dpi=120)


def _draw_durations(axes: Axes, size: Size) -> None:
    for name in OPTIMIZERS:
        mean = size.mean_curve(name)
        axes.plot(list(mean), list(mean.values()), "-", color=COLORS[name], label=NAMES[name], linewidth=1.5)
        for curve in size.curves[name].values():
            axes.plot(list(curve), list(curve.values()), "o", color=COLORS[name], markersize=3, alpha=0.7)
    axes.set_xscale("log", base=2)
    durations = DURATIONS["muon"]
    axes.set_xticks(durations, [str(duration) for duration in durations])
    axes.set_title(f"{size.parameters / 1e3:.0f}k parameters", fontsize=10)
    axes.set_xlabel("tokens a parameter")
    axes.grid(alpha=0.3)


def _draw_rates(axes: Axes, size: Size) -> None:
    for name in OPTIMIZERS:
        rates = dict(sorted(size.rates[name].items()))
        axes.plot(list(rates), list(rates.values()), "o-", color=COLORS[name], markersize=4, linewidth=1.5)
        best = size.best_rate(name)
        axes.plot(best, rates[best], "o", color=COLORS[name], markersize=10, fillstyle="none")
    axes.set_xscale("log", base=2)
    rates = sorted({rate for name in OPTIMIZERS for rate in size.rates[name]})
    axes.set_xticks(rates, [f"{1e3 * rate:g}" for rate in rates])
    axes.set_xlabel("peak learning rate / 0.001")
    axes.grid(alpha=0.3)


def page(sizes: list[Size], where: str, on_gpu: bool, four: str = "") -> str:
    """The page."""
    savings = savings_of(sizes)
    return f"""# What Muon saves beside AdamW

Made by `python benchmarks/efficiency.py` (`--page` writes it again from the rows in `benchmarks/results/efficiency.jsonl`).

Stock LLaMAs of {_listed([f"{size.parameters:,}" for size in sizes])} parameters, tied embeddings included, on the sources of
Python's standard library: vocabulary {VOCABULARY}, sequences of {SEQUENCE_LENGTH}, {TOKENS_PER_STEP:,} tokens a step, linear
decay to 0 after a warm-up of 5%, weight decay 0.1, fp32. Each optimizer's peak learning rate is tuned at each size, by a factor
of 2, at {TUNED_AT} tokens a parameter; under Muon the weights that AdamW updates have the same learning rate, the default. Then
{len(SEEDS)} random seeds are trained at {_listed([str(each) for each in DURATIONS["adamw"]])} tokens a parameter. Both
optimizers see the same initial weights and the same windows in the same order.

![final loss by tokens a parameter, and by learning rate](efficiency.png)

## Compute saved at equal loss

{headline(savings)}

{savings_table(savings)}

The factor is AdamW's tokens over those at which Muon has the same loss, read from Muon's curve (interpolated in the logarithms of
tokens and loss). Tokens: both models have the same FLOPs a token, so this is the factor of training compute. FLOPs: with the
matrix products of orthogonalization counted, which weigh more the fewer tokens a step has ({_flops_share(sizes)}
here; 0.3% for `modern_124m` with 524,288 tokens a step). Time: with the measured time of a step. Intervals are {LEVEL:.0%},
Student's t over the seeds; percentiles of a bootstrap over three seeds cover 61% where they say 90%.{four}

{trends(savings)}## What it does not say

This is a tiny scale: {sizes[-1].parameters / 1e3:.0f}k parameters at most, small batches, source text in a small vocabulary.
With both optimizers tuned, published factors at 100M to 1B parameters are 1.1 to 1.4, and fall with size ('Fantastic pretraining
optimizers', [arXiv:2509.02046](https://arxiv.org/abs/2509.02046)); Moonlight claims 2
([arXiv:2502.16982](https://arxiv.org/abs/2502.16982)). So take 1.1 to 1.4 for a large run, not the table above, and measure at
your own size.

{gpu_text(on_gpu)}

## Learning rates

{rates_table(sizes)}

Loss at {TUNED_AT} tokens a parameter with one seed; the lowest is bold, and its learning rate is that of all other runs.
Vertex: of the parabola through the lowest and its neighbours, and how far below the lowest it lies: what a finer grid could gain.
Other durations have the same learning rate, under both optimizers.

## Losses and step times

{losses_table(sizes)}

Mean over the seeds; ± is their standard deviation.

{times_table(sizes)}{where}
"""


def headline(savings: list[Saving]) -> str:
    """The range of the factors, in a sentence."""
    tokens = [one.tokens.estimate for one in savings]
    times = [over.estimate for one in savings if (over := one.over_time())]
    text = f"**Muon reaches AdamW's loss with {min(tokens):.2f} to {max(tokens):.2f} times fewer tokens"
    return f"{text}, in {min(times):.2f} to {max(times):.2f} times less time.**" if times else f"{text}.**"


def savings_table(savings: list[Saving]) -> str:
    """The factors, a line for each size and duration."""
    lines = []
    for one in savings:
        adamw, muon = (one.size.mean_curve(name) for name in OPTIMIZERS)
        timed = one.size.timed
        flops = one.over(1 + timed["muon_update_flops"] / timed["step_flops"]) if timed else None
        lines.append(
            [f"{one.size.parameters:,}", str(one.duration), f"{adamw[one.duration]:.3f}",
             f"{muon[one.duration]:.3f}" if one.duration in muon else "", f"**{one.tokens.estimate:.2f}** ({_ends(one.tokens)})",
             *(f"{each.estimate:.2f} ({_ends(each)})" if each else "" for each in (flops, one.over_time())), str(one.seeds)]
        )  # fmt: skip
    header = ["parameters", "AdamW's tokens a parameter", "AdamW's loss", "Muon's at as many", "saved: tokens", "FLOPs", "time",
              "seeds"]  # fmt: skip
    return markdown(header, lines)


def trends(savings: list[Saving]) -> str:
    """How the factor changes with size at each duration that all sizes have, and with duration at each size."""
    lines = []
    for duration in DURATIONS["adamw"]:
        own = [one for one in savings if one.duration == duration]
        if len(own) == len(SHAPES):
            points = [(one.size.parameters, factor) for one in own for factor in one.size.factors(duration)]
            lines.append(f"- {duration} tokens a parameter, by size: {_trend(own, points, 'parameters')}.")
    for parameters in dict.fromkeys(one.size.parameters for one in savings):
        own = [one for one in savings if one.size.parameters == parameters]
        if len(own) > 1:
            points = [(one.duration, factor) for one in own for factor in one.size.factors(one.duration)]
            lines.append(f"- {parameters:,} parameters, by duration: {_trend(own, points, 'tokens')}.")
    if not lines:
        return ""
    like = (f"Learning rates are tuned at {TUNED_AT} tokens a parameter, so those lines compare like with like. One that is low"
            " or high for another\nduration moves the other lines, and the intervals know of random seeds alone.")  # fmt: skip
    return "How the factor of tokens changes:\n\n" + "\n".join(lines) + f"\n\n{like}{_published_fall(savings)}\n\n"


def _published_fall(savings: list[Saving]) -> str:
    """Whether these sizes show the fall with size that is published, where the learning rates are tuned."""
    own = [one for one in savings if one.duration == TUNED_AT]
    if len(own) < len(SHAPES):
        return ""
    growth = growth_by_doubling([(one.size.parameters, factor) for one in own for factor in one.size.factors(TUNED_AT)])
    seen = "is seen here too" if growth.high < 1 else "is not seen over these sizes"
    return f" The published fall of the factor with\nsize {seen}."


def _trend(own: list[Saving], points: list[tuple[int, float]], of: str) -> str:
    means = ", ".join(f"{one.tokens.estimate:.2f}" for one in own)
    if len(points) < 3:
        return means
    growth = growth_by_doubling(points)
    return (f"{means}; each doubling of the {of} multiplies it by {growth.estimate:.3f} ({growth.low:.3f} to {growth.high:.3f}),"
            f" so {_direction(growth)}")  # fmt: skip


def _direction(growth: Interval) -> str:
    if growth.high < 1:
        return "it falls"
    return "it grows" if growth.low > 1 else "no change is beyond what seeds do"


def gpu_text(measured: bool) -> str:
    """Where the measurement at 124M parameters stands."""
    if measured:
        return "On a GPU `modern_124m` was trained with both for equal minutes: [performance](../performance.md#on-a-gpu)."
    return ("At 124M parameters it is not measured yet: `python benchmarks/gpu.py --only rate` trains `modern_124m` with both for"
            " equal minutes on a GPU.")  # fmt: skip


def rates_table(sizes: list[Size]) -> str:
    """Loss by learning rate."""
    rates = sorted({rate for size in sizes for name in OPTIMIZERS for rate in size.rates[name]})
    lines = []
    for size in sizes:
        for name in OPTIMIZERS:
            losses, best, lowest = size.rates[name], size.best_rate(name), vertex(size.rates[name])
            cells = [f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates]
            cells = [f"**{cell}**" if rate == best else cell for rate, cell in zip(rates, cells, strict=True)]
            gap = f"{lowest.learning_rate:.4f}, {lowest.below:.4f} nats lower" if lowest else "at the end of what was tried"
            lines.append([f"{size.parameters:,}", NAMES[name], *cells, gap])
    return markdown(["parameters", "optimizer", *(f"{rate:g}" for rate in rates), "vertex"], lines)


def losses_table(sizes: list[Size]) -> str:
    """Final losses."""
    durations = DURATIONS["muon"]
    lines = []
    for size in sizes:
        for name in OPTIMIZERS:
            cells = []
            for duration in durations:
                losses = [curve[duration] for curve in size.curves[name].values() if duration in curve]
                deviation = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
                cells.append(f"{statistics.fmean(losses):.3f}{deviation}" if losses else "")
            lines.append([f"{size.parameters:,}", NAMES[name], f"{size.best_rate(name):g}", *cells])
    return markdown(["parameters", "optimizer", "learning rate", *(f"{each} tokens a parameter" for each in durations)], lines)


def times_table(sizes: list[Size]) -> str:
    """Milliseconds of a step and their ratio, where they are measured."""
    lines = []
    for size in sizes:
        if timed := size.timed:
            steps = [_spread(timed[f"{name}_step_s"], 1e3, 1) for name in OPTIMIZERS]
            lines.append([f"{size.parameters:,}", *steps, _spread(timed["time_of_adamw"], 1, 3),
                          f"{timed['muon_update_flops'] / timed['step_flops']:.1%}"])  # fmt: skip
    header = ["parameters", "AdamW's step, ms", "Muon's step, ms", "ratio of neighbours", "FLOPs of orthogonalization / step"]
    about = "Median (least to most) of rounds in which both take turns in one process, one thread."
    return f"{markdown(header, lines)}\n\n{about}\n\n" if lines else ""


def _spread(values: list[float], unit: float, digits: int) -> str:
    median, low, high = (f"{value * unit:.{digits}f}" for value in values)
    return f"{median} ({low} to {high})"


def _ends(interval: Interval) -> str:
    return f"{interval.low:.2f} to {interval.high:.2f}" if math.isfinite(interval.high) else "of one seed"


def _flops_share(sizes: list[Size]) -> str:
    shares = [size.timed["muon_update_flops"] / size.timed["step_flops"] for size in sizes if size.timed]
    return f"{min(shares):.0%} to {max(shares):.0%} of a step" if shares else "not counted yet"


def _listed(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
