"""A week, compressed: python benchmarks/soak.py --minutes 60 (from the checkout's root; two cores).

One run of a tiny model with everything on (a checkpoint every other step, validation, samples, lm-eval's tasks, pushes to a
stand-in of the Hub over HTTP, a tracker that posts to a service) is disturbed at random moments: SIGTERM and the same command
again, SIGSTOP for some seconds, a full disk and room again, a dead tracker, a dead Hub. Meanwhile memory, open files, threads and
child processes are sampled. Beside it the same recipe is trained uninterrupted, without saves, pushes and trackers; the ends are
compared bit for bit.

Writes benchmarks/results/soak.json, drawn by benchmarks/pages/reliability.py. Exit code 1 unless the verdict is ok. The number of
steps follows from the pace of the first seconds: on a machine that is busy with something else later, it takes longer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hub import Hub  # noqa: E402  the stand-in that the tests push to
from soak_parts import growth  # noqa: E402
from soak_parts.disturbed import FAULTS, LONGEST_SAMPLE_S, REPO, TOKEN, WITH_TRACKER, Disturbed, Service, plan  # noqa: E402

DISK_BYTES = 1 << 30  # of the small disk
CALIBRATION_STEPS = 300
FEWEST_STEPS = 400
TIMED = {"tokens_per_s", "mfu", "elapsed_s", "peak_memory_bytes"}  # what may differ between two runs
MODEL = {
    "model_type": "llama", "vocab_size": 320, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    """Calibrate, disturb, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long the disturbed run lasts, about (default: 60)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/soak.json", help="the file that is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults' moments (default: 0)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, small_disk(Path(folder)) as disk, Hub() as hub:
        hub.account(TOKEN, TOKEN.removeprefix("hf_"))
        result = soak(Disturbed(Path(folder), hub, Service(), disk), given.minutes, given.seed)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(growth.table(result), flush=True)
    sys.exit(result["verdict"] != "ok")


