"""The `isoflop` command: its verbs, their help, mistakes, launches and closed pipes."""

import argparse
import subprocess
import sys

import pytest
from conftest import ROOT, run_command

from isoflop.cli import launch, recipes
from isoflop.cli.main import VERBS, dispatch
from isoflop.cli.parser import recipe_keys
from isoflop.config.shipped import shipped
from isoflop.utils.errors import UserError


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_reads_well_at_80_columns(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        dispatch([verb, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith(f"usage: isoflop {verb}")
    assert max(map(len, shown.splitlines())) <= 80


def test_the_command_lists_its_verbs_and_its_version(capsys):
    import isoflop

    assert dispatch([]) == dispatch(["--help"]) == dispatch(["--version"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)
    assert f"isoflop {isoflop.__version__}" in shown


def test_an_unknown_verb_names_the_nearest():
    with pytest.raises(UserError, match=r"pretain.*did you mean pretrain"):
        dispatch(["pretain", "quickstart"])


@pytest.mark.parametrize(
    ("typed", "form"),
    [
        (["--max_steps", "10"], "training.max_steps=10"),
        (["--max-steps=10"], "training.max_steps=10"),
        (["--training.max_steps", "10"], "training.max_steps=10"),
        (["--hidden_size", "64"], "model.hidden_size=64"),
    ],
)
def test_an_option_that_is_a_key_of_the_recipe_names_the_right_form(typed, form):
    with pytest.raises(UserError, match=f"give it as {form}, without dashes"):
        dispatch(["pretrain", "quickstart", *typed])


def test_a_mistyped_option_names_the_nearest():
    with pytest.raises(UserError, match=r"--dry-rum.*did you mean --dry-run"):
        dispatch(["pretrain", "quickstart", "--dry-rum"])


def test_the_keys_of_the_shipped_recipes_are_known():
    from isoflop.config.loading import load_recipe
    from isoflop.config.recipe import flatten

    keys = set(recipe_keys())
    for name in (name for name in shipped("recipes") if not name.startswith("sweeps/")):
        tree = flatten(load_recipe(name).model_dump(mode="json", exclude_none=True))
        sections = ("model.", "training.", "optimizer.", "schedule.", "output.", "hub.", "anomalies.")
        assert {key for key in tree if key.startswith(sections)} <= keys


def given(**options):
    return argparse.Namespace(**{"launch": "2gpu_zero1", "num_processes": None} | options)


def test_a_launch_is_accelerates_with_the_packaged_config_and_the_same_arguments():
    typed = ["llama2_1.36b", "--launch", "2gpu_zero1", "training.max_steps=5", "--num-processes=4", "--dry-run"]
    command = launch.launch_command("pretrain", typed, given(num_processes=4))
    place = command.index("--config_file")
    assert command[place - 1] in ("launch", "accelerate.commands.launch")
    assert command[place + 1].endswith("accelerate_configs/2gpu_zero1.yaml")
    assert command[place + 2 :] == [
        "--num_processes", "4", "--module", "isoflop", "pretrain", "llama2_1.36b", "training.max_steps=5", "--dry-run",
    ]  # fmt: skip


@pytest.mark.parametrize("typed", [["--launch", "cpu", "a"], ["a", "--launch=cpu"], ["--num-processes", "2", "a"]])
def test_launch_options_are_not_passed_on(typed):
    assert launch.without_options(typed) == ["a"]


def test_a_launch_config_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"2gpu_zero3.*did you mean"):
        launch.launch_command("pretrain", ["a"], given(launch="2gpu_zero3"))


@pytest.mark.distributed
def test_a_launch_trains_under_its_config_and_prints_its_command(write_recipe):
    done = run_command(sys.executable, "-m", "isoflop", "pretrain", write_recipe(), "--launch", "cpu", "--dry-run")
    assert "launch --config_file" in done.stdout.splitlines()[0]
    assert "--module isoflop pretrain" in done.stdout.splitlines()[0]
    assert "dry run: would train 10 steps" in done.stdout


def test_recipes_are_listed_shown_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert dispatch(["recipes"]) == 0
    shown = capsys.readouterr().out
    for name in (*shipped("recipes"), *shipped("accelerate_configs")):
        assert f"  {name} " in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert dispatch(["recipes", "copy", "quickstart"]) == dispatch(["recipes", "copy", "2gpu_zero1", "mine.yaml"]) == 0
    assert (tmp_path / "recipes/quickstart.yaml").read_text() == (ROOT / "recipes/quickstart.yaml").read_text()
    assert (tmp_path / "mine.yaml").read_text() == (ROOT / "accelerate_configs/2gpu_zero1.yaml").read_text()
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.yaml exists already"):
        dispatch(["recipes", "copy", "2gpu_zero1", "mine.yaml"])
    assert recipes.summary("recipes", "quickstart", 200).startswith("A small LLaMA")


@pytest.mark.new_process
def test_a_closed_pipe_gives_no_traceback():
    command = f"{sys.executable} -m isoflop plan recipe quickstart --full | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("quickstart")


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/env/bin/isoflop", ["isoflop", "pretrain", "quickstart"]),
        ("/env/lib/isoflop/__main__.py", ["isoflop", "pretrain", "quickstart"]),
        ("scripts/pretrain.py", ["python", "scripts/pretrain.py", "pretrain", "quickstart"]),
    ],
)
def test_the_recorded_command_is_the_one_that_was_typed(program, command, monkeypatch):
    from isoflop.train.distributed import command_typed

    monkeypatch.setattr(sys, "argv", [program, "pretrain", "quickstart"])
    assert command_typed() == command
