"""Regenerates docs/results/transfer.md and its figure: python benchmarks/pages/transfer.py (from the checkout's root; under an hour).

Trains small LLaMAs over learning rates, widths and depths under both parametrizations, one thread. Each run is a row of
benchmarks/results/transfer.jsonl; runs that have a row are not trained again, so that the same command resumes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.figure
import numpy as np
import torch
from measured import sources, tuned_losses

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe
from isoflop.data.manifest import read_manifest
from isoflop.data.order import Order, permute
from isoflop.data.windows import Windows
from isoflop.prepare.run import prepare
from isoflop.train.optimizers import build_optimizer, learning_rate, set_learning_rate
from isoflop.train.parametrization import parameter_scales
from isoflop.train.training_model import build_training_model
from isoflop.utils.tables import markdown

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs/results"
RESULTS = ROOT / "benchmarks/results/transfer.jsonl"
BASE_WIDTH, BASE_LAYERS = 32, 2
WIDTHS, DEPTHS = (32, 64, 128, 256), (2, 4, 8, 16)
LEARNING_RATES = tuple(1e-3 * 2**power for power in range(5))
FARTHEST = 4  # learning rates added beyond these, one at a time, while the lowest loss is at an end
HEAD_SIZE = 16
INITIALIZER_RANGE = 0.09  # at the base's width; the default of 0.02 learns slowly in so few steps
SEQUENCE_LENGTH, WINDOWS_PER_STEP, STEPS, WARMUP_STEPS = 256, 2, 200, 20
VALIDATION_WINDOWS = 64
PARAMETRIZATIONS = ("standard", "completep")


class Setting(NamedTuple):
    """What distinguishes one run from another."""

    width: int
    layers: int
    parametrization: str
    learning_rate: float
    seed: int

    @property
    def is_base(self) -> bool:
        """Whether both parametrizations are the same here."""
        return (self.width, self.layers) == (BASE_WIDTH, BASE_LAYERS)


class Optimum(NamedTuple):
    """Where the lowest loss of a curve lies."""

    learning_rate: float
    loss: float
    inside: bool
    """Whether the lowest measured loss has a higher one on either side."""


def main() -> None:
    """Train what has no row yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="random seeds of each run (default 2)")
    parser.add_argument("--redraw", action="store_true", help="train nothing, write the page from the rows that are there")
    given = parser.parse_args()
    if not given.redraw:
        torch.set_num_threads(1)
        prepare(load_recipe(ROOT / "recipes/quickstart.yaml"))
        train_missing(given.seeds, RESULTS)
    rows = of_complete_seeds(read_rows(RESULTS))
    DOCS.mkdir(parents=True, exist_ok=True)
    draw(losses_of(rows), DOCS / "transfer.png")
    (DOCS / "transfer.md").write_text(page(rows), encoding="utf-8")


def sizes() -> list[tuple[int, int]]:
    """Width and layers of every model, the base first, then the cheapest."""
    shapes = {(width, BASE_LAYERS) for width in WIDTHS} | {(BASE_WIDTH, layers) for layers in DEPTHS}
    return sorted(shapes, key=lambda shape: (shape != (BASE_WIDTH, BASE_LAYERS), shape[0] ** 2 * shape[1]))


def curves(seeds: int) -> list[Setting]:
    """A setting of each curve of loss by learning rate, seed after seed; the base's are the same under both parametrizations."""
    every = [
        Setting(width, layers, parametrization, LEARNING_RATES[0], seed)
        for seed, (width, layers), parametrization in itertools.product(range(seeds), sizes(), PARAMETRIZATIONS)
    ]
    return [one for one in every if one.parametrization == "standard" or not one.is_base]


