"""The training loop: prepared windows become a trained model that `from_pretrained` opens.

Entered by `pretrain(recipe)`, from Python or by `isoflop pretrain`, alone or under `accelerate launch`. A run that was stopped
resumes from its newest intact checkpoint, bit for bit. A finished run is left as it is.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.state import AcceleratorState, GradientState

from isoflop.checkpoint.manager import NEWEST
from isoflop.config.loading import load_recipe, to_yaml
from isoflop.config.recipe import Output, Recipe, flatten
from isoflop.data.order import derived_seed
from isoflop.publish.upload import check_hub
from isoflop.train.anomalies import find_anomaly, remember
from isoflop.train.distributed import asked_for_cpu, command_typed, reduce_sum
from isoflop.train.engines import build_accelerator, warm_up, zero_gradients
from isoflop.train.evaluation import bits_per_byte, validation_loss
from isoflop.train.flight_recorder import describe_dumps, enable_flight_recorder
from isoflop.train.garbage import StepCollector, collected_by_hand
from isoflop.train.metrics import LayerNorms, MetricsLog, full_tensor, layer_norms, peak_memory_bytes
from isoflop.train.optimizers import learning_rate, set_learning_rate
from isoflop.train.outcome import draw, finish, forecast, push_to_hub, run_downstream, write_samples
from isoflop.train.profiling import StepProfiler, profile_steps
from isoflop.train.records import Row
from isoflop.train.run_ahead import Readback, update_unless
from isoflop.train.run_folder import RunFolder
from isoflop.train.setup import Job, build_job, check_data, describe, require_disk
from isoflop.train.signals import StopRequest
from isoflop.train.state import TrainState, load_checkpoint, prune_checkpoints, roll_back, save_checkpoint
from isoflop.train.summary import RunSummary
from isoflop.utils.errors import UserError
from isoflop.utils.output import note_in

T = TypeVar("T")


class Stopped(Exception):
    """A signal ended a run before its last step; the message says what is saved and what resumes it."""


@dataclass(frozen=True)
class CheckpointLoss:
    """Validation loss of a checkpoint."""

    step: int
    val_loss: float
    """Nats per token."""
    bits_per_byte: float
    unigram_entropy_nats: float
    """What token frequencies alone reach."""


def pretrain(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: str | None = None,
    num_profiled_steps: int = 0,
    stop: StopRequest | None = None,
) -> RunSummary:
    """Train a recipe to its end and return the summary of the run. Collective under a launcher.

    `resume` None resumes from the newest intact checkpoint if there is one; `NEWEST` requires one; a step number returns to that
    checkpoint. `num_profiled_steps` optimizer steps are traced into the run folder. A request by `stop` saves and raises
    `Stopped`. Raises `UserError` for whatever the user can correct, before training where it can be known.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, list(overrides))
    if any(int(os.environ.get(f"{launcher}_RESTART_COUNT", "0")) for launcher in ("TORCHELASTIC", "SLURM")):
        resume = None  # a launcher that restarts its command means to resume, not to return to that step again
    folder, is_main = RunFolder(recipe.output.run_dir), os.environ.get("RANK", "0") == "0"
    folder.check_owner(recipe)
    if finished := folder.read_summary():
        return finished
    if recipe.hub.repo_id and is_main:
        check_hub(recipe.hub.repo_id, recipe)
    stop = stop or StopRequest()
    summary = _with_job(recipe, stop, lambda job: _pretrain(job, resume, num_profiled_steps), traced=True)
    if is_main:
        push_to_hub(recipe, folder)
    return summary


def evaluate_checkpoint(recipe: Recipe, resume: str | None = None, stop: StopRequest | None = None) -> CheckpointLoss:
    """Return the validation loss of the newest checkpoint, or of that of the step `resume`. Collective under a launcher."""
    RunFolder(recipe.output.run_dir).check_owner(recipe)
    return _with_job(recipe, stop or StopRequest(), lambda job: _evaluate(job, resume or NEWEST))


def dry_run(recipe: Recipe, stop: StopRequest | None = None) -> None:
    """Check everything and do one step on real data; write nothing. Collective under a launcher."""
    folder = RunFolder(recipe.output.run_dir)
    folder.check_owner(recipe)
    if recipe.hub.repo_id and os.environ.get("RANK", "0") == "0":
        check_hub(recipe.hub.repo_id, recipe)
    _with_job(recipe, stop or StopRequest(), _dry_run)


