"""Regenerates docs/ablation.md and its figure: python benchmarks/pages/ablation.py (from the checkout's root; about an hour on two cores).

Trains GPT-2's choices and each change of recipes/ablations/ at laptop size, under three seeds, one run at a time; interrupted,
the same command resumes. Then says what each was worth, and which differences other seeds would give as well.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import numpy as np
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

import isoflop.modeling.build  # noqa: F401  # makes the hybrid known to AutoModelForCausalLM
from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe
from isoflop.data.manifest import read_manifest
from isoflop.data.order import permute
from isoflop.data.windows import Windows
from isoflop.plan import cost
from isoflop.prepare.run import prepare
from isoflop.sweep.design import Run
from isoflop.sweep.runner import Runner, slots_of
from isoflop.train.run_folder import RunFolder
from isoflop.train.summary import RunSummary
from isoflop.utils.tables import markdown

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RECIPE = "recipes/ablations/laptop.yaml"
SEEDS = 3
LEVEL = 0.95  # of all intervals together
WIDE_SWIGLU = ["model.mlp=swiglu"]
SWIGLU = [*WIDE_SWIGLU, "model.intermediate_size=384"]  # 8/3 of the width: what GELU at four times it costs
RMSNORM = ["model.norm=rmsnorm", "model.norm_bias=false"]
ROPE = ["model.positions=rope"]
EQUAL = "equal_flops"  # in the name: as many steps as make the baseline's FLOPs
CHANGES = {
    "baseline": [],
    "rope": ROPE,
    "rmsnorm": RMSNORM,
    "swiglu": SWIGLU,
    "no_bias": ["model.attention_bias=false", "model.mlp_bias=false"],
    "all_three": [*ROPE, *RMSNORM, *SWIGLU],
    "learning_rate": ["optimizer.peak_learning_rate=9e-3", "schedule.warmup_steps=21", "schedule.final_learning_rate=9e-4"],
    "epochs": ["training.max_steps=1040"],
    "equal_flops_swiglu": WIDE_SWIGLU,
    "equal_flops_all_three": [*ROPE, *RMSNORM, *WIDE_SWIGLU],
    # Half of what is trained on is held out besides; the tokenizer stays.
    "equal_flops_epochs": ["data.validation_fraction=0.825", "data.prepared_dir=data/ablation_half",
                           "tokenizer={name: data/ablation/tokenizer}"],
}  # fmt: skip


class Result(NamedTuple):
    """A change's runs, one for each seed."""

    name: str
    runs: list[Run]
    losses: list[float]
    summaries: list[RunSummary]


class Worth(NamedTuple):
    """Mean difference from the baseline in nats, its interval (Dunnett: all intervals hold together), and its p-value."""

    difference: float
    low: float
    high: float
    p: float

    @property
    def distinct(self) -> bool:
        """Whether it is beyond what other seeds do."""
        return self.p < 1 - LEVEL


def main() -> None:
    """Train, score, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"replaces a value of {RECIPE} for all runs")
    overrides = parser.parse_args().overrides
    runs = {name: [run_of(name, seed, overrides) for seed in range(SEEDS)] for name in CHANGES}
    for name in ("baseline", "equal_flops_epochs"):
        prepare(runs[name][0].recipe)
    in_turn = [[each[seed]] for seed in range(SEEDS) for each in runs.values()]  # so that a slow hour falls on all alike
    folder = Path(runs["baseline"][0].recipe.output.run_dir).parent
    if code := Runner(in_turn, slots_of([], 1), "accelerate_configs/cpu.yaml", folder).train():
        raise SystemExit(code)
    windows = held_out(runs["baseline"][0].recipe)
    results = [Result(name, each, [loss_of(run, windows) for run in each], [summary_of(run) for run in each])
               for name, each in runs.items()]  # fmt: skip
    worths = worth_of(results)
    draw(results, worths, DOCS / "ablation.png")
    (DOCS / "ablation.md").write_text(page(results, worths), encoding="utf-8")


def run_of(name: str, seed: int, overrides: list[str]) -> Run:
    """One run: the recipe with a change; the command line's overrides go first, the change on top."""
    base = load_recipe(RECIPE, overrides)
    root = Path(base.output.run_dir).parent
    own = [*overrides, *CHANGES[name], f"seed={seed}", f"output.run_dir={root}/{name}_s{seed}"]
    if name == "epochs":
        own.append(f"training.max_steps={2 * steps_of(base)}")
    recipe = load_recipe(RECIPE, own)
    if EQUAL in name:
        per_token = [cost.flops_per_token(each.model, each.training.sequence_length) for each in (base, recipe)]
        recipe = load_recipe(RECIPE, [*own, f"training.max_steps={round(steps_of(base) * per_token[0] / per_token[1])}"])
    return Run(f"{name}_s{seed}", recipe, steps_of(recipe))


