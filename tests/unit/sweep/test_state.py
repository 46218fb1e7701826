"""Where a sweep stands, as its folders have it."""

import fcntl
import json

import pytest
from conftest import metrics_row, summary_with

from isoflop.sweep.design import Run
from isoflop.sweep.state import report, seconds_left, state_of, states_json


@pytest.fixture
def runs(toy_recipe):
    """Four runs of one size and length; nothing of them on disk yet."""
    return [Run(f"run{i}", toy_recipe(f"run{i}", training__max_steps=100), 100) for i in range(4)]


def write(run, steps, seconds, loss=None):
    from pathlib import Path

    folder = Path(run.recipe.output.run_dir)
    folder.mkdir(parents=True)
    rows = [metrics_row(step, elapsed_s=seconds * step / steps) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if loss is not None:
        (folder / "summary.json").write_text(json.dumps(summary_with(val_loss=loss, elapsed_s=seconds)))
    return folder


def test_states_and_time_left(runs):
    write(runs[0], 100, 50.0, loss=3.25)
    write(runs[1], 40, 20.0)
    running = write(runs[2], 10, 5.0)
    with (running / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        states = [state_of(run) for run in runs]
    assert [state.what for state in states] == ["finished", "stopped", "running", "waiting"]
    assert [state.steps_done for state in states] == [100, 40, 10, 0]
    assert seconds_left(states) == pytest.approx([0.0, 30.0, 45.0, 50.0])
    assert [row["state"] for row in states_json(states)] == ["finished", "stopped", "running", "waiting"]
    assert [row["seconds_left"] for row in states_json(states)] == pytest.approx([0.0, 30.0, 45.0, 50.0])
    assert {(row["peak_learning_rate"], row["tokens_per_step"]) for row in states_json(states)} == {(3e-3, 256)}
    reported = report(states)
    assert f"1 of 4 runs finished; {4 * runs[0].flops:.3g} FLOPs in all, {2.5 * runs[0].flops:.3g} left" in reported
    assert reported.endswith(", 0.03 h one after another")
    for cell in ("  3.2500  ", "stopped at 40%", "running at 10%", "waiting"):
        assert cell in reported


def test_without_a_step_there_is_no_pace(runs):
    states = [state_of(run) for run in runs]
    assert seconds_left(states) == [None] * 4
    assert report(states).endswith(f"0 of 4 runs finished; {4 * runs[0].flops:.3g} FLOPs in all, {4 * runs[0].flops:.3g} left")
