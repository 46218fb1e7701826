"""A run's `checkpoints/`: listing, verification and retention.

`step-N/` is the state after N optimizer steps. It is written to a temporary folder, checksummed file by file, synced and renamed,
so a kill or a full disk at any moment leaves the previous checkpoint intact.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from isoflop.utils.errors import UserError
from isoflop.utils.io import remove_own, replace_folder, sha256
from isoflop.utils.untrusted import leaves_folder, named, read_json, shown

logger = logging.getLogger(__name__)
CHECKSUMS, TRAINER_STATE = "checksums.json", "trainer_state.json"
MOST_FAULTS = 8  # listed in one message
# The files of a checkpoint: these, and torch.distributed.checkpoint's.
_OWN = re.compile(r"checksums\.json|trainer_state\.json|\.metadata(\.tmp)?|__\d+_\d+\.distcp")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    numbered = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]  # not a copy made by hand
    return sorted((path for path in numbered if any(_OWN.fullmatch(file.name) for file in path.glob("*"))), key=step_of)


def step_of(path: Path) -> int:
    """Return the optimizer steps of a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def temporary(folder: Path, step: int) -> Path:
    """Return the folder that a checkpoint is written to before it is complete."""
    return folder / f".step-{step}.partial"


def newest_intact(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files match their checksums. A broken one is logged and skipped."""
    for path in reversed(list_checkpoints(folder)):
        if not (faults := verify(path)):
            return path
        logger.warning("checkpoint %s is broken (%s): using an older one", path, "; ".join(faults))
    return None


def verify(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint: missing, truncated or altered files, by name. Empty where it is intact."""
    if outside := leaves_folder(path / CHECKSUMS, path):
        return [outside]
    try:
        checksums = read_json(path / CHECKSUMS, "use another checkpoint")
    except UserError as error:
        return [str(error)]
    faults = [f"{name} is not in {CHECKSUMS}" for name in (".metadata", TRAINER_STATE) if name not in checksums]
    there = {file.name for file in path.iterdir()}
    for name, checksum in checksums.items():
        if len(faults) == MOST_FAULTS:
            return [*faults, "and more"]
        if Path(name).name != name:
            faults.append(f"{CHECKSUMS} names {shown(name)}, which is no file of this folder")
        elif name not in there or not (path / name).is_file():
            faults.append(f"{named(name)} is missing")
        elif outside := leaves_folder(path / name, path):
            faults.append(outside)
        elif sha256(path / name) != checksum:
            faults.append(f"{name} does not match its checksum")
    return faults


def commit(tmp: Path, final: Path, trainer_state: dict[str, Any], known: dict[str, str]) -> None:
    """Complete a checkpoint: write trainer state and the checksum of every file, sync all, then rename the folder.

    `known` holds the checksums that the ranks computed of the files they wrote.
    """
    (tmp / TRAINER_STATE).write_text(json.dumps(trainer_state, indent=1) + "\n", encoding="utf-8")
    checksums = {file.name: known.get(file.name) or sha256(file) for file in sorted(tmp.iterdir())}
    (tmp / CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n", encoding="utf-8")
    for file in tmp.iterdir():
        _sync(file)
    _sync(tmp)
    replace_folder(tmp, final, _OWN)  # after returning to an older step, one of the same step exists
    _sync(final.parent)


def read_trainer_state(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside its tensors. Raises `UserError` where that is not a JSON object."""
    return read_json(path / TRAINER_STATE, "use another checkpoint")


def prune(folder: Path, keep_last: int, keep_every: int | None, keep: Iterable[int] = ()) -> None:
    """Delete all but the newest `keep_last`, the multiples of `keep_every`, the steps in `keep`, and those being read."""
    for path in list_checkpoints(folder)[:-keep_last]:
        step = step_of(path)
        if step not in keep and (keep_every is None or step % keep_every) and not _is_being_read(path):
            remove_own(path, _OWN)


def discard_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps. After a return to `step` retention must not count them."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            remove_own(path, _OWN)


def remove_temporary(folder: Path) -> None:
    """Delete incomplete checkpoints that a kill left behind."""
    for path in folder.glob(".step-*.partial"):
        remove_own(path, _OWN)


@contextmanager
def read_locked(path: Path) -> Iterator[None]:
    """Keep retention, of this process or another, from deleting a checkpoint while it is read or pushed.

    The kernel releases the lock when the process ends, however it ends. On a file system without locks nothing is locked.
    """
    with (path / CHECKSUMS).open("rb") as stream:
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_SH)
        yield


def _is_being_read(path: Path) -> bool:
    try:
        with (path / CHECKSUMS).open("r+b") as stream:  # for writing: NFS gives exclusive locks to no one else
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # incomplete, so nobody reads it; or a file system without locks
        return False
    return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
