"""Pretrain: prepared windows become a trained model that `from_pretrained` opens.

Entered by `pretrain(recipe)`, under `accelerate launch` or plain python. A run that was stopped goes on from its newest whole
checkpoint, bit for bit; a finished one is left alone.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from isoflop.anomaly import find_anomaly, remember
from isoflop.checkpoint.folder import list_checkpoints
from isoflop.cpu import keep_freed_memory
from isoflop.data.order import derived_seed
from isoflop.distributed import asked_for_cpu, build_accelerator, command_typed, reduce_sum
from isoflop.errors import UserError
from isoflop.flight_recorder import describe_dumps, enable_flight_recorder
from isoflop.garbage import StepCollector, collected_by_hand
from isoflop.job import Job, build_job, check_data, describe, require_disk
from isoflop.metrics import LayerNorms, MetricsLog, full_tensor, layer_norms, peak_memory_bytes, start_trackers
from isoflop.optim import learning_rate
from isoflop.outcome import draw, finish, forecast, push_to_hub, report, run_downstream, write_samples
from isoflop.output import note_in
from isoflop.profiling import StepProfiler, profile_steps
from isoflop.publish.upload import check_hub
from isoflop.recipe import Output, Recipe, flatten
from isoflop.recipe_file import to_yaml
from isoflop.records import Row
from isoflop.resume import NEWEST, Progress, load_checkpoint, prune_checkpoints, roll_back, save_checkpoint
from isoflop.run_ahead import Readback, update_unless
from isoflop.run_folder import RunFolder
from isoflop.stop import EXIT_RESUME, StopRequest, leave_after_lost_rank
from isoflop.validation import bits_per_byte, untouched_random_state, validation_loss


def pretrain(
    recipe: Recipe, resume: str | None = None, eval_only: bool = False, dry_run: bool = False, profile_steps: int = 0
) -> int:
    """Run a recipe to its end, or up to a signal; returns the exit code.

    `resume` None goes on from the newest whole checkpoint if there is one; `NEWEST` requires one; a step number takes
    that checkpoint. `eval_only` measures the checkpoint's validation loss; `dry_run` checks everything, does one step on
    real data and writes nothing. `profile_steps` optimizer steps are traced into the run folder.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    if any(int(os.environ.get(f"{launcher}_RESTART_COUNT", "0")) for launcher in ("TORCHELASTIC", "SLURM")):
        resume = None  # a launcher that starts its command again means to go on, not back again to where that began
    folder = RunFolder(recipe.output.run_dir)
    folder.check_owner(recipe)
    if (summary := folder.finished()) and not (eval_only or dry_run):
        if is_main:
            print(f"{folder.path} is finished:")
            report(folder, summary)
        return 0
    if recipe.hub.repo_id and is_main and not eval_only:
        check_hub(recipe.hub.repo_id, recipe)
    with StopRequest() as stop:
        manifest = check_data(recipe, every_byte=os.environ.get("LOCAL_RANK", "0") == "0")  # once a node: each may have a copy
        if not (dry_run or eval_only or asked_for_cpu()):  # which hides the GPUs, before anything has counted them
            enable_flight_recorder(folder.path)
        accelerator = build_accelerator(recipe.output)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        try:
            code = carry_out(build_job(recipe, manifest, accelerator, stop), resume, eval_only, dry_run, profile_steps)
        except RuntimeError as error:
            leave_after_lost_rank(error)
            raise
        # By now the job is gone, and with it DDP's reducer. Were that the last to let go of the process group, it would end
        # gloo's threads while holding the interpreter's lock, which one of them may wait for: seen to hang in torch 2.13.
        accelerator.free_memory()
        accelerator.end_training()
    if is_main and code == 0 and not (eval_only or dry_run):
        push_to_hub(recipe, folder)
    return code


