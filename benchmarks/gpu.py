"""Everything there is to prove and measure on a GPU, most valuable first: python benchmarks/gpu.py [--minutes 14] [--out DIR].

correct (5 parts of 13): loss, gradients, whole runs, resume after kill -9.  memory (2): predicted against allocated.
speed (4): tokens/s and MFU of the recipes, and what each choice is worth.  rate (the rest): loss by wall time, AdamW and Muon.

Each part is a process of its own with a time limit; rows are in DIR/gpu.jsonl as soon as a case is done, and a crash or a hang
costs that case alone. Needs no network. `--rehearse` runs every part at toy size on a CPU. Exit code 1 where a case crashed or a
check did not pass.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_parts import results
from gpu_parts.runner import kill_group, run_part, tail

ROOT = Path(__file__).parent.parent
MINUTES, REHEARSAL_MINUTES = 14.0, 20.0
SHARES = {"correct": 5.0, "memory": 2.0, "speed": 4.0, "rate": 2.0}  # of 13
REQUIRED = {"torch": (2, 11), "transformers": (5, 17), "accelerate": (1, 15), "datasets": (5, 2), "pydantic": (2, 12)}
OPTIONAL = {
    "liger_kernel": "Liger's kernels", "torchao": "float8", "triton": "compiling", "flash_attn": "flash attention 2",
    "flash_attn_interface": "flash attention 3",
}  # fmt: skip
PREPARE_LIMIT_S = 180
LOG, LOG_BYTES = "gpu.log", 4 * 2**20
PROBE = """
import json, torch, rows
print(json.dumps({"cuda": torch.cuda.is_available(), "about": rows.about() | {"gpu": torch.cuda.get_device_name()
                  if torch.cuda.is_available() else None, "cuda": torch.version.cuda}}))
"""


def main() -> int:
    """Check, prepare, run the parts, print the table."""
    given = arguments()
    lines = missing(given)
    print(*lines, sep="\n", flush=True)
    if any(line.startswith("error") for line in lines):
        return 2
    began, work = time.time(), Path(tempfile.mkdtemp(prefix="gpu-benchmark-"))
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        return run(given, work, began + 60 * given.minutes)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help=f"of everything together (default {MINUTES:g}; a rehearsal's is a limit)")
    parser.add_argument("--out", "--results", type=Path, metavar="DIR", help="folder of the rows (default benchmarks/results)")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU; its default DIR is a temporary folder")
    parser.add_argument("--only", help=f"some of the parts: {','.join(SHARES)}")
    parser.add_argument("--missing", action="store_true", help="only cases that DIR has no result of, from a machine like this")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT, to measure beside")
    parser.add_argument("--commit", help="name of the commit for the rows, where this is a copy without .git")
    given = parser.parse_args()
    given.parts = [part for part in SHARES if part in (given.only or ",".join(SHARES)).split(",")]
    if unknown := set((given.only or "").split(",")) - {"", *SHARES}:
        parser.error(f"--only {given.only}: {', '.join(sorted(unknown))} is no part; parts are {', '.join(SHARES)}")
    given.minutes = given.minutes or (REHEARSAL_MINUTES if given.rehearse else MINUTES)
    if given.out is None:
        given.out = Path(tempfile.mkdtemp(prefix="gpu-rehearsal-")) if given.rehearse else ROOT / "benchmarks/results"
    return given


def missing(given: argparse.Namespace) -> list[str]:
    """Lines about what is installed; those that begin with `error` end the run."""
    lines, found = [], []
    for name, least in REQUIRED.items():
        wanted = ".".join(map(str, least))
        try:
            number = version(name)
        except PackageNotFoundError:
            lines.append(f"error: {name} is not installed; {wanted} or newer is needed")
            continue
        found.append(f"{name} {number}")
        if tuple(int(part) for part in number.split(".")[:2] if part.isdigit()) < least:
            lines.append(f"error: {name} is {number}; {wanted} or newer is needed")
    absent = [f"{name} ({what})" for name, what in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    absent += [] if given.nanogpt else ["nanoGPT (--nanogpt PATH)"]
    return [f"found: {', '.join(found)}", f"not there, so left out: {', '.join(absent) or 'nothing'}", *lines]


def run(given: argparse.Namespace, work: Path, ends_at: float) -> int:
    """All parts within the time; returns the exit code."""
    variables = environment(given, work)
    started = time.time()
    preparation = Preparation(given, work, variables)
    about = probe(variables)
    if about is not None and not (about["cuda"] or given.rehearse):
        print("error: torch finds no CUDA device; run this on a machine with a GPU, or add --rehearse for toy sizes on a CPU")
    if about is None or not (about["cuda"] or given.rehearse):
        preparation.stop()
        return 2
    preparation.wait()
    about = about["about"] | {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), "rehearsal": given.rehearse}
    about |= {"commit": given.commit or about["commit"], "command": command_line()}
    print(f"on {about['machine']}, at {about['commit']}; rows in {given.out / results.FILE}", flush=True)
    results.put(given.out, [preparation.row()], about)
    say("setup", "prepare", [preparation.row()], time.time() - started)
    if preparation.error:
        return 1
    good = True
    for part, limit in limits(given.parts, time.time(), ends_at).items():
        good &= run_one(given, part, limit, work, about, variables)
    rows = [row for row in results.read(given.out) if row["run"] == about["run"]]
    print("\n" + "\n".join(results.table(rows)), flush=True)
    print(f"{time.time() - started:.0f} s in all; rows in {given.out / results.FILE}", flush=True)
    return 0 if good and not any(map(results.failed, rows)) else 1


def command_line() -> str:
    """As it was typed."""
    return shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])


def limits(parts: list[str], now: float, ends_at: float) -> dict[str, float]:
    """When each part has to end: the time left is shared in proportion, and what one leaves the next one has."""
    total, ends, spent = sum(SHARES[part] for part in parts), {}, 0.0
    for part in parts:
        spent += SHARES[part]
        ends[part] = now + (ends_at - now) * spent / total
    return ends


def environment(given: argparse.Namespace, work: Path) -> dict[str, str]:
    """Variables of all processes: no network, this checkout's modules, one cache of compiled kernels for all."""
    paths = [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    if importlib.util.find_spec("isoflop") is None:
        paths.insert(0, str(link_package(work / "package")))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton")}
    # One thread a process: those of several processes on few cores wait for one another.
    rehearsal = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} if given.rehearse else {}
    return os.environ | offline | caches | rehearsal | {"PYTHONPATH": os.pathsep.join(paths)}


