"""Files: checksums, atomic writes, locks on folders, and checks of who wrote them.

Nothing is overwritten or deleted that this program did not write: its folders have its lock file, and its files are identified by
their content.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from isoflop.utils.errors import UserError
from isoflop.utils.untrusted import MOST_JSON_BYTES


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, at about 1 GB/s a thread."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def atomic_write(file: Path, content: str | bytes, durable: bool = False, shared: bool = False) -> None:
    """Write a file at once: whenever a process is killed, it is complete or what it was before. Options: see `atomic_path`."""
    with atomic_path(file, durable, shared) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_path(file: Path, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to. It replaces `file` at the end, and is deleted after an error.

    `durable` syncs the content to the disk before the rename, so that a power failure leaves no empty file. `shared` gives every
    writer a temporary file of its own, for a file that several machines write to a shared folder at the same time.
    """
    temporary = temporary_path(file, shared)
    try:
        yield temporary
        replace_file(temporary, file, durable)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(file: Path, shared: bool = False) -> Path:
    """Return the path of a file while it is incomplete. It is hidden and ends in `.partial`, so that no glob finds it."""
    return file.with_name(f".{file.name}.{f'{secrets.token_hex(8)}.' if shared else ''}partial")


def replace_file(temporary: Path, file: Path, durable: bool) -> None:
    """Rename a temporary file to its final name, after a sync to the disk where it is to be `durable`."""
    if durable:
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
    temporary.replace(file)


def lock(file: Path, key: str, remedy: str) -> IO[str]:
    """Lock a folder by a file in it for as long as the returned file is open; the kernel releases it however the process ends.

    Raises `UserError` with the holder's name where another process has the lock, and where the folder cannot be written. `key` is
    the user's name for the folder.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key} cannot be written: {error.strerror}; name another folder") from None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        raise UserError(f"{key} is in use by {stream.read().strip() or 'another process'}; {remedy}") from None
    except OSError as error:
        print(
            f"{file.parent}: this file system has no locks ({error}); a second process here would go unnoticed",
            flush=True,
        )
    stream.truncate(0)
    stream.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
    stream.flush()
    return stream


def is_locked(file: Path) -> bool:
    """Return whether a process has locked a file with `lock`."""
    if not file.exists():
        return False
    with file.open("r+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # this file system has no locks
            return False
    return False


# Suffixes of output that people redirect into a run's folder. No file of this program has them, except push.log in a run.
LOGS = (".log", ".out", ".err")


def is_lock(file: Path) -> bool:
    """Return whether `lock` wrote a file. It is the first file in every folder of this program."""
    try:
        with file.open(encoding="utf-8") as stream:
            return re.fullmatch(r"host \S+, pid \d+\n", stream.read(1000)) is not None
    except (OSError, UnicodeDecodeError):
        return False


def require_own_folder(folder: Path, key: str, kind: str, early: Sequence[str], is_own: Callable[[], bool]) -> None:
    """Refuse a folder with files of another origin. Raises `UserError` with the names of some.

    `kind` names what the folder must be, and `is_own` checks its content. Files named in `early` exist before that can be
    checked: a folder with only these is accepted. Log files are accepted too.
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
    """Refuse to overwrite files of another origin. Files are written together; the first one is JSON with `keys`.

    Raises `UserError`.
    """
    there = [file for file in files if file.exists()]
    if there and not has_keys(files[0], keys):
        raise UserError(f"{key}: {there[0]} exists already, and was not written by this program; give another name")


def has_keys(file: Path, keys: Sequence[str]) -> bool:
    """Return whether a file is a JSON object with these keys."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= MOST_JSON_BYTES else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and set(keys) <= set(tree)


def write_new(file: Path, text: str, key: str) -> None:
    """Write a file that users edit. Raises `UserError` instead of overwriting a different one."""
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        if file.is_file() and file.read_bytes() == text.encode():
            return
        raise UserError(f"{key} exists already with other content; delete it, or give another name") from None
    except OSError as error:
        raise UserError(f"{key} cannot be written: {error.strerror}; give another folder") from None


def replace_folder(fresh: Path, folder: Path, own: re.Pattern[str]) -> None:
    """Replace a folder by a fresh one. Files of the old folder whose names do not match `own` are moved into the fresh one."""
    old = folder.with_name(f".{folder.name}.replaced.partial")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    if old.exists():
        for path in old.iterdir():
            if not (own.fullmatch(path.name) or (folder / path.name).exists()):
                path.rename(folder / path.name)
        remove_own(old, own)


def remove_own(folder: Path, own: re.Pattern[str]) -> bool:
    """Delete the files of a folder whose names match `own`, and the folder if it is empty then.

    Return whether the folder was deleted. A symbolic link in place of the folder is the user's and is kept.
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
