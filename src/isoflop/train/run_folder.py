"""The folder of a run: its files, its owner, and the rules for writing to it.

lock  environment.json  recipe.yaml  metrics.jsonl  samples.jsonl  loss.png  checkpoints/step-N/  model/  evaluations/
summary.json; and, where used: trackers.json  isoflop/  profile/  flight_recorder/  output_errors.txt  metrics.damaged-N.jsonl

A folder is a run's where it has a lock file or an environment.json; no other folder is written to.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from isoflop.config.loading import explain_errors, load_recipe, to_yaml
from isoflop.config.recipe import Recipe, differences
from isoflop.train.summary import RunSummary
from isoflop.utils.credentials import hide_in_command
from isoflop.utils.errors import UserError
from isoflop.utils.io import atomic_write, has_keys, is_lock, lock, replace_folder, require_own_folder
from isoflop.utils.untrusted import read_json

logger = logging.getLogger(__name__)
_LIBRARIES = (
    "isoflop",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
)
# What a run folder may hold before its environment.json, where a launch was killed early.
_EARLY = ("lock", "flight_recorder", ".environment.json.partial")
# Files of an exported model: those of transformers, and a hybrid's code.
_MODEL_FILES = re.compile(
    r"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|(tokenizer|special_tokens|added_tokens|vocab).*\.json"
    r"|merges\.txt|chat_template\.jinja|\w+_hybrid\.py|__init__\.py"
)


class RunFolder:
    """Paths of a run folder, and the rules for using it."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.curve = self.path / "loss.png"
        self.model = self.path / "model"
        self.summary = self.path / "summary.json"
        self.evaluations = self.path / "evaluations"
        self._lock: Any = None
        self._start: dict[str, str] = {}
        """Text of the files that this launch wrote, by name."""

    def check_owner(self, recipe: Recipe) -> None:
        """Refuse a folder that is not a run's, and one whose recipe would train to other weights. Raises `UserError`."""
        environment, lock_file = self.path / "environment.json", self.path / "lock"
        require_own_folder(
            self.path,
            "output.run_dir",
            "the folder of a run",
            _EARLY,
            lambda: is_lock(lock_file) or has_keys(environment, ["versions", "launch"]),
        )
        file = self.path / "recipe.yaml"
        if not file.exists():
            return
        if changed := differences(load_recipe(file).identity_fields(), recipe.identity_fields()):
            raise UserError(
                f"output.run_dir = {str(self.path)!r} belongs to another recipe ({'; '.join(changed)});"
                " set another output.run_dir, or delete this one to start over"
            )

    def free_bytes(self) -> int:
        """Return the free space where the folder is, or will be."""
        return shutil.disk_usage(next(p for p in (self.path, *self.path.absolute().parents) if p.exists())).free

    def read_summary(self) -> RunSummary | None:
        """Return the summary of a finished run, else None. Raises `UserError` where it is damaged."""
        if not self.summary.exists():
            return None
        remedy = "delete it, and the command that trained the run writes it from the last checkpoint"
        try:
            return RunSummary.read(read_json(self.summary, remedy), self.path)
        except ValidationError as error:
            raise UserError(f"{self.summary}: {explain_errors(error, RunSummary)}; {remedy}") from None

    def claim(self) -> None:
        """Lock the folder for this process; the kernel releases the lock when the process ends, however it ends."""
        key = f"output.run_dir = {str(self.path)!r}"
        self._lock = lock(self.path / "lock", key, "wait for that run, stop it, or set another output.run_dir")

    def restore(self) -> None:
        """Make the folder again where it was removed during the run. Raises `UserError` where another program uses it by now."""
        own, there = os.fstat(self._lock.fileno()), self.path / "lock"
        if there.exists() and there.stat().st_ino == own.st_ino:
            return
        if there.exists() or (self.path.exists() and {path.name for path in self.path.iterdir()} - {"checkpoints"}):
            raise UserError(
                f"output.run_dir = {str(self.path)!r} was removed during the run, and is used by something else now;"
                " this run ends. To train it again, set another output.run_dir"
            )
        self.claim()
        for name, text in self._start.items():
            atomic_write(self.path / name, text)
        logger.warning(
            "%s was removed during the run: it is made again, with the state of this run from here on; to end a run, stop its"
            " process first",
            self.path,
        )

    def write_start(self, recipe: Recipe, launch: dict[str, Any], command: list[str]) -> None:
        """Write the environment of this launch (started by `command`) and of earlier ones, then the resolved recipe.

        In this order: the first file marks the folder as a run's.
        """
        file = self.path / "environment.json"
        previous = read_json(file, "move it away: it describes earlier launches only") if file.exists() else None
        earlier = [] if previous is None else [*previous.pop("earlier_launches", []), previous]
        here = {**environment(), "command": hide_in_command(command), "launch": launch, "earlier_launches": earlier}
        self.write("environment.json", json.dumps(here, indent=1) + "\n")
        self.write("recipe.yaml", to_yaml(recipe))

    def write(self, name: str, text: str) -> None:
        """Write a file of this launch, which is written again where the folder is removed meanwhile."""
        self._start[name] = text
        atomic_write(self.path / name, text)

    def export(self, write: Callable[[Path], None]) -> None:
        """Replace `model/` by what `write` puts into a temporary folder. Files of other programs in it stay."""
        temporary = self.path / ".model.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        replace_folder(temporary, self.model, _MODEL_FILES)

    def finish(self, summary: RunSummary) -> None:
        """Write `summary.json`, which marks the run as finished."""
        atomic_write(self.summary, json.dumps(summary.to_dict(), indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Return versions, commit and hardware of this process."""
    from isoflop.train.devices import gpu_names  # imports torch, which readers of a run folder do without

    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "commit": _commit(),
        "hardware": {
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "cpu_cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": gpu_names(),
        },
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this library runs from, with `+changes` where files differ; None if installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
