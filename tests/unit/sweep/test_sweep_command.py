"""The command: real runs of a toy sweep, stopped and gone on with; a finished one fitted, and a larger run by its law."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, metrics_of_folder, metrics_row, run_command, summary_with

from isoflop.config.loading import load_recipe, to_yaml
from isoflop.scaling.laws import load_hyperparameters
from isoflop.sweep.command import SweepOptions, sweep_command
from isoflop.sweep.config import load_sweep_config
from isoflop.sweep.design import groups_of
from isoflop.train.signals import EXIT_RESUME
from isoflop.utils.errors import UserError

pytestmark = pytest.mark.processes


@pytest.fixture
def write_sweep(write_recipe, tmp_path):
    """Write a toy sweep; returns its path."""

    def write(**changes):
        tree = {
            "recipe": str(write_recipe()), "tokens_per_parameter": [1.0, 2.0, 4.0], "parameters": [2e4, 4.6e4, 9e4],
            "aspect_ratio": 32, "output_dir": str(tmp_path / "sweep"), "validations": 10,
        }  # fmt: skip
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree | changes))
        return str(tmp_path / "sweep.yaml")

    return write


def finish(run, loss=None):
    """Leave a run's folder as if it had been trained, with the losses of a known law or a given last one."""
    folder = Path(run.recipe.output.run_dir)
    folder.mkdir(parents=True)
    loss = loss or 1.2 + 40 / run.parameters**0.34 + 60 / run.tokens**0.28
    every, per_step = run.recipe.evaluation.validate_every, run.recipe.training.tokens_per_step
    rows = [
        metrics_row(
            step,
            tokens=per_step * step,
            val_loss=loss * (2 - step / run.steps) if step % every == 0 or step == run.steps else None,
        )
        for step in range(1, run.steps + 1)
    ]  # fmt: skip
    (folder / "lock").write_text("host here, pid 1\n")
    (folder / "recipe.yaml").write_text(to_yaml(run.recipe, exclude_none=True))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = summary_with(tokens=run.tokens, flops=run.flops, val_loss=loss, elapsed_s=run.steps / 10)
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def finished(write_sweep):
    """A sweep whose nine runs are done."""
    path = write_sweep()
    for group in groups_of(load_sweep_config(path)):
        finish(group[0])
    return path


@pytest.mark.new_process
@pytest.mark.distributed
def test_a_stopped_sweep_goes_on_and_redoes_nothing(write_sweep, tmp_path):
    path = write_sweep(tokens_per_parameter=[1.0], parameters=[2e4, 4.6e4])
    names = [group[0].name for group in groups_of(load_sweep_config(path))]
    first, second = (tmp_path / "sweep" / name for name in names)
    command = [sys.executable, "scripts/sweep.py", path]
    sweep = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rows = second / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size) and sweep.poll() is None:
        time.sleep(0.05)
    sweep.send_signal(signal.SIGTERM)
    out, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == EXIT_RESUME, out
    assert "SIGTERM: the runs in training are saved; the same command resumes" in out
    assert not (second / "summary.json").exists()
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*") if file.is_file()}
    reported = run_command(*command, "--dry-run").stdout
    assert re.search(rf"{re.escape(names[0])} .* finished ", reported)
    assert re.search(rf"{re.escape(names[1])} .* stopped at \d+% ", reported)
    assert "1 of 2 runs finished" in reported
    again = run_command(*command, check=False)
    assert again.returncode == 2
    assert "2 finished runs, and a law of 5 coefficients needs 6 or more" in again.stderr
    assert names[0] + ":" not in again.stdout
    assert {file: file.stat().st_mtime_ns for file in first.rglob("*") if file.is_file()} == before
    rows = metrics_of_folder(second)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert json.loads((second / "summary.json").read_text())["steps"] == len(rows)


def test_a_finished_sweep_is_fitted_and_its_law_scores_a_larger_run(finished, tmp_path, capsys, run_in_process):
    assert sweep_command(SweepOptions(finished)) == 0
    out = capsys.readouterr().out
    assert "9 of 9 runs finished" in out
    assert "no run repeats a window" not in out  # the toy corpus is small
    assert out.count("epochs of") >= 1
    law = tmp_path / "sweep/law.json"
    assert json.loads(law.read_text())["coefficients"]["E"] == pytest.approx(1.2, rel=1e-3)
    largest = max(group[0].flops for group in groups_of(load_sweep_config(finished)))
    assert sweep_command(SweepOptions(finished, target=1.2 * largest)) == 0
    reported = capsys.readouterr().out
    written = Path(reported.split(":")[0])
    recipe = load_recipe(written)
    assert (recipe.law, written.parent) == (str(law), tmp_path)
    assert recipe.optimizer.peak_learning_rate == 3e-3
    assert re.search(rf"^{re.escape(str(law))} predicts a final validation loss of \d\.\d+ \(90%: ", reported, flags=re.MULTILINE)
    shorter = recipe.training.model_copy(update={"max_steps": 40})
    assert run_in_process(recipe.model_copy(update={"training": shorter})) == 0
    summary = json.loads((Path(recipe.output.run_dir) / "summary.json").read_text())
    assert summary["law"] == str(law)
    assert summary["predicted_loss"] is summary["prediction_error"] is None  # of so few steps the law says nothing
    assert re.fullmatch(r"it gives \d\.\d\d nats, more than guessing: ln\(vocabulary\) = 5\.77", summary["outside"])
    assert f"law {law}: no prediction: it gives " in capsys.readouterr().out


