"""What a run ends with, and shows on its way: samples of text, the picture, the exported model, the summary, the push."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from accelerate.utils import gather_object

from isoflop import cost
from isoflop.errors import UserError, is_disk_full
from isoflop.export import export_checkpoint
from isoflop.job import Job, told
from isoflop.loss_curve import draw_curve
from isoflop.metrics import MetricsLog
from isoflop.recipe import Recipe
from isoflop.records import Row, TrainingCurve, describe_steps, is_sample, missing_steps, read_records, read_rows
from isoflop.run_folder import RunFolder
from isoflop.scaling.laws import Forecast
from isoflop.scores import scores_of, write_results
from isoflop.validation import bits_per_byte, sample_texts


def finish(job: Job, curve: TrainingCurve) -> None:
    """Export the last checkpoint as a model and write the summary. Raises `UserError` where the disk is full. Collective."""
    if job.accelerator.is_main_process:
        last = job.folder.checkpoints / f"step-{job.num_steps}"
        try:
            job.folder.export(lambda folder: export_checkpoint(job.recipe, last, folder))
            summary = summarize(job, curve)
            job.folder.finish(summary)
        except Exception as error:  # safetensors and torch wrap the system's
            if not is_disk_full(error):
                raise
            raise UserError(
                f"{job.folder.model}: {' '.join(str(error).split())}; training is finished: free some space, then the same"
                f" command writes model and summary from {last.name}"
            ) from None
        report(job.folder, summary)
    job.accelerator.wait_for_everyone()  # a rank that leaves early is taken for a failure


def run_downstream(job: Job, log: MetricsLog, step: int) -> dict[str, float] | None:
    """Scores of the tasks that are due, as `task/metric` and `task/metric_stderr`; None when a signal came meanwhile. Collective.

    The results behind those of the last step become `evaluations/training/results.json`.
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
    told = "; ".join(f"{score.task} {score.metric} {score}" for score in scores)
    log.say(f"step {step}: {told} (in {time.perf_counter() - started:.1f} s)")
    values = {f"{score.task}/{score.metric}": score.value for score in scores}
    errors = {f"{score.task}/{score.metric}_stderr": score.stderr for score in scores if score.stderr is not None}
    return values | errors


def write_samples(job: Job, step: int, log: MetricsLog) -> None:
    """Sample text on every rank, each with its own seed, into `samples.jsonl`; on the way also onto the screen. Collective."""
    evaluation, rank = job.recipe.evaluation, job.accelerator.process_index
    own = sample_texts(job.causal_lm, job.tokenizer, evaluation.sample_prompts, evaluation.sample_tokens, rank)
    texts: list[str] = gather_object(own)
    log.write_samples(step, texts)
    if evaluation.sample_every and step % evaluation.sample_every == 0:  # the last ones stand in the report
        log.say("\n".join(f"step {step}: sample: {text!r}" for text in texts))


def draw(job: Job, log: MetricsLog) -> None:
    """Draw the curve so far, on the main process."""
    if not job.accelerator.is_main_process:
        return
    title = f"{job.folder.path.name}: {cost.parameters(job.recipe.model) / 1e6:,.1f}M parameters"
    total_tokens = job.num_steps * job.recipe.training.tokens_per_step
    try:
        draw_curve(log.curve, job.folder.curve, title, job.validation_facts[1], job.promised(), total_tokens)
    except OSError as error:  # a picture that can be drawn again
        log.say(f"{job.folder.curve} not drawn: {error}")


def summarize(job: Job, curve: TrainingCurve) -> dict[str, Any]:
    """The numbers of a finished run, and its last samples."""
    last, (bytes_per_token, unigram_entropy_nats) = curve.last, job.validation_facts
    val_loss = math.nan if last["val_loss"] is None else last["val_loss"]
    tokens_per_s = statistics.median(curve.tokens_per_s)
    flops_per_token = cost.flops_per_token(job.recipe.model, job.recipe.training.sequence_length)
    lost = missing_steps([row["step"] for row in read_rows(job.folder.metrics, job.num_steps)])
    texts = [record["samples"] for record in read_records(job.folder.samples, job.num_steps, is_sample).rows[-1:]]
    return {
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
        "samples": texts[0] if texts else [],
    }


def prediction(job: Job, measured: float) -> dict[str, Any]:
    """What the recipe's law predicted, beside what came out; nothing where it names no law."""
    promised = job.promised()
    if promised is None:
        return {}
    low, high = promised.interval or (math.nan, math.nan)
    return {
        "law": job.recipe.law,
        "predicted_loss": promised.loss,
        "predicted_loss_interval": promised.interval,
        "prediction_error": promised.loss / measured - 1,
        "inside_interval": low <= measured <= high if promised.interval else None,
    }


def forecast(job: Job, log: MetricsLog, row: Row) -> dict[str, float]:
    """From mid-run on, the last validation loss that the law's runs foretell from this one, for the metrics."""
    share, recipe = row["step"] / job.num_steps, job.recipe
    tokens = job.num_steps * recipe.training.tokens_per_step
    ahead = job.law.forecast(row["val_loss"], share, recipe.schedule.name, recipe.model, tokens) if job.law else None
    if ahead is None or ahead.interval is None:
        return {}
    log.say(f"step {row['step']}: forecast of the last validation loss: {told(ahead)}")
    return {"forecast_loss": ahead.loss, "forecast_low": ahead.interval[0], "forecast_high": ahead.interval[1]}


def report(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Print a finished run's numbers and where its files are."""
    s = summary
    mfu = f"{s['mfu']:.1%}" if s["mfu"] else "n/a"
    print(
        f"validation loss {s['val_loss']:.4f} nats per token ({s['bits_per_byte']:.4f} bits per byte);"
        f" token frequencies alone: {s['unigram_entropy_nats']:.4f}\n"
        f"{s['tokens']:,} tokens in {s['steps']:,} steps, {s['elapsed_s']:,.0f} s; median {s['tokens_per_s']:,.0f} tokens/s,"
        f" MFU {mfu}\npeak memory {s['peak_memory_bytes']:,} bytes, predicted {s['predicted_memory_bytes']:,}"
        + ("" if torch.cuda.is_available() else " (a CPU's allocator keeps more for reuse)")
    )
    if "law" in s:
        inside = {True: ", inside the interval", False: ", outside the interval", None: ""}[s["inside_interval"]]
        print(
            f"law {s['law']} predicted {told(Forecast(s['predicted_loss'], s['predicted_loss_interval']))}, measured"
            f" {s['val_loss']:.4f}: {s['prediction_error']:+.2%}{inside}"
        )
    if lost := s.get("missing_steps"):
        print(f"{folder.metrics}: rows are missing: {describe_steps(lost)}")
    for text in s["samples"]:
        print(f"sample: {text}")
    print(f"loss curve: {folder.curve}\nmodel: {folder.model}", flush=True)


def push_to_hub(recipe: Recipe, folder: RunFolder) -> None:
    """Publish where the recipe names a repository; a failure leaves the run as it is, and says what to type."""
    if recipe.hub.repo_id is None:
        return
    from isoflop.publish.command import Request, publish

    try:
        publish(Request(run=str(folder.path), checkpoints=True))
    except Exception as error:  # the client's many errors, a card that cannot be made: none may cost a finished run
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        print(f"not published: {reason}; the run is whole, publish it with: python scripts/publish.py {folder.path}")
