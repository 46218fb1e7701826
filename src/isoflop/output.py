"""Standard output and error that cannot end a command, and that show no credential.

Entered by `guard_output`, once a process. What cannot be written is dropped: the reader of a pipe is gone, the terminal was
closed, the disk under a log is full. A run notes that once in its folder (`note_in`).
"""

from __future__ import annotations

import errno
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from isoflop.credentials import hide_credentials

# Nobody will read this stream again; on a full disk there may be room later.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


class GuardedStream:
    """A text stream whose `write` and `flush` never raise; everything else is the stream's own."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self.failure: str | None = None
        """Why something could not be written, where that happened."""

    def write(self, text: str) -> int:
        """Write text without credentials; what the stream's encoding lacks is escaped."""
        shown = hide_credentials(text)
        try:
            self._stream.write(shown)
        except UnicodeEncodeError as error:
            self.write(shown.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError, RuntimeError) as error:  # closed, or in the middle of a write that a signal interrupted
            self._fail(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of the lines."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand over what is buffered, where it can be written."""
        try:
            self._stream.flush()
        except (OSError, ValueError, RuntimeError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in _GONE:
            try:  # libraries in C and child processes write there too
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            except (OSError, ValueError):
                pass
        if self.failure is None:
            self.failure = getattr(error, "strerror", None) or str(error)
            _write_notes()

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)


_note_file: Path | None = None
_noted: set[str] = set()


def guard_output() -> None:
    """Guard standard output and error from here on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, GuardedStream):
            setattr(sys, name, GuardedStream(stream, name))


def note_in(folder: Path) -> None:
    """Write into `output_errors.txt` of a run's folder what could not be written, should that happen."""
    global _note_file
    _note_file = folder / "output_errors.txt"
    _write_notes()


def _write_notes() -> None:
    """One line for each stream that failed; tried again at the next failure where the disk is full."""
    if _note_file is None:
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, GuardedStream) and stream.failure and stream._name not in _noted:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            line = f"{now} pid {os.getpid()}: {stream._name} cannot be written ({stream.failure}); the run continues without it\n"
            try:
                with _note_file.open("a", encoding="utf-8") as notes:
                    notes.write(line)
                _noted.add(stream._name)
            except OSError:
                return
