"""A week, compressed: python benchmarks/soak.py --minutes 60 (from the checkout's root; two cores).

One run of a tiny model with everything on (a checkpoint every other step, validation, samples, a task of lm-eval, pushes to a
stand-in of the Hub over HTTP, a tracker that posts to a service) is disturbed at random moments: SIGTERM and the same command
again, SIGSTOP for some seconds, a full disk and room again, a dead tracker, a dead Hub. Meanwhile memory, open files and threads
of the process are sampled. Beside it the same recipe is trained undisturbed, with none of that; the ends are compared bit by bit.

Writes benchmarks/results/soak.json, which docs/reliability.py draws. Exit code 1 where the verdict is not "ok".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hub import Hub  # noqa: E402  the stand-in that the tests push to

REPO, TOKEN = "alice/soak", "hf_alice"
SAMPLE_S, POLL_S = 5.0, 0.05
DISK_BYTES = 1 << 30  # of the small disk
CALIBRATION_STEPS = 300
# How often each fault happens in an hour, and for how long, in seconds; at least once.
FAULTS = {
    "SIGTERM": (6, 0.0, 0.0),
    "SIGSTOP": (12, 2.0, 10.0),
    "full disk": (4, 5.0, 30.0),
    "dead tracker": (4, 10.0, 60.0),
    "dead Hub": (4, 10.0, 90.0),
}
# A tracker whose service is elsewhere: every row is posted. TensorBoard's class below it writes its files as usual.
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


@dataclass
class Soak:
    """The disturbed run, and what was seen of it."""

    folder: Path
    hub: Hub
    service: Service
    disk: Path | None
    """A small file system, where this user may mount one."""
    dice: random.Random
    process: subprocess.Popen[bytes] | None = None
    began: float = field(default_factory=time.monotonic)
    launches: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: set[int] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        """Since the first launch."""
        return time.monotonic() - self.began

    def launch(self, recipe: Path) -> None:
        """Start the command that a user would type."""
        env = self.hub.env(self.folder / "home", TOKEN) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(self.folder / "with_tracker.py"), "scripts/pretrain.py", str(recipe)]
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        self.launches.append({"began_s": self.seconds})

    def collect(self) -> int | None:
        """The exit code of a launch that has ended, noted."""
        assert self.process is not None
        code = self.process.poll()
        if code is not None and "exit_code" not in self.launches[-1]:
            self.launches[-1] |= {"ended_s": self.seconds, "exit_code": code}
        return code

    def look(self, checkpoints: Path) -> None:
        """Note the checkpoints that are there."""
        with contextlib.suppress(OSError):
            self.checkpoints |= {int(name.removeprefix("step-")) for name in os.listdir(checkpoints) if name.startswith("step-")}

    def measure(self) -> None:
        """Note memory, open files and threads of the training process."""
        assert self.process is not None
        with contextlib.suppress(psutil.Error):
            seen = psutil.Process(self.process.pid)
            with seen.oneshot():
                memory = seen.memory_full_info()
                self.samples.append(
                    {
                        "s": round(self.seconds, 1), "launch": len(self.launches) - 1, "rss_bytes": memory.rss,
                        "uss_bytes": memory.uss, "open_files": seen.num_fds(), "threads": seen.num_threads(),
                        "children": len(seen.children()),
                    }
                )  # fmt: skip

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
            filler = self.disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb") as stream:
                while True:
                    stream.write(b"\0" * 65536)
            time.sleep(seconds)
            filler.unlink(missing_ok=True)
        elif kind in ("dead tracker", "dead Hub"):
            server = self.service if kind == "dead tracker" else self.hub
            die(server)
            time.sleep(seconds)
            revive(server)


def main() -> None:
    """Calibrate, disturb, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long the disturbed run lasts, about (default: 60)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/soak.json", help="the file that is written")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, small_disk(Path(folder)) as disk, Hub() as hub:
        hub.account(TOKEN, TOKEN.removeprefix("hf_"))
        result = soak(Path(folder), disk, hub, given.minutes, given.seed)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result), flush=True)
    sys.exit(result["verdict"] != "ok")


