"""What every room does with files: a checksum, a write that is whole or not there, a folder for one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
from pathlib import Path
from typing import IO

from isoflop.errors import UserError


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

    Raises `UserError` with the holder's name where another process has it; `key` is what the user called the folder.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    held = file.open("a+", encoding="utf-8")
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