def _with_job(recipe: Recipe, stop: StopRequest, action: Callable[[Job], T | Stopped], traced: bool = False) -> T:
    """Check the data, build the job, run an action on it, and free what it held."""
    every_byte = os.environ.get("LOCAL_RANK", "0") == "0"  # once per node: each may have a copy
    manifest = check_data(recipe, every_byte)
    if traced and not asked_for_cpu():  # which hides the GPUs, before anything has counted them
        enable_flight_recorder(RunFolder(recipe.output.run_dir).path)
    accelerator = build_accelerator(recipe.output)
    result = action(build_job(recipe, manifest, accelerator, stop))
    # By now the job is freed, and with it DDP's reducer. If that were the last to release the process group, it would end gloo's
    # threads while holding the interpreter's lock, which one of them may wait for: torch 2.13 was seen to hang.
    accelerator.free_memory()
    accelerator.end_training()
    if accelerator.num_processes == 1:  # accelerate keeps its state in the process; another run may ask for another one
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if isinstance(result, Stopped):
        raise result
    return result


def _pretrain(job: Job, resume: str | None, num_profiled_steps: int) -> RunSummary | Stopped:
    """Load, train, and write what a run ends with."""
    if job.accelerator.is_main_process:
        job.folder.claim()
        note_in(job.folder.path)
    state = load_checkpoint(job, resume, eval_only=False)
    job.say("\n".join(describe(job)))
    if note := describe_dumps(job.folder.path):
        job.say(note)
    log = start(job, state)
    try:
        with collected_by_hand() as collector, profiler_of(job, log, num_profiled_steps) as profiler:
            completed = train(job, log, state, profiler, collector)
            job.checkpoints.wait()  # before the profiler writes: within a grace period the checkpoint comes first
            job.checkpoints.close()
            if completed:  # also where a launch was killed after its last step
                prune_checkpoints(job, log.curve, job.num_steps)
                draw(job, log)
    finally:
        log.close()
    if completed:
        summary = finish(job, log.curve)
        if job.push:
            job.push.wait()
        return summary
    if job.push:
        job.push.leave()
    there = job.checkpoints.available()
    without = " without --resume-from" if resume not in (None, NEWEST) else ""
    how = f"saved; the same command{without} resumes from {there[-1].name}" if there else "no step was finished; start again"
    return Stopped(f"{job.stop.signal or 'a signal to another rank'}: {how}")


def train(job: Job, log: MetricsLog, state: TrainState, profiler: StepProfiler, collector: StepCollector) -> bool:
    """Run the training loop. Returns False where a signal ended it early, with a checkpoint of the last finished step."""
    job.stop.start_deferring_signals()
    warm_up(job.model, job.optimizer, job.accelerator, job.batch(step=0)[0])
    stopped_before_its_row = reduce_sum(job.accelerator, float(log.lacks(state.step)))
    if stopped_before_its_row and not evaluate_and_log(job, log, state.row or {}):
        return False
    started, saved = time.perf_counter() - state.elapsed_s, True
    while state.step < job.num_steps:
        row = train_step(job, state)
        if row and "anomaly" in row and not handle_anomaly(job, state, row):
            state, saved = roll_back(job, log, state), True
            continue
        if row:
            state.step, state.row, state.elapsed_s = row["step"], row, time.perf_counter() - started
            row |= {"anomalies": state.anomalies, "elapsed_s": state.elapsed_s}
            if saved := checkpoint_is_due(job.recipe.output, state.step, job.num_steps):
                save_checkpoint(job, log, state)
        if row is None or not evaluate_and_log(job, log, row):
            if not saved:
                save_checkpoint(job, log, state)
            return False
        profiler.step()
        collector.step()
    return True


def profiler_of(job: Job, log: MetricsLog, num_steps: int) -> AbstractContextManager[StepProfiler]:
    """Return the profiler of this rank, whose summary is logged."""
    accelerator = job.accelerator
    return profile_steps(job.folder.path, num_steps, accelerator.device, accelerator.process_index, log.say)


def checkpoint_is_due(output: Output, step: int, last: int) -> bool:
    """Return whether the state after a step is saved."""
    return step % output.checkpoint_every == 0 or step in (last, *output.checkpoint_at)


