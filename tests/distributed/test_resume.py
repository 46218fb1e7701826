"""Stopped at any moment, by anything: the same command resumes, and nothing shows that it was stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import ROOT, curve_of, metrics_of, metrics_of_folder, weights_of

from isoflop.checkpoint import folder as checkpoint
from isoflop.checkpoint import saver
from isoflop.config.loading import load_recipe
from isoflop.train import trainer as pretrain_module
from isoflop.train.signals import EXIT_RESUME
from isoflop.utils.errors import UserError

DIE_IN_STEP_8 = """
import os, signal, sys
from isoflop.train.command import pretrain_command
import isoflop.train.trainer as pretrain
from isoflop.config.loading import load_recipe
step = pretrain.train_step
def dying(job, progress):
    if progress.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(job, progress)
pretrain.train_step = dying
pretrain_command(load_recipe(sys.argv[1]))
"""


@pytest.mark.parametrize("family", ["llama", "gpt2", "hybrid"])
def test_ten_steps_are_five_a_kill_and_five_more_bit_for_bit(family, uninterrupted, write_recipe, run_in_process):
    file = write_recipe(family=family)
    recipe = load_recipe(file)
    killed = subprocess.run([sys.executable, "-c", DIE_IN_STEP_8, file], cwd=ROOT, capture_output=True, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in metrics_of(recipe)] == [1, 2, 3, 4, 5, 6, 7]
    assert [p.name for p in checkpoint.list_checkpoints(Path(recipe.output.run_dir) / "checkpoints")] == ["step-5"]
    assert run_in_process(recipe) == 0
    assert curve_of(recipe) == curve_of(uninterrupted[family])
    assert weights_of(recipe) == weights_of(uninterrupted[family])


def test_dropout_resumes_bit_for_bit_too(write_recipe, run_in_process, monkeypatch):
    overrides = ["model.resid_pdrop=0.2", "model.embd_pdrop=0.1"]
    whole = load_recipe(write_recipe("whole", family="gpt2"), overrides)
    assert run_in_process(whole) == 0
    parted = load_recipe(write_recipe("parted", family="gpt2"), overrides)
    interrupt_at(monkeypatch, "step", 6)
    assert run_in_process(parted) == EXIT_RESUME
    monkeypatch.undo()
    assert run_in_process(parted) == 0
    assert curve_of(parted) == curve_of(whole)
    assert weights_of(parted) == weights_of(whole)


def interrupt_at(monkeypatch, phase, step, number=signal.SIGTERM):
    """Send this process a signal in the middle of a phase of a 1-based step."""
    import isoflop.train.evaluation as validation

    def signalling(function, when):
        def wrapped(*args, **kwargs):
            if when(*args, **kwargs):
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        return wrapped

    if phase == "accumulation":
        calls = []
        backward = Accelerator.backward
        # two micro-batches a step: this is the end of the first one
        monkeypatch.setattr(
            Accelerator, "backward", signalling(backward, lambda *_: calls.append(1) or len(calls) == 2 * step - 1)
        )
    elif phase == "step":
        monkeypatch.setattr(
            pretrain_module, "train_step", signalling(pretrain_module.train_step, lambda job, p: p.step + 1 == step)
        )
    elif phase == "saving":
        monkeypatch.setattr(saver, "commit", signalling(saver.commit, lambda *what: what[2]["step"] == step))
    elif phase == "evaluation":
        calls = []
        share = validation.rank_micro_batches
        monkeypatch.setattr(
            validation, "rank_micro_batches", signalling(share, lambda *_: calls.append(1) or len(calls) == step // 5)
        )
    else:
        monkeypatch.setattr(
            pretrain_module, "load_checkpoint", signalling(pretrain_module.load_checkpoint, lambda *_, **__: True)
        )


@pytest.mark.parametrize(
    ("phase", "step", "number", "saved"),
    [
        ("step", 1, signal.SIGTERM, None), ("step", 7, signal.SIGINT, 6), ("accumulation", 8, signal.SIGTERM, 7),
        ("accumulation", 6, signal.SIGINT, 5),
        ("evaluation", 5, signal.SIGUSR1, 5), ("evaluation", 10, signal.SIGINT, 10),
    ],
)  # fmt: skip
def test_a_signal_at_any_phase_saves_and_the_same_command_goes_on(
    phase, step, number, saved, uninterrupted, toy_recipe, run_in_process, monkeypatch, capsys
):
    recipe = toy_recipe()
    interrupt_at(monkeypatch, phase, step, number)
    assert run_in_process(recipe) == EXIT_RESUME
    newest = checkpoint.newest_intact(Path(recipe.output.run_dir) / "checkpoints")
    assert (newest and checkpoint.step_of(newest)) == saved
    printed = f"saved; the same command resumes from step-{saved}" if saved else "no step was finished; start again"
    assert f"{number.name}: {printed}" in capsys.readouterr().out
    monkeypatch.undo()
    assert run_in_process(recipe) == 0
    assert curve_of(recipe) == curve_of(uninterrupted["llama"])
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])


@pytest.mark.parametrize(("step", "number"), [(5, signal.SIGTERM), (5, signal.SIGUSR1), (10, signal.SIGTERM)])
def test_a_signal_while_saving_loses_nothing(step, number, uninterrupted, toy_recipe, run_in_process, monkeypatch):
    """Training continues while a checkpoint is written, so the step that is saved at last may be a later one."""
    recipe = toy_recipe()
    interrupt_at(monkeypatch, "saving", step, number)
    left = run_in_process(recipe)
    newest = checkpoint.newest_intact(Path(recipe.output.run_dir) / "checkpoints")
    assert checkpoint.step_of(newest) >= step
    assert left == EXIT_RESUME or checkpoint.step_of(newest) == 10
    monkeypatch.undo()
    assert run_in_process(recipe) == 0
    assert curve_of(recipe) == curve_of(uninterrupted["llama"])
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])


def test_a_signal_before_training_leaves_nothing_to_resume(toy_recipe, run_in_process, monkeypatch):
    recipe = toy_recipe()
    interrupt_at(monkeypatch, "setup", 0)
    with pytest.raises(SystemExit) as left:
        run_in_process(recipe)
    assert left.value.code == EXIT_RESUME
    assert not (Path(recipe.output.run_dir) / "checkpoints").exists()


def start_long_run(command, file):
    """Start a run of 100,000 steps and wait until some are done; returns the process and the run's folder."""
    process = subprocess.Popen(
        [*command, "scripts/pretrain.py", str(file)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    metrics = Path(load_recipe(file).output.run_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 20) and time.monotonic() < deadline:
        time.sleep(0.05)
    return process, metrics.parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_real_command_under_a_real_signal(number, write_recipe):
    # Never validating: a signal during validation leaves the step's row to the checkpoint, for the resumed run to write.
    recipe = write_recipe(training__max_steps=100_000, evaluation__validate_every=100_000)
    process, folder = start_long_run([sys.executable], recipe)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESUME
    assert f"{number.name}: saved" in output
    last = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    assert checkpoint.step_of(last) == metrics_of_folder(folder)[-1]["step"] >= 20
    assert checkpoint.verify(last) == []


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["cpu", "2cpu_ddp"])
def test_a_launcher_that_is_told_to_stop_takes_its_run_with_it_saved(config, write_recipe):
    """The simple launcher passes no signal on and just dies; torchrun's agent passes it to every rank."""
    port = [] if config == "cpu" else ["--main_process_port", "0"]
    command = ["accelerate", "launch", "--config_file", f"accelerate_configs/{config}.yaml", *port]
    recipe = write_recipe(training__max_steps=100_000, evaluation__validate_every=100_000)
    process, folder = start_long_run(command, recipe)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)  # until the last process has closed the pipe
    assert ": saved; the same command resumes" in output
    last = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    assert checkpoint.step_of(last) == metrics_of_folder(folder)[-1]["step"]
    assert checkpoint.verify(last) == []
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_chosen_checkpoint_and_one_that_is_not_there(uninterrupted, toy_recipe, run_in_process, capsys):
    recipe = toy_recipe(output__keep_last=9)
    with pytest.raises(UserError, match="has no intact checkpoint; to start from step 0 leave out --resume"):
        run_in_process(recipe, resume="newest")
    assert run_in_process(recipe) == 0
    (Path(recipe.output.run_dir) / "summary.json").unlink()
    with pytest.raises(UserError, match=r"--resume-from 7: .*step-7 is not intact .*there are: step-5, step-10"):
        run_in_process(recipe, resume="7")
    capsys.readouterr()
    assert run_in_process(recipe, resume="5") == 0
    assert "resuming from" in capsys.readouterr().out
    assert curve_of(recipe) == curve_of(uninterrupted["llama"])