def carry_out(job: Job, resume: str | None, eval_only: bool, dry_run: bool, num_profiled: int) -> int:
    """Do with a job what was asked for; returns the exit code."""
    if dry_run:
        return check_only(job)
    if job.accelerator.is_main_process and not eval_only:
        job.folder.claim()
        note_in(job.folder.path)
    progress = load_checkpoint(job, resume or (NEWEST if eval_only else None), eval_only)
    if eval_only:
        return evaluate_only(job, progress)
    job.accelerator.print("\n".join(describe(job)))
    if note := describe_dumps(job.folder.path):
        job.accelerator.print(note)
    log = start(job, progress)
    try:
        with collected_by_hand() as collector, profiler_of(job, log, num_profiled) as profiler:
            completed = train(job, log, progress, profiler, collector)
            job.saver.wait()  # before the profiler writes: within a grace period the checkpoint comes first
            job.saver.close()
            if completed:  # also where a launch was killed behind its last step
                prune_checkpoints(job, log.curve, job.num_steps)
                draw(job, log)
    finally:
        log.close()
    if completed:
        finish(job, log.curve)
        if job.push:
            job.push.wait()
        return 0
    if job.push:
        job.push.leave()
    kept = list_checkpoints(job.folder.checkpoints)
    onwards = (
        f"saved; the same command{' without --resume-from' if resume not in (None, NEWEST) else ''} goes on from {kept[-1].name}"
        if kept
        else "no step was finished; the same command starts over"
    )
    job.accelerator.print(f"{job.stop.signal or 'a signal to another rank'}: {onwards}")
    return EXIT_RESUME


def train(job: Job, log: MetricsLog, progress: Progress, profiler: StepProfiler, collector: StepCollector) -> bool:
    """The training loop. False when a signal ended it early, with a checkpoint of the last finished step."""
    job.stop.arm()
    warm_up(job)
    stopped_before_its_row = reduce_sum(job.accelerator, float(log.lacks(progress.step)))
    if stopped_before_its_row and not measure(job, log, progress.row or {}):
        return False
    started, saved = time.perf_counter() - progress.elapsed_s, True
    while progress.step < job.num_steps:
        row = train_step(job, progress)
        if row and "anomaly" in row and not passes(job, progress, row):
            progress, saved = roll_back(job, log, progress), True
            continue
        if row:
            progress.step, progress.row, progress.elapsed_s = row["step"], row, time.perf_counter() - started
            row |= {"anomalies": progress.anomalies, "elapsed_s": progress.elapsed_s}
            if saved := checkpoint_is_due(job.recipe.output, progress.step, job.num_steps):
                save_checkpoint(job, log, progress)
        if row is None or not measure(job, log, row):
            if not saved:
                save_checkpoint(job, log, progress)
            return False
        profiler.step()
        collector.step()
    return True


def profiler_of(job: Job, log: MetricsLog, num_steps: int) -> AbstractContextManager[StepProfiler]:
    """The profiler of this rank, whose summary is printed above the progress bar."""
    accelerator = job.accelerator
    return profile_steps(job.folder.path, num_steps, accelerator.device, accelerator.process_index, log.say)


def checkpoint_is_due(output: Output, step: int, last: int) -> bool:
    """Whether the state behind a step is saved."""
    return step % output.checkpoint_every == 0 or step in (last, *output.checkpoint_at)


def train_step(job: Job, progress: Progress) -> Row | None:
    """The next optimizer step and its row for the metrics; None where a signal to any rank came in its middle.

    The device is waited for once, for loss and gradient norm; on a GPU with the next step's gradients enqueued behind them, where
    nothing is due between the two. A step with an anomaly leaves the weights as they are.
    """
    recipe, step, batch = job.recipe, progress.step, progress.step + progress.passed_over
    started, summed = gradients_of(job, step, batch)
    if summed is None:
        return None
    values, norms = update(job, progress, summed)
    if job.runs_ahead and not something_is_due(recipe, step + 1, job.num_steps):
        job.ahead.enqueued((step + 1, batch + 1), sum_gradients(job, step + 1, batch + 1))
    loss_sum, grad_norm, *squares = values.read()
    loss = job.mean_loss(loss_sum)
    if (anomaly := find_anomaly(progress.history, loss, grad_norm, recipe.anomalies)) is None:
        remember(progress.history, loss, grad_norm)
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
    """When the device began a step, and the step's summed loss with its gradients in place: those enqueued ahead, or made now."""
    ahead, key = job.ahead, (step, batch)
    if ahead.holds(key):
        ahead.key = None
        return ahead.since, ahead.summed
    if ahead.key is not None:  # a rollback went elsewhere
        ahead.key = None
        zero_gradients(job)
    return time.perf_counter(), sum_gradients(job, step, batch)


