"""Nothing is overwritten or deleted that this program did not write."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import metrics_of, run_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isoflop.checkpoint import folder as checkpoints
from isoflop.compare.command import compare_command
from isoflop.config.loading import load_recipe
from isoflop.evaluate.run import evaluate
from isoflop.scaling.fit import fit_command
from isoflop.scaling.options import FitOptions
from isoflop.train.command import pretrain_command as pretrain
from isoflop.train.run_folder import RunFolder
from isoflop.utils.errors import UserError
from isoflop.utils.io import is_lock

REFUSED = "refused before any work; every byte stayed"


def content_of(folder):
    """Every file below a folder, by its path."""
    return {str(path.relative_to(folder)): digest(path) for path in sorted(Path(folder).rglob("*"))}


def digest(path):
    if path.is_symlink() or not path.is_file():
        return os.readlink(path) if path.is_symlink() else "folder"
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def somebodys(tmp_path):
    """A folder of somebody else's, with names that a run uses too."""
    folder = tmp_path / "somebodys"
    (folder / "model").mkdir(parents=True)
    (folder / "model/weights.bin").write_bytes(b"a year of work")
    (folder / "metrics.jsonl").write_text('{"accuracy": 0.9}\n')
    (folder / "lock").touch()
    return folder


@pytest.mark.parametrize("flags", [{}, {"dry_run": True}, {"eval_only": True}], ids=["train", "dry run", "eval only"])
def test_a_run_folder_that_is_no_runs(flags, somebodys, toy_recipe, run_in_process, tried):
    before = content_of(somebodys)
    recipe = toy_recipe(output__run_dir=str(somebodys))
    with pytest.raises(UserError, match=r"output\.run_dir = '\S+somebodys' is not empty and is not .* a run: it holds lock,"):
        run_in_process(recipe, **flags)
    assert content_of(somebodys) == before
    tried("output.run_dir is somebody else's folder", proof=REFUSED)


