"""Summarize a recipe's plan in at most thirteen lines: whether it fits, where, how long, to which loss, what to type next.

Entered by `summary_text`; `written_text` reports a recipe that a plan wrote.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from isoflop.plan import cost, hardware
from isoflop.plan.families import PUBLISHED_MODELS
from isoflop.plan.planned_recipe import PlannedRecipe
from isoflop.plan.report import MINUTE, NO_PREDICTION, benchmark_text, duration, gib
from isoflop.plan.results import GpuCost, LaunchNeeds, Plan
from isoflop.scaling.laws import Prediction
from isoflop.utils.tables import short, table

MOST_LINES = 13
GPU_COUNTS = (1, 2, 4, 8)  # of the table, where the user named no count
ENGINES = ("single", "ddp", "zero1", "fsdp2")  # by what they send: the first that fits is taken


class Fit(NamedTuple):
    """How a recipe runs on some GPUs of one model."""

    row: LaunchNeeds
    micro_batch_size: int
    """The recipe's own where that fits, else the largest that does."""


def summary_text(plan: Plan) -> str:
    """Return the summary of a recipe's plan."""
    lines, gpu, num_gpus = model_and_loss(plan), plan.options.name, plan.options.num_gpus
    on_cpu = next((row for row in plan.memory_and_time.launches if not row.launch.gpu), None)
    if plan.measured:
        lines += [*benchmark_text(plan).splitlines(), *_next(plan)]
    elif gpu is None and num_gpus is None and takes_seconds(plan) and on_cpu:
        lines.append(f"fits a CPU, with {gib(on_cpu.memory.total)} GiB; --measure times it here; a GPU takes under a minute")
        lines += _next(plan)
    elif gpu is not None and (num_gpus is not None or gpu not in hardware.GPUS):
        lines += _one_setup(plan, num_gpus or 1)
    else:
        lines += _table(plan, [num_gpus] if num_gpus else list(GPU_COUNTS))
        unnamed = [*(["--gpu a6000"] if gpu is None else []), *(["--gpus 2"] if num_gpus is None else [])]
        lines += [f"next: name your GPUs ({' '.join(unnamed)}) for the launch to type"] if plan.arguments else _to_write(plan)
    lines.append(plan.hyperparameters.summary())
    return "\n".join([*lines, *_warnings(plan, MOST_LINES - len(lines))])


def best_fit(plan: Plan, gpu: str, num_gpus: int) -> Fit | None:
    """Return the launch that sends least of those that fit the recipe's micro-batch, else the largest one; None: none fits."""
    wanted, fits = plan.stats.micro_batch_size, []
    windows = plan.stats.tokens_per_step // plan.stats.sequence_length // num_gpus
    for row in plan.memory_and_time.timed:
        largest, engine = row.largest_micro_batch.get(gpu), row.launch.engine
        launchable = row.config or engine in ("single", "ddp")
        if largest and launchable and row.launch.num_processes == num_gpus:
            micro = wanted if wanted <= largest and windows % wanted == 0 else largest
            fits.append(((micro != wanted, -micro, ENGINES.index(engine), row.launch.name), Fit(row, micro)))
    return min(fits, key=lambda fit: fit[0])[1] if fits else None


def model_and_loss(plan: Plan) -> list[str]:
    """Return two lines: model and tokens, and the predicted loss."""
    stats, data, own, shape = plan.stats, plan.repeated_data, plan.prediction, cost.shape_of(plan.recipe.model)
    epochs = f", {data.epochs:.2f} epochs" if data else ""
    if own.predicted_loss is None:
        loss = f"law {plan.law} has no prediction: {own.outside}"
    else:
        forecast = Prediction(own.predicted_loss, own.predicted_loss_interval)
        loss = f"{forecast} by law {plan.law}, nats per token of the law's own data"
    return [
        f"{plan.name}: {plan.recipe.model.model_type}, {shape.num_layers} layers x {shape.hidden_size},"
        f" {short(stats.parameters)} parameters, {short(stats.tokens)} tokens"
        f" ({stats.tokens_per_parameter:.1f} a parameter{epochs})",
        f"loss: {loss}",
    ]


def launch_table(plan: Plan) -> list[list[str]]:
    """Return a header and a row per launch: memory, and per GPU the time, or - where the recipe's micro-batch does not fit."""
    gpus = [row.spec.name for row in plan.memory_and_time.gpus]
    rows = [["launch", "processes", "memory, GiB", *gpus]]
    for row in plan.memory_and_time.launches:
        fits = {gpu: row.largest_micro_batch.get(gpu, 1) for gpu in gpus}
        cells = [duration(row.hours.get(gpu)) if fits[gpu] and row.launch.gpu else "-" for gpu in gpus]
        rows.append([row.launch.name, str(row.launch.num_processes), gib(row.memory.total), *cells])
    return rows


def takes_seconds(plan: Plan) -> bool:
    """Return whether every GPU needs less than a minute, so that a CPU will do."""
    return all(row.gpu_hours is not None and row.gpu_hours < MINUTE for row in plan.memory_and_time.gpus)