def update(job: Job, progress: Progress, summed: torch.Tensor) -> tuple[Readback, LayerNorms | None]:
    """Clip and update, unless loss or gradient norm is an anomaly. Returns these two, on their way from the device, and behind
    them the squares of the layers' norms where the recipe asks for those.

    Where the optimizer can be stopped by a flag on the device the host does not wait here.
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
        if find_anomaly(progress.history, job.mean_loss(loss_sum), norm, recipe.anomalies) is None:
            optimizer.step()
    zero_gradients(job)
    return values, norms


def zero_gradients(job: Job) -> None:
    """Let go of the gradients."""
    job.optimizer.zero_grad(set_to_none=not isinstance(job.model, DistributedDataParallel))  # DDP's buckets are the gradients


def something_is_due(recipe: Recipe, step: int, last: int) -> bool:
    """Whether the state behind a step is saved or evaluated, so that the next step's gradients have to wait."""
    evaluation = recipe.evaluation
    every = [
        evaluation.validate_every,
        *evaluation.tasks.values(),
        *([evaluation.sample_every] if evaluation.sample_every else []),
    ]
    return checkpoint_is_due(recipe.output, step, last) or any(step % interval == 0 for interval in every)


def sum_gradients(job: Job, step: int, batch: int) -> torch.Tensor | None:
    """Gradients of a 0-based step's share of `batch`, and its summed loss; None where a signal to any rank came."""
    recipe, accelerator, model = job.recipe, job.accelerator, job.model
    rate = learning_rate(step, job.num_steps, recipe.optimizer.peak_learning_rate, recipe.schedule)
    for group in job.optimizer.param_groups:  # now, since DeepSpeed updates inside the last backward pass
        group["lr"] = rate
    # Dropout follows from (seed, step, rank) alone, so no random state is saved; nothing done between steps can disturb it.
    torch.manual_seed(derived_seed(recipe.seed, step, accelerator.process_index))
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_batch in job.batch(batch):
        if job.stop.agreed():
            return None
        with accelerator.accumulate(model):
            loss = model(**micro_batch)
            accelerator.backward(loss)
            loss_sum += loss.detach()
        job.throttle.mark(accelerator.device)
    return loss_sum


def passes(job: Job, progress: Progress, row: Row) -> bool:
    """Whether to go on behind a step with an anomaly, its update left out; False to roll back. Raises `UserError` to stop."""
    policy, step = job.recipe.anomalies, row["step"]
    progress.anomalies += 1
    if policy.policy == "stop" or progress.anomalies > policy.limit:
        last = list_checkpoints(job.folder.checkpoints)
        raise UserError(
            f"training diverged at step {step}: {row['anomaly']}; the last good checkpoint is kept"
            f" ({last[-1].name if last else 'none yet'}), {progress.anomalies - 1} anomalies were passed before: set"
            " anomalies.policy to skip or rollback and go on from there, or lower optimizer.peak_learning_rate (now"
            f" {job.recipe.optimizer.peak_learning_rate}) or lengthen schedule.warmup_steps in a new output.run_dir"
        )
    how = "its update is skipped" if policy.policy == "skip" else "back to the newest checkpoint, and past its batches"
    job.accelerator.print(f"step {step}: {row['anomaly']}: {how} ({progress.anomalies} of at most {policy.limit})")
    return policy.policy == "skip"


