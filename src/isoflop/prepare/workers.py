"""Parts shared out over processes, with one progress bar over all of them."""

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
from multiprocessing.connection import wait
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from isoflop.data import compression
from isoflop.errors import UserError
from isoflop.prepare.corpus import Corpus, PartName
from isoflop.prepare.part import Done, Report, Tools

# A process takes some 3 s to start and works at about 100 MB/s, and alone it has the encoder use all cores.
WORTH_A_PROCESS_BYTES = 2**30

Work = Callable[[Corpus, Tools, PartName, dict[str, str], Report], None]


class Stopped(Exception):
    """Another part failed, or the user wants to stop."""


class Progress:
    """A bar of tokens (or bytes, where nothing is encoded) with rate and time left, judged by the text of finished parts."""

    def __init__(self, title: str, sizes: dict[PartName, int], unit: str) -> None:
        self._sizes, self._unit = sizes, unit
        self._text: Counter[PartName] = Counter()
        self._finished: set[PartName] = set()
        self._bar = tqdm(desc=title, unit=unit, unit_scale=True, smoothing=0.05)
        self._bar.set_postfix_str(f"0/{len(sizes)} parts")

    def __call__(self, done: Done) -> None:
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
        """Bytes of text in all parts: those of finished ones, and of the others as many for each byte of their files."""
        text = sum(self._text[part] for part in self._finished)
        size = sum(self._sizes[part] for part in self._finished)
        ratio = text / size if size else 1.0
        return text + sum(max(self._text[part], ratio * self._sizes[part]) for part in self._sizes.keys() - self._finished)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def run_parts(corpus: Corpus, work: Work, files: dict[PartName, dict[str, str]], report: Report) -> None:
    """Do `work` on every part of `files`, on up to `corpus.workers` processes; raises what the first failing part raised."""
    workers = min(corpus.workers, len(files))
    if workers <= 1:
        tools = Tools.of(corpus)
        for part, hashes in files.items():
            work(corpus, tools, part, hashes, report)
        return
    context = multiprocessing.get_context("forkserver")  # forking this process would copy its libraries' locked threads
    context.set_forkserver_preload([__name__])
    queue, stop = context.SimpleQueue(), context.Event()
    listener = threading.Thread(target=_listen, args=(queue, report), daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(corpus, work, queue, stop))
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
            f"one of {workers} processes was killed, most likely for want of memory (or it could not start, where a script of"
            " your own lacks `if __name__ == '__main__'`); what is finished is kept: run the same command with fewer --workers"
        ) from None
    queue.put(None)
    listener.join()  # not after a failure: a killed process may hold the lock of the queue for ever; the thread is a daemon


def _listen(queue: Any, report: Report) -> None:
    while (done := queue.get()) is not None:
        report(done)


_process: dict[str, Any] = {}  # what this worker process was started with


def _start(corpus: Corpus, work: Work, queue: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    compression.register()
    pa.set_cpu_count(1)  # as many processes as cores

    def report(done: Done) -> None:
        if stop.is_set():
            raise Stopped
        queue.put(done)

    _process.update(corpus=corpus, work=work, report=report, tools=Tools.of(corpus))


def _leave_with_parent() -> None:
    """A parent that is killed cannot say so: without this its workers would go on, and then wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(part: PartName, hashes: dict[str, str]) -> None:
    with contextlib.suppress(Stopped):
        _process["work"](_process["corpus"], _process["tools"], part, hashes, _process["report"])


def default_workers(parts: int, source_bytes: int) -> int:
    """Processes that are worth their start: up to one a core and a part, and a GiB of source files where those are known."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, parts, max(1, source_bytes // WORTH_A_PROCESS_BYTES) if source_bytes else cores)


@contextlib.contextmanager
def progress(title: str, sizes: dict[PartName, int], unit: str) -> Iterator[Progress]:
    """A bar over parts, by the bytes of the files of each."""
    bar = Progress(title, sizes, unit)
    try:
        yield bar
    finally:
        bar.close()