def soak(one: Disturbed, minutes: float, seed: int) -> dict[str, Any]:
    """Everything, in a folder of its own; returns what is written."""
    folder, tree = one.folder, toy(one.folder)
    (folder / "with_tracker.py").write_text(WITH_TRACKER.format(url=one.service.url), encoding="utf-8")
    prepared = recipe_file(folder, "prepared", tree, folder / "runs/prepared")
    subprocess.run([sys.executable, "scripts/prepare.py", prepared], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    steps = max(FEWEST_STEPS, round(60 * minutes / calibrate(one, tree)))
    tree["training"]["max_steps"] = steps
    rare = max(20, steps // 200)
    tree["evaluation"] |= {"validate_every": rare, "sample_every": max(5, rare // 20), "tasks": {"quick": 5 * rare}}
    run_dir, calm_dir = (one.disk or folder) / "runs/disturbed", folder / "runs/uninterrupted"
    disturbed = recipe_file(folder, "disturbed", tree, run_dir, everything(rare))
    calm = recipe_file(folder, "uninterrupted", tree, calm_dir, {"output": {"checkpoint_every": 10**7}})
    faults = plan(random.Random(seed), steps, minutes, [kind for kind in FAULTS if one.disk or kind != "full disk"])
    planned = growth.counted([fault._asdict() for fault in faults])
    print(f"soak: {steps:,} steps, {len(faults)} faults", flush=True)
    with training(calm) as uninterrupted:  # beside it, on the other core
        try:
            one.run(disturbed, run_dir, faults, LONGEST_SAMPLE_S * min(1.0, minutes / 10))
        finally:
            if one.process:
                one.process.kill()
        print(f"soak: the disturbed run ended after {one.seconds / 60:.1f} min; waiting for the uninterrupted one", flush=True)
        assert uninterrupted.wait() == 0, (folder / "uninterrupted.txt").read_text(encoding="utf-8")
    result = summary(one, steps, minutes, planned, compare(run_dir, calm_dir))
    wrong = growth.verdict(result)
    return {"verdict": "; ".join(wrong) or "ok"} | result


def toy(folder: Path) -> dict[str, Any]:
    """A recipe over some modules of the standard library."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if 2e3 < source.stat().st_size < 5e4:
            (corpus / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return {
        "model": MODEL,
        "tokenizer": {"train_vocab_size": 300},
        "data": {
            "source": {"kind": "text", "files": [f"{corpus}/*.txt"]}, "prepared_dir": str(folder / "data"),
            "validation_fraction": 0.1,
        },
        "training": {"sequence_length": 32, "tokens_per_step": 256, "micro_batch_size": 4, "max_steps": CALIBRATION_STEPS},
        "optimizer": {"peak_learning_rate": 1e-3},
        "schedule": {"name": "wsd", "warmup_steps": 20},
        "evaluation": {"validate_every": 100, "max_windows": 16, "sample_every": 10, "sample_tokens": 8, "task_documents": 4},
        "output": {"layer_norms": True},
        "anomalies": {"policy": "skip", "spike_sigmas": 50.0},
    }  # fmt: skip


def everything(push_every: int) -> dict[str, Any]:
    """What the disturbed run does beside training and evaluating."""
    return {
        "output": {"checkpoint_every": 2, "keep_last": 3, "trackers": ["tensorboard"]},
        "hub": {"repo_id": REPO, "push_every": push_every},
    }


def recipe_file(folder: Path, name: str, tree: dict[str, Any], run_dir: Path, more: dict[str, Any] | None = None) -> Path:
    """Write a recipe with some more keys."""
    more = more or {}
    merged = {key: tree.get(key, {}) | more.get(key, {}) for key in tree | more}
    merged["output"] |= {"run_dir": str(run_dir)}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(merged), encoding="utf-8")
    return file


@contextlib.contextmanager
def training(recipe: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Train a recipe beside what the block does; it does not outlive the block."""
    with recipe.with_suffix(".txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "scripts/pretrain.py", str(recipe)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def calibrate(one: Disturbed, tree: dict[str, Any]) -> float:
    """Seconds a step with everything on but pushes, of a short run; beside another, as it will be."""
    run_dir, beside = one.folder / "runs/calibration", one.folder / "runs/beside"
    longer = tree | {"training": tree["training"] | {"max_steps": 100 * CALIBRATION_STEPS}}
    with training(recipe_file(one.folder, "beside", longer, beside, {"output": {"checkpoint_every": 10**7}})):
        one.launch(recipe_file(one.folder, "calibration", tree, run_dir, {"output": everything(1)["output"]}))
        assert one.process is not None
        assert one.process.wait() == 0, (one.folder / "log.txt").read_text(encoding="utf-8")
    seconds = [row["elapsed_s"] for row in rows_of(run_dir)]
    one.launches.clear()
    shutil.rmtree(run_dir)
    return float(seconds[-1] - seconds[CALIBRATION_STEPS // 3 - 1]) / (CALIBRATION_STEPS * 2 // 3)


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def compare(run_dir: Path, calm: Path) -> list[str]:
    """What differs at the end between the disturbed run and the uninterrupted one."""
    checks: dict[str, Callable[[Path], Any]] = {
        "rows of the metrics": lambda folder: [
            {key: value for key, value in row.items() if key not in TIMED} for row in rows_of(folder)
        ],
        "samples": lambda folder: (folder / "samples.jsonl").read_text(encoding="utf-8"),
        "weights": lambda folder: (folder / "model/model.safetensors").read_bytes(),
        "files left over": lambda folder: [path.name for path in folder.rglob("*.partial*")],
    }
    different = []
    for name, read in checks.items():
        try:
            if read(run_dir) != read(calm):
                different.append(name)
        except (OSError, KeyError, ValueError) as error:
            different.append(f"{name}: {error}")
    return different


def summary(one: Disturbed, steps: int, minutes: float, planned: dict[str, int], differences: list[str]) -> dict[str, Any]:
    """What was seen: counts, growth, and the samples themselves."""
    tags = [tag for (_, name), repository in one.hub.repositories.items() if name == REPO for tag in repository.tags]
    grown = growth.launches_growth(one.samples, len(one.launches))
    return {
        "minutes": minutes,
        "lasted_s": one.launches[-1].get("ended_s"),
        "steps": steps,
        "checkpoints_seen": len(one.checkpoints),
        "checkpoints_pushed": len(tags),
        "tracker_posts": one.service.posts,
        "faults_planned": planned,
        "faults": growth.counted(one.faults),
        "exit_codes": dict(Counter(str(launch.get("exit_code")) for launch in one.launches)),
        "differences": differences,
        "rss_mb_per_hour": growth.pooled(grown, "rss_mb_per_hour"),
        "uss_mb_per_hour": growth.pooled(grown, "uss_mb_per_hour"),
        "growth": grown,
        "machine": f"{os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "accelerate")}},
        "launches": one.launches,
        "fault_list": one.faults,
        "samples": one.samples,
    }


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a file system of DISK_BYTES; None where this user may not mount one."""
    disk = folder / "disk"
    disk.mkdir()
    size = f"size={DISK_BYTES}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True, check=False)
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
