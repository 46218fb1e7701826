"""Pretrain: prepared windows become a trained model that `from_pretrained` opens.

Entered by `pretrain(recipe)`, under `accelerate launch` or plain python. A run that was stopped goes on from its newest whole
checkpoint, bit for bit; a finished one is left alone.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from isoflop import checkpoint, cost
from isoflop.data.order import derived_seed
from isoflop.distributed import EXIT_RESUME, StopRequest, build_accelerator, reduce_sum
from isoflop.errors import UserError
from isoflop.job import Job, build_job, check_data, describe, require_disk
from isoflop.metrics import MetricsLog, Row, draw_curve, layer_norms, peak_memory_bytes
from isoflop.optim import learning_rate
from isoflop.outcome import finish, push_to_hub, report, write_samples
from isoflop.recipe import Recipe, flatten
from isoflop.recipe_file import to_yaml
from isoflop.run_folder import RunFolder
from isoflop.validation import bits_per_byte, validation_loss

NEWEST = "newest"


def pretrain(recipe: Recipe, resume: str | None = None, eval_only: bool = False, dry_run: bool = False) -> int:
    """Run a recipe to its end, or up to a signal; returns the exit code.

    `resume` None goes on from the newest whole checkpoint if there is one; `NEWEST` requires one; a step number takes
    that checkpoint. `eval_only` measures the checkpoint's validation loss; `dry_run` checks everything, does one step on
    real data and writes nothing.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    folder = RunFolder(recipe.output.run_dir)
    folder.check_owner(recipe)
    if (summary := folder.finished()) and not (eval_only or dry_run):
        if is_main:
            print(f"{folder.path} is finished:")
            report(folder, summary)
        return 0
    with StopRequest() as stop:
        manifest = check_data(recipe, is_main)
        accelerator = build_accelerator(recipe.output)
        code = carry_out(build_job(recipe, manifest, accelerator, stop), resume, eval_only, dry_run)
        # By now the job is gone, and with it DDP's reducer. Were that the last to let go of the process group, it would end
        # gloo's threads while holding the interpreter's lock, which one of them may wait for: seen to hang in torch 2.13.
        accelerator.free_memory()
        accelerator.end_training()
    if is_main and code == 0 and not (eval_only or dry_run):
        push_to_hub(recipe, folder)
    return code


def carry_out(job: Job, resume: str | None, eval_only: bool, dry_run: bool) -> int:
    """Do with a job what was asked for; returns the exit code."""
    if dry_run:
        return check_only(job)
    if job.accelerator.is_main_process and not eval_only:
        job.folder.claim()
    state = load_checkpoint(job, resume or (NEWEST if eval_only else None), eval_only)
    if eval_only:
        return evaluate_only(job, state)
    job.accelerator.print("\n".join(describe(job)))
    log = start(job, state)
    try:
        completed = train(job, log, state)
    finally:
        log.close()
    if completed:
        finish(job, log.rows)
        return 0
    kept = checkpoint.list_checkpoints(job.folder.checkpoints)
    onwards = (
        f"saved; the same command goes on from {kept[-1].name}" if kept else "no step was finished; the same command starts over"
    )
    job.accelerator.print(f"{job.stop.signal or 'a signal to another rank'}: {onwards}")
    return EXIT_RESUME


def train(job: Job, log: MetricsLog, state: dict[str, Any]) -> bool:
    """The training loop. False when a signal ended it early, with a checkpoint of the last finished step."""
    job.stop.arm()
    settle_buckets(job)
    stopped_before_its_row = reduce_sum(job.accelerator, float(log.lacks(state["step"])))
    if stopped_before_its_row and not measure(job, log, state["row"]):
        return False
    started = time.perf_counter() - state["elapsed_s"]
    row, saved = state["row"], True
    for step in range(state["step"], job.num_steps):
        trained = train_step(job, step)
        if trained is not None:
            row = trained | {"elapsed_s": time.perf_counter() - started}
            require_finite(job, row)
            saved = row["step"] % job.recipe.output.checkpoint_every == 0 or row["step"] == job.num_steps
            if saved:
                save_checkpoint(job, log, row)
        if trained is None or not measure(job, log, row):
            if not saved:
                save_checkpoint(job, log, row)
            return False
    return True


