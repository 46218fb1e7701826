"""How long commands take to begin: python benchmarks/startup.py (from the checkout's root; two minutes).

Whole processes in turn, wall time. The first step of a run is there when its row of the metrics is.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rows import ROOT, in_turn, parser_of, recipe_of, spread, write

from isoflop.prepare.run import prepare

RECIPE = "recipes/llama2_1.36b.yaml"
COMMANDS = {
    "python, nothing else": ["-c", "pass"],
    "plan RECIPE": ["scripts/plan.py", RECIPE],
    "plan --flops": ["scripts/plan.py", "--flops", "1e21", "--family", "llama3"],
    "pretrain --help": ["scripts/pretrain.py", "--help"],
    "import torch, transformers, accelerate": ["-c", "import torch, transformers, accelerate"],
}


def main() -> None:
    """Measure, and write a row for each command."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("overrides", nargs="*", help="values of the run's recipe, section.key=value")
    given = parser.parse_intermixed_args()
    ways: dict[str, Callable[[], object]] = {
        name: lambda arguments=arguments: subprocess.run(  # type: ignore[misc]
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True
        )
        for name, arguments in COMMANDS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        prepare(recipe_of("llama", given.overrides, folder))
        launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet", "--config_file"]
        plain = ["scripts/pretrain.py", f"{folder}/benchmark.yaml", *given.overrides]
        ways["pretrain: its first step is done"] = lambda: first_step([sys.executable, *plain], folder)
        ways["accelerate launch: its first step is done"] = lambda: first_step(
            [*launch, "accelerate_configs/cpu.yaml", *plain], folder
        )
        seconds = in_turn(ways, given.rounds, warmup=1)
    write(given, "startup", [{"case": "wall time", "way": way, "seconds": spread(taken)} for way, taken in seconds.items()])


def first_step(command: list[str], folder: str) -> None:
    """Return when a run has written its first row; it is then stopped, and forgotten."""
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    with open(run_dir / "log", "w", encoding="utf-8") as log:
        started = [*command, f"output.run_dir={run_dir / 'run'}"]
        process = subprocess.Popen(started, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        metrics = run_dir / "run/metrics.jsonl"
        while not (metrics.is_file() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit((run_dir / "log").read_text(encoding="utf-8")[-3000:])
            time.sleep(0.01)
        subprocess.run(["pkill", "-KILL", "--session", str(process.pid)], check=True)
        process.wait()


if __name__ == "__main__":
    main()
