"""Publishing while training goes on: a child process pushes the checkpoints that the Hub lacks; training never waits for it.

A process and not a thread, so that an upload that hangs can be left behind at once, and its work takes nothing from training's
interpreter. What it says goes to `push.log` in the run's folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from isoflop.run_folder import RunFolder

# The launcher's; a child with them would take itself for a rank. Of a GPU it has no need.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# The client waits for ever on a connection that has gone silent. Enough for 36 GB at 10 MB/s.
LONGEST_S = 3600.0


class BackgroundPush:
    """At most one push of a run at a time; one that fails is taken up by the next."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._log = folder, folder.path / "push.log"
        self._child: subprocess.Popen[bytes] | None = None
        self._until = 0.0

    def start(self) -> None:
        """Begin to push what the Hub lacks. Where a push is still going on nothing is begun: the next one takes what is left."""
        if self._child is not None and self._child.poll() is None:
            if time.monotonic() < self._until:
                return
            self._child.kill()
            self._child.wait()
        self._report("the next checkpoint's push tries again")
        inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
        environment = inherited | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-m", "isoflop.publish.checkpoints", str(self._folder.path)]
        self._until = time.monotonic() + LONGEST_S
        try:
            with self._log.open("ab") as log:
                self._child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:  # no memory for a process, or no room for a line
            print(f"checkpoints are not being pushed: {error}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Return when no push is going on."""
        if self._child is not None:
            if self._child.poll() is None:
                print(f"waiting for the push of checkpoints ({self._log})", flush=True)
            try:
                self._child.wait(timeout=max(0.0, self._until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
            self._report("what is missing is pushed now")

    def leave(self) -> None:
        """End a push that is going on: what it has sent need not be sent again."""
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()

    def _report(self, onwards: str) -> None:
        if self._child is None or self._child.returncode == 0:
            return
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it was ended"]
        print(f"checkpoints were not pushed: {lines[-1].removeprefix('error: ')}; {onwards}", file=sys.stderr, flush=True)
