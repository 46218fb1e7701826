"""State of a sweep, read from its run folders: what has run, what is left, and for how long."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from isoflop.sweep.design import Run
from isoflop.train.records import read_rows
from isoflop.train.run_folder import RunFolder
from isoflop.utils.io import is_locked
from isoflop.utils.tables import table

HEADER = ["run", "N", "D", "D/N", "FLOPs", "peak rate", "tokens/step", "steps", "state", "val. loss", "hours", "left"]


class RunState(NamedTuple):
    """State of one run, from its folder."""

    run: Run
    what: Literal["finished", "running", "stopped", "waiting"]
    steps_done: int
    elapsed_s: float
    val_loss: float | None

    @property
    def flops_left(self) -> float:
        """FLOPs of the steps that are left."""
        return self.run.flops * (1 - self.steps_done / self.run.steps)


def state_of(run: Run) -> RunState:
    """Read the state from a run's folder, which may not exist yet."""
    folder = RunFolder(run.recipe.output.run_dir)
    if summary := folder.read_summary():
        return RunState(run, "finished", run.steps, summary.elapsed_s, summary.val_loss)
    rows = read_rows(folder.metrics, last_step=sys.maxsize)
    done, elapsed_s = (rows[-1]["step"], rows[-1]["elapsed_s"]) if rows else (0, 0.0)
    if is_locked(folder.path / "lock"):
        return RunState(run, "running", done, elapsed_s, None)
    return RunState(run, "stopped" if done else "waiting", done, elapsed_s, None)


def seconds_left(states: list[RunState]) -> list[float | None]:
    """Return each run's time to its end, at the FLOP/s of the run nearest in N that has trained; None before any has."""
    flops_per_s = {
        state.run.parameters: state.run.flops * state.steps_done / state.run.steps / state.elapsed_s
        for state in states
        if state.elapsed_s
    }

    def left(state: RunState) -> float | None:
        if not flops_per_s:
            return None
        return state.flops_left / flops_per_s[min(flops_per_s, key=lambda n: abs(math.log(n / state.run.parameters)))]

    return [left(state) for state in states]


def report(states: list[RunState]) -> str:
    """Return the table of runs, and a line on what is left."""
    left = seconds_left(states)
    rows = [_row(state, seconds) for state, seconds in zip(states, left, strict=True)]
    unfinished = [seconds for state, seconds in zip(states, left, strict=True) if state.what != "finished"]
    known = [seconds for seconds in unfinished if seconds is not None]
    total_left = f", {sum(known) / 3600:.2f} h one after another" if unfinished and known else ""
    total = sum(state.run.flops for state in states)
    return (
        f"{table(HEADER, rows)}\n{len(states) - len(unfinished)} of {len(states)} runs finished; {total:.3g} FLOPs in all,"
        f" {sum(state.flops_left for state in states):.3g} left{total_left}"
    )


def _row(state: RunState, seconds: float | None) -> list[str]:
    run, training = state.run, state.run.recipe.training
    what = state.what if state.what in ("finished", "waiting") else f"{state.what} at {state.steps_done / run.steps:.0%}"
    return [
        run.name,
        f"{run.parameters:,}",
        f"{run.tokens:,}",
        f"{run.tokens / run.parameters:.1f}",
        f"{run.flops:.3g}",
        f"{run.recipe.optimizer.peak_learning_rate:.3g}",
        f"{training.tokens_per_step:,}",
        f"{run.steps:,}",
        what,
        "-" if state.val_loss is None else f"{state.val_loss:.4f}",
        f"{state.elapsed_s / 3600:.3f}",
        "-" if state.what == "finished" else "n/a" if seconds is None else f"{seconds / 3600:.3f} h",
    ]


def states_json(states: list[RunState]) -> list[dict[str, Any]]:
    """Return the states as JSON values."""
    return [
        {
            "run": state.run.name,
            "run_dir": str(Path(state.run.recipe.output.run_dir)),
            "parameters": state.run.parameters,
            "tokens": state.run.tokens,
            "flops": state.run.flops,
            "peak_learning_rate": state.run.recipe.optimizer.peak_learning_rate,
            "tokens_per_step": state.run.recipe.training.tokens_per_step,
            "steps": state.run.steps,
            "state": state.what,
            "steps_done": state.steps_done,
            "val_loss": state.val_loss,
            "elapsed_s": state.elapsed_s,
            "seconds_left": 0.0 if state.what == "finished" else seconds,
        }
        for state, seconds in zip(states, seconds_left(states), strict=True)
    ]
