"""Distribute parts over processes, with one progress bar for all of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from isoflop.data.readers import compression
from isoflop.prepare.corpus import Corpus, PartName
from isoflop.prepare.part import OnProgress, WorkDone, WorkerContext
from isoflop.utils.errors import UserError

# A process takes some 3 s to start and encodes about 100 MB/s; a single process has the encoder use all cores.
WORTH_A_PROCESS_BYTES = 2**30

Work = Callable[[Corpus, WorkerContext, PartName, dict[str, str], OnProgress], None]


class Stopped(Exception):
    """Another part failed, or the user interrupted."""


class ProgressBar:
    """A bar of tokens, or of bytes where nothing is encoded, with speed and time left, estimated from the finished parts."""

    def __init__(self, title: str, sizes: dict[PartName, int], unit: str) -> None:
        self._sizes, self._unit = sizes, unit
        self._text: Counter[PartName] = Counter()
        self._finished: set[PartName] = set()
        self._bar = tqdm(desc=title, unit=unit, unit_scale=True, smoothing=0.05)
        self._bar.set_postfix_str(f"0/{len(sizes)} parts")

    def __call__(self, done: WorkDone) -> None:
        """Count a piece of work."""
        self._text[done.part] += done.bytes
        if done.finished:
            self._finished.add(done.part)
            self._bar.set_postfix_str(f"{len(self._finished)}/{len(self._sizes)} parts", refresh=False)
        total = sum(self._text.values())
        self._bar.update(done.tokens if self._unit == "tok" else done.bytes)
        if total:
            self._bar.total = max(self._bar.n, round(self._bar.n * self._expected() / total))

    def _expected(self) -> float:
        """Estimate the bytes of text of all parts: finished parts give the ratio of text to file bytes for the others."""
        text = sum(self._text[part] for part in self._finished)
        size = sum(self._sizes[part] for part in self._finished)
        ratio = text / size if size else 1.0
        return text + sum(max(self._text[part], ratio * self._sizes[part]) for part in self._sizes.keys() - self._finished)

    def close(self) -> None:
        """Close the bar and leave its last line."""
        self._bar.close()


def run_parts(corpus: Corpus, work: Work, files: dict[PartName, dict[str, str]], report: OnProgress) -> None:
    """Do `work` on every part of `files` in up to `corpus.num_workers` processes. Raises what the first failing part raised."""
    workers = min(corpus.num_workers, len(files))
    if workers <= 1:
        context = WorkerContext.of(corpus)
        for part, hashes in files.items():
            work(corpus, context, part, hashes, report)
        return
    processes = multiprocessing.get_context("forkserver")  # a fork of this process would copy locks that its threads hold
    processes.set_forkserver_preload([__name__])
    queue, stop = processes.SimpleQueue(), processes.Event()
    listener = threading.Thread(target=_listen, args=(queue, report), daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(workers, processes, initializer=_start, initargs=(corpus, work, queue, stop))
    try:
        with pool:
            try:
                for future in as_completed([pool.submit(_work, part, hashes) for part, hashes in files.items()]):
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise UserError(
            f"one of {workers} processes was killed, most likely because memory ran out (or it could not start, where a script of"
            " your own lacks `if __name__ == '__main__'`); finished parts are kept: run the same command with fewer --workers"
        ) from None
    queue.put(None)
    listener.join()  # not after a failure: a killed process may never release the queue's lock; the thread is a daemon


def _listen(queue: Any, report: OnProgress) -> None:
    while (done := queue.get()) is not None:
        report(done)


@dataclass(frozen=True)
class _Worker:
    """What a worker process was started with."""

    corpus: Corpus
    context: WorkerContext
    work: Work
    report: OnProgress


_worker: _Worker  # of this process, set by `_start`


def _start(corpus: Corpus, work: Work, queue: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all processes; the parent handles it
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    compression.register()
    pa.set_cpu_count(1)  # as many processes as cores

    def report(done: WorkDone) -> None:
        if stop.is_set():
            raise Stopped
        queue.put(done)

    global _worker
    _worker = _Worker(corpus, WorkerContext.of(corpus), work, report)


def _exit_with_parent() -> None:
    """Exit with the parent process: when it is killed, its workers would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(part: PartName, hashes: dict[str, str]) -> None:
    with contextlib.suppress(Stopped):
        _worker.work(_worker.corpus, _worker.context, part, hashes, _worker.report)


def default_workers(parts: int, source_bytes: int) -> int:
    """Return the processes worth their start: at most one per core, per part, and per GiB of source files of known size."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, parts, max(1, source_bytes // WORTH_A_PROCESS_BYTES) if source_bytes else cores)


@contextlib.contextmanager
def progress_bar(title: str, sizes: dict[PartName, int], unit: str) -> Iterator[ProgressBar]:
    """Show a bar over parts; `sizes` are the bytes of the files of each."""
    bar = ProgressBar(title, sizes, unit)
    try:
        yield bar
    finally:
        bar.close()
