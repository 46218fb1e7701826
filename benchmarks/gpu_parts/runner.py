"""Run a part's cases in a worker process that may crash or hang: only the case that did is lost. Standard library alone.

A worker appends JSON lines to its progress file: {"plan": [case, ...]}, then {"begin": case, "limit_s": s} and {"end": case} of
each case that `--done` does not name. It may leave after any case; it is started again for those that are left.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

POLL_S = 0.05
GRACE_S = 3.0  # for a worker that writes the stacks of its threads shortly before a limit
TAIL_LINES, TAIL_CHARACTERS = 15, 2000
Row = dict[str, Any]


class Ended(NamedTuple):
    """How a worker process ended."""

    plan: list[str]
    finished: list[str]
    running: str | None
    """The case that was running."""
    running_s: float
    fault: str | None
    """Why the running case, or the start of the worker, is lost."""
    out_of_time: bool
    """Killed at the part's limit, within the limit of the running case."""


def run_part(
    part: str, command: list[str], log: Path, ends_at: float, write: Callable[[list[Row]], None], environment: dict[str, str],
    done: list[str],
) -> bool:  # fmt: skip
    """Run the cases of a worker's plan that are not `done`, until `ends_at` (seconds since the epoch).

    Return whether none crashed or hung.

    Each start of the worker has its files at `log`-NUMBER. `write` takes the rows of lost and left-out cases; the worker writes
    the others.
    """
    done = list(done)
    good, starts = True, 0
    while True:
        own = log.with_name(f"{log.name}-{starts}")
        ended = run_worker([*command, "--done", json.dumps(done)], own, ends_at, environment)
        starts += 1
        done += ended.finished
        if ended.fault:
            good = False
            error = f"{ended.fault}\n{tail(own.with_suffix('.err'))}".rstrip()
            write([{"part": part, "case": ended.running or "start", "error": error, "seconds_until": round(ended.running_s, 1)}])
        elif ended.out_of_time and ended.running:
            reason = f"the part's time was up after {ended.running_s:.0f} s of it"
            write([{"part": part, "case": ended.running, "skipped": reason}])
        if ended.running:
            done.append(ended.running)
        left = [case for case in ended.plan if case not in done]
        if not left:
            return good
        if time.time() >= ends_at:
            write([{"part": part, "case": case, "skipped": "the part's time was up"} for case in left])
            return good
        if not (ended.finished or ended.running):
            return False  # a worker that does nothing would be started for ever; its fault is written


def run_worker(command: list[str], log: Path, ends_at: float, environment: dict[str, str]) -> Ended:
    """Run one worker process, and kill its whole group at a limit. Its output is in `log`.out and `log`.err."""
    progress = log.with_suffix(".progress")
    progress.touch()
    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
        process = subprocess.Popen(
            [*command, "--progress", str(progress)], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            fault, out_of_time = watch(process, progress, ends_at)
        finally:
            kill_group(process)
    plan, finished, running, began_at, _ = read_progress(progress)
    running_s = time.time() - began_at
    if fault is None and not out_of_time:
        if process.returncode:
            fault = f"the process ended with {describe(process.returncode)}"
        elif running or not plan:
            fault = "the process ended in the midst of a case" if running else "the process ended without a plan of its cases"
    return Ended(plan, finished, running, running_s if running else 0.0, fault, out_of_time)


def watch(process: subprocess.Popen[bytes], progress: Path, ends_at: float) -> tuple[str | None, bool]:
    """Wait for the process to end or reach a limit: (the fault of a case beyond its limit, whether the part's was reached)."""
    while process.poll() is None:
        time.sleep(POLL_S)
        now = time.time()
        _, _, running, began_at, limit_s = read_progress(progress)
        if running and now > began_at + limit_s + GRACE_S:
            return f"not done after its limit of {limit_s:.0f} s", False
        if now > ends_at + GRACE_S:
            return None, True
    return None, False


def read_progress(file: Path) -> tuple[list[str], list[str], str | None, float, float]:
    """Plan, finished cases, the running one, when it began and its limit."""
    plan: list[str] = []
    finished: list[str] = []
    running: str | None = None
    began_at, limit_s = time.time(), float("inf")
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # being written
            break
        plan = event.get("plan", plan)
        if "begin" in event:
            running, began_at, limit_s = event["begin"], event["at"], event["limit_s"]
        if "end" in event:
            finished.append(event["end"])
            running = None
    return plan, finished, running, began_at, limit_s


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a worker and of all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def describe(code: int) -> str:
    """An exit code, or the name of the signal."""
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


def tail(file: Path) -> str:
    """The last lines of a log."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return "\n".join(line for line in lines[-TAIL_LINES:])[-TAIL_CHARACTERS:]
