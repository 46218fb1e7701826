"""What all parts share: the device, recipes over local text, a clean process between cases, and what a case is."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rows import ROOT, recipe_of

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe
from isoflop.train import setup as job
from isoflop.train import trainer as pretrain
from isoflop.train.command import pretrain_command

Emit = Callable[..., None]
RECIPES = ("modern_124m", "gpt2_124m", "llama2_1.36b", "llama3_1.5b")
TOY_LENGTH, TOY_BATCH = 256, 2
TOY_WIDTHS = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 4096},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 4096},
}  # fmt: skip
OUT_OF_MEMORY = "out of memory"


class Context(NamedTuple):
    """How this run of the benchmark was started."""

    rehearse: bool
    work: Path
    """Prepared windows, runs and caches of this run; deleted at its end."""
    out: Path
    nanogpt: Path | None
    ends_at: float
    """Of this part, seconds since the epoch."""

    @property
    def device(self) -> torch.device:
        """The GPU; a CPU in a rehearsal."""
        return torch.device("cuda" if torch.cuda.is_available() and not self.rehearse else "cpu")


class Case(NamedTuple):
    """One measurement that may fail by itself."""

    name: str
    run: Callable[[Context, Emit], None]
    needs_s: float = 5.0
    """Seconds on a GPU, roughly: not begun where the part has less left."""
    missing: str | None = None
    """What it needs and is not there."""
    alone: bool = False
    """Changes its process, which is not used for another case."""
    to_the_end: bool = False
    """Takes all the time that its part has."""

    def limit_s(self, context: Context) -> float:
        """Seconds after which it counts as hanging."""
        if self.to_the_end:
            return max(120.0, context.ends_at - time.time())
        return 300.0 if context.rehearse else 30 + 3 * self.needs_s


def lacking(*modules: str) -> str | None:
    """The first of some modules that cannot be imported, as a reason to leave a case out."""
    return next((f"{name} is not installed" for name in modules if importlib.util.find_spec(name) is None), None)


def sized(
    context: Context,
    name: str,
    *overrides: str,
    micro_batches: int = 2,
    scale: float = 1.0,
) -> Recipe:
    """A recipe of `recipes/` over the prepared windows of its length, at its own micro-batch times `scale`, and with fewer tokens
    a step: so many micro-batches. Of toy size in a rehearsal. Only steps: no validation or checkpoint is reached."""
    file = ROOT / f"recipes/{name}.yaml"
    own = load_recipe(file)
    length, batch = own.training.sequence_length, own.training.micro_batch_size
    toy: list[str] = []
    if context.rehearse:
        length, batch = TOY_LENGTH, TOY_BATCH
        toy = [f"model.{key}={value}" for key, value in TOY_WIDTHS[own.model.model_type].items()]
        if getattr(own.model, "num_key_value_heads", None):
            toy.append("model.num_key_value_heads=2")
    batch = max(1, int(batch * scale))
    folder = tempfile.mkdtemp(prefix=f"{name}-", dir=context.work)
    settings = [
        f"data.prepared_dir={context.work}/data/{length}", f"output.run_dir={folder}/run", f"training.sequence_length={length}",
        f"training.micro_batch_size={batch}", f"training.tokens_per_step={micro_batches * batch * length}",
    ]  # fmt: skip
    return recipe_of(str(file), [*toy, *settings, *overrides], folder)


def small_recipe(model: dict[str, Any], sequence_length: int, micro_batch_size: int, **training: Any) -> Recipe:
    """A recipe for a model that is built but not trained from files."""
    return Recipe.model_validate(
        {
            "model": model,
            "tokenizer": {"train_vocab_size": 4096},
            "data": {"source": {"kind": "python_stdlib"}, "prepared_dir": "none"},
            "training": {
                "sequence_length": sequence_length, "tokens_per_step": sequence_length * micro_batch_size,
                "micro_batch_size": micro_batch_size, "max_steps": 1, **training,
            },
            "optimizer": {"peak_learning_rate": 3e-4},
            "output": {"run_dir": "none"},
        }
    )  # fmt: skip


@contextlib.contextmanager
def quick_setup(device: torch.device) -> Iterator[None]:
    """Let `pretrain` initialize weights on the GPU, in a second where a CPU takes ten for 1.3B, and ask for no room for the
    checkpoints that these runs never write. Neither changes a step's time or memory."""
    build = job.build_training_model

    def on_device(*arguments: Any, **named: Any) -> Any:
        with device:
            return build(*arguments, **named)

    with (
        mock.patch.object(job, "build_training_model", on_device),
        mock.patch.object(pretrain, "require_disk"),
    ):
        yield


class Finished(Exception):
    """A run has done what it was started for."""


def pretrain_until(context: Context, recipe: Recipe, done: Callable[[int], bool], **named: Any) -> None:
    """Train by the real loop in bf16 until `done`, asked before each step with the number of steps so far."""
    step, counter = pretrain.train_step, itertools.count()

    def counted(*arguments: Any, **named: Any) -> Any:
        if done(next(counter)):
            raise Finished
        return step(*arguments, **named)

    with (
        environment(ACCELERATE_MIXED_PRECISION="bf16"),
        quick_setup(context.device),
        mock.patch.object(pretrain, "train_step", counted),
        contextlib.suppress(Finished),
    ):
        pretrain_command(recipe, **named)


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables while a case runs."""
    with mock.patch.dict(os.environ, variables):
        yield


def clean_up() -> None:
    """Let go of what a case left: Accelerate's state, compiled code, memory."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # tens of MB of the allocator's, which count in each case's peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def compile_by_eager_backend() -> None:
    """Have torch.compile trace and differentiate, but generate no code: a minute less a model on a CPU."""
    compile_with = torch.compile

    def traced(*arguments: Any, **named: Any) -> Any:
        return compile_with(*arguments, **({"backend": "aot_eager"} | named))

    torch.compile = traced  # type: ignore[assignment]


def metrics_of(run_dir: str) -> list[dict[str, Any]]:
    """Rows that a run wrote of its steps."""
    file = Path(run_dir) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