def test_learning_rates_are_swept_and_fitted(write_sweep, tmp_path, capsys, run_in_process):
    """Two sizes, two lengths and three learning rates, trained; the least of the losses lies between the rates."""
    rates = [1e-4, 5e-3, 0.25]
    path = write_sweep(tokens_per_parameter=[0.7, 1.2], parameters=[2e4, 4.6e4], peak_learning_rate=rates, validations=2)
    runs = [group[0] for group in groups_of(load_sweep_config(path))]
    assert len(runs) == 12
    for run in runs:
        assert run_in_process(run.recipe) == 0
    capsys.readouterr()
    assert sweep_command(SweepOptions(path)) == 0
    out = capsys.readouterr().out
    assert "12 of 12 runs finished" in out
    assert "Learning rate and batch of adamw from 4 grids of runs" in out
    assert "exponent of N is 0: the grids have 2 distinct N, and an exponent needs 3" in out
    law = load_hyperparameters(tmp_path / "sweep/law.json")
    assert law.tokens_per_step.at(1e4, 4e4).value == pytest.approx(256)
    for run in runs:
        assert rates[0] < law.peak_learning_rate.at(1e4, run.tokens).value < rates[2]
    with pytest.raises(UserError, match="of learning rate and batch, and none of the loss"):
        sweep_command(SweepOptions(path, target=1e12))


def test_learning_rates_are_fitted_where_the_losses_give_no_law(write_sweep, tmp_path, capsys):
    """Losses that do not fall with N and D: the law file has the learning rate alone."""
    path = write_sweep(peak_learning_rate=[1e-3, 2e-3, 8e-3])
    for group in groups_of(load_sweep_config(path)):
        rate = group[0].recipe.optimizer.peak_learning_rate
        finish(group[0], 3 + 0.02 * math.log(rate / 3e-3) ** 2)
    assert sweep_command(SweepOptions(path)) == 0
    assert "is not written: the parametric fit is" in capsys.readouterr().err
    law = load_hyperparameters(tmp_path / "sweep/law.json")
    assert law.peak_learning_rate.at(3e4, 1e5).value == pytest.approx(3e-3, rel=1e-3)


def test_numbers_of_what_is_left(finished, tmp_path, capsys):
    (tmp_path / "sweep" / groups_of(load_sweep_config(finished))[0][0].name / "summary.json").unlink()
    assert sweep_command(SweepOptions(finished, dry_run=True, as_json=True)) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["stopped"] + ["finished"] * 8


def test_a_slurm_array_has_a_task_for_each_group(finished, tmp_path, capsys):
    file = tmp_path / "sweep.sbatch"
    assert sweep_command(SweepOptions(finished, slurm=str(file), config="accelerate_configs/1gpu.yaml")) == 0
    text = file.read_text()
    assert "#SBATCH --array=0-8\n" in text
    assert f'exec isoflop sweep {finished} --launch accelerate_configs/1gpu.yaml --only "$SLURM_ARRAY_TASK_ID"' in text
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    assert f"start them with: sbatch {file}" in capsys.readouterr().out


def test_what_cannot_be_is_refused(finished, tmp_path, write_sweep):
    with pytest.raises(UserError, match="--only 9: the sweep has groups 0 to 8"):
        sweep_command(SweepOptions(finished, only=9))
    with pytest.raises(UserError, match="--target 0: give a budget in FLOPs"):
        sweep_command(SweepOptions(finished, target=0.0))
    with pytest.raises(UserError, match=r"sweep/law\.json: neither a published law nor a file"):
        sweep_command(SweepOptions(finished, target=1e12))
    other = write_sweep(overrides={"optimizer.peak_learning_rate": 0.1})
    with pytest.raises(
        UserError, match=r"belongs to another recipe \(optimizer\.peak_learning_rate.*; for all runs of the sweep: its output_dir"
    ):
        sweep_command(SweepOptions(other))
