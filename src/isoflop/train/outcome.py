"""What a run writes beside its metrics: scores, samples, the loss curve; at its end the exported model, the summary, the push."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from isoflop.config.recipe import Recipe
from isoflop.evaluate.scores import scores_of, write_results
from isoflop.plan import cost
from isoflop.scaling.laws import NoPrediction, Prediction, prediction_json
from isoflop.train.evaluation import bits_per_byte, sample_texts
from isoflop.train.export import export_checkpoint
from isoflop.train.metrics import MetricsLog
from isoflop.train.plots import draw_curve
from isoflop.train.records import Row, TrainingCurve, describe_steps, is_row, is_sample, missing_steps, read_records
from isoflop.train.run_folder import RunFolder
from isoflop.train.setup import Job
from isoflop.train.summary import RunSummary
from isoflop.utils.errors import UserError, is_disk_full

logger = logging.getLogger(__name__)


def finish(job: Job, curve: TrainingCurve) -> RunSummary:
    """Export the last checkpoint as a model, write and return the summary. Raises `UserError` for a full disk. Collective."""
    written: list[RunSummary | None] = [None]
    if job.accelerator.is_main_process:
        last = job.folder.checkpoints / f"step-{job.num_steps}"
        try:
            job.folder.export(lambda folder: export_checkpoint(job.recipe, last, folder))
            summary = summarize(job, curve)
            job.folder.finish(summary)
        except Exception as error:  # safetensors and torch wrap the system's error
            if not is_disk_full(error):
                raise
            raise UserError(
                f"{job.folder.model}: {' '.join(str(error).split())}; training is finished: free some space, then the same"
                f" command writes model and summary from {last.name}"
            ) from None
        job.say(report(job.folder, summary))
        written = [summary]
    broadcast_object_list(written)  # every rank waits here: one that exits early is taken for a failure
    assert written[0] is not None
    return written[0]


def run_downstream(job: Job, log: MetricsLog, step: int) -> dict[str, float] | None:
    """Return scores of the tasks that are due, as `task/metric` and `task/metric_stderr`; None where a signal came. Collective.

    The results of the last step are written to `evaluations/training/results.json`.
    """
    if job.downstream is None:
        return {}
    last, started = step == job.num_steps, time.perf_counter()
    results = job.downstream.results(step, last)
    if not results:
        return None if results is None else {}
    scores = scores_of(results)
    if last:
        write_results(results, job.folder.evaluations / "training", cost.parameters(job.recipe.model))
    listed = "; ".join(f"{score.task} {score.metric} {score}" for score in scores)
    log.say(f"step {step}: {listed} (in {time.perf_counter() - started:.1f} s)")
    values = {f"{score.task}/{score.metric}": score.value for score in scores}
    errors = {f"{score.task}/{score.metric}_stderr": score.stderr for score in scores if score.stderr is not None}
    return values | errors


def write_samples(job: Job, step: int, log: MetricsLog) -> None:
    """Sample texts and write them to `samples.jsonl`, the same with any number of ranks; also log them. Collective."""
    evaluation = job.recipe.evaluation
    texts = sample_texts(job.causal_lm, job.tokenizer, evaluation.sample_prompts, evaluation.sample_tokens)
    log.write_samples(step, texts)
    if evaluation.sample_every and step % evaluation.sample_every == 0:  # the last step's are in the report
        log.say("\n".join(f"step {step}: sample: {text!r}" for text in texts))


def draw(job: Job, log: MetricsLog) -> None:
    """Draw the loss curve so far, on the main process."""
    if not job.accelerator.is_main_process:
        return
    title = f"{job.folder.path.name}: {cost.parameters(job.recipe.model) / 1e6:,.1f}M parameters"
    total_tokens = job.num_steps * job.recipe.training.tokens_per_step
    try:
        draw_curve(log.curve, job.folder.curve, title, job.validation_statistics[1], job.predicted(), total_tokens)
    except OSError as error:  # it can be drawn again
        log.say(f"{job.folder.curve} not drawn: {error}")


def summarize(job: Job, curve: TrainingCurve) -> RunSummary:
    """Return the numbers of a finished run, and its last samples."""
    last, (bytes_per_token, unigram_entropy_nats) = curve.last, job.validation_statistics
    val_loss = math.nan if last["val_loss"] is None else last["val_loss"]
    tokens_per_s = statistics.median(curve.tokens_per_s)
    flops_per_token = cost.flops_per_token(job.recipe.model, job.recipe.training.sequence_length)
    lost = missing_steps(read_records(job.folder.metrics, job.num_steps, is_row).steps)
    texts = deque(read_records(job.folder.samples, job.num_steps, is_sample), maxlen=1)
    values = {
        "steps": last["step"],
        "tokens": last["tokens"],
        "parameters": cost.parameters(job.recipe.model),
        "flops": last["tokens"] * flops_per_token,
        "loss": last["loss"],
        "val_loss": val_loss,
        "bits_per_byte": bits_per_byte(val_loss, bytes_per_token),
        "unigram_entropy_nats": unigram_entropy_nats,
        "tokens_per_s": tokens_per_s,
        "mfu": job.mfu(tokens_per_s),
        "predicted_memory_bytes": job.predicted_memory().total + job.memory_before_bytes,
        "peak_memory_bytes": curve.peak_memory_bytes,
        "elapsed_s": last["elapsed_s"],
        **prediction(job, val_loss),
        **({"missing_steps": lost} if lost else {}),
        "samples": texts[0]["samples"] if texts else [],
    }
    return RunSummary.read(values, job.folder.path)


def prediction(job: Job, measured: float) -> dict[str, Any]:
    """Return what the recipe's law predicted, and how far the run was from it; nothing without a law."""
    predicted = job.predicted()
    if predicted is None:
        return {}
    error, inside = None, None
    if isinstance(predicted, Prediction):
        low, high = predicted.interval or (math.nan, math.nan)
        error, inside = predicted.loss / measured - 1, low <= measured <= high if predicted.interval else None
    return {"law": job.recipe.law} | prediction_json(predicted) | {"prediction_error": error, "inside_interval": inside}


