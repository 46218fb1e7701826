"""Speed: tokens per second and MFU of the recipes by the real loop, what each choice is worth, peers, and a trace of two steps.

Steps have few micro-batches, so that a case takes seconds: clipping and update weigh more than in a step of a recipe's own size.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rows import spread
from ways import WAYS
from ways import Case as Training

from gpu_parts import kernels
from gpu_parts.cases import Case, Context, Emit, Finished, environment, lacking, pretrain_until, quick_setup, sized
from isoflop.plan import cost, hardware

MICRO_BATCHES = 4
WARMUP, MOST_STEPS, ENOUGH_S = 3, 20, 8.0
TRACE, MOST_TRACE_BYTES = "gpu_trace.json.gz", 16 * 2**20 - 1
TRACED_STEPS, TOP = 2, 10
# Seconds of a case on an H200: start, compiling, steps.
BUILT, COMPILED, LARGE = 10.0, 14.0, 20.0


class Turns:
    """Times the beginnings of steps, each of which waits for the device once; ends the loop after enough of them."""

    def __init__(self, rehearse: bool) -> None:
        self.begins: list[float] = []
        self.loss = float("nan")
        self._warmup, self._most = (1, 3) if rehearse else (WARMUP, MOST_STEPS)

    def begin(self) -> None:
        """A step begins."""
        self.begins.append(time.perf_counter())
        timed = len(self.begins) - 1 - self._warmup
        if timed >= self._most or (timed >= 3 and self.begins[-1] - self.begins[self._warmup] > ENOUGH_S):
            raise Finished

    def step_s(self) -> list[float]:
        """Seconds of the steps after the warm-up."""
        own = self.begins[self._warmup :]
        return [after - before for before, after in itertools.pairwise(own)]


def plan(context: Context) -> list[Case]:
    """The recipes, the trace, then the levers by what they may be worth; what the time does not reach is skipped."""
    on_gpu = context.device.type == "cuda"
    liger = lacking("liger_kernel") or (None if on_gpu else "Liger's kernels run on GPUs")
    float8 = lacking("torchao")
    compiler = lacking("triton") if on_gpu else None
    return [
        Case("machine", kernels.machine, 4),
        loop("modern_124m", "modern_124m", COMPILED),
        loop("llama2_1.36b", "llama2_1.36b", LARGE),
        loop("gpt2_124m", "gpt2_124m", COMPILED),
        loop("llama3_1.5b", "llama3_1.5b", LARGE),
        Case("trace modern_124m", trace, COMPILED),
        Case("loss", lambda context, emit: each(context, emit, kernels.loss, "modern_124m", "llama3_1.5b"), 10),
        loop("modern_124m eager", "modern_124m", BUILT, "training.compile=false"),
        loop("modern_124m bare loop", "modern_124m", COMPILED, way="bare"),
        loop("modern_124m liger", "modern_124m", COMPILED, "training.kernels=liger", missing=liger, alone=True),
        Case("attention", lambda context, emit: each(context, emit, kernels.attention, "modern_124m", "llama2_1.36b"), 5),
        Case("optimizer", lambda context, emit: each(context, emit, kernels.optimizer, "modern_124m", "llama2_1.36b"), 6),
        Case("muon update", lambda context, emit: each(context, emit, kernels.muon, "modern_124m", "llama2_1.36b"), 7),
        loop("gpt2_124m nanoGPT compiled", "gpt2_124m", 2 * LARGE, way="nanogpt", missing=nanogpt(context) or compiler,
             compile_all=True),
        loop("modern_124m transformers", "modern_124m", BUILT, "training.compile=false", way="transformers"),
        loop("modern_124m Trainer", "modern_124m", BUILT, "training.compile=false", way="trainer", alone=True),
        loop("llama2_1.36b float8", "llama2_1.36b", 35.0, missing=float8, alone=True, float8=True),
        loop("llama2_1.36b eager", "llama2_1.36b", COMPILED, "training.compile=false"),
        loop("llama2_1.36b liger", "llama2_1.36b", LARGE, "training.kernels=liger", missing=liger, alone=True),
        *(loop(f"modern_124m micro-batch x {scale:g}", "modern_124m", COMPILED, scale=scale) for scale in (2, 0.5, 0.25)),
        loop("modern_124m compiled at once", "modern_124m", 2 * LARGE, "training.compile=false", way="bare", missing=compiler,
             compile_all=True),
        loop("gpt2_124m nanoGPT", "gpt2_124m", BUILT, way="nanogpt", missing=nanogpt(context)),
        *(attention_of(context, name) for name in ("eager", "flash_attention_2", "flash_attention_3")),
    ]  # fmt: skip


def nanogpt(context: Context) -> str | None:
    """Why nanoGPT is left out."""
    if context.nanogpt is None:
        return "no checkout of nanoGPT is named: --nanogpt PATH"
    return None if (context.nanogpt / "model.py").is_file() else f"{context.nanogpt} has no model.py"


def attention_of(context: Context, name: str) -> Case:
    """The real loop with another attention function of transformers, at a quarter of the micro-batch: eager holds all scores."""
    module = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(name)
    on_gpu = context.device.type == "cuda"
    missing = (lacking(module) or (None if on_gpu else "flash attention runs on GPUs")) if module else None
    setting = f"model.attn_implementation={name}"
    return loop(f"modern_124m {name} attention x 0.25", "modern_124m", COMPILED, setting, missing=missing, scale=0.25)


def each(context: Context, emit: Emit, measure: Callable[[Context, Emit, str], None], *names: str) -> None:
    """An operation at the sizes of several recipes."""
    for name in names:
        measure(context, emit, name)


def loop(
    case: str, recipe: str, needs_s: float, *overrides: str, way: str = "isoflop", scale: float = 1.0, missing: str | None = None,
    alone: bool = False, **choices: bool,
) -> Case:  # fmt: skip
    """A case that trains a recipe in one of the ways of `ways.py`."""

    def run(context: Context, emit: Emit) -> None:
        own = sized(context, recipe, *overrides, micro_batches=MICRO_BATCHES, scale=scale)
        train(context, emit, Training(own, True, context.nanogpt, **choices), way)

    return Case(case, run, needs_s, missing, alone)


def train(context: Context, emit: Emit, case: Training, way: str) -> None:
    """Steps of a way until enough are timed, and one row of them."""
    turns, began = Turns(context.rehearse), time.perf_counter()
    torch.manual_seed(case.recipe.seed)
    with quick_setup(context.device), environment(), contextlib.suppress(Finished):  # `isoflop` sets a variable of accelerate's
        WAYS[way](case, turns)  # type: ignore[arg-type]
    training, model = case.recipe.training, case.recipe.model
    rates = spread([training.tokens_per_step / one for one in turns.step_s()])
    flops = rates[0] * cost.flops_per_token(model, training.sequence_length)
    on_gpu = context.device.type == "cuda"
    peak = hardware.peak_bf16_flops(torch.cuda.get_device_name()) if on_gpu else None
    matmul = kernels.matmul_flops_of(context)
    launch = cost.Launch("this", "single", gpu=on_gpu)
    emit(
        way=way, tokens_per_s=rates, step_s=spread(turns.step_s()), steps=len(turns.step_s()), mfu=peak and flops / peak,
        share_of_matmul=matmul and flops / matmul, first_step_s=turns.begins[1] - turns.begins[0],
        setup_s=turns.begins[0] - began, loss=turns.loss, parameters=cost.parameters(model),
        tokens_per_step=training.tokens_per_step, micro_batch_size=training.micro_batch_size, accumulation=MICRO_BATCHES,
        sequence_length=training.sequence_length, compile=training.compile, kernels=training.kernels,
        attention=model.attn_implementation, float8=case.float8, compile_all=case.compile_all,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        predicted_bytes=cost.predicted_memory(model, training, case.recipe.optimizer, launch).total,
    )  # fmt: skip


def trace(context: Context, emit: Emit) -> None:
    """Two traced steps of the real loop: kernels by time, how long the GPU idles, and the Chrome trace in the results' folder."""
    recipe = sized(context, "modern_124m", micro_batches=2)
    # Warm-up of the profiler, the traced steps, and some more: its files are written behind a step.
    pretrain_until(context, recipe, lambda steps: steps >= 8, profile_steps=TRACED_STEPS)
    folder = Path(recipe.output.run_dir) / "profile"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    emit(
        way="steps", figure=summary["step_ms"], unit="ms a step", gpu=summary["gpu"], categories=summary["categories"],
        idle_share=1 - summary["gpu"]["busy_share"] if summary["gpu"] else None, traced_steps=summary["num_steps"],
        tokens_per_step=recipe.training.tokens_per_step,
    )  # fmt: skip
    for place, row in enumerate(summary["top"][:TOP], 1):
        emit(way=f"kernel {place}", kernel=row["name"], ms_per_step=row["ms"], share=row["share"], calls_per_step=row["calls"])
    file = folder / "rank-0.trace.json.gz"
    size = file.stat().st_size
    if size > MOST_TRACE_BYTES:
        emit(way="trace", skipped=f"the trace has {size:,} bytes, more than {MOST_TRACE_BYTES:,}: not kept")
        return
    shutil.copy(file, context.out / TRACE)
    emit(way="trace", file=TRACE, bytes=size)