def train_step(job: Job, step: int) -> Row | None:
    """One optimizer step (0-based `step`) and its row for the metrics; None where a signal to any rank came in its middle.

    The device is waited for once, at the end.
    """
    recipe, accelerator, model, optimizer = job.recipe, job.accelerator, job.model, job.optimizer
    started = time.perf_counter()
    # Dropout follows from (seed, step, rank) alone, so no random state is saved; nothing done between steps can disturb it.
    torch.manual_seed(derived_seed(recipe.seed, step, accelerator.process_index))
    rate = learning_rate(step, job.num_steps, recipe.optimizer.peak_learning_rate, recipe.schedule)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss_sum, norms = torch.zeros((), device=accelerator.device), {}
    for micro_batch in job.batch(step):
        if job.stop.agreed():
            return None
        with accelerator.accumulate(model):
            loss = model(micro_batch)
            accelerator.backward(loss)
            loss_sum += loss.detach()
            if accelerator.sync_gradients:
                if recipe.output.layer_norms:
                    norms = layer_norms(job.causal_lm)
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=accelerator.num_processes == 1)  # DDP's buckets, once filled, are the gradients
    total_loss = reduce_sum(accelerator, loss_sum)
    tokens_per_s = recipe.training.tokens_per_step / (time.perf_counter() - started)
    row = {
        "step": step + 1,
        "tokens": (step + 1) * recipe.training.tokens_per_step,
        "loss": total_loss / (job.accumulation * accelerator.num_processes),
        "val_loss": None,
        "learning_rate": rate,
        "grad_norm": float(grad_norm),
        "tokens_per_s": tokens_per_s,
        "mfu": job.mfu(tokens_per_s),
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
    }
    return row | norms


def settle_buckets(job: Job) -> None:
    """Let DDP arrange its gradient buckets in backward passes that count for nothing.

    It does so after the first one; the sums of three ranks or more depend on the arrangement in their last bits, so a resumed run
    would differ from an undisturbed one. The second fills the new buckets; the old ones are let go before they are made.
    """
    if job.accelerator.num_processes > 1:
        micro_batch = job.batch(step=0)[0]
        for set_to_none in (True, False):
            job.accelerator.backward(job.model(micro_batch))
            job.optimizer.zero_grad(set_to_none=set_to_none)


def measure(job: Job, log: MetricsLog, row: Row) -> bool:
    """Validation loss and samples where they are due, then the step's row; False when a signal came meanwhile."""
    evaluation, step = job.recipe.evaluation, row["step"]
    due = step % evaluation.validate_every == 0 or step == job.num_steps
    if due:
        row["val_loss"] = validate(job)
        if row["val_loss"] is None:
            return False
    log.write(row)
    if evaluation.sample_every and step % evaluation.sample_every == 0:
        write_samples(job, step, log)
    if due and job.accelerator.is_main_process:
        title = f"{job.folder.path.name}: {cost.parameters(job.recipe.model) / 1e6:,.1f}M parameters"
        draw_curve(log.rows, job.folder.curve, title, job.manifest.splits["validation"].unigram_entropy_nats)
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


def require_finite(job: Job, row: Row) -> None:
    """Stop at a loss or gradient that is not a number, before anything of it is saved."""
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
        return
    last = checkpoint.list_checkpoints(job.folder.checkpoints)
    raise UserError(
        f"training diverged at step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}; the last good"
        f" checkpoint is kept ({last[-1].name if last else 'none yet'}): lower optimizer.peak_learning_rate (now"
        f" {job.recipe.optimizer.peak_learning_rate}) or lengthen schedule.warmup_steps, in a new output.run_dir"
    )


def save_checkpoint(job: Job, log: MetricsLog, row: Row) -> None:
    """Save the state after a step, with the row that the metrics may not have yet."""
    output = job.recipe.output
    log.sync()
    state = {"step": row["step"], "elapsed_s": row["elapsed_s"], "row": row, "data": job.manifest.fingerprint()}
    checkpoint.save(job.folder.checkpoints, row["step"], job.model, inner_optimizer(job), state)
    if job.accelerator.is_main_process:
        checkpoint.prune(job.folder.checkpoints, output.keep_last, output.keep_every)


