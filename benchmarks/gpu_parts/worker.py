"""A worker of `benchmarks/gpu.py`: runs cases of a part one after another and writes each one's rows when it is done.

python -m gpu_parts.worker PART MODULE ...; started by the runner, whose protocol it follows.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_parts import results

EXCEPTION_LINES = 12


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=results.PARTS)
    parser.add_argument("module", help="of the part")
    parser.add_argument("--settings", required=True, help="JSON of the run: folders, metadata of rows")
    parser.add_argument("--ends-at", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--done", type=json.loads, default=[])
    parser.add_argument("--progress", type=Path, required=True)
    given = parser.parse_args()
    settings = json.loads(given.settings)
    threading.Thread(target=die_with_parent, args=(os.getppid(),), daemon=True).start()

    import torch

    from gpu_parts import cases

    torch.manual_seed(0)
    if settings["rehearse"]:
        cases.compile_by_eager_backend()
    nanogpt = Path(settings["nanogpt"]) if settings["nanogpt"] else None
    context = cases.Context(settings["rehearse"], Path(settings["work"]), Path(settings["out"]), nanogpt, given.ends_at)
    plan = importlib.import_module(f"gpu_parts.{given.module}").plan(context)
    say(given.progress, {"plan": [case.name for case in plan]})
    for case in plan:
        if case.name not in given.done and run_case(case, context, given.part, settings["about"], given.progress):
            return


def die_with_parent(parent: int) -> None:
    """Kill this process's group when whoever started it is gone: nobody would at a limit."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def run_case(case: Any, context: Any, part: str, about: results.Row, progress: Path) -> bool:
    """Run a case. Return whether this process is of no use for another one."""
    from gpu_parts import cases

    limit_s, began = case.limit_s(context), time.time()
    say(progress, {"begin": case.name, "limit_s": limit_s, "at": began})
    faulthandler.dump_traceback_later(limit_s)  # where it hangs, for the row that the runner writes

    def emit(**row: Any) -> None:
        results.put(context.out, [{"part": part, "case": case.name} | row], about)

    broken = False
    left_s = context.ends_at - began
    if case.missing:
        emit(skipped=case.missing)
    elif left_s < case.needs_s and not context.rehearse:
        emit(skipped=f"{max(0, left_s):.0f} s left of the part's time, and it takes about {case.needs_s:.0f} s")
    else:
        try:
            case.run(context, emit)
        except Exception as error:
            print(f"--- {part}: {case.name}", file=sys.stderr)
            traceback.print_exc()
            emit(error="\n".join(traceback.format_exc().splitlines()[-EXCEPTION_LINES:])[-2000:])
            broken = is_broken(error)
            error.__traceback__ = None  # whose frames hold the case's tensors
        if not broken:
            cases.clean_up()
    faulthandler.cancel_dump_traceback_later()
    say(progress, {"end": case.name, "seconds": round(time.time() - began, 1)})
    return broken or (case.alone and not case.missing)


def is_broken(error: Exception) -> bool:
    """Whether CUDA is of no use any more in this process: an illegal access, a failed assertion in a kernel, a lost device."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)


def say(progress: Path, event: dict[str, Any]) -> None:
    """Tell the runner."""
    with progress.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    main()
