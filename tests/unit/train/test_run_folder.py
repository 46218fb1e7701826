import json
import subprocess

import pytest
from conftest import ROOT

from isoflop.train.run_folder import RunFolder, environment
from isoflop.utils.errors import UserError


def test_an_export_replaces_the_model_and_leaves_what_others_put_there(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.export(lambda tmp: (tmp / "model-00001-of-00002.safetensors").write_text("1"))
    (folder.model / "notes.txt").write_text("mine")
    (folder.model / "model.Q4.gguf").write_text("mine too")
    folder.export(lambda tmp: (tmp / "model.safetensors").write_text("2"))
    kept = ["model.Q4.gguf", "model.safetensors", "notes.txt"]
    assert sorted(file.name for file in folder.model.iterdir()) == kept
    with pytest.raises(ZeroDivisionError):
        folder.export(lambda tmp: 1 / 0)
    assert sorted(file.name for file in folder.model.iterdir()) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.partial", "model"]


def test_launches_are_kept_one_behind_the_other(tmp_path, toy_recipe):
    folder = RunFolder(str(tmp_path))
    for processes in (1, 2, 4):
        folder.write_start(toy_recipe(), {"num_processes": processes}, ["python", "x.py"])
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["launch"]["num_processes"] == 4
    assert [launch["launch"]["num_processes"] for launch in written["earlier_launches"]] == [1, 2]


def test_an_unclaimed_folder_without_recipe_has_no_owner(tmp_path, toy_recipe):
    RunFolder(str(tmp_path / "new")).check_owner(toy_recipe())
    assert RunFolder(str(tmp_path / "new")).read_summary() is None


def test_a_claim_is_exclusive(tmp_path):
    first = RunFolder(str(tmp_path))
    first.claim()
    with pytest.raises(UserError, match="is in use by host"):
        RunFolder(str(tmp_path)).claim()


def test_the_environment_names_commit_and_versions():
    described = environment()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    assert (described["commit"] or "").removesuffix("+changes") == head
    assert {"torch", "transformers", "accelerate", "datasets", "python"} <= set(described["versions"])
    assert described["hardware"]["memory_bytes"] > 10**9