def recipe_of(setting: Setting) -> Recipe:
    """The recipe of a run: the quickstart's data, a LLaMA with an untied head and heads of one size."""
    quickstart = load_recipe(ROOT / "recipes/quickstart.yaml").model_dump(mode="json")
    base = {"base_hidden_size": BASE_WIDTH, "base_num_layers": BASE_LAYERS} if setting.parametrization != "standard" else {}
    heads = setting.width // HEAD_SIZE
    model = {
        "model_type": "llama", "vocab_size": quickstart["model"]["vocab_size"], "max_position_embeddings": SEQUENCE_LENGTH,
        "hidden_size": setting.width, "intermediate_size": 3 * setting.width, "num_hidden_layers": setting.layers,
        "num_attention_heads": heads, "tie_word_embeddings": False, "initializer_range": INITIALIZER_RANGE,
    }  # fmt: skip
    tokens = SEQUENCE_LENGTH * WINDOWS_PER_STEP
    return Recipe.model_validate(
        {
            "model": model,
            "tokenizer": quickstart["tokenizer"],
            "data": quickstart["data"],
            "training": {
                "sequence_length": SEQUENCE_LENGTH, "tokens_per_step": tokens, "micro_batch_size": WINDOWS_PER_STEP,
                "max_steps": STEPS,
            },
            "optimizer": {"peak_learning_rate": setting.learning_rate},
            "schedule": {"warmup_steps": WARMUP_STEPS},
            "parametrization": {"name": setting.parametrization, **base},
            "output": {"run_dir": "runs/transfer"},
            "seed": setting.seed,
        }
    )  # fmt: skip


def windows_of(recipe: Recipe, split: str) -> Windows:
    """The windows of a split of the prepared data."""
    (source,) = read_manifest(recipe.data.prepared_dir).split(split)
    return Windows(recipe.data.prepared_dir, source.shards, recipe.training.sequence_length)


def held_out(recipe: Recipe) -> torch.Tensor:
    """Validation windows, (windows, sequence_length), the same for every run."""
    windows = windows_of(recipe, "validation")
    places = permute(np.arange(VALIDATION_WINDOWS), len(windows), recipe.data.split_seed, epoch=0)
    return torch.from_numpy(windows.take(places))


def train_one(recipe: Recipe, windows: Windows, validation: torch.Tensor) -> float:
    """Train a model and return its validation loss in nats per token."""
    device = torch.device("cpu")
    model = build_training_model(recipe, eos_token_id=0, bos_token_id=None)
    optimizer = build_optimizer(model.causal_lm, recipe.optimizer, device, parameter_scales(model.causal_lm, recipe))
    order = Order.of([len(windows)], [1.0], recipe.seed)
    for step in range(STEPS):
        set_learning_rate(optimizer, learning_rate(step, STEPS, recipe.optimizer.peak_learning_rate, recipe.schedule))
        loss = model(torch.from_numpy(windows.take(order.of_step(step, WINDOWS_PER_STEP))))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return math.fsum(model(batch).item() for batch in validation.split(16)) / (len(validation) / 16)


def train_missing(seeds: int, file: Path) -> None:
    """Train every run without a row, and append its row as soon as it is done."""
    from rows import about

    done = {setting_of(row): row["loss"] for row in read_rows(file)}
    every = curves(seeds)
    recipe = recipe_of(every[0])
    windows, validation = windows_of(recipe, "train"), held_out(recipe)
    where = about() | {"command": "python benchmarks/pages/transfer.py"}
    file.parent.mkdir(parents=True, exist_ok=True)

    def loss_of(setting: Setting) -> float:
        if setting not in done:
            started = time.perf_counter()
            done[setting] = round(train_one(recipe_of(setting), windows, validation), 5)
            row = setting._asdict() | {"loss": done[setting], "seconds": round(time.perf_counter() - started, 1)}
            with file.open("a", encoding="utf-8") as rows:
                rows.write(json.dumps(row | where) + "\n")
            print(json.dumps(row), flush=True)
        return done[setting]

    for curve in every:
        train_curve(lambda rate, curve=curve: loss_of(curve._replace(learning_rate=rate)))
    for setting, seed in itertools.product(list(done), range(seeds)):  # learning rates that one seed added, for all of them
        loss_of(setting._replace(seed=seed))


