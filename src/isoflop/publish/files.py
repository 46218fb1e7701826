"""Files of a repository: the run's own, and those generated from them."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from isoflop.config.loading import explain_errors, to_yaml
from isoflop.config.recipe import Recipe
from isoflop.evaluate.scores import RESULTS
from isoflop.publish.redaction import published_environment, published_recipe, published_results
from isoflop.train.records import Row, read_rows
from isoflop.train.run_folder import RunFolder
from isoflop.utils.errors import UserError
from isoflop.utils.untrusted import leaves_folder, read_json

Files = dict[str, Path | bytes]
"""Content by path in the repository: a local file, or bytes."""
CARD, RECIPE = "README.md", "recipe.yaml"


def _iso_time(text: str) -> str:
    try:
        return datetime.fromisoformat(text).isoformat()
    except ValueError:  # its message would repeat the text, of any length
        raise ValueError("it is not a time such as 2026-01-31T12:00:00+00:00") from None


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
    """The keys of a launch that the card reads."""

    started_at: Annotated[str, AfterValidator(_iso_time)]
    versions: dict[str, str | None]
    commit: str | None
    hardware: _Hardware
    command: list[str]
    launch: _How


class _Environment(_Launch):
    earlier_launches: list[_Launch]


def size_bytes(content: Path | bytes) -> int:
    """Return the size of a file's content."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def run_files(folder: RunFolder, recipe: Recipe) -> Files:
    """Return all files of a finished run except its card. Raises `UserError` if its model is missing."""
    if not (folder.model / "config.json").is_file():
        raise UserError(
            f"{folder.model} does not exist; delete {folder.summary}, and the command that trained the run writes both from"
            " its last checkpoint"
        )
    files: Files = model_files(folder.model)
    files[RECIPE] = to_yaml(published_recipe(recipe)).encode()
    files["training_environment.json"] = _json(published_environment(read_environment(folder)))
    for path in (folder.metrics, folder.samples, folder.curve, folder.summary):
        if path.is_file():
            files[path.name] = path
    for path in sorted(folder.evaluations.glob(f"*/{RESULTS}")):
        if outside := leaves_folder(path, folder.path):
            raise UserError(f"{outside}: only the run's own files are published")
        results = read_json(path, "move it away, or run `isoflop eval` again")
        files[path.relative_to(folder.path).as_posix()] = _json(published_results(results, folder.path))
    for content in files.values():
        if isinstance(content, Path) and (outside := leaves_folder(content, folder.path)):
            raise UserError(f"{outside}: only the run's own files are published")
    return files


def model_files(model: Path) -> Files:
    """Return the files of a saved model, for the top folder of a repository."""
    return {path.name: path for path in sorted(model.iterdir())}


def read_environment(folder: RunFolder) -> dict[str, Any]:
    """Return a run's record of its launches, with the newest at the top level."""
    file, remedy = folder.path / "environment.json", "move it away, and start the run again: it is written at every launch"
    environment = read_json(file, remedy)
    try:
        _Environment.model_validate(environment)
    except ValidationError as error:
        raise UserError(f"{file}: {explain_errors(error, _Environment)}; {remedy}") from None
    return environment


def read_metrics(folder: RunFolder) -> list[Row]:
    """Return the rows of all steps so far."""
    return read_rows(folder.metrics, sys.maxsize)


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()
