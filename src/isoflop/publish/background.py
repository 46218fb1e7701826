"""Push of checkpoints during training: a child process pushes those that the Hub lacks; training never waits for it.

A process, not a thread: an upload that hangs can be killed at once, and its work does not hold training's interpreter lock. Its
output goes to `push.log` in the run folder.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

from isoflop.train.run_folder import RunFolder

logger = logging.getLogger(__name__)
# Set by the launcher: a child that inherited them would act as a rank.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# The client waits forever on a silent connection; this limit allows 36 GB at 10 MB/s.
LONGEST_S = 3600.0


class BackgroundPush:
    """Runs at most one push of a run at a time; the next push resumes a failed one."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._log = folder, folder.path / "push.log"
        self._child: subprocess.Popen[bytes] | None = None
        self._until = 0.0

    def start(self) -> None:
        """Start a push of the missing checkpoints, unless one is running: the next one then pushes the rest."""
        if self._child is not None and self._child.poll() is None:
            if time.monotonic() < self._until:
                return
            self._child.kill()
            self._child.wait()
        self._report("the next checkpoint's push retries")
        inherited = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        environment = inherited | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-m", "isoflop.publish.checkpoints", str(self._folder.path)]
        self._until = time.monotonic() + LONGEST_S
        try:
            with self._log.open("ab") as log:
                self._child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except OSError as error:  # no memory for a process, or no disk space for the log
            logger.warning("checkpoints are not being pushed: %s", error)

    def wait(self) -> None:
        """Wait until no push is running."""
        if self._child is not None:
            if self._child.poll() is None:
                logger.info("waiting for the push of checkpoints (%s)", self._log)
            try:
                self._child.wait(timeout=max(0.0, self._until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
            self._report("the missing ones are pushed now")

    def leave(self) -> None:
        """End a running push; the files that it has sent need not be sent again."""
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()

    def _report(self, next_try: str) -> None:
        if self._child is None or self._child.returncode == 0:
            return
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it was killed"]
        logger.warning("checkpoints were not pushed: %s; %s", lines[-1].removeprefix("error: "), next_try)
