"""A run's `checkpoints/`: what is there, what is whole, and what may go.

`step-N/` is the state after N optimizer steps. It is written aside, checksummed file by file, synced and renamed, so a kill or a
full disk at any moment leaves the one before as it was.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from isoflop.disk import remove_own, replace_folder, sha256
from isoflop.errors import UserError
from isoflop.untrusted import leaves_folder, named, read_json, shown

CHECKSUMS, TRAINER_STATE = "checksums.json", "trainer_state.json"
MOST_FAULTS = 8  # of a checkpoint, in a message
# The files of a checkpoint: these, and torch.distributed.checkpoint's.
_OWN = re.compile(r"checksums\.json|trainer_state\.json|\.metadata(\.tmp)?|__\d+_\d+\.distcp")


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    named = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]  # not a copy by hand
    return sorted((path for path in named if any(_OWN.fullmatch(file.name) for file in path.glob("*"))), key=step_of)


def step_of(path: Path) -> int:
    """Optimizer steps behind a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def partial(folder: Path, step: int) -> Path:
    """Where a checkpoint is written before it is whole."""
    return folder / f".step-{step}.partial"


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files match their checksums; a broken one is named on stderr and passed over."""
    for path in reversed(list_checkpoints(folder)):
        if not (faults := find_faults(path)):
            return path
        print(f"checkpoint {path} is broken ({'; '.join(faults)}): using an older one", file=sys.stderr, flush=True)
    return None


def find_faults(path: Path) -> list[str]:
    """What is wrong with a checkpoint: missing, truncated or altered files, by name. Empty when it is whole."""
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


def seal(aside: Path, final: Path, trainer_state: dict[str, Any], known: dict[str, str]) -> None:
    """Make a written checkpoint whole: trainer state, the checksum of every file, all synced to the disk, then its name.

    `known` are checksums that the ranks took of the files they wrote.
    """
    (aside / TRAINER_STATE).write_text(json.dumps(trainer_state, indent=1) + "\n", encoding="utf-8")
    checksums = {file.name: known.get(file.name) or sha256(file) for file in sorted(aside.iterdir())}
    (aside / CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n", encoding="utf-8")
    for file in aside.iterdir():
        _sync(file)
    _sync(aside)
    replace_folder(aside, final, _OWN)  # one of the same step is there after going back to an older one
    _sync(final.parent)


def read_trainer_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors. Raises `UserError` where that is no JSON object."""
    return read_json(path / TRAINER_STATE, "use another checkpoint")


def prune(folder: Path, keep_last: int, keep_every: int | None, keep: Iterable[int] = ()) -> None:
    """Delete all but the newest `keep_last`, the multiples of `keep_every`, the steps in `keep`, and what is held."""
    for path in list_checkpoints(folder)[:-keep_last]:
        step = step_of(path)
        if step not in keep and (keep_every is None or step % keep_every) and not _is_held(path):
            remove_own(path, _OWN)


def discard_after(folder: Path, step: int) -> None:
    """Delete checkpoints of later steps: after going back to `step` they are of a past that retention must not count."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            remove_own(path, _OWN)


def remove_partials(folder: Path) -> None:
    """Delete what a kill left half written."""
    for path in folder.glob(".step-*.partial"):
        remove_own(path, _OWN)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep retention, also another process's, from deleting a checkpoint while it is read or pushed.

    The kernel lets go when the process ends, however it ends. A file system without locks cannot be told: nothing is held there.
    """
    with (path / CHECKSUMS).open("rb") as stream:
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_SH)
        yield


def _is_held(path: Path) -> bool:
    try:
        with (path / CHECKSUMS).open("r+b") as stream:  # for writing: NFS gives exclusive locks to no one else
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # not whole, so nobody's; or no locks here, so nobody can hold it
        return False
    return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
