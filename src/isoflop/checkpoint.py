"""Checkpoints that are whole or not there, and that any engine at any world size can load.

`torch.distributed.checkpoint` over `get_state_dict`/`set_state_dict`: weights and moments under their own names, whoever
saved them. A checkpoint is written aside, checksummed file by file, synced and renamed, so a kill or a full disk at any
moment leaves the one before as it was. `step-N/` is the state after N optimizer steps.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from isoflop.errors import UserError

CHECKSUMS, TRAINER_STATE = "checksums.json", "trainer_state.json"


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, trainer_state: dict[str, Any]) -> Path:
    """Write `folder/step-N` and return it. Collective. Raises `UserError` when the disk is full; what was there stays."""
    final, aside = folder / f"step-{step}", folder / f".step-{step}.partial"
    weights, moments = get_state_dict(model, optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if _is_main():
            _remove_partials(folder)
            aside.mkdir()
        _barrier()
        with _one_process_is_fine():
            save_sharded({"model": weights, "optimizer": moments}, checkpoint_id=aside)
        if _is_main():
            _seal(aside, trainer_state)
            shutil.rmtree(final, ignore_errors=True)  # the same state, reached again after resuming from an older one
            aside.rename(final)
            _sync(folder)
    except (OSError, RuntimeError, CheckpointException) as error:
        free = shutil.disk_usage(folder).free
        shutil.rmtree(aside, ignore_errors=True)
        if not _is_disk_full(error):
            raise
        needed = _local_bytes(weights) + _local_bytes(moments)
        whole = ", ".join(path.name for path in list_checkpoints(folder)) or "none"
        raise UserError(
            f"output.run_dir: no space left while saving step {step}: {folder} has {free:,} bytes free, this checkpoint needs"
            f" about {needed:,}; earlier checkpoints are whole ({whole}): free some space, then the same command goes on"
        ) from error
    _barrier()
    return final


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Load weights (and moments, given an optimizer) in place and return the trainer state. Collective."""
    weights, moments = get_state_dict(model, [optimizer] if optimizer else [])
    state: dict[str, Any] = {"model": weights} | ({"optimizer": moments} if optimizer else {})
    with _one_process_is_fine():
        load_sharded(state, checkpoint_id=path)
    set_state_dict(
        model,
        [optimizer] if optimizer else [],
        model_state_dict=state["model"],
        optim_state_dict=state.get("optimizer", {}),
    )
    trainer_state: dict[str, Any] = json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
    return trainer_state


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    named = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]  # not a copy by hand
    return sorted(named, key=step_of)


def step_of(path: Path) -> int:
    """Optimizer steps behind a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files match their checksums; a broken one is named on stderr and passed over."""
    for path in reversed(list_checkpoints(folder)):
        if not (faults := find_faults(path)):
            return path
        print(f"checkpoint {path} is broken ({'; '.join(faults)}): using an older one", file=sys.stderr, flush=True)
    return None


def find_faults(path: Path) -> list[str]:
    """What is wrong with a checkpoint: missing, truncated or altered files, by name. Empty when it is whole."""
    try:
        checksums: dict[str, str] = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{CHECKSUMS}: {error}"]
    faults = []
    for name, checksum in checksums.items():
        if not (path / name).is_file():
            faults.append(f"{name} is missing")
        elif _sha256(path / name) != checksum:
            faults.append(f"{name} does not match its checksum")
    return faults


def prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest `keep_last` and the multiples of `keep_every`."""
    for path in list_checkpoints(folder)[:-keep_last]:
        if keep_every is None or step_of(path) % keep_every:
            shutil.rmtree(path)


def discard_after(folder: Path, step: int) -> None:
    """Delete checkpoints of later steps: after going back to `step` they are of a past that retention must not count."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            shutil.rmtree(path)


def _seal(aside: Path, trainer_state: dict[str, Any]) -> None:
    """Trainer state and the checksum of every file, all synced to the disk."""
    (aside / TRAINER_STATE).write_text(json.dumps(trainer_state, indent=1) + "\n", encoding="utf-8")
    checksums = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
    (aside / CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n", encoding="utf-8")
    for file in aside.iterdir():
        _sync(file)
    _sync(aside)


def _remove_partials(folder: Path) -> None:
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _local_bytes(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    return sum(_local_bytes(value) for value in tree.values()) if isinstance(tree, dict) else 0


def _is_disk_full(error: BaseException) -> bool:
    """Whether ENOSPC, a quota or a file-size limit is behind an error; DCP wraps what happened on each rank."""
    causes = [error, error.__cause__, error.__context__]
    causes += [wrapped[0] for wrapped in getattr(error, "failures", {}).values()]
    numbers = {cause.errno for cause in causes if isinstance(cause, OSError)}
    return bool(numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}) or "No space left" in str(error)


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Without DCP's warning that one process saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
