"""Experiment trackers, by what stands in their own files: one run for one run folder, each scalar once, resumed where it was."""

import json
import re
import signal
import sqlite3
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from conftest import metrics_of, metrics_row
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isoflop.config.loading import load_recipe
from isoflop.train.metrics import MetricsLog
from isoflop.train.run_folder import RunFolder
from isoflop.train.trackers import start_trackers


def scalars_of(run_dir):
    """Scalars of TensorBoard's only folder in a run's folder, as TensorBoard reads them: {tag: {step: value}}, each step once."""
    folders = {file.parent for file in Path(run_dir).rglob("events.out.tfevents*")}
    assert folders == {Path(run_dir) / "isoflop"}
    events = EventAccumulator(str(*folders), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), tag
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def in_trackio(database):
    """Runs of trackio's own database: {name: [(step, metrics), ...]}."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    found = {}
    for name, step, metrics in rows:
        found.setdefault(name, []).append((step, json.loads(metrics)))
    return found


@pytest.fixture
def trackio(tmp_path):
    """A folder of trackio's own, for processes that start from here on; returns the database of the project."""
    return tmp_path / "trackio" / "isoflop.db"


KILLED = """
import os, signal, time, isoflop.train.trainer as pretrain
step = pretrain.train_step
def killed(job, progress):
    if progress.step == 7:
        time.sleep({seconds})
        os.kill(os.getpid(), signal.SIGKILL)
    return step(job, progress)
pretrain.train_step = killed
"""


def test_a_killed_run_goes_on_in_the_same_runs_with_each_scalar_once(write_recipe, ranks, trackio):
    """Killed behind step 7, resumed from step 5: with two trackers, steps 6 and 7 are sent by both processes."""
    file = write_recipe(output__trackers=["tensorboard", "trackio"])
    for code in (KILLED.format(seconds=3), KILLED.format(seconds=0), None):  # trackio has its rows, or loses some
        launched = ranks.start("cpu", file, code=code, env={"TRACKIO_DIR": str(trackio.parent)})
        assert launched.wait() == [-signal.SIGKILL if code else 0], launched.text()
    recipe = load_recipe(file)
    rows, run_dir = metrics_of(recipe), Path(recipe.output.run_dir)
    scalars = scalars_of(run_dir)
    assert set(scalars) == {key for row in rows for key in row if row[key] is not None} - {"step"}
    for key, values in scalars.items():
        wanted = {row["step"]: row[key] for row in rows if row[key] is not None}
        assert values == pytest.approx(wanted, rel=1e-6), key
    ((name, tracked),) = in_trackio(trackio).items()
    assert name == f"toy-{json.loads((run_dir / 'trackers.json').read_text())['id']}"
    assert [(step, metrics["loss"]) for step, metrics in tracked] == [(row["step"], row["loss"]) for row in rows]
    assert not any("step" in metrics for _, metrics in tracked)


@pytest.mark.distributed
def test_two_ranks_are_one_run(write_recipe, ranks, trackio):
    """W&B and trackio log on every rank, as accelerate has them."""
    file = write_recipe(output__trackers=["trackio"])
    printed = ranks.run("2gpu_ddp", file, env={"TRACKIO_DIR": str(trackio.parent)})
    assert printed.count("Created new run: toy-") == 1
    ((_, tracked),) = in_trackio(trackio).items()
    assert [step for step, _ in tracked] == list(range(1, 11))


def test_steps_that_a_rollback_undid_are_gone_from_tensorboard(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim()
    log = MetricsLog(folder, Accelerator(cpu=True, log_with="tensorboard", project_dir=folder.path), 0, 9, {"seed": 1})
    for step in range(1, 7):
        log.write(metrics_row(step, loss=9.0))
    log.rewind(3)
    for step in (4, 5):
        log.write(metrics_row(step, loss=1.0))
    log.close()
    assert scalars_of(folder.path)["loss"] == {1: 9.0, 2: 9.0, 3: 9.0, 4: 1.0, 5: 1.0}


class Service(types.ModuleType):
    """What accelerate's trackers call of `wandb` and `mlflow` when they start; the packages are not installed here."""

    def __init__(self, name, calls):
        super().__init__(name)
        self.calls, self.config = calls, {}
        self.utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))

    def init(self, **named):
        self.calls.append(named)
        return SimpleNamespace(step=8 if len(self.calls) > 1 else 0)

    def search_experiments(self, **_):
        return [SimpleNamespace(experiment_id="1")]

    def start_run(self, **named):
        self.calls.append(named)
        return SimpleNamespace(info=SimpleNamespace(run_id=named["run_id"] or "of-the-server"))

    def log_params(self, values):
        assert self.calls[-1]["run_id"] is None, "mlflow refuses values that have changed"

    def MlflowClient(self):
        points = [SimpleNamespace(step=step) for step in range(1, 8)] if len(self.calls) > 1 else []
        return SimpleNamespace(get_metric_history=lambda run_id, key: points)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_is_asked_for_the_run_of_the_folder(name, tmp_path, monkeypatch):
    """Begun by one launch, continued by the next behind the steps it has; a folder that is made anew begins another one."""
    service = Service(name, [])
    monkeypatch.setitem(sys.modules, name, service)
    last_steps = []
    for run_dir in ("runs/toy", "runs/toy", "other/toy"):
        folder, accelerator = RunFolder(str(tmp_path / run_dir)), Accelerator(cpu=True)
        folder.path.mkdir(parents=True, exist_ok=True)
        accelerator.log_with = [name]
        start_trackers(accelerator, folder, {"seed": None}, 5, print)
        last_steps.append(accelerator.trackers[0].last_step)
    first, again, other = service.calls
    assert last_steps[1] == 7
    if name == "wandb":
        assert first == again
        assert first == {"project": "isoflop", "name": "toy", "id": first["id"], "resume": "allow"}
        assert re.fullmatch("[0-9a-f]{12}", first["id"])
        assert other["id"] != first["id"]
        monkeypatch.setenv("WANDB_RUN_ID", "mine")
        start_trackers(accelerator, folder, {}, 5, print)
        assert service.calls[-1]["id"] == "mine"
    else:
        assert [call["run_name"] for call in service.calls] == ["toy"] * 3
        assert [call["run_id"] for call in service.calls] == [None, "of-the-server", None]