def test_going_back_and_being_stopped_again_loses_no_row(uninterrupted, toy_recipe, run_in_process, monkeypatch):
    recipe = toy_recipe(output__keep_last=1, output__keep_every=5)
    assert run_in_process(recipe) == 0
    folder = Path(recipe.output.run_dir)
    (folder / "summary.json").unlink()
    interrupt_at(monkeypatch, "step", 8)
    assert run_in_process(recipe, resume="5") == EXIT_RESUME
    monkeypatch.undo()
    assert [path.name for path in checkpoint.list_checkpoints(folder / "checkpoints")] == ["step-5", "step-7"]
    assert run_in_process(recipe) == 0
    assert curve_of(recipe) == curve_of(uninterrupted["llama"])


def test_a_broken_newest_is_gone_after_falling_back(uninterrupted, toy_recipe, run_in_process, monkeypatch):
    recipe = toy_recipe(output__keep_last=1, output__keep_every=5)
    assert run_in_process(recipe) == 0
    folder = Path(recipe.output.run_dir)
    (folder / "summary.json").unlink()
    (folder / "checkpoints/step-10/.metadata").unlink()
    interrupt_at(monkeypatch, "step", 8)
    assert run_in_process(recipe) == EXIT_RESUME
    monkeypatch.undo()
    assert checkpoint.newest_intact(folder / "checkpoints").name == "step-7"
    assert run_in_process(recipe) == 0
    assert curve_of(recipe) == curve_of(uninterrupted["llama"])


