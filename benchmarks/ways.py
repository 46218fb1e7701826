"""The ways to train that benchmarks/step.py holds against each other, each a process that does one optimizer step at its turn.

All train the same tokens in the same order, with the same clipping and, but for the Trainer's, the same fused AdamW.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import status_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from isoflop.config.recipe import Gpt2Model, LlamaModel, Recipe, gradient_accumulation_steps
from isoflop.data.manifest import read_manifest
from isoflop.data.windows import Windows
from isoflop.train.cpu import tune_glibc_malloc
from isoflop.train.optimizers import build_optimizer
from isoflop.train.training_model import build_training_model

Forward = Callable[[Tensor], Tensor]  # ids (batch, seq) to the mean loss


class Case(NamedTuple):
    """What is trained and how; all ways have it in common."""

    recipe: Recipe
    bf16: bool
    nanogpt: Path | None
    float8: bool = False
    """Of the real loop: products of the layers in float8, the rest in bf16."""
    compile_all: bool = False
    """Of the plain loop: one torch.compile around the whole model and its loss."""

    @property
    def mixed_precision(self) -> str:
        """As a launch config has it."""
        return "fp8" if self.float8 else "bf16" if self.bf16 else "no"

    @property
    def device(self) -> torch.device:
        """The GPU where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Turns:
    """A step's beginning: says how long the last one took, everything between two beginnings counted, and waits for the next."""

    def __init__(self, connection: Connection, device: torch.device) -> None:
        self._connection, self._device = connection, device
        self._started: float | None = None
        self._before_bytes = status_bytes("VmRSS")
        self.loss = float("nan")
        """Of the last step; the way's own."""

    def begin(self) -> None:
        """Wait for the turn; the process ends here when there is none any more."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._connection.send(self._started and time.perf_counter() - self._started)
        if not self._connection.recv():
            grown = status_bytes("VmHWM") - self._before_bytes
            peak = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else grown
            self._connection.send({"loss": self.loss, "peak_memory_bytes": peak})
            raise SystemExit(0)
        self._started = time.perf_counter()


def take_turns(way: str, case: Case, connection: Connection, log: str) -> None:
    """The process of one way; never returns."""
    with (
        open(log, "w", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        if case.device.type == "cpu":
            tune_glibc_malloc()  # for all alike
        torch.manual_seed(case.recipe.seed)
        WAYS[way](case, Turns(connection, case.device))


def available(case: Case) -> list[str]:
    """The ways that can train this case here."""
    llama, gpt2 = type(case.recipe.model) is LlamaModel, isinstance(case.recipe.model, Gpt2Model)
    can = {"nanogpt": gpt2 and case.nanogpt is not None, "litgpt": llama and _is_there("litgpt")}
    return [way for way in WAYS if can.get(way, True)]


def _is_there(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def batches(case: Case) -> Iterator[Tensor]:
    """The ids of each step, (accumulation, micro-batch, seq), as training sees them; some steps' worth, again and again."""
    recipe, training = case.recipe, case.recipe.training
    manifest = read_manifest(recipe.data.prepared_dir)
    windows = Windows(recipe.data.prepared_dir, manifest.shards("train"), manifest.sequence_length)
    order, per_step = manifest.order(recipe.data.shares(), recipe.seed), training.tokens_per_step // training.sequence_length
    shape = (gradient_accumulation_steps(training, 1), training.micro_batch_size, training.sequence_length)
    steps = [torch.from_numpy(windows.take(order.of_step(step, per_step))).view(shape) for step in range(64)]
    return itertools.cycle([ids.to(case.device) for ids in steps])


def plain_loop(case: Case, turns: Turns, model: nn.Module, forward: Forward) -> None:
    """What a step cannot do without: forward, backward, clipping, update, one look at the loss."""
    optimizer = build_optimizer(model, case.recipe.optimizer, case.device)
    forward = torch.compile(forward) if case.compile_all else forward
    for micro_batches in batches(case):
        turns.begin()
        loss_sum = torch.zeros((), device=case.device)
        for ids in micro_batches:
            with torch.autocast(case.device.type, torch.bfloat16, enabled=case.bf16):
                loss = forward(ids) / len(micro_batches)
            loss.backward()
            loss_sum += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), case.recipe.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.loss = loss_sum.item()


