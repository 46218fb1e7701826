"""Tables of a model card, in Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isoflop.config.recipe import Recipe
from isoflop.config.recipe_data import HubSource, PythonSource, Source
from isoflop.data.manifest import FILE_NAME, read_manifest
from isoflop.plan import cost
from isoflop.scaling.laws import PUBLISHED, NoPrediction, Prediction, load_law
from isoflop.train.export import OPENED_WITH, is_stock
from isoflop.train.records import Row
from isoflop.train.summary import RunSummary
from isoflop.utils.tables import markdown

LAWS = ("hoffmann", "besiroglu")  # the default, and the one whose bootstrap gives an interval


def rounded(count: float) -> str:
    """Return a count with four digits: 124,475,904 as 124.5M."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.4g}{letter}"
    return f"{count:g}"


def fenced(text: str) -> str:
    """Return text as a code block, with a fence longer than any backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def data_name(recipe: Recipe) -> str:
    """Return the data's name for a sentence."""
    return " and ".join(_source_name(source) for source in recipe.data.sources().values())


def _source_name(source: Source) -> str:
    if isinstance(source, HubSource):
        return f"{source.name} ({source.config})" if source.config else source.name
    if isinstance(source, PythonSource):
        return "Python's standard library" + (" and installed packages" if source.kind == "python_packages" else "")
    return f"local files {', '.join(source.files)}"


def remote_code(recipe: Recipe) -> str:
    """Return the further argument of `from_pretrained` that a model without a stock class needs."""
    return "" if is_stock(recipe) else ", trust_remote_code=True"


def architecture(recipe: Recipe) -> str:
    """Return the model's shape and its tokenizer."""
    model, tokenizer, shape = recipe.model, recipe.tokenizer, cost.shape_of(recipe.model)
    trained = f"byte-level BPE with {tokenizer.train_vocab_size} ids, trained on this data"
    return _facts(
        {
            "type": f"{model.model_type}, {'stock transformers' if is_stock(recipe) else 'with its code beside the weights'}",
            "opens in": f"transformers 4.57 and 5 (tested with {' and '.join(OPENED_WITH)})",
            "parameters": f"{cost.parameters(model):,}",
            "layers": f"{shape.num_layers}",
            "width": f"{shape.hidden_size:,}",
            "attention heads": f"{shape.num_heads} of size {shape.head_dim}, {shape.num_key_value_heads} of keys and values",
            "feed-forward width": f"{shape.intermediate_size:,}",
            "vocabulary": f"{shape.vocab_size:,}, embedding and head {'tied' if shape.tied else 'not tied'}",
            "context": f"{model.max_positions:,} tokens",
            "tokenizer": tokenizer.name or trained,
        }
    )


def training(recipe: Recipe, summary: RunSummary, launches: list[dict[str, Any]]) -> str:
    """Return tokens, compute, hardware, time and versions."""
    n, d, newest = summary.parameters, summary.tokens, launches[-1]
    mfu = f"{summary.mfu:.1%}" if summary.mfu else "n/a"
    return _facts(
        {
            "tokens (D)": f"{d:,} = {summary.steps:,} steps x {recipe.training.tokens_per_step:,}",
            "tokens per parameter (D/N)": f"{d / n:.2f}",
            "FLOPs": f"{summary.flops:.3e} (6 N D: {6 * n * d:.3e})",
            "hardware": "; then ".join(dict.fromkeys(_hardware(launch) for launch in launches)),
            "hours": f"{summary.elapsed_s / 3600:.3g}",
            "median throughput": f"{summary.tokens_per_s:,.0f} tokens/s, MFU {mfu}",
            "versions": ", ".join(f"{name} {version}" for name, version in newest["versions"].items()),
            "commit of the code": newest["commit"] or "an installed copy",
        }
    )


def _hardware(launch: dict[str, Any]) -> str:
    hardware, how = launch["hardware"], launch["launch"]
    if how["device"].startswith("cuda"):
        return f"{how['num_processes']} x {' and '.join(dict.fromkeys(hardware['gpus']))}"
    return f"CPU with {hardware['cpu_cores']} cores"


