"""Train the runs of a sweep, each by the ordinary `pretrain` in its own process: on one machine, or spread over its GPUs.

A signal is passed on, so that every run saves. Started again, finished runs are skipped and stopped ones resume. Several sweeps
may work on one folder, on one machine or many: a run that another process trains is skipped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from isoflop.checkpoint.folder import list_checkpoints
from isoflop.config.loading import to_yaml
from isoflop.sweep.design import Group, Run
from isoflop.sweep.state import state_of
from isoflop.train.run_folder import RunFolder
from isoflop.train.signals import EXIT_RESUME, end_with_parent, without_nohup
from isoflop.utils.io import atomic_write, lock

POLL_S = 0.2
PROGRAM = ("--module", "isoflop", "pretrain")  # what `accelerate launch` runs


class Slot(NamedTuple):
    """A place for one run at a time, as environment variables."""

    environment: dict[str, str]


def slots_of(gpus: list[str], jobs: int) -> list[Slot]:
    """Return a slot for each GPU; without GPUs `jobs` slots that share the cores (threads of several runs slow each other)."""
    if gpus:
        return [Slot({"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus]
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}
    return [Slot(threads) for _ in range(jobs)]


@dataclass
class Process:
    """One run being trained."""

    run: Run
    group: Group
    slot: Slot
    child: subprocess.Popen[bytes]

    @property
    def ended(self) -> bool:
        """Whether launcher and run have ended: after a signal the launcher ends first, while the run still saves."""
        return self.child.poll() is not None and state_of(self.run).what != "running"


@dataclass
class Runner:
    """A queue of groups, and a process in each slot that has one."""

    groups: list[Group]
    slots: list[Slot]
    config: str
    """A launch config."""
    folder: Path
    program: Sequence[str] = PROGRAM
    running: list[Process] = field(default_factory=list)
    failed: list[Run] = field(default_factory=list)
    signal: str | None = None

    def train(self) -> int:
        """Train all runs that are neither finished nor trained by another process; returns the exit code."""
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._stop) for number in without_nohup(handled)}
        try:
            queue = list(self.groups)
            while (queue and not self.signal) or self.running:
                free = [slot for slot in self.slots if slot not in [process.slot for process in self.running]]
                while queue and free and not self.signal:
                    if started := self._start(queue.pop(0), free[0]):
                        self.running.append(started)
                        free.pop(0)
                time.sleep(POLL_S)
                self._collect()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signal:
            print(f"{self.signal}: the runs in training are saved; the same command resumes", flush=True)
            return EXIT_RESUME
        return 1 if self.failed else 0

    def _start(self, group: Group, slot: Slot) -> Process | None:
        """Start a group's first run that is not finished."""
        for run in group:
            if run not in self.failed and state_of(run).what in ("waiting", "stopped"):
                branch_off(run, group[0])
                return Process(run, group, slot, self._launch(run, slot))
        return None

    def _launch(self, run: Run, slot: Slot) -> subprocess.Popen[bytes]:
        recipe, log = recipe_file(self.folder, run), self.folder / "logs" / f"{run.name}.log"
        for file in (recipe, log):
            file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(recipe, to_yaml(run.recipe, exclude_none=True))
        print(f"{time.strftime('%H:%M:%S')} {run.name}: {run.steps:,} steps, {run.flops:.3g} FLOPs; log: {log}", flush=True)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", self.config]
        with log.open("ab") as stream:
            return subprocess.Popen(
                [*launch, *self.program, str(recipe)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | slot.environment,
                start_new_session=True,  # a Ctrl-C reaches it only once, through the sweep
                preexec_fn=end_with_parent,  # a killed sweep ends its runs: their launchers pass the signal on
            )

    def _collect(self) -> None:
        """Remove the processes that ended, and start the next run of their groups."""
        for process in [process for process in self.running if process.ended]:
            self.running.remove(process)
            state = state_of(process.run)
            if state.what == "finished":
                print(f"{time.strftime('%H:%M:%S')} {process.run.name}: loss {state.val_loss:.4f}", flush=True)
            elif not self.signal:
                self.failed.append(process.run)
                print(
                    f"{process.run.name} failed (exit code {process.child.returncode}); its log ends:\n{self._tail(process.run)}"
                )
            if not self.signal and (following := self._start(process.group, process.slot)):
                self.running.append(following)

    def _tail(self, run: Run) -> str:
        lines = (self.folder / "logs" / f"{run.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-3:])

    def _stop(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number).name
        for process in self.running:
            os.killpg(process.child.pid, signal.SIGTERM)


def recipe_file(folder: Path, run: Run) -> Path:
    """Return the file of a run's recipe in a sweep's folder."""
    return folder / "recipes" / f"{run.name}.yaml"


def branch_off(run: Run, trunk: Run) -> None:
    """Start a run from the checkpoint of a longer one of its size, at the step where their schedules part.

    The result is bit for bit that of the run alone: up to that step both have the same batches and learning rates.
    """
    folder, origin = RunFolder(run.recipe.output.run_dir), RunFolder(trunk.recipe.output.run_dir)
    checkpoint = origin.checkpoints / f"step-{run.branch_step}"
    if run is trunk or list_checkpoints(folder.checkpoints) or not checkpoint.is_dir():
        return
    with lock(folder.path / "lock", f"output.run_dir = {str(folder.path)!r}", "wait for that run"):  # which also marks the folder
        tmp = folder.checkpoints / f".step-{run.branch_step}.partial"
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.copytree(checkpoint, tmp, copy_function=os.link)
        shutil.copyfile(origin.metrics, folder.metrics)  # later rows are removed when it resumes
        tmp.rename(folder.checkpoints / checkpoint.name)
