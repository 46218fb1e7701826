"""The terminal goes away: output that cannot be written ends no run, and a hang-up saves."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, curve_of, launch, metrics_of, run_command, weights_of

from isoflop.checkpoint import folder as checkpoints
from isoflop.config.loading import load_recipe
from isoflop.train.signals import EXIT_RESUME

PYTHON = [sys.executable, "scripts/pretrain.py"]
LONG = {"training__max_steps": 100_000, "evaluation__validate_every": 100_000, "output__checkpoint_every": 100_000}
SAME = "the run ended well, bit for bit as an uninterrupted one; one note in its folder"


def notes_of(recipe):
    """Lines of the note, without their times."""
    file = Path(recipe.output.run_dir) / "output_errors.txt"
    return [re.sub(r"^\S+ pid \d+: ", "", line) for line in file.read_text().splitlines()]


def wait_for_rows(file, size_bytes):
    """Wait until a run has written so much."""
    deadline = time.monotonic() + 120
    while not (file.exists() and file.stat().st_size > size_bytes):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_reader_that_leaves(both, write_recipe, uninterrupted, tried):
    """`| head -n 1`: the pipe is closed after the first line."""
    recipe = load_recipe(file := write_recipe())
    with subprocess.Popen(
        [*PYTHON, file], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT if both else subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline()
        process.stdout.close()
        printed = "" if both else process.stderr.read()
        assert process.wait(timeout=240) == 0, printed
    assert "Traceback" not in printed
    assert notes_of(recipe)[0] == "stdout cannot be written (Broken pipe); the run continues without it"
    assert len(notes_of(recipe)) <= 1 + both
    assert curve_of(recipe) == curve_of(uninterrupted["llama"])
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])
    tried("a closed pipe on standard output", proof=SAME)


@pytest.mark.distributed
def test_a_reader_that_leaves_a_launch_of_two_ranks(write_recipe, tried):
    """Through a shell, as typed: torchrun's agent has the same pipe."""
    file = write_recipe()
    command = f"accelerate launch --config_file accelerate_configs/2cpu_ddp.yaml --main_process_port 0 scripts/pretrain.py {file}"
    done = run_command("bash", "-c", f"set -o pipefail; {command} 2>&1 | head -n 1")
    assert done.stdout.count("\n") == 1
    recipe = load_recipe(file)
    assert [row["step"] for row in metrics_of(recipe)] == list(range(1, 11))
    assert json.loads((Path(recipe.output.run_dir) / "summary.json").read_text())["steps"] == 10
    assert notes_of(recipe)[0] == "stdout cannot be written (Broken pipe); the run continues without it"
    tried("a closed pipe under `accelerate launch` of two ranks", proof="the launch ended well, every step once")


def test_a_full_disk_under_the_log(write_recipe, uninterrupted, tried):
    """The kernel's own full device as standard output and error."""
    recipe = load_recipe(file := write_recipe())
    with open("/dev/full", "w") as full:
        assert subprocess.run([*PYTHON, file], cwd=ROOT, stdout=full, stderr=full, timeout=240, check=False).returncode == 0
    assert notes_of(recipe)[0] == "stdout cannot be written (No space left on device); the run continues without it"
    assert len(notes_of(recipe)) <= 2
    assert curve_of(recipe) == curve_of(uninterrupted["llama"])
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])
    tried("a full disk under the log", proof=SAME)


def test_a_refusal_that_cannot_be_printed_keeps_its_exit_code(write_recipe):
    with open("/dev/full", "w") as full:
        command = [*PYTHON, write_recipe(), "training.max_steps=0"]
        assert subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, timeout=60, check=False).returncode == 2


@pytest.mark.parametrize(
    "command",
    ["plan.py models", "plan.py recipe recipes/llama2_1.36b.yaml", "prepare.py {recipe}"],
)
def test_other_commands_end_well_without_a_reader(command, write_recipe, tmp_path):
    file = write_recipe(data__prepared_dir=str(tmp_path / "data"))
    done = run_command("bash", "-c", f"set -o pipefail; python scripts/{command.format(recipe=file)} | true", check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_what_an_encoding_lacks_is_escaped(write_recipe, uninterrupted):
    """A Latin-1 terminal, and prompts beyond it."""
    recipe = load_recipe(file := write_recipe(evaluation__sample_prompts=["π →"], evaluation__sample_every=5))
    done = run_command(*PYTHON, file, env={"PYTHONIOENCODING": "latin-1"})
    assert done.stdout.count(r"step 5: sample: '\u03c0 \u2192") == 1
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])