def train_step(job: Job, state: TrainState) -> Row | None:
    """Do the next optimizer step and return its row of metrics; None where a signal to any rank interrupted it.

    The host waits for the device once, for loss and gradient norm. On a GPU the next step's gradients are enqueued by then, where
    nothing is due between the two steps. A step with an anomaly leaves the weights as they are.
    """
    recipe, step, batch = job.recipe, state.step, state.step + state.skipped_batches
    started, summed = gradients_of(job, step, batch)
    if summed is None:
        return None
    values, norms = update(job, state, summed)
    if job.runs_ahead and not something_is_due(recipe, step + 1, job.num_steps):
        job.ahead.enqueued((step + 1, batch + 1), sum_gradients(job, step + 1, batch + 1))
    loss_sum, grad_norm, *squares = values.read()
    loss = job.mean_loss(loss_sum)
    if (anomaly := find_anomaly(state.history, loss, grad_norm, recipe.anomalies)) is None:
        remember(state.history, loss, grad_norm)
    job.ahead.since = time.perf_counter()
    tokens_per_s = recipe.training.tokens_per_step / (job.ahead.since - started)
    row = {
        "step": step + 1,
        "tokens": (step + 1) * recipe.training.tokens_per_step,
        "loss": loss,
        "val_loss": None,
        "learning_rate": learning_rate(step, job.num_steps, recipe.optimizer.peak_learning_rate, recipe.schedule),
        "grad_norm": grad_norm,
        "tokens_per_s": tokens_per_s,
        "mfu": job.mfu(tokens_per_s),
        "peak_memory_bytes": peak_memory_bytes(job.accelerator.device),
    }
    return row | (norms.by_layer(squares) if norms else {}) | ({"anomaly": anomaly} if anomaly else {})


def gradients_of(job: Job, step: int, batch: int) -> tuple[float, torch.Tensor | None]:
    """Return when the device began a step, and its summed loss, with gradients in place: enqueued earlier, or computed now."""
    ahead, key = job.ahead, (step, batch)
    if ahead.holds(key):
        ahead.key = None
        return ahead.since, ahead.summed
    if ahead.key is not None:  # enqueued for another step, before a rollback
        ahead.key = None
        zero_gradients(job.model, job.optimizer)
    return time.perf_counter(), sum_gradients(job, step, batch)


def update(job: Job, state: TrainState, summed: torch.Tensor) -> tuple[Readback, LayerNorms | None]:
    """Clip and update, unless loss or gradient norm is an anomaly.

    Returns these two on their way to the host, followed by the squares of the layers' norms where the recipe asks for them. The
    host does not wait here where a flag on the device can skip the update.
    """
    recipe, optimizer = job.recipe, job.optimizer
    norms = layer_norms(job.causal_lm) if recipe.output.layer_norms else None
    grad_norm = full_tensor(job.accelerator.clip_grad_norm_(job.model.parameters(), recipe.optimizer.max_grad_norm))
    grad_norm = torch.as_tensor(grad_norm, dtype=summed.dtype, device=summed.device)  # DeepSpeed gives a number
    judged = torch.stack([job.accelerator.reduce(summed, "sum"), grad_norm])
    values = Readback(torch.cat([judged, *([norms.squares] if norms else [])]))
    if job.flags_updates:
        update_unless(~judged.isfinite().all(), job.inner_optimizer, optimizer.step)
    else:
        loss_sum, norm, *_ = values.read()
        if find_anomaly(state.history, job.mean_loss(loss_sum), norm, recipe.anomalies) is None:
            optimizer.step()
    zero_gradients(job.model, job.optimizer)
    return values, norms


def something_is_due(recipe: Recipe, step: int, last: int) -> bool:
    """Return whether the state after a step is saved or evaluated, so that the next step's gradients must wait."""
    evaluation = recipe.evaluation
    every = [
        evaluation.validate_every,
        *evaluation.tasks.values(),
        *([evaluation.sample_every] if evaluation.sample_every else []),
    ]
    return checkpoint_is_due(recipe.output, step, last) or any(step % interval == 0 for interval in every)


def sum_gradients(job: Job, step: int, batch: int) -> torch.Tensor | None:
    """Compute this rank's gradients of `batch` in a 0-based step. Returns the summed loss; None where a signal came."""
    recipe, accelerator, model = job.recipe, job.accelerator, job.model
    step_learning_rate = learning_rate(step, job.num_steps, recipe.optimizer.peak_learning_rate, recipe.schedule)
    set_learning_rate(job.optimizer, step_learning_rate)  # before the backward pass: DeepSpeed updates inside the last one
    # Dropout depends on (seed, step, rank) alone, so no random state is saved, and nothing done between steps changes it.
    torch.manual_seed(derived_seed(recipe.seed, step, accelerator.process_index))
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_batch in job.batch(batch):
        if job.stop.should_stop():
            return None
        with accelerator.accumulate(model):
            loss = model(**micro_batch)
            accelerator.backward(loss)
            loss_sum += loss.detach()
        job.throttle.mark(accelerator.device)
    return loss_sum