def train_curve(loss_of: Callable[[float], float]) -> dict[float, float]:
    """Return losses by learning rate, with learning rates added until the lowest loss lies between two others."""
    return tuned_losses(loss_of, LEARNING_RATES, FARTHEST)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none where it does not exist."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def of_complete_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of seeds that have every curve; others are still being trained."""
    there = {setting_of(row) for row in rows}
    every = [curve._replace(learning_rate=rate) for curve in curves(1) for rate in LEARNING_RATES]
    complete = {row["seed"] for row in rows if all(setting._replace(seed=row["seed"]) in there for setting in every)}
    return [row for row in rows if row["seed"] in complete]


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting of a row."""
    return Setting(**{name: row[name] for name in Setting._fields})


Curves = dict[tuple[str, int, int], dict[float, float]]


def losses_of(rows: Iterable[dict[str, Any]]) -> Curves:
    """Loss by learning rate of each (parametrization, width, layers), the base's under both: the mean of the seeds.

    Learning rates that only some seeds have are left out.
    """
    found: dict[tuple[str, int, int], dict[float, list[float]]] = {}
    for row in rows:
        setting = setting_of(row)
        for name in PARAMETRIZATIONS if setting.is_base else (setting.parametrization,):
            curve = found.setdefault((name, setting.width, setting.layers), {})
            curve.setdefault(setting.learning_rate, []).append(row["loss"])
    means = {}
    for key, curve in found.items():
        seeds = max(map(len, curve.values()))
        means[key] = {rate: math.fsum(each) / seeds for rate, each in sorted(curve.items()) if len(each) == seeds}
    return means


def parabola(curve: dict[float, float], rates: Iterable[float]) -> np.polynomial.Polynomial:
    """Return loss by the logarithm of the learning rate, through three points of a curve."""
    near = list(rates)
    return np.polynomial.Polynomial.fit(np.log(near), [curve[rate] for rate in near], 2)


def optimum(curve: dict[float, float]) -> Optimum:
    """Return the vertex of the parabola through the lowest loss and its neighbours."""
    rates = sorted(curve)
    place = min(range(len(rates)), key=lambda index: curve[rates[index]])
    if place in (0, len(rates) - 1):
        return Optimum(rates[place], curve[rates[place]], inside=False)
    fitted = parabola(curve, rates[place - 1 : place + 2])
    vertex = float(fitted.deriv().roots()[0].real)
    return Optimum(math.exp(vertex), float(fitted(vertex)), inside=True)


def excess(curve: dict[float, float], base: dict[float, float]) -> float:
    """Return the loss at the base's optimum beyond that at the curve's own, by the parabola of the three nearest points."""
    learning_rate = math.log(optimum(base).learning_rate)
    nearest = sorted(curve, key=lambda rate: abs(math.log(rate) - learning_rate))[:3]
    return max(0.0, float(parabola(curve, nearest)(learning_rate)) - optimum(curve).loss)


def series(curves_of: Curves, parametrization: str) -> dict[str, list[tuple[str, dict[float, float]]]]:
    """The curves over widths and those over depths, each with its label."""
    widths = [(f"width {width}", curves_of[parametrization, width, BASE_LAYERS]) for width in WIDTHS]
    depths = [(f"{layers} layers", curves_of[parametrization, BASE_WIDTH, layers]) for layers in DEPTHS]
    return {"width": widths, "depth": depths}


def draw(curves_of: Curves, file: Path) -> None:
    """Loss by learning rate: a column for each parametrization, a row for widths and one for depths; a star at each optimum."""
    figure = matplotlib.figure.Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, parametrization in enumerate(PARAMETRIZATIONS):
        for row, curves_here in enumerate(series(curves_of, parametrization).values()):
            panel = axes[row][column]
            for number, (label, curve) in enumerate(curves_here):
                color = matplotlib.colormaps["viridis"](0.9 * number / (len(curves_here) - 1))
                panel.plot(list(curve), list(curve.values()), "o-", color=color, label=label, markersize=4)
                best = optimum(curve)
                panel.plot(best.learning_rate, best.loss, "*", color=color, markersize=14, markeredgecolor="#333333")
            base = optimum(curves_of[parametrization, BASE_WIDTH, BASE_LAYERS]).learning_rate
            panel.axvline(
                base, color="#d1495b", linewidth=1, linestyle="--", label="base's optimum" if not row + column else None
            )
            rates = sorted({rate for curve in curves_of.values() for rate in curve})
            panel.set_xscale("log")
            panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
            panel.set_title(f"{parametrization}: {'widths' if row == 0 else 'depths'}")
            if row == 1:
                panel.set_xlabel("peak learning rate of the recipe")
            if column == 0:
                panel.set_ylabel("validation loss (nats per token)")
    figure.savefig(file, dpi=110)


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page."""
    curves_of = losses_of(rows)
    seeds = len({row["seed"] for row in rows})
    recipe = recipe_of(setting_of(rows[0]))
    tokens = STEPS * recipe.training.tokens_per_step
    findings = "\n".join(finding(curves_of, axis) for axis in ("width", "depth"))
    tables = "\n\n".join(
        f"Over {'widths' if axis == 'width' else 'depths'}, {parametrization}:\n\n"
        + loss_table(series(curves_of, parametrization)[axis])
        for axis in ("width", "depth")
        for parametrization in PARAMETRIZATIONS
    )
    minutes = math.fsum(row["seconds"] for row in rows) / 60
    return f"""# Do learning rates transfer between sizes?

Made by `python benchmarks/pages/transfer.py` from the rows of `benchmarks/results/transfer.jsonl`, which the same command trains where
they are missing ({len(rows)} runs, {minutes:.0f} minutes on one thread of a shared machine). [parametrization.md](../parametrization.md) has
the rules.

Small LLaMAs with an untied head on Python's own sources: widths {_listed(WIDTHS)} with {BASE_LAYERS} layers, and
{_listed(DEPTHS)} layers of width {BASE_WIDTH}; heads of {HEAD_SIZE}, {STEPS} steps of {recipe.training.tokens_per_step} tokens
({tokens:,} in all), AdamW, cosine to 0 after {WARMUP_STEPS} steps of warm-up, initializer_range {INITIALIZER_RANGE}, {seeds} random
seed{"s" if seeds > 1 else ""}. The base of `completep` is the smallest model, {BASE_WIDTH} wide with {BASE_LAYERS} layers, so both
parametrizations have that curve in common. Loss is over {VALIDATION_WINDOWS} validation windows of {SEQUENCE_LENGTH} tokens, the same for
all runs. Learning rates a factor of 2 apart are added until the lowest loss lies between two others.

![loss by learning rate, and where the optimum lies](transfer.png)

## What was found

{findings}

{optima_table(curves_of)}

The optimum is the vertex of the parabola through the lowest loss and its two neighbours, in the logarithm of the learning rate.
The last column is the loss at the base's optimum beyond that at the model's own, by the parabola through the three nearest learning
rates: what is lost by tuning the base alone.

## Every loss

{tables}

## How to read it

- A learning rate transfers where the last column is near zero. {noise(rows)}
- A star lies at the vertex of a parabola, below the measured losses beside it. Where a curve is flat, noise moves its optimum far and
  its loss little, so the last column is the better measure of the two.
- These models are tiny and see few tokens. The page shows the direction and size of the shift at this scale; it does not show that
  the same holds at 1B parameters. The CompleteP paper (arXiv:2505.01618) has measurements up to 1.5B.
- Learning rates are the recipe's. Under `completep` those of the layers' matrices are smaller by the width, and those of the
  residual projections by the depth too.

{sources(rows)}
"""


