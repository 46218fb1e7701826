"""What every part does with files: a checksum, an atomic write, a folder for one process at a time, and whose files they are.

Nothing is overwritten or deleted that this program did not write: a folder of its own holds its lock file, and a file of its own
is known by its content.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from isoflop.errors import UserError
from isoflop.untrusted import MOST_JSON_BYTES


def sha256(file: Path) -> str:
    """Checksum of a file's content, about 1 GB/s a thread."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_aside(file: Path, text: str) -> None:
    """Write a file so that it is whole or not there."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def lock(file: Path, key: str, remedy: str) -> IO[str]:
    """Lock a folder by a file in it for as long as the result is open; the kernel lets go however the process ends.

    Raises `UserError` with the holder's name where another process has it, and where the folder cannot be written; `key` is what
    the user called the folder.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key} cannot be written: {error.strerror}; name another folder") from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.seek(0)
        raise UserError(f"{key} is in use by {held.read().strip() or 'another process'}; {remedy}") from None
    except OSError as error:
        print(f"{file.parent}: no locks on this file system ({error}); a second process here would not be noticed", flush=True)
    held.truncate(0)
    held.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
    held.flush()
    return held


def is_locked(file: Path) -> bool:
    """Whether a process holds a lock of `lock`."""
    if not file.exists():
        return False
    with file.open("r+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no locks on this file system
            return False
    return False


# What people redirect into a folder that is to be a run's; no file of this program is called so, but for push.log in a run.
LOGS = (".log", ".out", ".err")


def is_lock(file: Path) -> bool:
    """Whether a file is one that `lock` wrote. It is in every folder of this program from before anything else is."""
    try:
        with file.open(encoding="utf-8") as stream:
            return re.fullmatch(r"host \S+, pid \d+\n", stream.read(1000)) is not None
    except (OSError, UnicodeDecodeError):
        return False


def require_own_folder(folder: Path, key: str, kind: str, early: Sequence[str], is_own: Callable[[], bool]) -> None:
    """Refuse a folder that holds somebody else's files. Raises `UserError` with the names of some.

    `kind` is what it would have to be, `is_own` tells from its content. Files of the names `early` are there before that can be
    decided: alone they are ours. So are people's logs.
    """
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.endswith(LOGS))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{key} = {str(folder)!r}: {error.strerror}; give a folder that is new, empty or {kind}") from None
    if set(names) <= set(early) or is_own():
        return
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise UserError(
        f"{key} = {str(folder)!r} is not empty and is not {kind}: it holds {', '.join(names[:3])}{more}, which would be"
        f" overwritten; set {key} to a new or an empty folder"
    )


def require_own_files(files: Sequence[Path], key: str, keys: Sequence[str]) -> None:
    """Refuse to overwrite files of somebody else. They are written together, the first being JSON with `keys`, which tells.

    Raises `UserError`.
    """
    there = [file for file in files if file.exists()]
    if there and not has_keys(files[0], keys):
        raise UserError(f"{key}: {there[0]} exists already and is not known to be written by this program; give another name")


def has_keys(file: Path, keys: Sequence[str]) -> bool:
    """Whether a file is a JSON object with these keys."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= MOST_JSON_BYTES else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and set(keys) <= set(tree)


def write_new(file: Path, text: str, key: str) -> None:
    """Write a file that people edit. Raises `UserError` rather than overwrite another one."""
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        if file.is_file() and file.read_bytes() == text.encode():
            return
        raise UserError(f"{key} exists already, and is another one; delete it, or give another name") from None
    except OSError as error:
        raise UserError(f"{key} cannot be written: {error.strerror}; give another folder") from None


def replace_folder(fresh: Path, folder: Path, own: re.Pattern[str]) -> None:
    """Put a fresh folder in the place of another; files there that are not this program's by their names are moved into it."""
    before = folder.with_name(f".{folder.name}.replaced.partial")
    if folder.exists():
        folder.rename(before)
    fresh.rename(folder)
    if before.exists():
        for path in before.iterdir():
            if not (own.fullmatch(path.name) or (folder / path.name).exists()):
                path.rename(folder / path.name)
        remove_own(before, own)


def remove_own(folder: Path, own: re.Pattern[str]) -> bool:
    """Delete the files of a folder that this program wrote, by their names, and the folder where nothing else is in it.

    Returns whether it is gone. A link in place of the folder is somebody's own arrangement and is left alone.
    """
    if folder.is_symlink():
        return False
    for path in folder.iterdir():
        if own.fullmatch(path.name) and (path.is_file() or path.is_symlink()):
            path.unlink()
    try:
        folder.rmdir()
    except OSError:  # not empty
        return False
    return True
