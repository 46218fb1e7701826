"""The files of a repository: a run's own, and those made from them for it."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from isoflop.errors import UserError
from isoflop.publish.redaction import published_environment, published_recipe, published_results
from isoflop.recipe import Recipe
from isoflop.recipe_file import explain_errors, to_yaml
from isoflop.records import Row, read_rows
from isoflop.run_folder import RunFolder
from isoflop.scores import RESULTS
from isoflop.untrusted import leaves_folder, read_json

Files = dict[str, Path | bytes]
"""Content by path in the repository: a file of this machine, or bytes."""
CARD, RECIPE = "README.md", "recipe.yaml"
EVENTS = "logs/events.out.tfevents.0.isoflop"  # always this name: a later push of the same run finds it there


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Hardware(_Part):
    cpu_cores: int | None
    gpus: list[str]


class _How(_Part):
    num_processes: int
    distributed_type: str
    mixed_precision: str
    device: str
    resumed_from_step: int


class _Launch(_Part):
    """What of a launch is read back."""

    started_at: Annotated[str, AfterValidator(lambda text: datetime.fromisoformat(text).isoformat())]
    versions: dict[str, str | None]
    commit: str | None
    hardware: _Hardware
    command: list[str]
    launch: _How


class _Environment(_Launch):
    earlier_launches: list[_Launch]


def size_bytes(content: Path | bytes) -> int:
    """Size of a file's content."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def run_files(folder: RunFolder, recipe: Recipe) -> Files:
    """All of a finished run but its card. Raises `UserError` where its model is not there."""
    if not (folder.model / "config.json").is_file():
        raise UserError(
            f"{folder.model} is not there; delete {folder.summary}, and the command that trained the run writes both from its"
            " last checkpoint"
        )
    files: Files = model_files(folder.model)
    files[RECIPE] = to_yaml(published_recipe(recipe)).encode()
    files["training_environment.json"] = _json(published_environment(read_environment(folder)))
    for path in (folder.metrics, folder.samples, folder.curve, folder.summary):
        if path.is_file():
            files[path.name] = path
    for path in sorted(folder.evaluations.glob(f"*/{RESULTS}")):
        if outside := leaves_folder(path, folder.path):
            raise UserError(f"{outside}: what is published is the run's own")
        results = read_json(path, "move it away, or run scripts/run_eval.py again")
        files[path.relative_to(folder.path).as_posix()] = _json(published_results(results, folder.path))
    for content in files.values():
        if isinstance(content, Path) and (outside := leaves_folder(content, folder.path)):
            raise UserError(f"{outside}: what is published is the run's own")
    if has_tensorboard():
        files[EVENTS] = event_file(read_metrics(folder), start_time(folder))
    return files


def model_files(model: Path) -> Files:
    """The files of a saved model, which lie at the top of a repository."""
    return {path.name: path for path in sorted(model.iterdir())}


def read_environment(folder: RunFolder) -> dict[str, Any]:
    """What a run wrote about its launches, the newest one at the top."""
    file, remedy = folder.path / "environment.json", "move it away, and start the run again: it is written at every launch"
    environment = read_json(file, remedy)
    try:
        _Environment.model_validate(environment)
    except ValidationError as error:
        raise UserError(f"{file}: {explain_errors(error, _Environment)}; {remedy}") from None
    return environment


def read_metrics(folder: RunFolder) -> list[Row]:
    """Rows of all steps so far."""
    return read_rows(folder.metrics, sys.maxsize)


def start_time(folder: RunFolder) -> float:
    """When a run was first launched, in seconds of Unix time."""
    environment = read_environment(folder)
    first = [*environment["earlier_launches"], environment][0]
    return datetime.fromisoformat(first["started_at"]).timestamp()


def has_tensorboard() -> bool:
    """Whether event files can be written here."""
    return importlib.util.find_spec("tensorboard") is not None


def event_file(rows: list[Row], started: float) -> bytes:
    """Every scalar of the metrics as a TensorBoard event file, which the Hub shows as curves.

    Times are those of training, so that the same metrics make the same bytes: torch's `SummaryWriter` would put host name,
    process number and the present into them.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    stream = io.BytesIO()
    writer = RecordWriter(stream)
    writer.write(Event(wall_time=started, file_version="brain.Event:2").SerializeToString())
    for row in rows:
        numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
        scalars = {key: value for key, value in numbers.items() if key.isprintable()}
        summary = Summary(value=[Summary.Value(tag=key, simple_value=value) for key, value in scalars.items()])
        writer.write(Event(wall_time=started + row["elapsed_s"], step=row["step"], summary=summary).SerializeToString())
    return stream.getvalue()


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()