def soak(folder: Path, disk: Path | None, hub: Hub, minutes: float, seed: int) -> dict[str, Any]:
    """Everything, in a folder; returns what is written."""
    service = Service()
    (folder / "with_tracker.py").write_text(WITH_TRACKER.format(url=service.url), encoding="utf-8")
    tree = toy(folder)
    one = Soak(folder, hub, service, disk, random.Random(seed))
    prepare = [sys.executable, "scripts/prepare.py", str(recipe_file(folder, "prepared", tree, folder / "runs", {}))]
    subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    pace_s = calibrate(one, tree)
    tree["training"]["max_steps"] = max(100, round(60 * minutes / pace_s))
    run_dir = (disk or folder) / "runs/disturbed"
    disturbed = recipe_file(folder, "disturbed", tree, run_dir, EVERYTHING)
    calm = recipe_file(folder, "undisturbed", tree, folder / "runs/undisturbed", {"output": {"checkpoint_every": 10**6}})
    print(f"soak: {tree['training']['max_steps']:,} steps of about {1000 * pace_s:.0f} ms", flush=True)
    undisturbed = subprocess.Popen(  # beside it, on the other core, and behind everything else there
        ["nice", sys.executable, "scripts/pretrain.py", str(calm)], cwd=ROOT, stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    disturb_until_done(one, disturbed, run_dir, minutes)
    assert undisturbed.wait() == 0
    return summary(one, tree, run_dir, folder / "runs/undisturbed", minutes)


EVERYTHING: dict[str, Any] = {
    "output": {"checkpoint_every": 2, "keep_last": 3, "layer_norms": True, "trackers": ["tensorboard"]},
    "evaluation": {"tasks": {"quick": 5000}, "task_documents": 4},
    "anomalies": {"policy": "skip", "spike_sigmas": 50.0},
    "hub": {"repo_id": REPO, "push_every": 1000},
}


def toy(folder: Path) -> dict[str, Any]:
    """A recipe over some modules of the standard library."""
    corpus = folder / "corpus"
    corpus.mkdir()
    sources = [file for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) if 2e3 < file.stat().st_size < 5e4]
    for source in sources:
        (corpus / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return {
        "model": {
            "model_type": "llama", "vocab_size": 320, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        },
        "tokenizer": {"train_vocab_size": 300},
        "data": {
            "source": {"kind": "text", "files": [f"{corpus}/*.txt"]}, "prepared_dir": str(folder / "data"),
            "validation_fraction": 0.1,
        },
        "training": {"sequence_length": 32, "tokens_per_step": 256, "micro_batch_size": 4, "max_steps": CALIBRATION_STEPS},
        "optimizer": {"peak_learning_rate": 1e-3},
        "schedule": {"name": "wsd", "warmup_steps": 20},
        "evaluation": {"validate_every": 1000, "max_windows": 16, "sample_every": 50, "sample_tokens": 8},
    }  # fmt: skip


def recipe_file(folder: Path, name: str, tree: dict[str, Any], run_dir: Path, more: dict[str, Any]) -> Path:
    """Write a recipe with some more keys."""
    merged = {key: tree.get(key, {}) | more.get(key, {}) for key in tree | more}
    merged["output"] = merged.get("output", {}) | {"run_dir": str(run_dir)}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(merged), encoding="utf-8")
    return file


def calibrate(one: Soak, tree: dict[str, Any]) -> float:
    """Seconds a step with everything on, of a short run."""
    run_dir = one.folder / "runs/calibration"
    one.launch(recipe_file(one.folder, "calibration", tree, run_dir, EVERYTHING | {"hub": {}}))
    assert one.process is not None
    assert one.process.wait() == 0, (one.folder / "log.txt").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    one.launches.clear()
    shutil.rmtree(run_dir)
    return float(rows[-1]["elapsed_s"] - rows[99]["elapsed_s"]) / (len(rows) - 100)


def disturb_until_done(one: Soak, recipe: Path, run_dir: Path, minutes: float) -> None:
    """Launch until the run is finished, with faults at random moments."""
    plan = sorted(
        (one.dice.uniform(0.05, 0.9) * 60 * minutes, kind, one.dice.uniform(shortest, longest) * min(1.0, minutes / 10))
        for kind, (an_hour, shortest, longest) in FAULTS.items()
        if kind != "full disk" or one.disk is not None
        for _ in range(max(1, round(an_hour * minutes / 60)))
    )
    one.began = time.monotonic()
    one.launch(recipe)
    worker: threading.Thread | None = None
    next_sample = 0.0
    while True:
        one.look(run_dir / "checkpoints")
        if one.collect() is not None:
            if (run_dir / "summary.json").exists() and one.launches[-1]["exit_code"] == 0:
                break
            if one.launches[-1]["exit_code"] not in (2, 75) or len(one.launches) > 1000:
                break
            one.launch(recipe)
        if one.seconds >= next_sample:
            one.measure()
            next_sample = one.seconds + SAMPLE_S * min(1.0, minutes / 10)
        if plan and one.seconds >= plan[0][0] and (worker is None or not worker.is_alive()):
            _, kind, seconds = plan.pop(0)
            worker = threading.Thread(target=one.disturb, args=(kind, seconds))
            worker.start()
        time.sleep(POLL_S)
    if worker:
        worker.join()


