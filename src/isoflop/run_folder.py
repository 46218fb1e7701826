"""A run's folder: who owns it, who is in it, and what stays in it when the run is over.

lock  environment.json  recipe.yaml  metrics.jsonl  samples.jsonl  loss.png  checkpoints/step-N/  model/  evaluations/
summary.json; profile/  flight_recorder/  output_errors.txt  metrics.damaged-N.jsonl, where asked for or left by a fault

A folder is a run's by its lock file or its environment.json; no other one is written to.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from isoflop.credentials import hide_in_command
from isoflop.devices import gpu_names
from isoflop.disk import has_keys, is_lock, lock, replace_folder, require_own_folder, write_aside
from isoflop.errors import UserError
from isoflop.recipe import Recipe, differences
from isoflop.recipe_file import load_recipe, to_yaml
from isoflop.summary import require_summary
from isoflop.untrusted import read_json

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
# What a run folder may hold before its environment.json: a launch was killed at once, or its lock was cut short.
_EARLY = ("lock", "flight_recorder", ".environment.json.partial")
# Files of an exported model: what transformers names so, and the code of a hybrid.
_MODEL_FILES = re.compile(
    r"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|(tokenizer|special_tokens|added_tokens|vocab).*\.json"
    r"|merges\.txt|chat_template\.jinja|\w+_hybrid\.py|__init__\.py"
)


class RunFolder:
    """Paths of a run folder, and the rules for entering it."""

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
        """What this launch wrote on entry, by name."""

    def check_owner(self, recipe: Recipe) -> None:
        """Refuse a folder that is no run's, and one whose recipe would train to other weights."""
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
        if changed := differences(load_recipe(file).trajectory(), recipe.trajectory()):
            raise UserError(
                f"output.run_dir = {str(self.path)!r} belongs to another recipe ({'; '.join(changed)});"
                " set another output.run_dir, or delete this one to start over"
            )

    def free_bytes(self) -> int:
        """Free space where the folder is, or will be."""
        return shutil.disk_usage(next(p for p in (self.path, *self.path.absolute().parents) if p.exists())).free

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that is done, else None. Raises `UserError` where it is damaged."""
        if not self.summary.exists():
            return None
        remedy = "delete it, and the command that trained the run writes it from the last checkpoint"
        return require_summary(self.summary, read_json(self.summary, remedy))

    def claim(self) -> None:
        """Lock the folder for this process; the kernel lets go when the process ends, however it ends."""
        key = f"output.run_dir = {str(self.path)!r}"
        self._lock = lock(self.path / "lock", key, "wait for that run, stop it, or set another output.run_dir")

    def restore(self) -> None:
        """Make the folder again where it was removed under the run. Raises `UserError` where it is somebody else's by now."""
        own, there = os.fstat(self._lock.fileno()), self.path / "lock"
        if there.exists() and there.stat().st_ino == own.st_ino:
            return
        if there.exists() or (self.path.exists() and {path.name for path in self.path.iterdir()} - {"checkpoints"}):
            raise UserError(
                f"output.run_dir = {str(self.path)!r} was removed while the run was going on, and is used by something else now;"
                " this run ends. To train it again, set another output.run_dir"
            )
        self.claim()
        for name, text in self._start.items():
            write_aside(self.path / name, text)
        print(
            f"{self.path} was removed while the run was going on: it is made again, with the state of this run from here on;"
            " to end a run, stop its process first",
            file=sys.stderr,
            flush=True,
        )

    def write_start(self, recipe: Recipe, launch: dict[str, Any], command: list[str]) -> None:
        """The environment of this launch (by `command`) with those of earlier ones behind it, and the resolved recipe.

        In this order: the first says that the folder is a run's.
        """
        file = self.path / "environment.json"
        previous = read_json(file, "move it away: it tells of earlier launches alone") if file.exists() else None
        earlier = [] if previous is None else [*previous.pop("earlier_launches", []), previous]
        here = {**environment(), "command": hide_in_command(command), "launch": launch, "earlier_launches": earlier}
        self._start = {"environment.json": json.dumps(here, indent=1) + "\n", "recipe.yaml": to_yaml(recipe)}
        for name, text in self._start.items():
            write_aside(self.path / name, text)

    def export(self, write: Callable[[Path], None]) -> None:
        """Replace `model/` by what `write` puts into a temporary folder. Files that somebody else put there stay."""
        temporary = self.path / ".model.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        replace_folder(temporary, self.model, _MODEL_FILES)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`: from now on the run is done."""
        write_aside(self.summary, json.dumps(summary, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Versions, commit and hardware of this process."""
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
    """Commit of the checkout this library runs from, with `+changes` where files differ; None for an installed copy."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
