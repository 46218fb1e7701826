"""Regenerates docs/reliability.md: python docs/reliability.py (from the checkout's root; some ten minutes on two cores).

Runs the tests that really do each fault, the slow ones too, and counts what they noted.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
TESTS = ["tests/faults", "tests/checkpoint", "tests/prepare/test_parts.py"]
HEAD = """# Reliability

Made by `python docs/reliability.py`, which really does each of these faults, to real processes and real files, and counts.

A run is stopped by anything and the same command goes on. Batches follow from (seed, step), the learning rate from the step,
dropout from (seed, step, rank); a checkpoint holds tensors by parameter name and a few numbers, is written aside,
checksummed, synced and renamed, and is the same for one process, DDP, DeepSpeed ZeRO-1 and FSDP2.

"""
NOTES = """
## What is behind it

- **Saving** copies each rank's own part to the host and writes it in a thread with a process group of its own; one save at
  most is in flight. A save that finds the disk full is reported at once and tried again at the next one; the last one of a
  run must succeed.
- **Signals** (SIGTERM, SIGINT, SIGUSR1) to any rank are agreed on between micro-batches; all ranks drop the unfinished step,
  save, and leave with exit code 75. A thread ends a process that does not come back from a library in time: 2 s before
  torchrun would kill it (`TORCH_ELASTIC_SHUTDOWN_TIMEOUT`, 30 s where not set), 600 s without a launcher.
- **A rank that is gone** closes its connection; the others ask for stop requests over gloo before every micro-batch, so they
  notice within one, say so, and leave with exit code 75. On GPUs a collective of nccl's may have to be given up first: on one
  node the launcher does, within 30 s; a node that falls silent without closing its connections is given up after ten minutes.
- **Retention** keeps the newest `output.keep_last`, the multiples of `output.keep_every`, the one with the least validation
  loss, and whatever another process holds open to read or push.
- **Anomalies**: `anomalies.policy` in the recipe is `stop`, `skip` (the update is left out) or `rollback` (to the newest
  checkpoint, and past the batches up to this one); `anomalies.spike_sigmas: 6` counts jumps above the mean of the last 128
  steps too. DeepSpeed cannot skip: it updates the weights before anyone sees the gradients.
- **Security**: tensors are read with `weights_only`; a checkpoint's table of contents, a pickle of torch's, may name
  descriptions of tensors alone; `trust_remote_code` is set nowhere; names in manifests and checksums are names of files in
  their own folder.

Not tried here: anything on a GPU (nccl, CUDA copies), and a power cut (files and folders are synced before a checkpoint gets
its name).
"""


def main() -> None:
    """Run, count, write."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-q", *TESTS, f"--junitxml={report}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(command, cwd=HERE.parent, env=environment, check=False)
        (HERE / "reliability.md").write_text(page(report), encoding="utf-8")


def page(report: Path) -> str:
    """The page, from pytest's report."""
    times: dict[str, int] = defaultdict(int)
    proofs: dict[str, str] = {}
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        noted = {item.get("name", ""): item.get("value", "") for item in case.iter("property")}
        if "fault" in noted:
            times[noted["fault"]] += int(noted["times"])
            proofs[noted["fault"]] = noted["proof"]
    outcomes = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    lost = [f"{case.get('name')}" for kind in ("failure", "error") for case in outcomes[kind]]
    rows = "".join(f"| {fault} | {times[fault]} | {proofs[fault]} |\n" for fault in sorted(times, key=order))
    passed = len(cases) - sum(map(len, outcomes.values()))
    versions = f"torch {version('torch').split('+')[0]}, accelerate {version('accelerate')}, deepspeed {version('deepspeed')}"
    return (
        f"{HEAD}{sum(times.values())} faults of {len(times)} kinds; what was lost: **{', '.join(lost) or 'nothing'}**. {passed}"
        f" tests passed, {len(outcomes['skipped'])} skipped, {len(lost)} failed (Python {platform.python_version()}, {versions};"
        f" gloo on {os.cpu_count()} CPU cores).\n\n| fault | times | what showed that nothing was lost |\n| --- | --- | --- |\n"
        f"{rows}{NOTES}"
    )


def order(fault: str) -> tuple[int, str]:
    """Kills first, then signals, then the rest by name."""
    first = ("`kill", "SIG", "a checkpoint of")
    return next((place for place, start in enumerate(first) if fault.startswith(start)), len(first)), fault


if __name__ == "__main__":
    main()
