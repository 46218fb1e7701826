"""Runs of efficiency.py: the recipe of each, its training, the step times of both optimizers, and the file of rows."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rows import in_turn, paired, spread

from isoflop.config.recipe import Recipe
from isoflop.data.manifest import read_manifest
from isoflop.data.windows import Windows
from isoflop.plan import cost
from isoflop.plan.optimizer_cost import update_flops
from isoflop.train.optimizers import build_optimizer
from isoflop.train.trainer import pretrain
from isoflop.train.training_model import build_training_model
from isoflop.utils.errors import UserError

OPTIMIZERS = ("adamw", "muon")
HEAD_DIM, VOCABULARY, SEQUENCE_LENGTH = 16, 512, 128
TOKENS_PER_STEP = 1024
SHAPES = ((32, 2), (48, 2), (64, 2))  # width and layers; 34k, 64k and 103k parameters, more than half of them in the layers
TUNED_AT = 20  # tokens a parameter at which the learning rate is tuned
SEEDS = (0, 1, 2)
# Muon has a shorter run besides, so that its curve reaches up to AdamW's loss at 10 tokens a parameter.
DURATIONS = {"adamw": (10, 20, 40), "muon": (5, 10, 20, 40)}
VALIDATION_WINDOWS = 512
PREPARED = "data/efficiency"
TIMED_STEPS, TIMED_ROUNDS = 10, 30


class Setting(NamedTuple):
    """What distinguishes one run from another."""

    width: int
    layers: int
    optimizer: str
    learning_rate: float
    tokens_per_parameter: int
    seed: int


class Row(NamedTuple):
    """Result of a run."""

    setting: Setting
    parameters: int
    tokens: int
    loss: float
    """Validation loss after the last step, in nats per token; infinite where training stopped at a non-finite loss."""


def train(setting: Setting, file: Path, where: dict[str, Any]) -> Row:
    """Return the row of a run, trained now unless the file has it."""
    tree = tree_of(setting)
    for row in read(file, "run"):
        if row["key"] == key_of(tree):
            return row_of(row)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load(tree | {"output": {"run_dir": f"{folder}/run", "checkpoint_every": 10**9}})
        try:
            loss = pretrain(recipe).val_loss
        except UserError as error:
            if "training diverged" not in str(error):
                raise
            loss = math.inf
    parameters = cost.parameters(recipe.model)
    tokens = recipe.training.num_steps(parameters) * TOKENS_PER_STEP
    row = {"key": key_of(tree), "kind": "run", **setting._asdict(), "parameters": parameters, "tokens": tokens,
           "loss": loss, "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip
    append(file, row, where)
    return row_of(row)


def tree_of(setting: Setting) -> dict[str, Any]:
    """Return the recipe of a run as YAML would have it, without its run folder."""
    width = setting.width
    heads = width // HEAD_DIM
    tree: dict[str, Any] = {
        "model": {
            "model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": SEQUENCE_LENGTH, "hidden_size": width,
            "intermediate_size": 3 * width // 2, "num_hidden_layers": setting.layers, "num_attention_heads": heads,
            "num_key_value_heads": heads, "tie_word_embeddings": True,
            "initializer_range": round(0.55 / width**0.5, 3),  # 0.02 at a width of 768, as in recipes/laptop.yaml
        },
        "tokenizer": {"train_vocab_size": VOCABULARY},
        "data": {"source": {"kind": "python_stdlib"}, "prepared_dir": PREPARED, "validation_fraction": 0.05},
        "training": {
            "sequence_length": SEQUENCE_LENGTH, "tokens_per_step": TOKENS_PER_STEP,
            "micro_batch_size": TOKENS_PER_STEP // SEQUENCE_LENGTH, "tokens_per_parameter": setting.tokens_per_parameter,
        },
        "optimizer": {"name": setting.optimizer, "peak_learning_rate": setting.learning_rate, "weight_decay": 0.1},
        "schedule": {"name": "linear"},
        "evaluation": {"validate_every": 10**9, "max_windows": VALIDATION_WINDOWS},
        "seed": setting.seed,
    }  # fmt: skip
    recipe = load(tree)
    steps = recipe.training.num_steps(cost.parameters(recipe.model))
    return tree | {"schedule": {"name": "linear", "warmup_steps": max(1, steps // 20)}}


def load(tree: dict[str, Any]) -> Recipe:
    """Return a validated recipe; its run folder is not used where the tree has none."""
    return Recipe.model_validate({"output": {"run_dir": "runs/efficiency"}} | tree)


def key_of(tree: dict[str, Any]) -> str:
    """Return the hash of a recipe's given values."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def time_size(width: int, layers: int, file: Path, where: dict[str, Any]) -> None:
    """Append the step times of both optimizers at a size, measured in turn, unless the file has them."""
    recipes = {name: load(tree_of(Setting(width, layers, name, 1e-3, TUNED_AT, 0))) for name in OPTIMIZERS}
    row: dict[str, Any] = {"kind": "time", "width": width, "layers": layers, "tokens_per_step": TOKENS_PER_STEP}
    if any(row.items() <= done.items() for done in read(file, "time")):
        return
    seconds = in_turn({name: stepper(recipe) for name, recipe in recipes.items()}, TIMED_ROUNDS)
    row |= {f"{name}_step_s": spread([each / TIMED_STEPS for each in seconds[name]]) for name in OPTIMIZERS}
    flops_of_step = TOKENS_PER_STEP * cost.flops_per_token(recipes["adamw"].model, SEQUENCE_LENGTH)
    row |= {"time_of_adamw": paired(seconds["muon"], seconds["adamw"]), "step_flops": flops_of_step}
    row["muon_update_flops"] = update_flops(recipes["muon"].model, recipes["muon"].optimizer)
    append(file, row, where)


def stepper(recipe: Recipe) -> Callable[[], None]:
    """Return a function that does some steps on windows in order, with the model and optimizer of the training loop."""
    (source,) = read_manifest(recipe.data.prepared_dir).split("train")
    windows = Windows(recipe.data.prepared_dir, source.shards, SEQUENCE_LENGTH)
    batch = torch.from_numpy(windows.take(np.arange(TOKENS_PER_STEP // SEQUENCE_LENGTH)))
    model = build_training_model(recipe, eos_token_id=0, bos_token_id=None)
    optimizer = build_optimizer(model.causal_lm, recipe.optimizer, torch.device("cpu"))

    def steps() -> None:
        for _ in range(TIMED_STEPS):
            model(batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def append(file: Path, row: dict[str, Any], where: dict[str, Any]) -> None:
    """Add a row to the results."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row | where) + "\n")
    print(json.dumps(row), flush=True)


def read(file: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Return the rows of a kind, `run` or `time`; none where there is no file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return (row for row in map(json.loads, lines) if row["kind"] == kind)


def row_of(row: dict[str, Any]) -> Row:
    """Return the result of a run from its JSON row."""
    return Row(Setting(**{name: row[name] for name in Setting._fields}), row["parameters"], row["tokens"], row["loss"])
