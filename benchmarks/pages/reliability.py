"""Regenerates docs/reliability.md and its figure: python benchmarks/pages/reliability.py (from the checkout's root; an hour on two cores).

Runs the tests that really do each fault, the slow ones too, and counts what they noted. The soak is not run: its section is made
from benchmarks/results/soak.json, where there is one.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.figure

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOAK = ROOT / "benchmarks/results/soak.json"
COLORS = {"SIGTERM": "#d1495b", "SIGSTOP": "#8a8a8a", "full disk": "#d1a14b", "dead tracker": "#2e8b57", "dead Hub": "#7a4ea3"}
TESTS = ["tests/faults", "tests/distributed/test_elastic.py", "tests/unit/checkpoint", "tests/unit/prepare/test_parts.py"]
HEAD = """# Reliability

Made by `python benchmarks/pages/reliability.py`, which really does each of these faults, to real processes and real files, and counts.

A run may be stopped by anything; the same command resumes it. Batches follow from (seed, step), the learning rate from the step,
dropout from (seed, step, rank). A checkpoint holds tensors by parameter name and a few numbers. It is written under a temporary
name, checksummed, synced and renamed, and is the same for one process, DDP, DeepSpeed ZeRO-1 and FSDP2.

"""
NOTES = """
## How it works

- **Saving** copies each rank's own part to the host and writes it in a thread with a process group of its own; one save at
  most is in flight. A save that finds the disk full is reported at once and tried again at the next one; the last one of a
  run must succeed.
- **Signals** (SIGTERM, SIGINT, SIGHUP, SIGUSR1) to any rank are agreed on between micro-batches; all ranks drop the unfinished
  step, save, and exit with code 75. A thread ends a process that does not return from a library in time: 2 s before torchrun
  would kill it (`TORCH_ELASTIC_SHUTDOWN_TIMEOUT`, default: 30 s), 600 s without a launcher.
- **A rank that is gone** closes its connection; the others ask for stop requests over gloo before every micro-batch, so they
  notice within one, report it, and exit with code 75. On GPUs a collective of NCCL may have to be given up first: on one
  node the launcher does, within 30 s; a node that falls silent without closing its connections is given up after ten minutes.
- **Rows and samples** are written step by step; the row of a checkpoint's own step is in the checkpoint. Samples are written
  before their step's row, and once. A file that somebody deletes, replaces or damages meanwhile is written again from what was in
  it; rows that are lost are a gap, which is reported and drawn. While the disk is full they wait in memory.
- **Output** that cannot be written (a closed pipe, a terminal that is gone, a full disk under the log) ends no run.
- **Retention** keeps the newest `output.keep_last`, the multiples of `output.keep_every`, the one with the least validation
  loss, and whatever another process holds open to read or push.
- **Anomalies**: `anomalies.policy` in the recipe is `stop`, `skip` (the update is left out) or `rollback` (to the newest
  checkpoint, and past the batches up to this one); `anomalies.spike_sigmas: 6` counts jumps above the mean of the last 128
  steps too. DeepSpeed cannot skip: it updates the weights before the gradients can be read.
- **Whose files**: a run writes into a folder that is new, empty or a run's by its lock file or `environment.json`; the same
  holds for prepared folders, reports, laws and evaluations. Only files that this program wrote are deleted: what somebody else
  put into `model/` or `checkpoints/step-N/` stays.
- **Files of others**: tensors are read with `weights_only`; neither they nor windows are ever decompressed; a checkpoint's table
  of contents, a pickle of torch's, may name descriptions of tensors alone; `trust_remote_code` is never on; names and links that
  lead out of a folder are refused; sizes, nesting and YAML aliases are bounded before anything is built.
- **Credentials** are found by their published shape, in URLs, by their name, and by the values that the environment holds. A
  recipe with one is refused; elsewhere they are hidden in all that is written, printed or pushed.

Not tried here: anything on a GPU (NCCL, CUDA copies), and a power cut (files and folders are synced before a checkpoint gets
its name).
"""


def main() -> None:
    """Run, count, write."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-q", *TESTS, f"--junitxml={report}"]
        environment = {
            **os.environ,
            "ISOFLOP_TEST_ALL": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        (DOCS / "reliability.md").write_text(page(report), encoding="utf-8")


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
        f"{rows}{soak_section(SOAK)}{NOTES}"
    )


