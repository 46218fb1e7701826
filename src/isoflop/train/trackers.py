"""The runs of a run folder with its experiment trackers: one with each of them, which a resumed run continues.

Entered by `start_trackers`. `trackers.json` in the folder holds what they are known by, so a folder that is moved takes its runs
along, and a new folder starts new ones.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from isoflop.train.run_folder import RunFolder
from isoflop.utils.untrusted import read_json

PROJECT = "isoflop"


def start_trackers(
    accelerator: Accelerator, folder: RunFolder, config: dict[str, Any], last_step: int, say: Callable[[str], None]
) -> None:
    """Start each of Accelerate's trackers, or continue its run behind a step.

    One that cannot be reached, or cannot write, is named and left out. For the main process alone: on other ranks W&B and trackio
    would start too.
    """
    if not accelerator.log_with:
        return
    known, started = _known_by(folder), list[Any]()
    for name in map(str, wanted := accelerator.log_with):
        accelerator.log_with, accelerator.trackers = [name], []
        try:
            accelerator.init_trackers(PROJECT, init_kwargs={name: _identity(name, folder.path, known, last_step)})
            (tracker,) = accelerator.trackers
            _store(tracker, config, known)
            tracker.last_step = _last_step(tracker, last_step)
            started.append(tracker)
        except Exception as error:  # the many errors of many services: none may cost a run
            say(f"tracker {name} does not start ({type(error).__name__}: {error}): training without it")
    accelerator.log_with, accelerator.trackers = wanted, started
    _write(folder, known)


def track(tracker: Any, scalars: dict[str, float], step: int) -> None:
    """Send a tracker a step's scalars, unless it has them: only TensorBoard can drop those of a step that is trained again."""
    if step > tracker.last_step:
        tracker.log(scalars, step=step)
        tracker.last_step = step


def forget_after(tracker: Any, step: int) -> None:
    """Drop what a tracker was sent after a step, where it can."""
    if tracker.name == "tensorboard":
        tracker.writer.close()
        tracker.writer.purge_step = step + 1  # it stands at the top of the next event file
        tracker.last_step = min(step, tracker.last_step)


def _known_by(folder: RunFolder) -> dict[str, Any]:
    file = folder.path / "trackers.json"
    known = read_json(file, "move it away: the trackers then begin new runs") if file.exists() else {}
    known = {"id": uuid.uuid4().hex[:12]} | known
    _write(folder, known)  # before a tracker begins a run by it
    return known


def _write(folder: RunFolder, known: dict[str, Any]) -> None:
    folder.write("trackers.json", json.dumps(known, indent=1) + "\n")


def _identity(name: str, path: Path, known: dict[str, Any], last_step: int) -> dict[str, Any]:
    """Arguments of a tracker by which it begins or continues the run of a folder; none of the trackers without such."""
    title, own = path.resolve().name, known["id"]
    if name == "tensorboard":
        return {"purge_step": last_step + 1}
    if name == "wandb":  # which ranks arguments above the user's environment
        chosen = {"id": os.environ.get("WANDB_RUN_ID", own), "name": os.environ.get("WANDB_NAME", title)}
        return {**chosen, "resume": "allow"}
    if name == "trackio":  # knows a run by its name alone
        return {"name": f"{title}-{own}", "resume": "allow"}
    if name == "mlflow":
        return {"run_name": title, "run_id": known.get("mlflow")}
    return {}


def _store(tracker: Any, config: dict[str, Any], known: dict[str, Any]) -> None:
    """Give a tracker the recipe's values."""
    config = {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()}
    if tracker.name == "tensorboard":  # its own way is a folder for each launch, named by the time
        from torch.utils.tensorboard import summary

        for part in summary.hparams(config, {"val_loss": 0}):  # type: ignore[no-untyped-call]
            tracker.writer.file_writer.add_summary(part)
        tracker.writer.flush()
        return
    if tracker.name == "mlflow":
        if "mlflow" in known:  # which refuses a value that has changed
            return
        known["mlflow"] = tracker.tracker.info.run_id
    tracker.store_init_configuration(config)


def _last_step(tracker: Any, last_step: int) -> int:
    """The last step whose scalars a tracker has. The rows of a process that was killed may be on their way, or lost."""
    if tracker.name == "tensorboard":
        return last_step
    if tracker.name == "wandb":
        return int(tracker.run.step) - 1
    if tracker.name == "trackio":
        return int(tracker.run._next_step) - 1
    if tracker.name == "mlflow":
        import mlflow

        history = mlflow.MlflowClient().get_metric_history(tracker.tracker.info.run_id, "loss")
        return max((point.step for point in history), default=0)
    return 0  # a new run
