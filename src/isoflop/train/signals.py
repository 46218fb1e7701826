"""Signals that stop a run: all ranks answer the request together, and a forced exit follows where they do not."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from isoflop.train.distributed import launched_by_accelerate

EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, saved; the same command resumes


class StopRequest:
    """Request to stop by SIGTERM, SIGINT, SIGHUP or SIGUSR1, answered between micro-batches: save, then exit with `EXIT_RESUME`.

    As a context manager it handles these signals; without entering it, nothing sets the request. A launcher gives its processes
    seconds before it kills them (torchrun 30), and a step can take longer: an unfinished step is dropped and done again. Before
    training there is nothing to save, and a signal exits at once. Where the main thread does not return in time (a compilation,
    a collective whose peer is gone), another thread ends the process. Under nohup SIGHUP, of a closed terminal, stays ignored.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal: str | None = None
        self._deferring = False
        self._group: dist.ProcessGroup | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._exited = threading.Event()
        self._signals, self._wakeup = socket.socketpair()
        self._watcher = threading.Thread(target=self._force_exit, name="forced exit", daemon=True)

    def __enter__(self) -> StopRequest:
        follow_launcher()
        # The kernel's handler writes to this socket even while the main thread is inside a library that never returns.
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in without_nohup(self.SIGNALS)}
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._exited.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._wakeup.close()
        self._watcher.join()
        self._signals.close()
        self._group = None

    def start_deferring_signals(self) -> None:
        """Let the loop answer signals from here on. Collective."""
        if dist.is_initialized():
            # On the CPU, so that asking never waits for the device. A rank that vanished (power loss) times out, but after NCCL's
            # own 10 minutes, so that its flight recorder has been written.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=15))
        self._deferring = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name  # torchrun sends a second one
        if not self._deferring:
            print(f"{self.signal} before training: nothing to save, exiting", file=sys.stderr, flush=True)
            sys.exit(EXIT_RESUME)

    def _force_exit(self) -> None:
        """Wait for a signal, then for the run's end; end the process where the grace period is nearly over."""
        number = self._signals.recv(1)
        if number and not self._exited.wait(timeout=grace_s()):
            print(
                f"{signal.Signals(number[0]).name}: the process did not stop in {grace_s():.0f} s and is ended; the"
                " same command resumes from the newest intact checkpoint",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_RESUME)

    def should_stop(self) -> bool:
        """Return whether any rank received a signal to stop. Collective: every rank asks at the same points.

        It takes under a millisecond, over gloo between hosts. A GPU meanwhile works on what was enqueued (`run_ahead`).
        """
        if self._group is None:
            return self.signal is not None
        flag = torch.tensor([float(self.signal is not None)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())


def without_nohup(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the signals, without SIGHUP where nohup ignores it."""
    return [number for number in signals if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def grace_s() -> float:
    """Return the seconds from a signal to the forced exit: just under torchrun's own timeout; long without torchrun."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return max(1.0, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)) - 2)
    return 600.0


def follow_launcher() -> None:
    """End this process with `accelerate launch`, whose simple launcher passes no signal on.

    It does not end with a shell: a run under nohup continues.
    """
    if launched_by_accelerate():
        end_with_parent()


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends (prctl(2), PR_SET_PDEATHSIG; Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def leave_after_lost_rank(error: RuntimeError) -> None:
    """End this process at once where `error` means that another rank is gone: no collective would ever return.

    gloo raises it as soon as the other's connection closes. On GPUs too the stop request asks over gloo at each micro-batch.
    """
    lost = (
        "Connection closed by peer", "Connection reset by peer", "Connection was likely closed", "Read error", "Broken pipe",
        "Timed out waiting",
    )  # fmt: skip
    if dist.is_initialized() and any(sign in str(error) for sign in lost):
        print(
            f"rank {dist.get_rank()}: another process of this run is gone ({str(error).splitlines()[0]}); exiting, the same"
            " command resumes from the newest intact checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_RESUME)
