"""A run's folder: who owns it, who is in it, and what stays in it when the run is over.

recipe.yaml  environment.json  metrics.jsonl  samples.jsonl  checkpoints/step-N/  model/  loss.png  evaluations/  summary.json
profile/  flight_recorder/, where asked for or left by a hang
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from isoflop.devices import gpu_names
from isoflop.disk import lock, write_aside
from isoflop.errors import UserError
from isoflop.recipe import Recipe, differences
from isoflop.recipe_file import load_recipe, to_yaml

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

    def check_owner(self, recipe: Recipe) -> None:
        """Refuse a folder whose recipe would train to other weights."""
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
        """The summary of a run that is done, else None."""
        return json.loads(self.summary.read_text(encoding="utf-8")) if self.summary.exists() else None

    def claim(self) -> None:
        """Lock the folder for this process; the kernel lets go when the process ends, however it ends."""
        key = f"output.run_dir = {str(self.path)!r}"
        self._lock = lock(self.path / "lock", key, "wait for that run, stop it, or set another output.run_dir")

    def write_start(self, recipe: Recipe, launch: dict[str, Any], command: list[str]) -> None:
        """The resolved recipe, and the environment of this launch (by `command`) with those of earlier ones behind it."""
        write_aside(self.path / "recipe.yaml", to_yaml(recipe))
        file = self.path / "environment.json"
        previous = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        earlier = [] if previous is None else [*previous.pop("earlier_launches"), previous]
        write_aside(
            file,
            json.dumps({**environment(), "command": command, "launch": launch, "earlier_launches": earlier}, indent=1) + "\n",
        )

    def export(self, write: Callable[[Path], None]) -> None:
        """Replace `model/` by what `write` puts into a folder aside."""
        aside = self.path / ".model.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        write(aside)
        shutil.rmtree(self.model, ignore_errors=True)
        aside.rename(self.model)

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