def noise(rows: list[dict[str, Any]]) -> str:
    """Return a sentence on how much seeds differ at the lowest loss of each curve."""
    by_setting: dict[Setting, list[float]] = {}
    for row in rows:
        by_setting.setdefault(setting_of(row)._replace(seed=0), []).append(row["loss"])
    lowest: dict[Setting, list[float]] = {}
    for setting, losses in by_setting.items():
        curve = setting._replace(learning_rate=0.0)
        lowest[curve] = min(lowest.get(curve, losses), losses, key=lambda each: sum(each) / len(each))
    spreads = [float(np.var(losses, ddof=1)) for losses in lowest.values() if len(losses) > 1]
    if not spreads:
        return "There is one random seed, so the noise is not known."
    return (
        f"At the lowest loss of each curve two random seeds differ with a standard deviation of"
        f" {math.sqrt(math.fsum(spreads) / len(spreads)):.3f} nats; at learning rates beyond, some diverge and they differ more."
    )


def finding(curves_of: Curves, axis: str) -> str:
    """Return one sentence for each parametrization on how far its optimum moves along an axis."""
    sentences, costs = [], []
    for parametrization in PARAMETRIZATIONS:
        here = series(curves_of, parametrization)[axis]
        best = [optimum(curve) for _, curve in here]
        rates = [each.learning_rate for each in best]
        lost = [excess(curve, here[0][1]) for _, curve in here]
        costs.append(max(lost))
        sentences.append(
            f"under `{parametrization}` the optimum is {rates[0]:.2g} for the base and {rates[-1]:.2g} for the largest, the farthest two a"
            f" factor of {max(rates) / min(rates):.1f} apart, and the base's optimum costs up to {max(lost):.3f} nats"
        )
    largest = series(curves_of, "standard")[axis][-1][0]
    losses = [optimum(series(curves_of, name)[axis][-1][1]).loss for name in PARAMETRIZATIONS]
    shown = "shows" if costs[1] < costs[0] else "does not show"
    over = f"from {WIDTHS[0]} to {WIDTHS[-1]} wide" if axis == "width" else f"from {DEPTHS[0]} to {DEPTHS[-1]} layers"
    return (
        f"- **{axis.capitalize()}**, {over}: {'; '.join(sentences)}. So this page {shown} that `completep` transfers learning rates over {axis} better than `standard`. At its own optimum the largest ({largest}) reaches"
        f" {losses[1]:.3f} under `completep` and {losses[0]:.3f} under `standard`."
    )