def test_eval_only_measures_the_checkpoint_and_writes_nothing(uninterrupted, run_in_process, capsys):
    recipe = uninterrupted["llama"]
    before = {file: file.stat().st_mtime_ns for file in Path(recipe.output.run_dir).rglob("*")}
    assert run_in_process(recipe, eval_only=True) == 0
    loss = float(re.search(r"step 10: validation loss ([\d.]+)", capsys.readouterr().out)[1])
    assert loss == pytest.approx(metrics_of(recipe)[-1]["val_loss"], abs=1e-6)
    assert {file: file.stat().st_mtime_ns for file in Path(recipe.output.run_dir).rglob("*")} == before


@pytest.mark.distributed
def test_three_ranks_resume_bit_for_bit(write_recipe, ranks):
    """Sums of three depend on how DDP lays out its buckets: a resumed run must find them as they were."""
    sizes = {"training__tokens_per_step": 384}
    complete, parted = write_recipe("complete", **sizes), write_recipe("parted", **sizes)
    for file in (complete, parted):
        ranks.run("2cpu_ddp", file, processes=3)
    recipe = load_recipe(parted)
    (Path(recipe.output.run_dir) / "summary.json").unlink()
    ranks.run("2cpu_ddp", parted, "--resume-from", "5", processes=3)
    assert curve_of(recipe) == curve_of(load_recipe(complete))
    assert weights_of(recipe) == weights_of(load_recipe(complete))