def steps_of(recipe: Recipe) -> int:
    """Optimizer steps of a run."""
    return recipe.training.num_steps(cost.parameters(recipe.model))


def held_out(recipe: Recipe) -> torch.Tensor:
    """The baseline's held-out windows, (windows, sequence_length): no run has seen them."""
    data = recipe.data
    (split,) = read_manifest(data.prepared_dir).split("validation")
    windows = Windows(data.prepared_dir, split.shards, recipe.training.sequence_length)
    count = min(recipe.evaluation.max_windows or len(windows), len(windows))
    return torch.from_numpy(windows.take(permute(np.arange(count), len(windows), data.split_seed, epoch=0)))


def loss_of(run: Run, windows: torch.Tensor) -> float:
    """Mean loss (nats per token) of a run's model."""
    model = AutoModelForCausalLM.from_pretrained(RunFolder(run.recipe.output.run_dir).model)
    with torch.no_grad():
        losses = [model(batch, labels=batch).loss.item() * len(batch) for batch in windows.split(8)]
    return math.fsum(losses) / len(windows)


def summary_of(run: Run) -> RunSummary:
    """What a run ended with."""
    summary = RunFolder(run.recipe.output.run_dir).read_summary()
    assert summary is not None
    return summary


def worth_of(results: list[Result]) -> dict[str, Worth]:
    """Dunnett's test of every change against the baseline: one spread for all, as three seeds of one tell it badly.

    Where seeds of some changes part much further, those are tested with all in one spread, and the others without them.
    """
    baseline, *changed = results
    apart = unsteady(results)
    worths = _dunnett(baseline, changed) | _dunnett(baseline, [result for result in changed if result.name not in apart])
    return {result.name: worths[result.name] for result in changed}


def _dunnett(baseline: Result, changed: list[Result]) -> dict[str, Worth]:
    test = stats.dunnett(*[result.losses for result in changed], control=baseline.losses, rng=np.random.default_rng(0))
    interval = test.confidence_interval(LEVEL)
    means = [statistics.mean(result.losses) - statistics.mean(baseline.losses) for result in changed]
    return {
        result.name: Worth(mean, low, high, p)
        for result, mean, low, high, p in zip(changed, means, interval.low, interval.high, test.pvalue, strict=True)
    }


def unsteady(results: list[Result]) -> list[str]:
    """Changes whose seeds differ more than three times as much as the median change's: training at its edge, not noise."""
    spreads = {result.name: statistics.stdev(result.losses) for result in results}
    return [name for name, spread in spreads.items() if spread > 3 * statistics.median(spreads.values())]


def spread_of(results: list[Result]) -> float:
    """Standard deviation between seeds, over all changes but unsteady ones."""
    apart = unsteady(results)
    return math.sqrt(statistics.mean(statistics.variance(result.losses) for result in results if result.name not in apart))


def more_than_the_sum(results: list[Result]) -> tuple[float, float]:
    """All three together beyond the sum of each alone, in nats, and half its 95% interval (Student's t)."""
    means = {result.name: statistics.mean(result.losses) for result in results}
    extra = means["all_three"] + 2 * means["baseline"] - means["rope"] - means["rmsnorm"] - means["swiglu"]
    squares = 1 + 4 + 3  # of the coefficients above
    freedom = sum(len(result.losses) - 1 for result in results if result.name not in unsteady(results))
    return extra, float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * spread_of(results) * math.sqrt(squares / SEEDS)


def draw(results: list[Result], worths: dict[str, Worth], file: Path) -> None:
    """Each change's difference with its interval, and each seed's beside it."""
    figure = matplotlib.figure.Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    baseline, *changed = results
    for place, result in enumerate(reversed(changed)):
        worth = worths[result.name]
        color = "#999999" if not worth.distinct else "#2e8b57" if worth.difference < 0 else "#d1495b"
        axes.plot([worth.low, worth.high], [place, place], color=color, linewidth=3, solid_capstyle="butt")
        axes.plot(worth.difference, place, "o", color=color, markersize=8)
        seeds = [loss - own for loss, own in zip(result.losses, baseline.losses, strict=True)]
        axes.plot(seeds, [place - 0.25] * len(seeds), "|", color="#333333", markersize=7)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.set_yticks(range(len(changed)), [result.name for result in reversed(changed)])
    axes.set_xlabel("held-out loss beyond the baseline's (nats per token): mean, 95% interval; ticks: each seed")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(file, dpi=120)


