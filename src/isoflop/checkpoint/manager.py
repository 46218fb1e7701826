"""`CheckpointManager`: how training saves, finds, loads and prunes the checkpoints of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from isoflop.checkpoint import folder
from isoflop.checkpoint.saver import Saver
from isoflop.checkpoint.state import load_tensors
from isoflop.utils.errors import UserError

NEWEST = "newest"


class CheckpointManager:
    """The checkpoints of one run. `save`, `wait` and `close` are collective."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saver = Saver(path)
        self.save, self.wait, self.close = self._saver.save, self._saver.wait, self._saver.close

    def available(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return folder.list_checkpoints(self.path)

    def latest(self) -> Path | None:
        """Return the newest intact checkpoint."""
        return folder.newest_intact(self.path)

    def select(self, resume: str | None) -> Path | None:
        """Return the checkpoint to load: the newest intact one, or that of the step `resume`.

        Without `resume` a run that has none starts from step 0; `NEWEST` requires one. Raises `UserError` where the checkpoint
        asked for is missing or damaged.
        """
        there = self.available()
        if resume is None or resume == NEWEST:
            latest = self.latest()
            if latest is None and (there or resume == NEWEST):
                broken = f" ({', '.join(path.name for path in there)} are broken); put one back, or delete the run's folder"
                raise UserError(
                    f"{self.path} has no intact checkpoint{broken if there else ''}; to start from step 0 leave out --resume and"
                    " --eval-only"
                )
            return latest
        path = self.path / f"step-{resume.removeprefix('step-')}"
        if faults := folder.verify(path):
            names = ", ".join(known.name for known in there) or "none"
            raise UserError(f"--resume-from {resume}: {path} is not intact ({'; '.join(faults)}); there are: {names}")
        return path

    def load(self, path: Path, model: nn.Module, optimizer: Any, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Load a checkpoint into an unwrapped model and its optimizer (or None), in place; return its trainer state.

        `check` sees the state before any tensor is read, and may raise.
        """
        with folder.read_locked(path):
            state = folder.read_trainer_state(path)
            check(state)
            load_tensors(path, model, optimizer)
        return state

    def prune(self, keep_last: int, keep_every: int | None, keep: Iterable[int] = ()) -> None:
        """Delete all but the newest `keep_last`, the multiples of `keep_every`, the steps in `keep`, and those being read."""
        folder.prune(self.path, keep_last, keep_every, keep)

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps."""
        folder.discard_after(self.path, step)
