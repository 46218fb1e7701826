"""`metrics.jsonl` and `samples.jsonl`: one JSON object per step, read tolerantly, and protected while a run writes them.

Somebody else may delete, replace or truncate the file, or fill the disk. The run continues: the file is written again from what
was in it, and rows that are lost are a gap, which is reported.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import io
import itertools
import json
import math
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from isoflop.utils.errors import UserError
from isoflop.utils.io import atomic_path

Row = dict[str, Any]
# What a row of the metrics has at least: finite numbers, and losses, which are null where not measured or not finite.
NUMBERS, LOSSES = ("tokens", "tokens_per_s", "elapsed_s", "peak_memory_bytes"), ("loss", "val_loss")
LONGEST_LINE = 16 * 2**20  # bytes; a row with the norms of 1,000 layers has 0.1 MB


class Records:
    """What a file of JSON lines holds: where each step's line begins. Lines are read when they are asked for, one at a time.

    A run that resumes reads the rows of all its steps, which are 2 kB each in memory and more.
    """

    def __init__(self, file: Path, starts: dict[int, int], damaged: int) -> None:
        self._file = file
        self.steps = array("q", sorted(starts))
        """Ascending; the later line counts where a step is there twice."""
        self._starts = array("q", (starts[step] for step in self.steps))
        self.damaged = damaged
        """Lines that are not a record of a step. A last line cut short by a kill does not count."""

    def __iter__(self) -> Iterator[Row]:
        return (record for line in self.lines() if (record := _parsed(line)) is not None)

    def lines(self) -> Iterator[bytes]:
        """Yield the lines of the file by step. Raises `UserError` where they can no longer be read."""
        if not self.steps:
            return
        try:
            with self._file.open("rb") as stream:
                for start in self._starts:
                    stream.seek(start)
                    yield stream.readline(LONGEST_LINE).rstrip(b"\n") + b"\n"
        except OSError as error:
            raise _unreadable(self._file, error) from None


def read_rows(file: Path, last_step: int) -> list[Row]:
    """Return the rows of a `metrics.jsonl` up to a step. Lines that are not rows are left out."""
    return list(read_records(file, last_step, is_row))


def read_records(file: Path, last_step: int, valid: Callable[[Row], bool]) -> Records:
    """Find the records in a file of JSON lines; none where there is no file. Raises `UserError` where it cannot be read."""
    starts, damaged, start = dict[int, int](), 0, 0
    try:
        with file.open("rb") as stream:
            while line := stream.readline(LONGEST_LINE):
                record = _parsed(line)
                if record is not None and valid(record):
                    if record["step"] <= last_step:
                        starts[record["step"]] = start
                elif line.endswith(b"\n") or len(line) == LONGEST_LINE:
                    damaged += 1
                start += len(line)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unreadable(file, error) from None
    return Records(file, starts, damaged)


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file} cannot be read: {error.strerror}; it is a file of JSON lines that a run writes")


def _parsed(line: bytes) -> Row | None:
    """Return the record of a step in a line, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and 0 < step < 2**63 else None


def is_row(record: Row) -> bool:
    """Return whether a record is a row of the metrics: a number, null or text under each key, or the norms of the layers."""
    scalars = [value for value in record.values() if not isinstance(value, dict)]
    return (
        all(_is_number(record.get(key)) for key in NUMBERS)
        and all(key in record and (record[key] is None or _is_number(record[key])) for key in LOSSES)
        and all(value is None or isinstance(value, str) or _is_number(value) for value in scalars)
    )


