"""Pretrain: prepared windows become a trained model that `from_pretrained` opens.

Entered by `pretrain(recipe)`, under `accelerate launch` or plain python. A run that was stopped goes on from its newest whole
checkpoint, bit for bit; a finished one is left alone.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.utils.logging import disable_progress_bar

from isoflop import checkpoint, cost
from isoflop.data.order import derived_seed
from isoflop.distributed import EXIT_RESUME, StopRequest, build_accelerator, reduce_sums
from isoflop.errors import UserError
from isoflop.job import Job, build_job, check_data, describe, require_disk
from isoflop.metrics import MetricsLog, Row, draw_curve, layer_norms, peak_memory_bytes
from isoflop.optim import learning_rate
from isoflop.recipe import Recipe, flatten
from isoflop.recipe_file import to_yaml
from isoflop.run_folder import RunFolder
from isoflop.validation import bits_per_byte, sample_texts, validation_loss

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
    return code


def carry_out(job: Job, resume: str | None, eval_only: bool, dry_run: bool) -> int:
    """Do with a job what was asked for; returns the exit code."""
    if dry_run:
        return check_only(job)
    if job.accelerator.is_main_process and not eval_only:
        job.folder.claim()
    state = load_checkpoint(job, resume or (NEWEST if eval_only else None))
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
    job.accelerator.print(f"{job.stop.signal or 'a signal to another rank'}: saved; the same command goes on from here")
    return EXIT_RESUME


def train(job: Job, log: MetricsLog, state: dict[str, Any]) -> bool:
    """The training loop. False when a signal ended it early, with a checkpoint of the last step."""
    job.stop.arm()
    stopped_before_its_row = reduce_sums(job.accelerator, [float(log.lacks(state["step"]))])[0]
    if stopped_before_its_row and not measure(job, log, state["row"]):
        return False
    started = time.perf_counter() - state["elapsed_s"]
    for step in range(state["step"], job.num_steps):
        row, stop = train_step(job, step)
        row["elapsed_s"] = time.perf_counter() - started
        require_finite(job, row)
        saved = stop or row["step"] % job.recipe.output.checkpoint_every == 0 or row["step"] == job.num_steps
        if saved:
            log.sync()
            save_checkpoint(job, row)
        if not stop and measure(job, log, row):
            continue
        if not saved:  # the signal came during the evaluation
            save_checkpoint(job, row)
        return False
    return True


def train_step(job: Job, step: int) -> tuple[Row, bool]:
    """One optimizer step (0-based `step`): its row for the metrics, and whether any rank was told to stop.

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
        with accelerator.accumulate(model):
            loss = model(micro_batch)
            accelerator.backward(loss)
            loss_sum += loss.detach()
            if accelerator.sync_gradients:
                if recipe.output.layer_norms:
                    norms = layer_norms(job.causal_lm)
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    total_loss, stopping = reduce_sums(accelerator, [loss_sum, float(job.stop.signal is not None)])
    step_s = time.perf_counter() - started
    tokens_per_s, peak = recipe.training.tokens_per_step / step_s, job.peak_flops()
    row = {
        "step": step + 1,
        "tokens": (step + 1) * recipe.training.tokens_per_step,
        "loss": total_loss / (job.accumulation * accelerator.num_processes),
        "val_loss": None,
        "learning_rate": rate,
        "grad_norm": float(grad_norm),
        "tokens_per_s": tokens_per_s,
        "mfu": peak and tokens_per_s * cost.flops_per_token(recipe.model, recipe.training.sequence_length) / peak,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
    }
    return row | norms, stopping > 0


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
        interrupted=lambda: job.stop.agreed(job.accelerator),
    )


def write_samples(job: Job, step: int, log: MetricsLog | None = None) -> list[str]:
    """Sample text on the main process, into `samples.jsonl` and onto the screen."""
    if not job.accelerator.is_main_process:
        return []
    evaluation = job.recipe.evaluation
    texts = sample_texts(job.causal_lm, job.tokenizer, evaluation.sample_prompts, evaluation.sample_tokens)
    with job.folder.samples.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"step": step, "samples": texts}) + "\n")
    if log:
        log.say("\n".join(f"step {step}: sample: {text!r}" for text in texts))
    return texts


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


def save_checkpoint(job: Job, row: Row) -> None:
    """Save the state after a step, with the row that the metrics may not have yet."""
    output = job.recipe.output
    state = {"step": row["step"], "elapsed_s": row["elapsed_s"], "row": row, "data": job.manifest.fingerprint()}
    checkpoint.save(job.folder.checkpoints, row["step"], job.model, inner_optimizer(job), state)
    if job.accelerator.is_main_process:
        checkpoint.prune(job.folder.checkpoints, output.keep_last, output.keep_every)


def load_checkpoint(job: Job, resume: str | None) -> dict[str, Any]:
    """Load what `resume` names, and return its trainer state; a fresh one where there is nothing to resume."""
    chosen: list[Path | None] = [None]
    if job.accelerator.is_main_process:
        chosen = [choose_checkpoint(job.folder.checkpoints, resume)]
    path = broadcast_object_list(chosen)[0]
    if path is None:
        return {"step": 0, "elapsed_s": 0.0, "row": None}
    job.accelerator.print(f"resuming from {path}")
    state = checkpoint.load(path, job.model, inner_optimizer(job))
    if state["data"] != job.manifest.fingerprint():
        raise UserError(
            f"data.prepared_dir = {job.recipe.data.prepared_dir!r} holds other windows than {path} was trained on, made"
            " from the same recipe but other files; put the earlier ones back, or start over in another output.run_dir"
        )
    return state


