"""Rows, samples and run folders that are deleted, replaced or damaged: this is reported and marked, and no more is lost."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import curve_of, metrics_of, metrics_row, weights_of

from isoflop.checkpoint import folder as checkpoints
from isoflop.config.loading import load_recipe
from isoflop.train.signals import EXIT_RESUME

# Something is done to the run's folder at the beginning of the step behind `step`, while the run continues.
MEANWHILE = """
import os, pathlib, shutil, signal, isoflop.train.trainer as pretrain
step, done = pretrain.train_step, []
def disturbed(job, progress):
    if progress.step == {step} and not done and job.accelerator.is_main_process:
        done.append(1)
        folder = job.folder.path
        {action}
    return step(job, progress)
pretrain.train_step = disturbed
"""
SAME = "losses, gradient norms and weights bit for bit those of an uninterrupted run; every row there"


def same_as(uninterrupted, recipe):
    return curve_of(recipe) == curve_of(uninterrupted["llama"]) and weights_of(recipe) == weights_of(uninterrupted["llama"])


def samples_of(recipe):
    return [json.loads(line) for line in (Path(recipe.output.run_dir) / "samples.jsonl").read_text().splitlines()]


def summary_of(recipe):
    return json.loads((Path(recipe.output.run_dir) / "summary.json").read_text())


@pytest.mark.parametrize("name", ["metrics", "samples"])
@pytest.mark.parametrize(
    ("what", "action"),
    [
        ("deleted", "(folder / '{name}.jsonl').unlink()"),
        ("replaced", "(folder / 'new').write_text('mine'); (folder / 'new').replace(folder / '{name}.jsonl')"),
        ("appended to", "(folder / '{name}.jsonl').open('a').write('mine' + chr(10))"),
    ],
)
def test_a_file_that_others_change_under_a_run(name, what, action, write_recipe, ranks, uninterrupted, tried):
    recipe = load_recipe(file := write_recipe(evaluation__sample_every=2))
    printed = ranks.run("cpu", file, code=MEANWHILE.format(step=6, action=action.format(name=name)))
    reported = "was deleted" if what == "deleted" else f"was changed by somebody else, and is kept as {name}.damaged-1.jsonl"
    lines = 6 if name == "metrics" else 3
    assert printed.count(f"{name}.jsonl {reported}: written again, with {lines} lines") == 1
    assert same_as(uninterrupted, recipe)
    assert [entry["step"] for entry in samples_of(recipe)] == [2, 4, 6, 8, 10]
    assert "missing_steps" not in summary_of(recipe)
    if what != "deleted":
        assert "mine" in (Path(recipe.output.run_dir) / f"{name}.damaged-1.jsonl").read_text()
    tried(f"a file of records {what} under a run", proof=SAME)


def test_rows_cut_off_under_a_run_are_a_gap(write_recipe, ranks, uninterrupted, tried):
    """Emptied in place: what is gone is gone, and the summary says which."""
    recipe = load_recipe(file := write_recipe())
    ranks.run("cpu", file, code=MEANWHILE.format(step=6, action="os.truncate(folder / 'metrics.jsonl', 0)"))
    assert [row["step"] for row in metrics_of(recipe)] == [7, 8, 9, 10]
    assert summary_of(recipe)["missing_steps"] == [[1, 6]]
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])
    tried("metrics.jsonl emptied under a run", proof="reported; the gap stands in the summary; same weights")


@pytest.mark.parametrize("config", ["cpu", pytest.param("2gpu_fsdp2", marks=pytest.mark.distributed)])
def test_rows_deleted_between_two_launches(config, write_recipe, ranks, tried):
    file, whole = write_recipe(), write_recipe("whole")
    recipe = load_recipe(file)
    stop = MEANWHILE.format(step=6, action="os.kill(os.getpid(), signal.SIGTERM)")
    assert set(ranks.start(config, file, code=stop).wait()) == {EXIT_RESUME}
    (Path(recipe.output.run_dir) / "metrics.jsonl").unlink()
    printed = ranks.run(config, file)
    assert "metrics.jsonl: rows are missing: steps 1 to 5; the curve and the summary show the gap" in printed
    assert [row["step"] for row in metrics_of(recipe)] == [6, 7, 8, 9, 10]  # that of step 6 is in the checkpoint
    assert summary_of(recipe)["missing_steps"] == [[1, 5]]
    ranks.run(config, whole)
    assert curve_of(recipe) == curve_of(load_recipe(whole))[5:]
    assert weights_of(recipe) == weights_of(load_recipe(whole))
    tried("metrics.jsonl deleted between two launches", proof="reported at resume; the gap in curve and summary; same weights")


def test_lines_damaged_between_two_launches(write_recipe, ranks, uninterrupted, tried):
    recipe = load_recipe(file := write_recipe())
    stop = MEANWHILE.format(step=8, action="os.kill(os.getpid(), signal.SIGTERM)")
    assert ranks.start("cpu", file, code=stop).wait() == [EXIT_RESUME]
    metrics = Path(recipe.output.run_dir) / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    lines[2], lines[3], lines[5] = "rubbish", lines[3][:30], json.dumps({"step": 6, "accuracy": 0.9})
    metrics.write_text("\n".join(lines) + "\n")
    printed = ranks.run("cpu", file)
    assert "3 damaged lines are left out; a copy of the file as it was is kept as metrics.damaged-1.jsonl" in printed
    assert "rows are missing: steps 3 to 4, step 6; the curve and the summary show the gap" in printed
    assert [row["step"] for row in metrics_of(recipe)] == [1, 2, 5, 7, 8, 9, 10]
    assert (metrics.parent / "metrics.damaged-1.jsonl").read_text() == "\n".join(lines) + "\n"
    assert summary_of(recipe)["missing_steps"] == [[3, 4], [6, 6]]
    assert "rows are missing: steps 3 to 4, step 6" in ranks.run("cpu", file)  # also in the report of a finished run
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])
    tried("lines of metrics.jsonl damaged between two launches", proof="reported at resume; what was intact stayed; same weights")


def test_a_foreign_metrics_file_in_a_runs_folder(write_recipe, ranks, uninterrupted, tried):
    """It used to end in a traceback: KeyError 'step'."""
    recipe = load_recipe(file := write_recipe())
    folder = Path(recipe.output.run_dir)
    folder.mkdir(parents=True)
    (folder / "lock").write_text("host here, pid 1\n")
    (folder / "metrics.jsonl").write_text('{"accuracy": 0.9}\n')
    ranks.run("cpu", file)
    assert same_as(uninterrupted, recipe)
    assert (folder / "metrics.damaged-1.jsonl").read_text() == '{"accuracy": 0.9}\n'
    tried("a foreign metrics.jsonl in a run's folder", proof="kept under another name; the run is whole")


DIES = """
import os, signal, isoflop.train.metrics as metrics
write = metrics.MetricsLog.{method}
def killed(self, *given):
    step = given[0] if isinstance(given[0], int) else given[0]["step"]
    if {after}:
        write(self, *given)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    if not {after}:
        write(self, *given)