def optima_table(curves_of: Curves) -> str:
    """Return the table of optima, their losses and the cost of the base's learning rate."""
    rows = []
    for axis, parametrization in itertools.product(("width", "depth"), PARAMETRIZATIONS):
        here = series(curves_of, parametrization)[axis]
        for label, curve in here:
            best = optimum(curve)
            where = f"{best.learning_rate:.3g}" + ("" if best.inside else " (end of the range)")
            rows.append([f"{parametrization}, {label}", where, f"{best.loss:.3f}", f"{excess(curve, here[0][1]):.3f}"])
    return markdown(["model", "optimal learning rate", "loss there", "lost with the base's learning rate"], rows)


def loss_table(here: list[tuple[str, dict[float, float]]]) -> str:
    """Return losses by learning rate, the lowest of each row in bold."""
    rates = sorted({rate for _, curve in here for rate in curve})
    rows = [[label, *(_cell(curve.get(rate), min(curve.values())) for rate in rates)] for label, curve in here]
    return markdown(["model", *(f"{rate:g}" for rate in rates)], rows)


def _cell(loss: float | None, lowest: float) -> str:
    if loss is None:
        return ""
    return f"**{loss:.3f}**" if loss == lowest else f"{loss:.3f}"


def _listed(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}"


if __name__ == "__main__":
    main()