def summary(one: Soak, tree: dict[str, Any], run_dir: Path, calm: Path, minutes: float) -> dict[str, Any]:
    """What was seen, and whether it is as it should be."""
    differences = compare(run_dir, calm)
    slopes = [slopes_of(one, number) for number in range(len(one.launches))]
    long = [slope for slope in slopes if slope]
    tags = [tag for (_, name), repository in one.hub.repositories.items() if name == REPO for tag in repository.tags]
    codes = Counter(str(launch.get("exit_code")) for launch in one.launches)
    verdict = "ok"
    if differences or set(codes) - {"0", "2", "75"}:
        verdict = f"differences: {differences}; exit codes: {dict(codes)}"
    elif any(slope["open_files"] > 0 or slope["threads"] > 0 for slope in long):
        verdict = "open files or threads grow"
    return {
        "verdict": verdict,
        "minutes": minutes,
        "lasted_s": one.launches[-1].get("ended_s"),
        "steps": tree["training"]["max_steps"],
        "checkpoints_seen": len(one.checkpoints),
        "checkpoints_pushed": len(tags),
        "tracker_posts": one.service.posts,
        "faults": dict(Counter(fault["kind"] for fault in one.faults)),
        "exit_codes": dict(codes),
        "differences": differences,
        "growth": slopes,
        "versions": {"python": sys.version.split()[0], "torch": version("torch"), "accelerate": version("accelerate")},
        "launches": one.launches,
        "fault_list": one.faults,
        "samples": one.samples,
    }


def compare(run_dir: Path, calm: Path) -> list[str]:
    """What differs at the end between the disturbed run and the undisturbed one."""
    keys = ("step", "loss", "val_loss", "grad_norm", "learning_rate")

    def rows(folder: Path) -> list[tuple[Any, ...]]:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [tuple(json.loads(line)[key] for key in keys) for line in lines]

    checks: dict[str, Callable[[Path], Any]] = {
        "curve": rows,
        "samples": lambda folder: (folder / "samples.jsonl").read_text(encoding="utf-8"),
        "weights": lambda folder: (folder / "model/model.safetensors").read_bytes(),
        "left over": lambda folder: [path.name for path in folder.rglob("*.partial")],
    }
    different = []
    for name, read in checks.items():
        try:
            if read(run_dir) != read(calm):
                different.append(name)
        except (OSError, KeyError, ValueError) as error:
            different.append(f"{name}: {error}")
    return different


def slopes_of(one: Soak, launch: int) -> dict[str, Any] | None:
    """Growth over a launch behind its first third: MB an hour, and the change of open files and threads; None of a short one."""
    seen = [sample for sample in one.samples if sample["launch"] == launch]
    seen = seen[len(seen) // 3 :]
    if len(seen) < 12:
        return None
    hours = [sample["s"] / 3600 for sample in seen]
    third = max(1, len(seen) // 3)
    return {
        "launch": launch,
        "minutes": round((hours[-1] - hours[0]) * 60, 1),
        "rss_mb_per_hour": round(theil_sen(hours, [sample["rss_bytes"] / 1e6 for sample in seen]), 2),
        "uss_mb_per_hour": round(theil_sen(hours, [sample["uss_bytes"] / 1e6 for sample in seen]), 2),
        **{
            key: statistics.median(sample[key] for sample in seen[-third:])
            - statistics.median(sample[key] for sample in seen[:third])
            for key in ("open_files", "threads")
        },
    }


def theil_sen(x: list[float], y: list[float]) -> float:
    """The median of the slopes between all pairs of points."""
    return statistics.median((y[j] - y[i]) / (x[j] - x[i]) for i in range(len(x)) for j in range(i + 1, len(x)) if x[j] > x[i])


def table(result: dict[str, Any]) -> str:
    """The result on a screen."""
    faults = ", ".join(f"{count} x {kind}" for kind, count in result["faults"].items())
    growth = "\n".join(
        f"  launch {slope['launch']}, {slope['minutes']} min: RSS {slope['rss_mb_per_hour']:+} MB an hour, USS"
        f" {slope['uss_mb_per_hour']:+}; open files {slope['open_files']:+}, threads {slope['threads']:+}"
        for slope in result["growth"]
        if slope
    )
    return (
        f"verdict: {result['verdict']}\n{result['steps']:,} steps in {result['lasted_s'] / 60:.1f} min and"
        f" {len(result['launches'])} launches; {result['checkpoints_seen']:,} checkpoints seen,"
        f" {result['checkpoints_pushed']} pushed, {result['tracker_posts']:,} posts of the tracker\nfaults: {faults}\n"
        f"differences from the undisturbed run: {len(result['differences'])}\n{growth}"
    )


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of DISK_BYTES; None where this user may not mount one."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        print("soak: no small disk can be mounted here: a full disk is not tried", flush=True)
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


if __name__ == "__main__":
    main()
