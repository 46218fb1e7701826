"""Profile of a few optimizer steps: a Chrome trace and a memory snapshot per rank, and a summary of where the time went.

Entered by `profile_steps`, around the training loop. It writes to `RUN_DIR/profile`: `rank-N.trace.json.gz`, which
https://ui.perfetto.dev opens; on a GPU `rank-N.memory.pickle`, which https://pytorch.org/memory_viz opens; and `summary.md` and
`summary.json` of rank 0. A profile changes no result. An error of the profiler is reported and does not end the run.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from isoflop.train.step_time import summarize
from isoflop.utils.io import atomic_path, atomic_write

# The first step compiles and allocates, the second may compile again (for another number of documents), and in the third the
# tracer is on but its events are dropped, since its start takes time.
SKIPPED_STEPS = 3
# Newest allocations and releases that a snapshot keeps: each takes up to several KB (torch.cuda.memory).
_MEMORY_EVENTS = 100_000


class StepProfiler:
    """Profiler of `steps` optimizer steps after the first `SKIPPED_STEPS`; with `steps` 0 it does nothing."""

    def __init__(self, run_dir: Path, steps: int, device: torch.device, rank: int, say: Callable[[str], None]) -> None:
        self._folder, self._steps, self._device, self._rank, self._say = run_dir / "profile", steps, device, rank, say
        self._finished_steps = 0
        self._profile: profile | None = None
        if steps:
            self._attempt("start", self._start)

    def step(self) -> None:
        """Count a finished optimizer step; every rank calls it. The call after the last traced step writes the files."""
        if self._profile is None:
            return
        self._finished_steps += 1
        if self._finished_steps == SKIPPED_STEPS and self._on_gpu:
            self._attempt("memory history", self._record_memory)
        traced = self._attempt("trace", self._profile.step)
        if not traced or self._finished_steps == SKIPPED_STEPS + self._steps:
            self._end()

    def close(self) -> None:
        """Write what was recorded, where the run ends before all traced steps are finished."""
        if self._profile is None:
            return
        if self._finished_steps < SKIPPED_STEPS:
            self._tell(
                f"profile: nothing was recorded: the run ended after {self._finished_steps} steps, and tracing starts after"
                f" {SKIPPED_STEPS}"
            )
        self._end()

    def _start(self) -> None:
        started = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])],
            schedule=schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=self._steps, repeat=1),
            on_trace_ready=self._export,
        )
        started.__enter__()  # type: ignore[no-untyped-call]
        self._profile = started

    def _record_memory(self) -> None:
        torch.cuda.synchronize(self._device)  # else kernels of the previous step run in the first traced one, untraced
        # Python frames only: torch takes minutes to resolve those of C++ (torchtitan, tools/profiler.py).
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MEMORY_EVENTS)

    def _export(self, traced: profile) -> None:
        """Write the files. torch's profiler calls it after the last traced step, or when the run ends before that."""
        writable = self._attempt("folder", lambda: self._folder.mkdir(parents=True, exist_ok=True))
        if writable and self._on_gpu:
            self._attempt("memory snapshot", self._write_memory)
        if self._rank == 0:
            self._attempt("summary", lambda: self._write_summary(traced))
        if writable:
            self._attempt("trace", lambda: self._write_trace(traced))

    def _write_memory(self) -> None:
        file = self._folder / f"rank-{self._rank}.memory.pickle"
        torch.cuda.memory._dump_snapshot(str(file))  # type: ignore[no-untyped-call]

    def _write_summary(self, traced: profile) -> None:
        events = traced.events()  # type: ignore[no-untyped-call]
        summary = summarize(events, self._finished_steps - SKIPPED_STEPS)
        if summary is None:
            self._tell(f"profile: no traced step was finished; the trace in {self._folder} holds a part of one")
            return
        viewers = "rank-N.trace.json.gz opens in https://ui.perfetto.dev, " + (
            "rank-N.memory.pickle in https://pytorch.org/memory_viz" if self._on_gpu else "a CPU has no memory snapshot"
        )
        self._tell(f"profile of rank 0: {summary.text()}\n{self._folder}: {viewers}")
        atomic_write(self._folder / "summary.md", f"{summary.page()}\n{viewers}\n")
        atomic_write(self._folder / "summary.json", json.dumps(summary.to_dict(), indent=1) + "\n")

    def _write_trace(self, traced: profile) -> None:
        """Compress the trace in its own folder: torch would use the system's temporary one, and it takes hundreds of MB."""
        name = f"rank-{self._rank}.trace.json"
        plain = self._folder / f".{name}"
        try:
            traced.export_chrome_trace(str(plain))
            if not plain.exists():  # the tracer is C++ and raises nothing on a full disk
                raise OSError(f"torch could not write {plain}")
            with (
                plain.open("rb") as source,
                atomic_path(self._folder / f"{name}.gz") as temporary,
                gzip.open(temporary, "wb", compresslevel=3) as target,
            ):
                shutil.copyfileobj(source, target)
        finally:
            for part in self._folder.glob(f".{name}*"):  # torch's temporary file too
                part.unlink()

    def _end(self) -> None:
        """Leave torch's profiler, which exports what it has recorded and not exported yet."""
        if self._profile is not None:
            traced, self._profile = self._profile, None
            self._attempt("end", lambda: traced.__exit__(None, None, None))  # type: ignore[no-untyped-call]
        if self._on_gpu:
            self._attempt("memory history", lambda: torch.cuda.memory._record_memory_history(enabled=None))

    def _attempt(self, part: str, action: Callable[[], object]) -> bool:
        """Run a part of profiling; report what it raises, since training does not depend on it. Returns whether it succeeded."""
        try:
            action()
        except Exception as error:
            print(f"rank {self._rank}: profile: {part}: {error!r}; training continues", file=sys.stderr, flush=True)
            return False
        return True

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _tell(self, text: str) -> None:
        if self._rank == 0:
            self._say(text)


@contextmanager
def profile_steps(
    run_dir: Path, steps: int, device: torch.device, rank: int, say: Callable[[str], None] = print
) -> Iterator[StepProfiler]:
    """Yield a profiler whose `step()` the training loop calls after each optimizer step; with `steps` 0 it does nothing.

    Each rank writes its files to `run_dir`/profile; rank 0 prints the summary by `say`.
    """
    profiler = StepProfiler(run_dir, steps, device, rank, say)
    try:
        yield profiler
    finally:
        profiler.close()