def choose_checkpoint(checkpoints: Path, resume: str | None) -> Path | None:
    """The checkpoint that `resume` asks for. Raises `UserError` where it is not there or not whole."""
    if resume is None or resume == NEWEST:
        newest = checkpoint.newest_whole(checkpoints)
        if newest is None and resume == NEWEST:
            raise UserError(f"{checkpoints} has no whole checkpoint; start the run without --resume and --eval-only")
        return newest
    path = checkpoints / f"step-{resume.removeprefix('step-')}"
    if faults := checkpoint.find_faults(path):
        there = ", ".join(known.name for known in checkpoint.list_checkpoints(checkpoints)) or "none"
        raise UserError(f"--resume {resume}: {path} is not whole ({'; '.join(faults)}); there are: {there}")
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


def finish(job: Job, rows: list[Row]) -> None:
    """Export the model, sample from it, and write the summary."""
    if job.accelerator.is_main_process:
        job.folder.export(lambda folder: export_model(job, folder))
        samples = write_samples(job, job.num_steps)
        summary = summarize(job, rows) | {"samples": samples}
        job.folder.finish(summary)
        report(job.folder, summary)
        push_to_hub(job)
    job.accelerator.wait_for_everyone()  # a rank that leaves early is taken for a failure


def export_model(job: Job, folder: Path) -> None:
    """Config, safetensors, generation config and tokenizer: what `from_pretrained` and `pipeline` open."""
    job.causal_lm.generation_config.pad_token_id = job.manifest.tokenizer.eos_token_id
    disable_progress_bar()
    job.causal_lm.save_pretrained(folder)
    job.tokenizer.model_max_length = job.recipe.model.max_positions
    job.tokenizer.save_pretrained(folder)


def summarize(job: Job, rows: list[Row]) -> dict[str, Any]:
    """The numbers of a finished run."""
    last, split = rows[-1], job.manifest.splits["validation"]
    tokens_per_s = statistics.median(row["tokens_per_s"] for row in rows)
    peak = job.peak_flops()
    flops_per_token = cost.flops_per_token(job.recipe.model, job.recipe.training.sequence_length)
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "parameters": cost.parameters(job.recipe.model),
        "flops": last["tokens"] * flops_per_token,
        "loss": last["loss"],
        "val_loss": last["val_loss"],
        "bits_per_byte": bits_per_byte(last["val_loss"], split),
        "unigram_entropy_nats": split.unigram_entropy_nats,
        "tokens_per_s": tokens_per_s,
        "mfu": peak and tokens_per_s * flops_per_token / peak,
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
        "elapsed_s": last["elapsed_s"],
    }


def report(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Print a finished run's numbers and where its files are."""
    s = summary
    mfu = f"{s['mfu']:.1%}" if s["mfu"] else "n/a"
    print(
        f"validation loss {s['val_loss']:.4f} nats per token ({s['bits_per_byte']:.4f} bits per byte);"
        f" token frequencies alone: {s['unigram_entropy_nats']:.4f}\n"
        f"{s['tokens']:,} tokens in {s['steps']:,} steps, {s['elapsed_s']:,.0f} s; median {s['tokens_per_s']:,.0f} tokens/s,"
        f" MFU {mfu}; peak memory {s['peak_memory_bytes']:,} bytes"
    )
    for text in s["samples"]:
        print(f"sample: {text}")
    print(f"loss curve: {folder.curve}\nmodel: {folder.model}", flush=True)


def push_to_hub(job: Job) -> None:
    """Push `model/` where the recipe names a repository; a failure leaves the run as it is, and says so."""
    hub = job.recipe.hub
    if hub.repo_id is None:
        return
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(hub.repo_id, private=hub.private, exist_ok=True)
        HfApi().upload_folder(repo_id=hub.repo_id, folder_path=job.folder.model)
        print(f"pushed to {hub.repo_id}")
    except Exception as error:  # the client's many errors: none may cost a finished run
        print(f"hub.repo_id = {hub.repo_id!r}: not pushed ({type(error).__name__}: {error}); the model is in {job.folder.model}")


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
    started = time.perf_counter()
    row, _ = train_step(job, step=0)
    require_finite(job, row)
    step_s = time.perf_counter() - started
    job.accelerator.print(
        f"one step: loss {row['loss']:.4f} (ln of the vocabulary is {math.log(job.recipe.model.vocab_size):.4f}), gradient norm"
        f" {row['grad_norm']:.3f}, {step_s:.2f} s, peak memory {row['peak_memory_bytes']:,} bytes\n"
        f"dry run: would train {job.num_steps:,} steps in about {job.num_steps * step_s / 3600:.2f} h (at the first step's"
        f" pace, the slowest) and write {job.folder.path}{onwards}; nothing was written"
    )
    return 0