def command_line(launch: dict[str, Any]) -> str:
    """Return the command of a launch, with processes and precision as a comment."""
    how = launch["launch"]
    precision = "fp32" if how["mixed_precision"] == "no" else how["mixed_precision"]
    processes = "1 process" if how["num_processes"] == 1 else f"{how['num_processes']} processes ({how['distributed_type']})"
    return f"{shlex.join(launch['command'])}  # {processes}, {precision}, from step {how['resumed_from_step']:,}"


def data(recipe: Recipe, prepared_dir: str, tokens: int) -> str:
    """Return each source's share of the tokens, and its epochs if the prepared folder is there."""
    shares, sources = recipe.data.shares(), recipe.data.sources()
    rows = {name: [_source_name(sources[name]), f"{share:.2%}", "n/a", "n/a"] for name, share in shares.items()}
    if (Path(prepared_dir) / FILE_NAME).is_file():
        manifest = read_manifest(prepared_dir)
        order = manifest.order(shares, recipe.seed)
        counts = order.counts(tokens // recipe.training.sequence_length)
        for name, count, size in zip(shares, counts, order.sizes, strict=True):
            commit = manifest.sources[name].revision or "n/a"
            rows[name][1:] = [f"{count / max(1, sum(counts)):.2%}", f"{count / size:.2f}", commit]
    return markdown(["source", "share of the tokens", "epochs", "commit"], rows.values())


def laws(recipe: Recipe, summary: RunSummary) -> str:
    """Return the losses that laws predict for this run, the run's own law first, and the measured one."""
    predictions = {name: load_law(name).predict(recipe.model, summary.tokens, recipe.optimizer.name) for name in LAWS}
    if own := own_law(summary):
        loss, why_not = summary.predicted_loss, summary.outside
        own_prediction = NoPrediction(why_not or "") if loss is None else Prediction(loss, summary.predicted_loss_interval)
        predictions = {own: own_prediction} | predictions
    rows = [[name, *_prediction(predicted), f"{summary.val_loss:.4f}"] for name, predicted in predictions.items()]
    return markdown(["law", "predicted loss", "interval", "measured validation loss"], rows)


def _prediction(predicted: Prediction | NoPrediction) -> list[str]:
    """Return a predicted loss and its interval, or why there is none."""
    if isinstance(predicted, NoPrediction):
        return [str(predicted), "n/a"]
    loss, interval = predicted
    return [f"{loss:.4f}", "n/a" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"]


def own_law(summary: RunSummary) -> str | None:
    """Return the law that the run was compared with, unless it is a published one."""
    return None if summary.law in PUBLISHED else summary.law


def extrapolations(recipe: Recipe, tokens: int) -> list[str]:
    """Return the laws whose prediction of this run is an extrapolation, and how far."""
    optimizer = recipe.optimizer.name
    known = [law for law in map(load_law, LAWS) if isinstance(law.predict(recipe.model, tokens, optimizer), Prediction)]
    found = {law.name: law.extrapolates(law.model_size(recipe.model), tokens) for law in known}
    return [f"{name}: {'; '.join(beyond)}" for name, beyond in found.items() if beyond]


def revisions(names: Sequence[str], rows: list[Row]) -> str | None:
    """Return the checkpoints `step-N` in a repository, oldest first; None if there are none."""
    by_step = {row["step"]: row for row in rows}
    steps = sorted(step for step in (int(name.removeprefix("step-")) for name in names) if step in by_step)
    if not steps:
        return None
    return markdown(["revision", "tokens", "training loss", "validation loss"], [_revision(by_step[step]) for step in steps])


def _revision(row: Row) -> list[str]:
    losses = ["n/a" if row[key] is None else f"{row[key]:.4f}" for key in ("loss", "val_loss")]
    return [f"step-{row['step']}", f"{row['tokens']:,}", *losses]


def _facts(facts: dict[str, str]) -> str:
    return markdown(["", ""], [[name, value] for name, value in facts.items()])