def _one_setup(plan: Plan, num_gpus: int) -> list[str]:
    """Return whether the recipe fits on these GPUs, how long it takes, and the launch to type."""
    gpu = plan.memory_and_time.gpus[0]
    name, time = gpu.spec.name, f"time: {gpu.mfu_source}"
    if gpu.gpu_hours:
        time = f"time: {duration(gpu.gpu_hours / num_gpus)} at an MFU of {gpu.mfu:.1%}"
    if name not in hardware.GPUS:
        return [f"{num_gpus} x {name}: memory not known; --full has what each launch config needs", time]
    fit, usable = best_fit(plan, name, num_gpus), gib(hardware.usable_bytes(hardware.GPUS[name].memory_bytes))
    windows = plan.stats.tokens_per_step // plan.stats.sequence_length
    if windows % num_gpus:
        return [f"{num_gpus} x {name}: the {windows} windows of a step (training.tokens_per_step) do not divide by {num_gpus}"]
    if fit is None:
        return [f"{num_gpus} x {name}: does not fit; more GPUs or training.activation_checkpointing=true may help"]
    own, launch = fit.micro_batch_size == plan.stats.micro_batch_size, fit.row.launch
    needed = f"{gib(fit.row.memory.total)} of {usable} GiB" if own else f"{usable} GiB hold no more"
    needed += "; needs DeepSpeed" if launch.engine == "zero1" else ""
    options = launch_options(fit.row.config, num_gpus) + ([] if own else [f"training.micro_batch_size={fit.micro_batch_size}"])
    return [
        f"{num_gpus} x {name}: fits under {launch.name} at micro-batch {fit.micro_batch_size} ({needed})",
        time,
        *_next(plan, options),
    ]


def launch_options(config: Path | None, num_gpus: int) -> list[str]:
    """Return the options of `isoflop pretrain` for a launch config; without one, those of DDP in bf16."""
    if config is not None:
        return ["--launch", config.stem if config.parent.name == "accelerate_configs" else str(config)]
    return ["--launch", "2gpu_ddp", "--num-processes", str(num_gpus)]


def _table(plan: Plan, counts: list[int]) -> list[str]:
    """Return time by GPU and number of GPUs."""
    header = ["GPU", *(f"{count} GPU{'s' if count > 1 else ''}" for count in counts)]
    rows = [[row.spec.name, *(_cell(plan, row, count) for count in counts)] for row in plan.memory_and_time.gpus]
    legend = "time of the run; (N): fits only with training.micro_batch_size=N; -: does not fit"
    return [legend, *table(header, rows).splitlines()]


def _cell(plan: Plan, gpu: GpuCost, num_gpus: int) -> str:
    time = duration(gpu.gpu_hours and gpu.gpu_hours / num_gpus)
    if gpu.spec.name not in hardware.GPUS:
        return time
    fit = best_fit(plan, gpu.spec.name, num_gpus)
    if fit is None:
        return "-"
    return time + ("" if fit.micro_batch_size == plan.stats.micro_batch_size else f" ({fit.micro_batch_size})")


def _next(plan: Plan, options: Sequence[str] = ()) -> list[str]:
    """Return the commands to type: prepare, where the data are not prepared, and pretrain with its options."""
    if not plan.arguments:
        return _to_write(plan)
    prepared = plan.repeated_data is not None and plan.repeated_data.is_counted
    commands = [] if prepared else [["isoflop", "prepare", *plan.arguments]]
    return [f"next: {shlex.join(command)}" for command in [*commands, ["isoflop", "pretrain", *plan.arguments, *options]]]


def _to_write(plan: Plan) -> list[str]:
    return [f"next: isoflop plan models {plan.name} --write FILE makes it a recipe"] if plan.name in PUBLISHED_MODELS else []


def _warnings(plan: Plan, room: int) -> list[str]:
    """Return the warnings, a line each where there is room, else their subjects; and where the rest is."""
    warnings = [w for w in plan.warnings if plan.prediction.outside is None or NO_PREDICTION not in w]
    more = "--full has every launch config, memory by part, all laws, and each formula"
    if len(warnings) < room:
        return [*(f"warning: {warning}" for warning in warnings), more]
    subjects = "; ".join(warning.split(":")[0] for warning in warnings)
    return [f"{len(warnings)} warnings ({subjects}): --full has them, every launch config and each formula"]


def written_text(planned: PlannedRecipe) -> str:
    """Return what was written, the values that changed, and what to type next."""
    training, options, path = planned.recipe.training, planned.plan.options, shlex.quote(str(planned.path))
    launch = launch_options(planned.config, planned.launch.num_processes)
    if options.gpu is None and options.num_gpus is None and takes_seconds(planned.plan):
        launch = []  # on any machine: a config for GPUs is refused on a CPU
    return "\n".join([
        f"wrote {planned.path}: {training.max_steps:,} steps x {training.tokens_per_step:,} tokens",
        *planned.notes,
        f"next: isoflop prepare {path}",
        " ".join(["then: isoflop pretrain", path, *launch, "--dry-run"]),
    ])  # fmt: skip