def link_package(folder: Path) -> Path:
    """A folder to import `isoflop` from, where it is not installed."""
    package = folder / "isoflop"
    package.mkdir(parents=True)
    for entry in (ROOT / "src/isoflop").iterdir():
        (package / entry.name).symlink_to(entry)
    number = next(line for line in (ROOT / "src/isoflop/__init__.py").read_text().splitlines() if "__version__" in line)
    facts = folder / "isoflop.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: isoflop\nVersion: {number.split(chr(34))[1]}\n")
    return folder


def probe(variables: dict[str, str]) -> dict[str, Any] | None:
    """Device, machine and versions, asked of a process that imports torch; None, with its errors printed, where that fails."""
    done = subprocess.run([sys.executable, "-c", PROBE], env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"error: torch and what rows need cannot be imported:\n{done.stderr[-2000:]}", flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Preparation:
    """Windows of each length, a process for each, while torch is probed."""

    def __init__(self, given: argparse.Namespace, work: Path, variables: dict[str, str]) -> None:
        # Of the quickstart, the 124M recipes, the larger ones.
        lengths = (256,) if given.rehearse else (256, 1024, 2048)
        self.seconds: dict[int, float] = {}
        self.error: str | None = None
        self._began = time.time()
        self._logs = {length: work / f"prepare-{length}.log" for length in lengths}
        self._processes = {length: self._start(length, work, variables) for length in lengths}

    def _start(self, length: int, work: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        settings = [
            f"training.sequence_length={length}", "training.micro_batch_size=1", f"training.tokens_per_step={length}",
            f"model.max_position_embeddings={length}", f"data.prepared_dir={work}/data/{length}",
        ]  # fmt: skip
        command = [sys.executable, "scripts/prepare.py", "recipes/quickstart.yaml", "--workers", "1", *settings]
        with self._logs[length].open("w") as log:
            return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        """Return when all are done, or one of them has taken too long."""
        for length, process in self._processes.items():
            try:
                code = process.wait(timeout=max(1, PREPARE_LIMIT_S - (time.time() - self._began)))
                self.seconds[length] = round(time.time() - self._began, 1)
            except subprocess.TimeoutExpired:
                code = None
            if code != 0:
                why = f"not done in {PREPARE_LIMIT_S} s" if code is None else f"exit code {code}"
                self.error = f"scripts/prepare.py, windows of {length}: {why}\n{tail(self._logs[length])}"
        self.stop()

    def stop(self) -> None:
        """End what is left of them."""
        for process in self._processes.values():
            kill_group(process)

    def row(self) -> dict[str, Any]:
        """What came out."""
        row: dict[str, Any] = {"part": "setup", "case": "prepare", "way": "scripts/prepare.py", "seconds": self.seconds}
        row["text"] = f"windows of {', '.join(map(str, self._logs))} tokens from Python's standard library"
        return row | ({"error": self.error} if self.error else {})


def run_one(
    given: argparse.Namespace, part: str, limit: float, work: Path, about: dict[str, Any], variables: dict[str, str]
) -> bool:
    """One part; prints a line for each case as its rows come. Returns whether none crashed."""
    settings = {
        "rehearse": given.rehearse,
        "work": str(work),
        "out": str(given.out.resolve()),
        "about": about,
        "nanogpt": str(given.nanogpt.resolve()) if given.nanogpt else None,
    }
    print(f"{part}: at most {limit - time.time():.0f} s", flush=True)
    good: list[bool] = []
    earlier = results.read(given.out) if given.missing else []
    done = results.measured_cases([row for row in earlier if (row["part"], row["machine"]) == (part, about["machine"])])

    def run_module(module: str) -> None:
        command = [sys.executable, "-m", "gpu_parts.worker", part, module, "--settings", json.dumps(settings)]
        command += ["--ends-at", str(limit)]
        good.append(
            run_part(part, command, work / module, limit, lambda rows: results.put(given.out, rows, about), variables, done)
        )

    with Printer(given.out, part, about["run"], work):
        threads = [threading.Thread(target=run_module, args=(module,)) for module in results.PARTS[part]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    keep_log(given.out / LOG, part, work)
    return len(good) == len(threads) and all(good)


class Printer:
    """Prints each case of a part when it is done."""

    def __init__(self, out: Path, part: str, run: str, work: Path) -> None:
        self._out, self._part, self._run, self._work = out, part, run, work
        self._ended = threading.Event()
        self._printed: set[str] = set()

    def __enter__(self) -> Printer:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._print(lost=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.3):
            with contextlib.suppress(OSError, ValueError):
                self._print(lost=False)

    def _print(self, lost: bool) -> None:
        """Cases whose worker says that they are done; at the end those too that it never came to say it of."""
        ended: dict[str, float] = {}
        for file in logs(self._work, self._part, ".progress"):
            for line in file.read_text(encoding="utf-8").splitlines():
                event = json.loads(line)
                ended |= {event["end"]: event["seconds"]} if "end" in event else {}
        rows = [row for row in results.read(self._out) if (row["run"], row["part"]) == (self._run, self._part)]
        for (_, case), own in results.by_case(rows).items():
            if case not in self._printed and (lost or case in ended):
                self._printed.add(case)
                say(self._part, case, own, ended.get(case))


def say(part: str, case: str, rows: list[dict[str, Any]], seconds: float | None) -> None:
    """A line about a case."""
    took = f" ({seconds:.1f} s)" if seconds is not None else ""
    print(f"{part} / {case}{took}: {results.line_of(rows)}"[:300], flush=True)


def logs(work: Path, part: str, *suffixes: str) -> list[Path]:
    """Files of a part's worker processes."""
    return sorted(file for module in results.PARTS[part] for suffix in suffixes for file in work.glob(f"{module}-[0-9]*{suffix}"))


def keep_log(log: Path, part: str, work: Path) -> None:
    """Append what the part's processes wrote, the end of it."""
    with log.open("ab") as stream:
        for file in logs(work, part, ".out", ".err"):
            stream.write(f"=== {file.name}\n".encode() + file.read_bytes()[-LOG_BYTES // 20 :] + b"\n")
    if log.stat().st_size > LOG_BYTES:
        log.write_bytes(log.read_bytes()[-LOG_BYTES:])


if __name__ == "__main__":
    sys.exit(main())