@pytest.fixture
def not_under_nohup():
    """What the test starts does not ignore SIGHUP, also where the tests run under nohup: a process inherits that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


HANG_UP = """
import os, signal, isoflop.train.trainer as pretrain
step = pretrain.train_step
def hung_up(job, progress):
    if progress.step == 6 and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGHUP)
    return step(job, progress)
pretrain.train_step = hung_up
"""


@pytest.mark.parametrize("config", ["cpu", pytest.param("2gpu_fsdp2", marks=pytest.mark.distributed)])
def test_a_hang_up_saves_as_sigterm_does(config, write_recipe, ranks, tried):
    file, whole = write_recipe(), write_recipe("whole")
    launched = ranks.start(config, file, code=HANG_UP)
    assert set(launched.wait()) == {EXIT_RESUME}, launched.text()
    assert "SIGHUP: saved; the same command resumes from step-6" in launched.text()
    assert checkpoints.newest_intact(Path(load_recipe(file).output.run_dir) / "checkpoints").name == "step-6"
    for one in (file, whole):
        ranks.run(config, one)
    assert curve_of(load_recipe(file)) == curve_of(load_recipe(whole))
    assert weights_of(load_recipe(file)) == weights_of(load_recipe(whole))
    tried(f"SIGHUP, `{config}`")


def test_under_nohup_a_hang_up_changes_nothing(write_recipe, ranks, uninterrupted):
    recipe = load_recipe(file := write_recipe())
    ignored = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    assert ranks.start("cpu", file, code=ignored + HANG_UP).wait() == [0]
    assert curve_of(recipe) == curve_of(uninterrupted["llama"])


@pytest.mark.usefixtures("not_under_nohup")
def test_a_terminal_that_is_closed(write_recipe, tried):
    """A real one: the kernel sends SIGHUP, and every write fails from then on."""
    recipe = load_recipe(file := write_recipe(**LONG))
    rows = Path(recipe.output.run_dir) / "metrics.jsonl"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(PYTHON[0], [*PYTHON, str(file)])
    wait_for_rows(rows, 10_000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == EXIT_RESUME
    newest = checkpoints.newest_intact(Path(recipe.output.run_dir) / "checkpoints")
    assert checkpoints.step_of(newest) == metrics_of(recipe)[-1]["step"]
    assert re.match(r"std(out|err) cannot be written \(Input/output error\)", notes_of(recipe)[0])
    tried("a terminal that is closed", proof="saved at the step it came in; exit code 75")


@pytest.mark.slow
@pytest.mark.distributed
def test_under_nohup_torchrun_ends_a_run_unless_it_is_told_not_to(write_recipe, tried):
    """It handles SIGHUP even where that is ignored; the guide's variable keeps it from doing so."""
    for handled, ends in (({}, True), ({"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT"}, False)):
        recipe = load_recipe(file := write_recipe(f"{ends}", **LONG))
        rows = Path(recipe.output.run_dir) / "metrics.jsonl"
        command = [
            "nohup",
            "accelerate",
            "launch",
            "--config_file",
            "accelerate_configs/2cpu_ddp.yaml",
            "--main_process_port",
            "0",
        ]
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **handled}
        with subprocess.Popen(
            [*command, "scripts/pretrain.py", str(file)], cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            wait_for_rows(rows, 10_000)
            os.killpg(process.pid, signal.SIGHUP)
            if not ends:
                wait_for_rows(rows, 2 * rows.stat().st_size)
                assert process.poll() is None
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=120)
        newest = checkpoints.newest_intact(Path(recipe.output.run_dir) / "checkpoints")
        assert checkpoints.step_of(newest) == metrics_of(recipe)[-1]["step"]
    tried("SIGHUP to a launch of two ranks under nohup", 2, proof="saved; with the guide's variable the run went on")


@pytest.mark.slow
@pytest.mark.usefixtures("not_under_nohup")
def test_a_launch_whose_shell_hangs_up(write_recipe, tried):
    """SIGHUP to the whole process group of `accelerate launch`, one process, as a shell sends it when its window closes."""
    recipe = load_recipe(file := write_recipe(**LONG))
    rows = Path(recipe.output.run_dir) / "metrics.jsonl"
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "scripts/pretrain.py", str(file)]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        wait_for_rows(rows, 10_000)
        os.killpg(process.pid, signal.SIGHUP)
        process.wait(timeout=60)
    deadline = time.monotonic() + 60
    folder = Path(recipe.output.run_dir) / "checkpoints"
    while not checkpoints.list_checkpoints(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert checkpoints.step_of(checkpoints.newest_intact(folder)) == metrics_of(recipe)[-1]["step"]
    assert f"going on from step-{metrics_of(recipe)[-1]['step']}" in launch("cpu", file, "--dry-run").stdout
    tried("SIGHUP to a launch, as from a window that closes", proof="saved at the step it came in")
