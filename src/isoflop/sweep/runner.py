"""Train the runs of a sweep, each by the ordinary `pretrain` in a process of its own: on one machine, or packed over its GPUs.

A signal is passed on, so that every run saves; started again, finished runs are left alone and stopped ones go on. Several sweeps
may work on one folder, on one machine or many: a run that another process trains is passed over.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from isoflop.checkpoint.folder import list_checkpoints
from isoflop.disk import lock, write_aside
from isoflop.recipe_file import to_yaml
from isoflop.run_folder import RunFolder
from isoflop.stop import EXIT_RESUME, end_with_parent, without_nohup
from isoflop.sweep.design import Group, Run
from isoflop.sweep.state import state_of

POLL_S = 0.2


class Slot(NamedTuple):
    """Where one run at a time is trained, as environment variables."""

    environment: dict[str, str]


def slots_of(gpus: list[str], jobs: int) -> list[Slot]:
    """A slot for each GPU; without GPUs `jobs` of them, which share the cores: threads of several runs slow one another down."""
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
        """Whether launcher and run are gone: told to stop, the first leaves while the second still saves."""
        return self.child.poll() is not None and state_of(self.run).what != "running"


@dataclass
class Runner:
    """A queue of groups, and a process in each slot that has one."""

    groups: list[Group]
    slots: list[Slot]
    config: str
    """A file of accelerate_configs/."""
    folder: Path
    running: list[Process] = field(default_factory=list)
    failed: list[Run] = field(default_factory=list)
    signal: str | None = None

    def train(self) -> int:
        """Train all that is neither finished nor in another process's hands; returns the exit code."""
        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._stop) for number in without_nohup(heard)}
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
            print(f"{self.signal}: what was being trained is saved; the same command goes on", flush=True)
            return EXIT_RESUME
        return 1 if self.failed else 0

    def _start(self, group: Group, slot: Slot) -> Process | None:
        """Start a group's first run that is to be trained."""
        for run in group:
            if run not in self.failed and state_of(run).what in ("waiting", "stopped"):
                branch_off(run, group[0])
                return Process(run, group, slot, self._launch(run, slot))
        return None

    def _launch(self, run: Run, slot: Slot) -> subprocess.Popen[bytes]:
        recipe, log = recipe_file(self.folder, run), self.folder / "logs" / f"{run.name}.log"
        for file in (recipe, log):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(recipe, to_yaml(run.recipe, exclude_none=True))
        print(f"{time.strftime('%H:%M:%S')} {run.name}: {run.steps:,} steps, {run.flops:.3g} FLOPs; log: {log}", flush=True)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", self.config]
        with log.open("ab") as stream:
            return subprocess.Popen(
                [*launch, "scripts/pretrain.py", str(recipe)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | slot.environment,
                start_new_session=True,  # a Ctrl-C reaches it through the sweep alone, once
                preexec_fn=end_with_parent,  # a sweep that is killed takes its runs with it: their launchers pass the end on
            )

    def _collect(self) -> None:
        """Take leave of the processes that ended, and go on to the next run of their groups."""
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
    """Where a sweep in `folder` writes the recipe of a run."""
    return folder / "recipes" / f"{run.name}.yaml"


def branch_off(run: Run, trunk: Run) -> None:
    """Let a run begin from the checkpoint of a longer one of its size, where their paths part.

    Bit for bit what it would have come to by itself: up to there both see the same batches at the same rates.
    """
    folder, origin = RunFolder(run.recipe.output.run_dir), RunFolder(trunk.recipe.output.run_dir)
    checkpoint = origin.checkpoints / f"step-{run.branch_step}"
    if run is trunk or list_checkpoints(folder.checkpoints) or not checkpoint.is_dir():
        return
    with lock(folder.path / "lock", f"output.run_dir = {str(folder.path)!r}", "wait for that run"):  # it marks the folder, too
        aside = folder.checkpoints / f".step-{run.branch_step}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(checkpoint, aside, copy_function=os.link)
        shutil.copyfile(origin.metrics, folder.metrics)  # later rows are cut off when it goes on
        aside.rename(folder.checkpoints / checkpoint.name)