def test_a_launch_says_so_in_one_line(somebodys, write_recipe):
    done = run_command("python", "scripts/pretrain.py", write_recipe(output__run_dir=str(somebodys)), check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: output.run_dir = ")
    assert "set output.run_dir to a new or an empty folder" in done.stderr


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.sets(
        st.sampled_from(
            ["model/config.json", "metrics.jsonl", "recipe.yaml", "environment.json", "summary.json", "checkpoints/step-5/data",
             "samples.jsonl", "lock", "notes.txt", "a/b/c", ".git/HEAD", "flight_recorder/x", "loss.png"]
        ),
        min_size=1,
    ),
    content=st.sampled_from(["", "text\n", "{}\n", '{"versions": 1}\n', "[]\n", "model: llama\n", "host a\n", "\0"]),
)  # fmt: skip
def test_any_folder_that_is_no_runs(names, content, toy_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "folder"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    before, recipe = content_of(folder), toy_recipe()
    if {name.split("/")[0] for name in names} <= {"lock", "flight_recorder"}:
        RunFolder(str(folder)).check_owner(recipe)
    else:
        with pytest.raises(UserError, match="is not empty and is not the folder of a run"):
            RunFolder(str(folder)).check_owner(recipe)
    assert content_of(folder) == before


def test_a_file_in_the_place_of_a_folder(tmp_path, toy_recipe, run_in_process):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"output\.run_dir = '\S+file': Not a directory"):
        run_in_process(toy_recipe(output__run_dir=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_made(write_recipe):
    done = run_command("python", "scripts/pretrain.py", write_recipe(output__run_dir="/proc/none/run"), check=False)
    assert done.returncode == 2
    assert "error: output.run_dir = '/proc/none/run' cannot be written: No such file or directory; name another" in done.stderr


def test_logs_of_ones_own_are_no_obstacle(tmp_path, toy_recipe, run_in_process):
    """`... | tee runs/x/train.log`, and Slurm's."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("train.log", "slurm-1.out"):
        (folder / name).write_text("mine")
    assert run_in_process(recipe := toy_recipe(output__run_dir=str(folder))) == 0
    assert len(metrics_of(recipe)) == 10
    assert [(folder / name).read_text() for name in ("train.log", "slurm-1.out")] == ["mine", "mine"]


def test_a_launch_that_was_killed_at_once_is_a_run(tmp_path, toy_recipe):
    """Its folder holds the lock alone; should the kill have cut that short, nothing in it."""
    folder = RunFolder(str(tmp_path / "run"))
    folder.claim()
    assert is_lock(folder.path / "lock")
    RunFolder(str(folder.path)).check_owner(toy_recipe())
    (folder.path / "lock").write_text("")
    RunFolder(str(folder.path)).check_owner(toy_recipe())


def test_what_others_put_into_a_run_stays(uninterrupted, tmp_path, run_in_process, tried):
    """Notes beside a model that is exported again, in a checkpoint that is deleted, and a folder that looks like one."""
    folder = Path(shutil.copytree(uninterrupted["llama"].output.run_dir, tmp_path / "run"))
    (folder / "summary.json").unlink()
    theirs = ["model/notes.txt", "model/q4/model.gguf", "checkpoints/step-10/notes.txt", "checkpoints/step-7/notes.txt", "lab.md"]
    for name in theirs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    recipe = load_recipe(folder / "recipe.yaml", [f"output.run_dir={folder}", "output.keep_last=1"])
    assert run_in_process(recipe, resume="5") == 0
    assert [(folder / name).read_text() for name in theirs] == [f"mine: {name}" for name in theirs]
    assert [path.name for path in checkpoints.list_checkpoints(folder / "checkpoints")] == ["step-5", "step-10"]
    assert not checkpoints.verify(folder / "checkpoints/step-10")
    tried(
        "files of somebody else inside a run's folder",
        len(theirs),
        proof="every one stayed",
    )


def test_a_checkpoint_behind_a_link_is_left(uninterrupted, tmp_path):
    """Moved to another disk by hand."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    elsewhere = shutil.copytree(Path(uninterrupted["llama"].output.run_dir) / "checkpoints/step-5", tmp_path / "elsewhere")
    (folder / "step-5").symlink_to(elsewhere)
    before = content_of(elsewhere)
    checkpoints.discard_after(folder, 0)
    assert content_of(elsewhere) == before


def test_a_prepared_folder_that_is_none(somebodys, write_recipe, tried):
    before = content_of(somebodys)
    done = run_command("python", "scripts/prepare.py", write_recipe(data__prepared_dir=str(somebodys)), check=False)
    assert done.returncode == 2
    assert "is not empty and is not a prepared folder: it holds lock, metrics.jsonl, model, which would be" in done.stderr
    (somebodys / "manifest.json").write_text('{"name": "a web app"}')
    assert (
        run_command("python", "scripts/prepare.py", write_recipe(data__prepared_dir=str(somebodys)), check=False).returncode == 2
    )
    (somebodys / "manifest.json").unlink()
    assert content_of(somebodys) == before
    tried("data.prepared_dir is somebody else's folder", proof=REFUSED)


def test_a_folder_of_parts_that_is_none(somebodys, tmp_path, write_recipe, tried):
    """`<prepared_dir>.partial`, which all but what is kept used to be deleted from."""
    parts = somebodys.rename(tmp_path / "data.partial")
    before, file = content_of(parts), write_recipe(data__prepared_dir=str(tmp_path / "data"))
    done = run_command("python", "scripts/prepare.py", file, check=False)
    assert done.returncode == 2
    assert "is not empty and is not a folder of parts that prepare wrote" in done.stderr
    assert content_of(parts) == before
    shutil.rmtree(parts)
    parts.mkdir()
    (parts / "lock").write_text("host here, pid 1\n")
    (parts / "notes.txt").write_text("mine")
    (parts / "text-train-summary.arrow").write_text("mine")
    run_command("python", "scripts/prepare.py", file)
    there = sorted(path.name for path in (tmp_path / "data").iterdir() if "00" not in path.name)
    assert there == ["manifest.json", "notes.txt", "text-train-summary.arrow", "tokenizer"]
    tried("a folder of parts that is somebody else's; notes in one's own", proof="refused; the notes stayed")


@pytest.mark.parametrize("name", ["law.json", "law_report.json", "law.md", "law.png"])
def test_fit_overwrites_only_its_own(name, tmp_path, table, tried):
    out = tmp_path / "out/law.json"
    out.parent.mkdir()
    (out.parent / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=f"{name} exists already, and was not written by this program"):
        fit_command(FitOptions((table,), out=str(out), resamples=20))
    assert {path.name: path.read_text() for path in out.parent.iterdir()} == {name: '{"mine": 1}'}
    (out.parent / name).unlink()
    for _ in range(2):
        fit_command(FitOptions((table,), out=str(out), resamples=20))
    assert sorted(path.name for path in out.parent.iterdir()) == ["law.json", "law.md", "law.png", "law_report.json"]
    tried("fit, compare, sweep or an evaluation would overwrite a file of somebody else", proof=REFUSED)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A small table of runs."""
    file = tmp_path_factory.mktemp("table") / "runs.csv"
    rows = [(n, d, 1.7 + 400 / n**0.34 + 410 / d**0.28) for n in (1e6, 3e6, 1e7) for d in (1e8, 3e8, 1e9)]
    file.write_text("parameters,tokens,loss\n" + "".join(f"{n:.0f},{d:.0f},{loss}\n" for n, d, loss in rows))
    return str(file)


@pytest.mark.parametrize("name", ["comparison.json", "comparison.md", "comparison.png"])
def test_compare_overwrites_only_its_own(name, uninterrupted, tmp_path, tried):
    runs = [uninterrupted[family].output.run_dir for family in ("llama", "gpt2")]
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"--out .*{name} exists already, and was not written by this program"):
        compare_command(runs, str(tmp_path), as_json=False)
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    for _ in range(2):
        assert compare_command(runs, str(tmp_path), as_json=False) == 0
    assert json.loads((tmp_path / "comparison.json").read_text())["unit"]
    tried("fit, compare, sweep or an evaluation would overwrite a file of somebody else", proof=REFUSED)


def test_pretrain_is_the_only_entry_and_checks_first(somebodys, toy_recipe):
    """Also called as a function."""
    with pytest.raises(UserError, match="is not the folder of a run"):
        pretrain(toy_recipe(output__run_dir=str(somebodys)))


@pytest.mark.parametrize("name", ["results.json", "results.md"])
def test_an_evaluation_overwrites_only_its_own(name, uninterrupted, tmp_path, tried):
    (tmp_path / name).write_text('{"mine": 1}')
    run = uninterrupted["llama"].output.run_dir
    with pytest.raises(UserError, match=rf"results in \S+: \S+{name} exists already, and was not written by this program"):
        evaluate(run, output=tmp_path, limit=2)
    assert (tmp_path / name).read_text() == '{"mine": 1}'
    (tmp_path / name).unlink()
    for _ in range(2):
        assert evaluate(run, output=tmp_path, limit=2) is not None
    tried("fit, compare, sweep or an evaluation would overwrite a file of somebody else", proof=REFUSED)