def is_sample(record: Row) -> bool:
    """Return whether a record holds sampled texts."""
    texts = record.get("samples")
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def _is_number(value: Any) -> bool:
    # The bound keeps `float(value)` of a whole number from overflowing.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def finite(value: Any) -> Any:
    """Return the value with None for NaN and infinity, also among the norms of the layers."""
    if isinstance(value, dict):
        return {key: finite(norm) for key, norm in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def missing_steps(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Return first and last of each range of steps that are missing among ascending steps, from step 1 on."""
    return [(before + 1, step - 1) for before, step in zip((0, *steps), steps, strict=False) if step > before + 1]


def describe_steps(ranges: Sequence[tuple[int, int]]) -> str:
    """Return ranges of steps as text."""
    return ", ".join(f"step {first}" if first == last else f"steps {first} to {last}" for first, last in ranges)


def damaged_copy(file: Path) -> Path:
    """Return an unused name for the copy of a damaged file."""
    names = (file.with_name(f"{file.stem}.damaged-{number}{file.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


class StepFile:
    """A file of JSON lines that a run appends to. `report` prints a line, `restore` makes the folder again where it is gone.

    On entry the file is cut back to `records`. Where lines of it are damaged, a copy is kept under another name.
    """

    def __init__(
        self,
        file: Path,
        records: Records,
        valid: Callable[[Row], bool],
        report: Callable[[str], None],
        restore: Callable[[], None],
    ) -> None:
        self._file, self._valid, self._report, self._restore = file, valid, report, restore
        self._waiting: list[bytes] = []
        """Lines that found no room on the disk."""
        self.last_step: int = records.steps[-1] if records.steps else 0
        if records.damaged:
            kept = damaged_copy(file)
            shutil.copy2(file, kept)
            report(f"{file}: {records.damaged} damaged lines are left out; a copy of the file as it was is kept as {kept.name}")
        self._stream, self._size = _rewritten(file, records.lines())

    def append(self, record: Row) -> None:
        """Write one step's record. Where there is no room, it is kept in memory and written with the next one."""
        self.last_step = record["step"]
        self._waiting.append(_line(record))
        try:
            self._write_waiting()
        except OSError as error:
            if len(self._waiting) == 1:
                self._report(f"{self._file}: {error.strerror}; training continues, its lines are kept in memory meanwhile")

    def rewind(self, step: int) -> None:
        """Remove the records after a step, which is trained again. Raises `UserError` where there is no room."""
        self._require_written()
        self.last_step = min(self.last_step, step)
        try:
            self._replace(read_records(self._file, step, self._valid).lines())
        except OSError as error:
            raise self._unwritable(error) from None

    def sync(self) -> None:
        """Sync every record written so far to the disk: a checkpoint holds only the row of its own step."""
        with contextlib.suppress(OSError):  # reported where it was met
            self._write_waiting()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file. Raises `UserError` where records found no room to the end."""
        try:
            self._require_written()
        finally:
            self._stream.close()

    def _require_written(self) -> None:
        try:
            self._write_waiting()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self._file}: {error.strerror}; {len(self._waiting)} lines are not written: free some space, then the same command"
            " resumes"
        )

    def _write_waiting(self) -> None:
        """Write the lines that wait. Raises `OSError` where there is no room; the file then ends with a complete line."""
        self._require_unchanged()
        while self._waiting:
            line = self._waiting[0]
            if self._stream.write(line) != len(line):
                os.ftruncate(self._stream.fileno(), self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += len(line)
            del self._waiting[0]

    def _require_unchanged(self) -> None:
        """Write the file again where somebody else deleted, replaced or changed it. What stands there is kept."""
        try:
            there = self._file.stat()
        except FileNotFoundError:
            there = None
        own = os.fstat(self._stream.fileno())
        if there and (there.st_ino, there.st_dev, there.st_size) == (own.st_ino, own.st_dev, self._size):
            return
        self._restore()
        what = "was deleted"
        if there:
            kept = damaged_copy(self._file)
            self._file.rename(kept)
            what = f"was changed by somebody else, and is kept as {kept.name}"
        self._stream.seek(0)  # a deleted file can be read for as long as it is open
        lines = self._stream.read().splitlines(keepends=True)
        intact = [line for line in lines if (record := _parsed(line)) is not None and self._valid(record)]
        self._replace(intact)
        self._report(f"{self._file} {what}: written again, with {len(intact)} lines")

    def _replace(self, lines: Iterable[bytes]) -> None:
        stream, size = _rewritten(self._file, lines)
        self._stream.close()
        self._stream, self._size = stream, size


def _rewritten(file: Path, lines: Iterable[bytes]) -> tuple[io.FileIO, int]:
    """Replace a file by one of these lines; returns it, open for more, and its size in bytes."""
    with atomic_path(file) as temporary, temporary.open("wb") as stream:
        stream.writelines(lines)
        size = stream.tell()
    return file.open("ab+", buffering=0), size  # unbuffered: what found no room is known at once


def _line(record: Row) -> bytes:
    return (json.dumps(record) + "\n").encode()


class TrainingCurve:
    """The rows so far in 32 bytes per step, with the full rows of the steps that were validated or scored."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.steps, self.tokens, self.losses, self.tokens_per_s = array("q"), array("q"), array("d"), array("d")
        self.measured: list[Row] = []
        self.peak_memory_bytes = 0
        self.last: Row = {}
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        """Add the row of the next step."""
        self.steps.append(row["step"])
        self.tokens.append(row["tokens"])
        self.losses.append(math.nan if row["loss"] is None else row["loss"])
        self.tokens_per_s.append(row["tokens_per_s"])
        self.peak_memory_bytes = max(self.peak_memory_bytes, row["peak_memory_bytes"])
        self.last = {key: value for key, value in row.items() if not isinstance(value, dict)}
        if row["val_loss"] is not None or any("/" in key for key in row):
            self.measured.append(self.last)

    def rewind(self, step: int) -> None:
        """Remove the rows after a step."""
        kept = bisect.bisect_right(self.steps, step)
        for column in (self.steps, self.tokens, self.losses, self.tokens_per_s):
            del column[kept:]
        self.measured = [row for row in self.measured if row["step"] <= step]
        self.last = {}
