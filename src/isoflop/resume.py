"""Where a run stands, how it is saved, and how it goes on from there."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from pydantic import TypeAdapter, ValidationError

from isoflop.anomaly import History
from isoflop.checkpoint import folder as checkpoints
from isoflop.checkpoint.state import is_zero, load_tensors
from isoflop.errors import UserError
from isoflop.job import Job
from isoflop.metrics import MetricsLog
from isoflop.records import Row, TrainingCurve, finite, is_row
from isoflop.untrusted import shown

NEWEST = "newest"


@dataclass
class Progress:
    """All that a checkpoint holds beside tensors. Batches follow from (seed, step + passed_over), the rate from the step."""

    step: int = 0
    """Optimizer steps done."""
    elapsed_s: float = 0.0
    row: Row | None = None
    """The last step's metrics, which their file may not have yet."""
    passed_over: int = 0
    """Batches never trained on: those of steps that a rollback undid."""
    anomalies: int = 0
    """Steps skipped or rolled back from."""
    history: History = field(default_factory=list)


def save_checkpoint(job: Job, log: MetricsLog, progress: Progress) -> None:
    """Begin to save; training goes on meanwhile."""
    log.sync()
    progress_step = progress.step  # training goes on meanwhile

    def when_whole() -> None:
        prune_checkpoints(job, log.curve, progress_step)
        if job.push:
            job.push.start()

    state = asdict(progress) | {"data": job.manifest.fingerprint()}
    job.saver.save(progress.step, job.training_model, job.inner_optimizer, state, then=when_whole)


def prune_checkpoints(job: Job, curve: TrainingCurve, saved_step: int) -> None:
    """Delete what the recipe does not keep once a step is saved, on the main process.

    The checkpoint of the least validation loss stays. A step is saved before it is validated, and counts from the next save on.
    """
    if not job.accelerator.is_main_process:
        return
    output, folder = job.recipe.output, job.folder.checkpoints
    measured = {row["step"]: row["val_loss"] for row in list(curve.measured) if row["step"] < saved_step}
    listed = map(checkpoints.step_of, checkpoints.list_checkpoints(folder))
    there = [step for step in listed if measured.get(step) is not None]
    try:
        best = sorted(there, key=measured.__getitem__)[:1]
        checkpoints.prune(folder, output.keep_last, output.keep_every, keep=best + output.checkpoint_at)
    except OSError as error:  # the new one is whole; what could not be deleted is tried again at the next
        print(f"{folder}: an old checkpoint was not deleted: {error}", file=sys.stderr, flush=True)


def load_checkpoint(job: Job, resume: str | None, eval_only: bool) -> Progress:
    """Load what `resume` names, and return where it stands; a fresh start where there is nothing to resume."""
    chosen: list[Path | None] = [None]
    if job.accelerator.is_main_process:
        chosen = [choose_checkpoint(job.folder.checkpoints, resume)]
    path = broadcast_object_list(chosen)[0]
    if path is None:
        return Progress()
    job.accelerator.print(f"{'measuring' if eval_only else 'resuming from'} {path}")
    with checkpoints.held(path):
        state = checkpoints.read_trainer_state(path)
        if state.pop("data", None) != job.manifest.fingerprint():
            raise UserError(
                f"data.prepared_dir = {job.recipe.data.prepared_dir!r} holds other windows than {path} was trained on, made"
                " from the same recipe but other files; put the earlier ones back, or start over in another output.run_dir"
            )
        # To be measured it needs no moments; DeepSpeed's weights are in its optimizer.
        moments = job.inner_optimizer if not eval_only or is_zero(job.inner_optimizer) else None
        load_tensors(path, job.training_model, moments)
    progress = progress_of(path, state)
    job.accelerator.wait_for_everyone()
    if job.accelerator.is_main_process and not eval_only:
        checkpoints.discard_after(job.folder.checkpoints, progress.step)  # broken, or to be trained again
    return progress


def progress_of(path: Path, state: dict[str, Any]) -> Progress:
    """What a checkpoint's trainer state says. Raises `UserError` where that is not as `save_checkpoint` writes it."""
    where = path / checkpoints.TRAINER_STATE
    try:
        progress: Progress = TypeAdapter(Progress).validate_python(state)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise UserError(f"{where}: {key} = {shown(first['input'])}: {first['msg']}; use another checkpoint") from None
    row = {key: finite(value) for key, value in (progress.row or {}).items()}
    if progress.step != checkpoints.step_of(path) or row.get("step") != progress.step or not is_row(row):
        raise UserError(f"{where}: step or row is not that of {path.name}; use another checkpoint")
    return progress


def roll_back(job: Job, log: MetricsLog, progress: Progress) -> Progress:
    """The newest checkpoint's state, with the batches from there up to the present one passed over (PaLM, section 5.1)."""
    job.saver.wait()
    if not checkpoints.list_checkpoints(job.folder.checkpoints):
        raise UserError(
            "anomalies.policy = 'rollback' has no checkpoint to go back to yet; lower output.checkpoint_every, or lengthen"
            " schedule.warmup_steps, in a new output.run_dir"
        )
    earlier = load_checkpoint(job, NEWEST, eval_only=False)
    earlier.passed_over = progress.passed_over + progress.step + 1 - earlier.step
    earlier.anomalies = progress.anomalies
    log.rewind(earlier.step)
    return earlier


def choose_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint that `resume` asks for. Raises `UserError` where it is not there or not whole."""
    listed = checkpoints.list_checkpoints(folder)
    if resume is None or resume == NEWEST:
        newest = checkpoints.newest_whole(folder)
        if newest is None and (listed or resume == NEWEST):
            broken = f" ({', '.join(path.name for path in listed)} are broken); put one back, or delete the run's folder"
            raise UserError(
                f"{folder} has no whole checkpoint{broken if listed else ''}; to start from step 0 leave out --resume and"
                " --eval-only"
            )
        return newest
    path = folder / f"step-{resume.removeprefix('step-')}"
    if faults := checkpoints.find_faults(path):
        there = ", ".join(known.name for known in listed) or "none"
        raise UserError(f"--resume-from {resume}: {path} is not whole ({'; '.join(faults)}); there are: {there}")
    return path