def isoflop(case: Case, turns: Turns) -> None:
    """The real loop with all that it does: batches from disk, signals, anomalies, metrics to file and screen."""
    from isoflop.train import trainer as pretrain
    from isoflop.train.command import pretrain_command

    step = pretrain.train_step

    def paced(*arguments: Any, **named: Any) -> Any:
        turns.begin()
        row = step(*arguments, **named)
        turns.loss = row["loss"]
        return row

    os.environ["ACCELERATE_MIXED_PRECISION"] = case.mixed_precision
    pretrain.train_step = paced
    try:
        pretrain_command(case.recipe)
    finally:
        pretrain.train_step = step


def bare(case: Case, turns: Turns) -> None:
    """isoflop's model and loss in the plain loop: what its own loop is compared with."""
    model = training_model(case)
    plain_loop(case, turns, model, model)


def transformers(case: Case, turns: Turns) -> None:
    """The stock model with the stock loss, full logits."""
    model = training_model(case).causal_lm
    stock_head(model)
    plain_loop(case, turns, model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss)


def trainer(case: Case, turns: Turns) -> None:
    """transformers' Trainer around the stock model, logging every step."""
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    training, optimizer = case.recipe.training, case.recipe.optimizer
    ids = torch.cat([step.flatten(0, 1) for step in itertools.islice(batches(case), 64)]).tolist()
    model = training_model(case).causal_lm
    stock_head(model)

    class Paced(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            turns.loss = logs.get("loss", turns.loss)

    arguments = TrainingArguments(
        output_dir=case.recipe.output.run_dir, per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps(training, 1), max_steps=10**6, bf16=case.bf16,
        use_cpu=case.device.type == "cpu", learning_rate=optimizer.peak_learning_rate, lr_scheduler_type="constant",
        weight_decay=optimizer.weight_decay, adam_beta1=optimizer.beta1, adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon, max_grad_norm=optimizer.max_grad_norm, optim="adamw_torch_fused", logging_steps=1,
        save_strategy="no", report_to=[], train_sampling_strategy="sequential", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")
    Trainer(model, arguments, train_dataset=rows, callbacks=[Paced()]).train()


def nanogpt(case: Case, turns: Turns) -> None:
    """nanoGPT's model.py of the checkout that was named, in the plain loop."""
    sys.path.insert(0, str(case.nanogpt))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    shape: Any = case.recipe.model
    config = GPTConfig(shape.n_positions, shape.vocab_size, shape.n_layer, shape.n_head, shape.n_embd, dropout=0.0, bias=True)
    model = GPT(config).to(case.device)
    # As many positions as the others compute: the last has no target (-1 is nanoGPT's mark of that).
    plain_loop(case, turns, model, lambda ids: model(ids, F.pad(ids[:, 1:], (0, 1), value=-1))[1])


def litgpt(case: Case, turns: Turns) -> None:
    """litgpt's GPT of the same shape, with its own chunked loss, in the plain loop."""
    from litgpt import GPT, Config  # type: ignore[import-not-found]
    from litgpt.utils import chunked_cross_entropy  # type: ignore[import-not-found]

    shape: Any = case.recipe.model
    config = Config(
        block_size=shape.max_position_embeddings, padded_vocab_size=shape.vocab_size, n_layer=shape.num_hidden_layers,
        n_head=shape.num_attention_heads, n_query_groups=shape.num_key_value_heads, n_embd=shape.hidden_size, bias=False,
        intermediate_size=shape.intermediate_size, parallel_residual=False, rotary_percentage=1.0, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    model = GPT(config).to(case.device)
    if shape.tie_word_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    model.apply(model._init_weights)
    plain_loop(case, turns, model, lambda ids: chunked_cross_entropy(model(ids)[:, :-1], ids[:, 1:]))


def training_model(case: Case) -> Any:
    """isoflop's model with its initial weights; compiled where the recipe says so."""
    return build_training_model(case.recipe, eos_token_id=0, bos_token_id=None, device=case.device)


def stock_head(model: Any) -> None:
    """Put back the stock head over the same weight."""
    loss_head = model.get_output_embeddings()
    head = nn.Linear(loss_head.in_features, loss_head.out_features, bias=False, device="meta")
    head.weight = loss_head.weight
    model.set_output_embeddings(head)


WAYS: dict[str, Callable[[Case, Turns], None]] = {
    "isoflop": isoflop, "bare": bare, "transformers": transformers, "trainer": trainer, "nanogpt": nanogpt, "litgpt": litgpt,
}  # fmt: skip