def forecast(job: Job, log: MetricsLog, row: Row) -> dict[str, float]:
    """Return, from mid-run on, the forecast of the final validation loss from this one, for the metrics."""
    progress, recipe = row["step"] / job.num_steps, job.recipe
    tokens = job.num_steps * recipe.training.tokens_per_step
    schedule, optimizer = recipe.schedule.name, recipe.optimizer.name
    ahead = job.law.forecast(row["val_loss"], progress, schedule, recipe.model, tokens, optimizer) if job.law else None
    if ahead is None or ahead.interval is None:
        return {}
    log.say(f"step {row['step']}: forecast of the final validation loss: {ahead}")
    return {"forecast_loss": ahead.loss, "forecast_low": ahead.interval[0], "forecast_high": ahead.interval[1]}


def report(folder: RunFolder, summary: RunSummary) -> str:
    """Return a finished run's numbers and where its files are, as text."""
    s = summary
    mfu = f"{s.mfu:.1%}" if s.mfu else "n/a"
    lines = [
        f"validation loss {s.val_loss:.4f} nats per token ({s.bits_per_byte:.4f} bits per byte);"
        f" token frequencies alone: {s.unigram_entropy_nats:.4f}",
        f"{s.tokens:,} tokens in {s.steps:,} steps, {s.elapsed_s:,.0f} s; median {s.tokens_per_s:,.0f} tokens/s, MFU {mfu}",
        f"peak memory {s.peak_memory_bytes:,} bytes, predicted {s.predicted_memory_bytes:,}"
        + ("" if torch.cuda.is_available() else " (a CPU's allocator keeps more for reuse)"),
    ]
    if s.outside:
        lines.append(f"law {s.law}: {NoPrediction(s.outside)}; measured {s.val_loss:.4f}")
    elif s.law is not None and s.predicted_loss is not None:
        inside = {True: ", inside the interval", False: ", outside the interval", None: ""}[s.inside_interval]
        predicted = Prediction(s.predicted_loss, s.predicted_loss_interval)
        lines.append(f"law {s.law} predicted {predicted}, measured {s.val_loss:.4f}: {s.prediction_error:+.2%}{inside}")
    if s.missing_steps:
        lines.append(f"{folder.metrics}: rows are missing: {describe_steps(s.missing_steps)}")
    lines += [f"sample: {text}" for text in s.samples]
    return "\n".join([*lines, f"loss curve: {folder.curve}", f"model: {folder.model}"])


def push_to_hub(recipe: Recipe, folder: RunFolder) -> None:
    """Publish where the recipe names a repository. A failure is logged with the command that publishes; the run is complete."""
    if recipe.hub.repo_id is None:
        return
    from isoflop.publish.publishing import publish

    try:
        publish(folder.path, checkpoints=True)
    except Exception as error:  # the client's many errors, a card that cannot be made: none may cost a finished run
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        logger.info("not published: %s; the run is complete, publish it with: isoflop publish %s", reason, folder.path)