def soak_section(file: Path) -> str:
    """The section of a soak, from its results, with its figure drawn beside this file; nothing where there are none."""
    if not file.exists():
        return ""
    result = json.loads(file.read_text(encoding="utf-8"))
    draw_soak(result, DOCS / "reliability_soak.png")
    judged = [one for one in result["growth"] if one["judged"]]
    faults = ", ".join(f"{count} x {kind}" for kind, count in result["faults"].items())
    codes = ", ".join(f"{count} x {code}" for code, count in result["exit_codes"].items())
    slopes = [result["rss_mb_per_hour"], result["uss_mb_per_hour"]]
    memory = "no launch was long enough" if None in slopes else "{:+.1f} MB an hour (private: {:+.1f})".format(*slopes)
    constant = {key: max((one[key] for one in judged), default=0) for key in ("open_files", "threads", "children")}
    rows = [
        ("verdict", result["verdict"]),
        ("launches, by exit code", f"{len(result['launches'])}: {codes}"),
        ("checkpoints seen on the disk; tagged on the Hub", f"{result['checkpoints_seen']:,}; {result['checkpoints_pushed']}"),
        ("faults", f"{sum(result['faults'].values())}: {faults}"),
        ("differences from an uninterrupted run: rows, samples, weights, files left over", str(len(result["differences"]))),
        (f"resident memory, over {sum(one['minutes'] for one in judged):.0f} min of {len(judged)} launches", memory),
        ("most growth of a launch: open files, threads, child processes", ", ".join(f"{n:+}" for n in constant.values())),
    ]
    return (
        "\n## A week, compressed\n\n"
        f"`python benchmarks/soak.py --minutes {result['minutes']:g}`: one run of {result['steps']:,} steps of a tiny model in"
        f" {result['lasted_s'] / 60:.0f} minutes on {result['machine']} (torch {result['versions']['torch']}), with everything on"
        " and a checkpoint every other step. Faults come at random moments. Growth is measured behind a launch's first minutes,"
        " in launches long enough to show it: memory by a Theil-Sen slope, weighted by minutes; the rest by the lower deciles of"
        " a launch's first and last third, as a save in flight has a file open. A thread fewer after a full disk is TensorBoard's"
        " writer, which ends there: the run reports it and continues without that tracker."
        f"{result.get('remark', '')}\n\n| what | seen |\n| --- | --- |\n"
        + "".join(f"| {what} | {seen} |\n" for what, seen in rows)
        + "\n![memory, open files and threads over time](reliability_soak.png)\n"
    )


def draw_soak(result: dict[str, Any], file: Path) -> None:
    """Resident memory, open files and threads over minutes; each fault is a line."""
    figure = matplotlib.figure.Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(3, sharex=True, gridspec_kw={"height_ratios": [2, 1, 1]})
    kinds = {"resident memory (MB)": ("rss_bytes", 1e-6), "open files": ("open_files", 1), "threads": ("threads", 1)}
    for axes, (name, (key, unit)) in zip(panels, kinds.items(), strict=True):
        for launch in range(len(result["launches"])):
            own = [sample for sample in result["samples"] if sample["launch"] == launch]
            axes.plot([one["s"] / 60 for one in own], [one[key] * unit for one in own], color="#1f4e8c", linewidth=1.2)
        for fault in result["fault_list"]:
            axes.axvline(fault["s"] / 60, color=COLORS[fault["kind"]], linewidth=0.8, alpha=0.7)
        axes.set(ylabel=name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for kind, count in result["faults"].items():
        panels[0].plot([], [], color=COLORS[kind], label=f"{kind} ({count})")
    figure.legend(loc="outside lower center", ncols=len(COLORS), fontsize="small")
    panels[0].set(title=f"{result['steps']:,} steps, {len(result['launches'])} launches: {result['verdict']}")
    panels[-1].set(xlabel="minutes")
    figure.savefig(file, dpi=110)


def order(fault: str) -> tuple[int, str]:
    """Kills of whole jobs first, then other kills, then signals, then checkpoints across engines, then the rest by name."""
    first = ("`kill -9` of a whole job", "`kill", "SIG", "a checkpoint of")
    return next((place for place, start in enumerate(first) if fault.startswith(start)), len(first)), fault


if __name__ == "__main__":
    main()
