"""Where a run stands: what a checkpoint holds beside tensors, and how it is saved, loaded and rolled back."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from pydantic import TypeAdapter, ValidationError

from isoflop.checkpoint import folder as checkpoints
from isoflop.checkpoint.manager import NEWEST
from isoflop.train import deepspeed
from isoflop.train.anomalies import History
from isoflop.train.metrics import MetricsLog
from isoflop.train.records import Row, TrainingCurve, finite, is_row
from isoflop.train.setup import Job
from isoflop.utils.errors import UserError
from isoflop.utils.untrusted import shown

logger = logging.getLogger(__name__)
# Keys of `trainer_state.json` that differ from the fields' names.
_JSON_KEYS = {"skipped_batches": "passed_over"}


@dataclass
class TrainState:
    """All that a checkpoint holds beside tensors. Batches follow from (seed, step + skipped_batches)."""

    step: int = 0
    """Optimizer steps done."""
    elapsed_s: float = 0.0
    row: Row | None = None
    """The last step's metrics, which `metrics.jsonl` may not have yet."""
    skipped_batches: int = 0
    """Batches never trained on: those of steps that a rollback undid."""
    anomalies: int = 0
    """Steps skipped or rolled back from."""
    history: History = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the state under the keys of `trainer_state.json`."""
        return {_JSON_KEYS.get(name, name): value for name, value in asdict(self).items()}


def save_checkpoint(job: Job, log: MetricsLog, state: TrainState) -> None:
    """Start saving; training continues meanwhile."""
    log.sync()
    saved_step = state.step

    def on_saved() -> None:
        prune_checkpoints(job, log.curve, saved_step)
        if job.push:
            job.push.start()

    trainer_state = state.to_dict() | {"data": job.manifest.fingerprint()}
    job.checkpoints.save(state.step, job.training_model, job.inner_optimizer, trainer_state, on_saved=on_saved)


def prune_checkpoints(job: Job, curve: TrainingCurve, saved_step: int) -> None:
    """Delete what the recipe does not keep once a step is saved, on the main process.

    The checkpoint with the least validation loss stays. A step is saved before it is validated, so it counts from the next save.
    """
    if not job.accelerator.is_main_process:
        return
    output, validated = (
        job.recipe.output,
        {row["step"]: row["val_loss"] for row in list(curve.measured) if row["step"] < saved_step},
    )
    there = [step for step in map(checkpoints.step_of, job.checkpoints.available()) if validated.get(step) is not None]
    try:
        best = sorted(there, key=validated.__getitem__)[:1]
        job.checkpoints.prune(output.keep_last, output.keep_every, keep=best + output.checkpoint_at)
    except OSError as error:  # the new checkpoint is complete; deleting is tried again at the next save
        logger.warning("%s: an old checkpoint was not deleted: %s", job.checkpoints.path, error)


def load_checkpoint(job: Job, resume: str | None, eval_only: bool) -> TrainState:
    """Load the checkpoint that `resume` names and return its state; a fresh one where there is nothing to resume. Collective."""
    selected: list[Path | None] = [None]
    if job.accelerator.is_main_process:
        selected = [job.checkpoints.select(resume)]
    path = broadcast_object_list(selected)[0]
    if path is None:
        return TrainState()
    job.say(f"{'evaluating' if eval_only else 'resuming from'} {path}")

    def check(trainer_state: dict[str, Any]) -> None:
        if trainer_state.pop("data", None) != job.manifest.fingerprint():
            raise UserError(
                f"data.prepared_dir = {job.recipe.data.prepared_dir!r} holds other windows than {path} was trained on, made"
                " from the same recipe but other files; put the earlier ones back, or start over in another output.run_dir"
            )

    # An evaluation needs no moments. DeepSpeed's weights are in its optimizer.
    optimizer = job.inner_optimizer if not eval_only or deepspeed.is_deepspeed(job.inner_optimizer) else None
    state = parse_state(path, job.checkpoints.load(path, job.training_model, optimizer, check))
    job.accelerator.wait_for_everyone()
    if job.accelerator.is_main_process and not eval_only:
        job.checkpoints.discard_after(state.step)  # broken, or to be trained again
    return state


def parse_state(path: Path, trainer_state: dict[str, Any]) -> TrainState:
    """Return the state of a `trainer_state.json`. Raises `UserError` where it is not as `save_checkpoint` writes it."""
    where = path / checkpoints.TRAINER_STATE
    names = {key: name for name, key in _JSON_KEYS.items()}
    try:
        state: TrainState = TypeAdapter(TrainState).validate_python(
            {names.get(key, key): value for key, value in trainer_state.items()}
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(_JSON_KEYS.get(str(part), str(part)) for part in first["loc"]) or "it"
        raise UserError(f"{where}: {key} = {shown(first['input'])}: {first['msg']}; use another checkpoint") from None
    row = {key: finite(value) for key, value in (state.row or {}).items()}
    if state.step != checkpoints.step_of(path) or row.get("step") != state.step or not is_row(row):
        raise UserError(f"{where}: step or row is not that of {path.name}; use another checkpoint")
    return state


def roll_back(job: Job, log: MetricsLog, state: TrainState) -> TrainState:
    """Load the newest checkpoint; the batches from there to the present one will be skipped (PaLM, section 5.1)."""
    job.checkpoints.wait()
    if not job.checkpoints.available():
        raise UserError(
            "anomalies.policy = 'rollback' has no checkpoint to return to yet; lower output.checkpoint_every, or lengthen"
            " schedule.warmup_steps, in a new output.run_dir"
        )
    earlier = load_checkpoint(job, NEWEST, eval_only=False)
    earlier.skipped_batches = state.skipped_batches + state.step + 1 - earlier.step
    earlier.anomalies = state.anomalies
    log.rewind(earlier.step)
    return earlier
