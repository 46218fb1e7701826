"""Standard output and error: writes never end a command, credentials are hidden, progress bars are lines in a file.

Entered by `guard_output`, once per process. Text that cannot be written is dropped: a pipe has lost its reader, a terminal was
closed, the disk of a log is full. A run records that once in its folder (`note_in`). Without a terminal, a progress bar of any
library becomes a plain line now and then, instead of many redraws a second.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from isoflop.utils.credentials import hide_credentials

# These streams have no reader any more; after ENOSPC a later write may succeed.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
_UP = "\x1b[A"
_GRAPHICS = re.compile(r"\|[\s\d#\u2580-\u259f]*\|")  # of a bar of tqdm


def seconds_between_lines(elapsed_s: float) -> float:
    """Return the seconds between two lines of progress without a terminal: 10 at first, ten minutes after some hours."""
    return min(600.0, max(10.0, elapsed_s / 50))


class BarLines:
    """Converts a progress bar's redraws, each of which begins with `\\r`, to lines for a stream that is not a terminal."""

    def __init__(self) -> None:
        self._state: str | None = None
        """The bar's current text, if a bar was written last."""
        self._printed = ""
        self._began_s = self._printed_s = 0.0

    def __call__(self, text: str) -> str:
        """Return the text to write."""
        if text.startswith("\r"):
            return self._redrawn(_GRAPHICS.sub("", text).strip())
        if not text.replace(_UP, ""):  # empty, or cursor movement between several bars
            self._state = "" if text else self._state
            return ""
        state, self._state = self._state, None
        if text != "\n" or state is None:
            return text
        ended = state and ("100%" in state or "%" not in state)  # else it moves to a bar below this one
        return self._line(state) if ended and state != self._printed else ""

    def _redrawn(self, state: str) -> str:
        now_s = time.monotonic()
        if self._began_s == 0.0:
            self._began_s = self._printed_s = now_s
        self._state = state
        due = now_s - self._printed_s >= seconds_between_lines(now_s - self._began_s)
        return self._line(state) if due and state else ""

    def _line(self, state: str) -> str:
        self._printed, self._printed_s = state, time.monotonic()
        return f"{state}\n"


class GuardedStream:
    """A text stream whose `write` and `flush` never raise; everything else is the stream's own."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._lines = None if stream.isatty() else BarLines()
        self.failure: str | None = None
        """Reason of the first failed write."""

    def write(self, text: str) -> int:
        """Write text without credentials; characters outside the stream's encoding are escaped."""
        shown = hide_credentials(text if self._lines is None else self._lines(text))
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
        """Flush the buffer, if it can be written."""
        try:
            self._stream.flush()
        except (OSError, ValueError, RuntimeError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in _GONE:
            try:  # C libraries and child processes write to it too
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


class ConsoleHandler(logging.Handler):
    """Handler that prints messages above any progress bar: warnings to standard error, others to standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()


def log_to_console() -> None:
    """Print what the package logs, in this process; a library call without this logs by Python's `logging` alone."""
    logger = logging.getLogger("isoflop")
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


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
    """Write one line for each failed stream; retried at the next failure if the disk is full."""
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
