"""The disturbed run: its process, the services around it, the faults, and what is sampled meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from hub import Hub  # the stand-in that the tests push to

ROOT = Path(__file__).parent.parent.parent
REPO, TOKEN = "alice/soak", "hf_alice"
POLL_S, LONGEST_SAMPLE_S = 0.05, 5.0
# How often each fault happens in an hour (at least once), and for how many seconds at least and at most.
FAULTS = {
    "SIGTERM": (6, 0.0, 0.0),
    "SIGSTOP": (12, 2.0, 10.0),
    "full disk": (4, 5.0, 30.0),
    "dead tracker": (4, 10.0, 60.0),
    "dead Hub": (4, 10.0, 90.0),
}
EXPECTED_CODES = (0, 2, 75)  # finished; refused, for want of disk; stopped by a signal
# A tracker whose service is elsewhere: every 20th row is posted. TensorBoard's class below it writes its files as usual.
WITH_TRACKER = """
import runpy, sys, urllib.request
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker
class Posting(TensorBoardTracker):
    def log(self, values, step=None, **named):
        super().log(values, step=step, **named)
        if step % 20 == 0:
            urllib.request.urlopen({url!r}, data=str(values).encode(), timeout=5).close()
LOGGER_TYPE_TO_CLASS["tensorboard"] = Posting
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Service(ThreadingHTTPServer):
    """What the tracker posts to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Accepting)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.posts = 0
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()


class _Accepting(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts += 1
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def die(server: ThreadingHTTPServer) -> None:
    """Close a server's port: who asks is refused."""
    server.shutdown()
    server.socket.close()


def revive(server: ThreadingHTTPServer) -> None:
    """Listen on the same port again."""
    server.socket = socket.socket()
    server.allow_reuse_address = True
    server.server_bind()
    server.server_activate()
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()


class Fault(NamedTuple):
    """A fault that is to happen."""

    step: int
    """Once the run has saved this step: by steps and not by time, so that every fault happens however fast the machine is."""
    kind: str
    seconds: float


def plan(dice: random.Random, steps: int, minutes: float, kinds: Sequence[str]) -> list[Fault]:
    """Draw the faults of a run, by step."""
    shorter = min(1.0, minutes / 10)
    return sorted(
        Fault(round(dice.uniform(0.05, 0.9) * steps), kind, dice.uniform(*FAULTS[kind][1:]) * shorter)
        for kind in kinds
        for _ in range(max(1, round(FAULTS[kind][0] * minutes / 60)))
    )


@dataclass
class Disturbed:
    """The disturbed run, and what was seen of it. `disk` is a small file system, where this user may mount one."""

    folder: Path
    hub: Hub
    service: Service
    disk: Path | None
    process: subprocess.Popen[bytes] | None = None
    began: float = field(default_factory=time.monotonic)
    launches: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: set[int] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        """Seconds since the first launch."""
        return time.monotonic() - self.began

    def run(self, recipe: Path, run_dir: Path, faults: list[Fault], sample_s: float) -> None:
        """Launch the same command until the run is finished, with `faults` meanwhile and a sample every `sample_s` seconds."""
        self.began = time.monotonic()
        self.launch(recipe)
        worker, next_sample = threading.Thread(), 0.0
        while not (run_dir / "summary.json").exists() or self.ended() is None:
            if (code := self.ended()) is not None:
                if code not in EXPECTED_CODES:
                    break
                self.launch(recipe)
            self.look(run_dir / "checkpoints")
            if self.seconds >= next_sample:
                self.sample()
                next_sample = self.seconds + sample_s
            if faults and max(self.checkpoints, default=0) >= faults[0].step and not worker.is_alive():
                worker = threading.Thread(target=self.disturb, args=faults.pop(0)[1:])
                worker.start()
            time.sleep(POLL_S)
        if worker.ident:
            worker.join()

    def launch(self, recipe: Path) -> None:
        """Start the command that a user would type."""
        env = self.hub.env(self.folder / "home", TOKEN) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(self.folder / "with_tracker.py"), "scripts/pretrain.py", str(recipe)]
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        self.launches.append({"began_s": round(self.seconds, 1)})

    def ended(self) -> int | None:
        """The exit code of the newest launch, noted once; None while it runs."""
        assert self.process is not None
        code = self.process.poll()
        if code is not None and "exit_code" not in self.launches[-1]:
            self.launches[-1] |= {"ended_s": round(self.seconds, 1), "exit_code": code}
        return code

    def look(self, checkpoints: Path) -> None:
        """Note the checkpoints that are there: at least so many were saved."""
        with contextlib.suppress(OSError):
            self.checkpoints |= {int(name.removeprefix("step-")) for name in os.listdir(checkpoints) if name.startswith("step-")}

    def sample(self) -> None:
        """Note memory, open files, threads and child processes of the training process."""
        assert self.process is not None
        with contextlib.suppress(psutil.Error):
            seen = psutil.Process(self.process.pid)
            with seen.oneshot():
                memory = seen.memory_full_info()
                counts = {
                    "rss_bytes": memory.rss, "uss_bytes": memory.uss, "open_files": seen.num_fds(),
                    "threads": seen.num_threads(), "children": len(seen.children()),
                }  # fmt: skip
            if memory.rss:  # a process that has just ended has none
                place = {"launch": len(self.launches) - 1, "step": max(self.checkpoints, default=0)}
                self.samples.append({"s": round(self.seconds, 1), **place, **counts})

    def disturb(self, kind: str, seconds: float) -> None:
        """Do a fault, and undo it."""
        assert self.process is not None
        self.faults.append({"kind": kind, "s": round(self.seconds, 1), "lasted_s": round(seconds, 1)})
        if kind == "SIGTERM":
            self.process.send_signal(signal.SIGTERM)
        elif kind == "SIGSTOP":
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            self.process.send_signal(signal.SIGCONT)
        elif kind == "full disk" and self.disk is not None:
            self.fill(self.disk / "filler", seconds)
        elif kind in ("dead tracker", "dead Hub"):
            server = self.service if kind == "dead tracker" else self.hub
            die(server)
            time.sleep(seconds)
            revive(server)

    def fill(self, filler: Path, seconds: float) -> None:
        """Take all room on the small disk for some seconds."""
        until = time.monotonic() + seconds
        with filler.open("wb", buffering=0) as stream:
            while time.monotonic() < until:
                try:
                    stream.write(b"\0" * 65536)
                except OSError:  # full; what the run removes meanwhile is taken too
                    time.sleep(POLL_S)
        filler.unlink()