def warm_up(job: Job) -> None:
    """Run forward and backward passes that count for nothing, where an engine settles something in its first ones.

    DDP arranges its gradient buckets after the first backward pass. The sums of three ranks or more depend on the arrangement in
    their last bits, so a resumed run would differ from an undisturbed one. The second pass fills the new buckets; the old ones
    are freed before. FSDP2 takes the module of the first forward pass for its root, and a resumed run may start with samples,
    whose forward passes are the inner model's.
    """
    if isinstance(job.model, DistributedDataParallel):
        micro_batch = job.batch(step=0)[0]
        for set_to_none in (True, False):
            job.accelerator.backward(job.model(**micro_batch))
            job.optimizer.zero_grad(set_to_none=set_to_none)
    elif isinstance(job.model, FSDPModule):
        with torch.no_grad(), untouched_random_state(job.accelerator.device):
            job.model(**job.batch(step=0)[0])


def measure(job: Job, log: MetricsLog, row: Row) -> bool:
    """Validation loss, downstream scores and samples where they are due, then the step's row; False when a signal came."""
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
    log.write(row | scores)  # the last thing of a step: a run that resumes does again what was due, where the row is missing
    if (due or scores) and step < job.num_steps:
        draw(job, log)
    return True


def validate(job: Job) -> float | None:
    """Validation loss of the model as it is; None when a signal interrupted it. Collective."""
    return validation_loss(
        job.model,
        job.accelerator,
        job.validation_windows,
        job.validation_order(),
        job.recipe.training.micro_batch_size,
        interrupted=job.stop.agreed,
    )


def start(job: Job, progress: Progress) -> MetricsLog:
    """Write recipe and environment, start the trackers, open the metrics."""
    accelerator = job.accelerator
    if accelerator.is_main_process:
        require_disk(job)
        launch = {
            "num_processes": accelerator.num_processes,
            "distributed_type": accelerator.distributed_type.value,
            "mixed_precision": accelerator.mixed_precision,
            "device": str(accelerator.device),
            "gradient_accumulation": job.accumulation,
            "resumed_from_step": progress.step,
        }
        job.folder.write_start(job.recipe, launch, command_typed())
    start_trackers(accelerator, flatten(job.recipe.model_dump()))
    return MetricsLog(job.folder, accelerator, progress.step, job.num_steps)


def evaluate_only(job: Job, progress: Progress) -> int:
    """Print the validation loss of a checkpoint."""
    loss = validate(job)
    if loss is None:
        return EXIT_RESUME
    bytes_per_token, unigram_entropy_nats = job.validation_facts
    job.accelerator.print(
        f"step {progress.step}: validation loss {loss:.6f} nats per token"
        f" ({bits_per_byte(loss, bytes_per_token):.4f} bits per byte); token frequencies alone: {unigram_entropy_nats:.4f}"
    )
    return 0


def check_only(job: Job) -> int:
    """The checklist before a long run: what was found, one real step, what would be done."""
    job.accelerator.print(to_yaml(job.recipe) + "\n".join(describe(job)))
    require_disk(job)
    there = list_checkpoints(job.folder.checkpoints)
    onwards = f", going on from {there[-1].name}" if there else ""
    warm_up(job)
    started = time.perf_counter()
    row = train_step(job, Progress())
    if row is None:
        return EXIT_RESUME
    if "anomaly" in row:
        raise UserError(f"the first step already fails: {row['anomaly']}; lower model.initializer_range")
    step_s = time.perf_counter() - started
    job.accelerator.print(
        f"one step: loss {row['loss']:.4f} (ln of the vocabulary is {math.log(job.recipe.model.vocab_size):.4f}), gradient norm"
        f" {row['grad_norm']:.3f}, {step_s:.2f} s, peak memory {row['peak_memory_bytes']:,} bytes\n"
        f"dry run: would train {job.num_steps:,} steps in about {job.num_steps * step_s / 3600:.2f} h (at the first step's"
        f" pace, the slowest) and write {job.folder.path}{onwards}; nothing was written"
    )
    return 0