def handle_anomaly(job: Job, state: TrainState, row: Row) -> bool:
    """Return True to continue after an anomaly, the update skipped; False to roll back. Raises `UserError` to stop."""
    policy, step = job.recipe.anomalies, row["step"]
    state.anomalies += 1
    if policy.policy == "stop" or state.anomalies > policy.limit:
        last = job.checkpoints.available()
        raise UserError(
            f"training diverged at step {step}: {row['anomaly']}; the last good checkpoint is kept"
            f" ({last[-1].name if last else 'none yet'}), {state.anomalies - 1} anomalies before were skipped: set"
            " anomalies.policy to skip or rollback and resume from there, or lower optimizer.peak_learning_rate (now"
            f" {job.recipe.optimizer.peak_learning_rate}) or lengthen schedule.warmup_steps in a new output.run_dir"
        )
    how = "its update is skipped" if policy.policy == "skip" else "return to the newest checkpoint, and skip the batches since"
    job.say(f"step {step}: {row['anomaly']}: {how} ({state.anomalies} of at most {policy.limit})")
    return policy.policy == "skip"


def evaluate_and_log(job: Job, log: MetricsLog, row: Row) -> bool:
    """Compute validation loss, scores and samples where they are due, then write the step's row. False where a signal came."""
    evaluation, step = job.recipe.evaluation, row["step"]
    due = step % evaluation.validate_every == 0 or step == job.num_steps
    if due:
        row["val_loss"] = validate(job)
        if row["val_loss"] is None:
            return False
        row |= forecast(job, log, row)
    scores = run_downstream(job, log, step)
    if scores is None:
        return False
    if step == job.num_steps or (evaluation.sample_every and step % evaluation.sample_every == 0):
        write_samples(job, step, log)
    log.write(row | scores)  # last: where the row is missing, a resumed run does again what was due
    if (due or scores) and step < job.num_steps:
        draw(job, log)
    return True


def validate(job: Job) -> float | None:
    """Return the validation loss of the model as it is; None where a signal interrupted it. Collective."""
    return validation_loss(
        job.model,
        job.accelerator,
        job.validation_windows,
        job.validation_order(),
        job.recipe.training.micro_batch_size,
        interrupted=job.stop.should_stop,
    )


def start(job: Job, state: TrainState) -> MetricsLog:
    """Write recipe and environment, open the metrics, start the trackers."""
    accelerator = job.accelerator
    if accelerator.is_main_process:
        require_disk(job)
        launch = {
            "num_processes": accelerator.num_processes,
            "distributed_type": accelerator.distributed_type.value,
            "mixed_precision": accelerator.mixed_precision,
            "device": str(accelerator.device),
            "gradient_accumulation": job.accumulation,
            "resumed_from_step": state.step,
        }
        job.folder.write_start(job.recipe, launch, command_typed())
    return MetricsLog(job.folder, accelerator, state.step, job.num_steps, flatten(job.recipe.model_dump()))


def _evaluate(job: Job, resume: str) -> CheckpointLoss | Stopped:
    """Load a checkpoint and compute its validation loss."""
    state = load_checkpoint(job, resume, eval_only=True)
    loss = validate(job)
    if loss is None:
        return Stopped(f"{job.stop.signal or 'a signal to another rank'}: stopped")
    bytes_per_token, unigram_entropy_nats = job.validation_statistics
    return CheckpointLoss(state.step, loss, bits_per_byte(loss, bytes_per_token), unigram_entropy_nats)


def _dry_run(job: Job) -> Stopped | None:
    """Log what was found, do one real step, and log what would be done."""
    job.say(to_yaml(job.recipe) + "\n".join(describe(job)))
    require_disk(job)
    there = job.checkpoints.available()
    resuming = f", resuming from {there[-1].name}" if there else ""
    warm_up(job.model, job.optimizer, job.accelerator, job.batch(step=0)[0])
    started = time.perf_counter()
    row = train_step(job, TrainState())
    if row is None:
        return Stopped(f"{job.stop.signal or 'a signal to another rank'}: stopped")
    if "anomaly" in row:
        raise UserError(f"the first step already fails: {row['anomaly']}; lower model.initializer_range")
    step_s = time.perf_counter() - started
    job.say(
        f"one step: loss {row['loss']:.4f} (ln of the vocabulary is {math.log(job.recipe.model.vocab_size):.4f}), gradient norm"
        f" {row['grad_norm']:.3f}, {step_s:.2f} s, peak memory {row['peak_memory_bytes']:,} bytes\n"
        f"dry run: would train {job.num_steps:,} steps in about {job.num_steps * step_s / 3600:.2f} h (at the first step's"
        f" pace, the slowest) and write {job.folder.path}{resuming}; nothing was written"
    )
    return None