def load_checkpoint(job: Job, resume: str | None, eval_only: bool) -> dict[str, Any]:
    """Load what `resume` names, and return its trainer state; a fresh one where there is nothing to resume."""
    chosen: list[Path | None] = [None]
    if job.accelerator.is_main_process:
        chosen = [choose_checkpoint(job.folder.checkpoints, resume)]
    path = broadcast_object_list(chosen)[0]
    if path is None:
        return {"step": 0, "elapsed_s": 0.0, "row": None}
    job.accelerator.print(f"{'measuring' if eval_only else 'resuming from'} {path}")
    state = checkpoint.load(path, job.model, None if eval_only else inner_optimizer(job))
    if state["data"] != job.manifest.fingerprint():
        raise UserError(
            f"data.prepared_dir = {job.recipe.data.prepared_dir!r} holds other windows than {path} was trained on, made"
            " from the same recipe but other files; put the earlier ones back, or start over in another output.run_dir"
        )
    if job.accelerator.is_main_process and not eval_only:
        checkpoint.discard_after(job.folder.checkpoints, state["step"])  # broken, or to be trained again
    return state


def choose_checkpoint(checkpoints: Path, resume: str | None) -> Path | None:
    """The checkpoint that `resume` asks for. Raises `UserError` where it is not there or not whole."""
    listed = checkpoint.list_checkpoints(checkpoints)
    if resume is None or resume == NEWEST:
        newest = checkpoint.newest_whole(checkpoints)
        if newest is None and (listed or resume == NEWEST):
            raise UserError(
                f"{checkpoints} has no whole checkpoint"
                + (
                    f" ({', '.join(path.name for path in listed)} are broken); put one back, or delete the run's folder"
                    if listed
                    else ""
                )
                + "; to start from step 0 leave out --resume and --eval-only"
            )
        return newest
    path = checkpoints / f"step-{resume.removeprefix('step-')}"
    if faults := checkpoint.find_faults(path):
        there = ", ".join(known.name for known in listed) or "none"
        raise UserError(f"--resume-from {resume}: {path} is not whole ({'; '.join(faults)}); there are: {there}")
    return path


def inner_optimizer(job: Job) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper, whose state the checkpoint holds."""
    inner: torch.optim.Optimizer = getattr(job.optimizer, "optimizer", job.optimizer)
    return inner


def start(job: Job, state: dict[str, Any]) -> MetricsLog:
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
            "resumed_from_step": state["step"],
        }
        job.folder.write_start(job.recipe, launch)
    if job.recipe.output.trackers:
        scalars = {k: v if isinstance(v, int | float | str) else str(v) for k, v in flatten(job.recipe.model_dump()).items()}
        accelerator.init_trackers("isoflop", config=scalars)
    return MetricsLog(job.folder.metrics, accelerator, state["step"], job.num_steps)


def evaluate_only(job: Job, state: dict[str, Any]) -> int:
    """Print the validation loss of a checkpoint."""
    loss = validate(job)
    if loss is None:
        return EXIT_RESUME
    split = job.manifest.splits["validation"]
    job.accelerator.print(
        f"step {state['step']}: validation loss {loss:.6f} nats per token ({bits_per_byte(loss, split):.4f} bits per byte);"
        f" token frequencies alone: {split.unigram_entropy_nats:.4f}"
    )
    return 0


def check_only(job: Job) -> int:
    """The checklist before a long run: what was found, one real step, what would be done."""
    job.accelerator.print(to_yaml(job.recipe) + "\n".join(describe(job)))
    require_disk(job)
    there = checkpoint.list_checkpoints(job.folder.checkpoints)
    onwards = f", going on from {there[-1].name}" if there else ""
    settle_buckets(job)
    started = time.perf_counter()
    row = train_step(job, step=0)
    if row is None:
        return EXIT_RESUME
    require_finite(job, row)
    step_s = time.perf_counter() - started
    job.accelerator.print(
        f"one step: loss {row['loss']:.4f} (ln of the vocabulary is {math.log(job.recipe.model.vocab_size):.4f}), gradient norm"
        f" {row['grad_norm']:.3f}, {step_s:.2f} s, peak memory {row['peak_memory_bytes']:,} bytes\n"
        f"dry run: would train {job.num_steps:,} steps in about {job.num_steps * step_s / 3600:.2f} h (at the first step's"
        f" pace, the slowest) and write {job.folder.path}{onwards}; nothing was written"
    )
    return 0