def page(results: list[Result], worths: dict[str, Worth]) -> str:
    """The page."""
    baseline = results[0]
    run = baseline.runs[0]
    size, windows = run.parameters / 1e6, run.recipe.evaluation.max_windows
    extra, half = more_than_the_sum(results)
    apart = "beyond seed noise" if abs(extra) > half else "within seed noise"
    resolution = statistics.median((worth.high - worth.low) / 2 for worth in worths.values())
    losses = markdown(
        ["change", "loss (nats per token)", "between seeds", "difference", "95% interval", "p"],
        [_loss_row(result, worths) for result in results],
    )
    costs = markdown(
        ["change", "parameters", "tokens", "FLOPs", "tokens/s", "of the baseline's", "peak memory, MB", "minutes"],
        [_cost_row(result, baseline) for result in results],
    )
    return f"""# What each change from GPT-2 to LLaMA was worth, at laptop size

Made by `python benchmarks/pages/ablation.py`, on two CPU cores: `{RECIPE}` ({run.parameters:,} parameters, {run.tokens:,} tokens of
Python's own sources, one epoch) and the changes of [recipes/ablations](../recipes/ablations/README.md), each by itself, in the
hybrid; {SEEDS} seeds of each, which choose weights and order, over the same text. Loss is that of the final models over the same
{windows} held-out windows.

![differences from the baseline](ablation.png)

{losses}

Between seeds: standard deviation of {SEEDS}; over all changes {spread_of(results):.4f}{_without(results)}. Intervals and
p-values are Dunnett's, against the baseline, with the one spread of all changes: all intervals hold together in
{LEVEL:.0%} of repetitions.

**Beyond seed noise:**
{_listed(worths, distinct=True)}.

**Within seed noise:**
{_listed(worths, distinct=False)}.
With {SEEDS} seeds, differences under some {resolution:.3f} nats cannot be seen at this size.

All three together are worth {extra:+.4f} ± {half:.4f} nats beyond the sum of each alone, which is {apart}.

## What they cost

{costs}

Tokens/s: median of the seeds; beside the baseline's of the same seed. Peak memory is the process's, libraries included.

## How to read it

- `epochs` spends twice the baseline's FLOPs. `equal_flops_epochs` sees half of the baseline's text twice: what fresh text is
  worth.
- `equal_flops_swiglu` and `equal_flops_all_three` keep the MLP's inner width, so a token costs more and they see fewer.
- One rate for all: a change whose best rate lies elsewhere is judged at the baseline's. `learning_rate` says what a rate is
  worth.
- This is {size:.1f}M parameters and {run.tokens / 1e6:.1f}M tokens. What holds at 124M and 10B tokens is for the recipes of that
  size to say; nothing here shows that it is the same.
"""


def _without(results: list[Result]) -> str:
    if not (names := unsteady(results)):
        return ""
    return f", without {', '.join(f'`{name}`' for name in names)}, whose seeds part further"


def _loss_row(result: Result, worths: dict[str, Worth]) -> list[str]:
    mean, between = statistics.mean(result.losses), statistics.stdev(result.losses)
    row = [f"`{result.name}`", f"{mean:.4f}", f"{between:.4f}"]
    if (worth := worths.get(result.name)) is None:
        return [*row, "-", "-", "-"]
    mark = "**" if worth.distinct else ""
    p = "< 0.001" if worth.p < 0.001 else f"{worth.p:.3f}"
    return [*row, f"{mark}{worth.difference:+.4f}{mark}", f"{worth.low:+.4f} to {worth.high:+.4f}", p]


def _cost_row(result: Result, baseline: Result) -> list[str]:
    speeds, beside = ([s.tokens_per_s for s in each.summaries] for each in (result, baseline))
    ratios = [speed / other for speed, other in zip(speeds, beside, strict=True)]
    run = result.runs[0]
    return [
        f"`{result.name}`", f"{run.parameters:,}", f"{run.tokens:,}", f"{run.flops:.3g}", f"{statistics.median(speeds):,.0f}",
        f"{statistics.median(ratios):.2f}", f"{statistics.median(s.peak_memory_bytes for s in result.summaries) / 1e6:,.0f}",
        f"{statistics.median(s.elapsed_s for s in result.summaries) / 60:.1f}",
    ]  # fmt: skip


def _listed(worths: dict[str, Worth], distinct: bool) -> str:
    chosen = sorted((worth.difference, name) for name, worth in worths.items() if worth.distinct == distinct)
    return ", ".join(f"`{name}` ({difference:+.3f})" for difference, name in chosen) or "none"


if __name__ == "__main__":
    main()