metrics.MetricsLog.{method} = killed
"""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", ["write_samples", "write"])
def test_samples_stand_there_once_wherever_a_kill_falls(method, after, write_recipe, ranks, uninterrupted, tried):
    """At a step with a checkpoint, in the middle, and at the last one."""
    settings = {"evaluation__sample_every": 2, "output__checkpoint_every": 2}
    recipe, whole = load_recipe(file := write_recipe(**settings)), write_recipe("whole", **settings)
    for step in (4, 6, 10):
        launched = ranks.start("cpu", file, code=DIES.format(method=method, step=step, after=after))
        assert launched.wait() == [-signal.SIGKILL], launched.text()
    ranks.run("cpu", file)
    ranks.run("cpu", whole)
    assert samples_of(recipe) == samples_of(load_recipe(whole))
    assert [entry["step"] for entry in samples_of(recipe)] == [2, 4, 6, 8, 10]
    assert summary_of(recipe)["samples"] == samples_of(recipe)[-1]["samples"]
    assert same_as(uninterrupted, recipe)
    tried("`kill -9` before or after a step's samples or row", 3, proof="each step's samples and row once, the same")


def test_a_run_folder_removed_under_a_run(write_recipe, ranks, uninterrupted, tried):
    """Its state is in memory: the folder is made again, and the run comes to its end."""
    recipe = load_recipe(file := write_recipe(evaluation__sample_every=2))
    printed = ranks.run("cpu", file, code=MEANWHILE.format(step=6, action="shutil.rmtree(folder)"))
    assert printed.count("was removed during the run: it is made again") == 1
    assert "free some space" not in printed
    folder = Path(recipe.output.run_dir)
    assert [row["step"] for row in metrics_of(recipe)] == list(range(1, 11))
    assert [path.name for path in checkpoints.list_checkpoints(folder / "checkpoints")] == ["step-10"]
    assert {"environment.json", "recipe.yaml", "lock", "model", "summary.json"} <= {path.name for path in folder.iterdir()}
    assert same_as(uninterrupted, recipe)
    assert [entry["step"] for entry in samples_of(recipe)][-2:] == [8, 10]
    tried("a run's folder removed under it", proof="made again from memory; rows, samples and weights as uninterrupted")


def test_a_run_folder_removed_while_a_checkpoint_is_written(write_recipe, ranks, uninterrupted, tried):
    recipe = load_recipe(file := write_recipe())
    code = (
        "import shutil, isoflop.checkpoint.saver as saver\nsave, done = saver.save_sharded, []\n"
        "def removed(*given, **named):\n"
        "    if not done:\n        done.append(1)\n"
        f"        shutil.rmtree({recipe.output.run_dir!r})\n"
        "    return save(*given, **named)\nsaver.save_sharded = removed\n"
    )
    printed = ranks.run("cpu", file, code=code)
    assert "checkpoint of step 5 was not saved" in printed or "is made again" in printed
    assert "free some space" not in printed
    assert same_as(uninterrupted, recipe)
    tried("a run's folder removed in a save", proof="reported; the next checkpoint is complete; weights as uninterrupted")


def test_a_run_folder_that_another_run_has_taken_is_left_to_it(write_recipe, ranks, tried):
    settings = {"training__max_steps": 100_000, "evaluation__validate_every": 100_000, "output__checkpoint_every": 100_000}
    recipe = load_recipe(file := write_recipe(**settings))
    metrics = Path(recipe.output.run_dir) / "metrics.jsonl"
    first = ranks.start("cpu", file, code="import isoflop.train.trainer as p, os, time\nstep = p.train_step\n"
        "def waits(job, progress):\n    while progress.step == 6 and not os.path.exists(str(job.folder.path) + '.go'):\n"
        "        time.sleep(0.05)\n    return step(job, progress)\np.train_step = waits\n")  # fmt: skip
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") == 6)
    shutil.rmtree(metrics.parent)
    second = ranks.start("cpu", file, "seed=2")
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    Path(f"{metrics.parent}.go").touch()
    assert first.wait(60) == [2], first.text()
    assert "was removed during the run, and is used by something else now; this run ends" in first.text()
    there = metrics.read_text().count("\n")
    wait_for(lambda: metrics.read_text().count("\n") > there)
    second.kill(0, signal.SIGTERM)
    assert second.wait() == [EXIT_RESUME], second.text()
    assert not list(metrics.parent.glob("*damaged*"))
    steps = [row["step"] for row in metrics_of(recipe)]
    assert steps == list(range(1, len(steps) + 1))
    tried(
        "a run's folder removed, and another run in its place", proof="the first ended and reported it; the second lost nothing"
    )


def wait_for(condition, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_summary_that_is_damaged_is_refused_by_name(uninterrupted, tmp_path, ranks):
    folder = Path(shutil.copytree(uninterrupted["llama"].output.run_dir, tmp_path / "run"))
    for content, reason in (
        ("{", "is not JSON"),
        ("[]", "holds a list where a JSON object belongs"),
        ('{"steps": "ten"}', "steps = 'ten': must be a whole number"),
    ):
        (folder / "summary.json").write_text(content)
        launched = ranks.start("cpu", folder / "recipe.yaml", f"output.run_dir={folder}")
        assert launched.wait() == [2]
        assert f"summary.json{':' if 'steps' in reason else ''} {reason}" in launched.text()
        assert "delete" in launched.text()
    os.unlink(folder / "summary.json")
    ranks.run("cpu", folder / "recipe.yaml", f"output.run_dir={folder}")
    assert metrics_row(1).keys() <= json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]).keys()
