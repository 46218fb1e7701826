"""Recipes, launch configs and evaluation files found from any folder."""

import os
from pathlib import Path

import pytest
from conftest import ROOT

from isoflop.config.loading import load_recipe
from isoflop.config.shipped import PACKAGE, find, shipped
from isoflop.utils.errors import UserError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["llama3_1.5b", "llama3_1.5b.yaml", "recipes/llama3_1.5b", "recipes/llama3_1.5b.yaml"])
def test_a_shipped_recipe_is_found_from_any_folder(name):
    assert find("recipes", name) == PACKAGE / "recipes/llama3_1.5b.yaml"
    assert load_recipe(name) == load_recipe(ROOT / "recipes/llama3_1.5b.yaml")


@pytest.mark.parametrize(
    ("kind", "name", "file"),
    [
        ("accelerate_configs", "2gpu_ddp", "accelerate_configs/2gpu_ddp.yaml"),
        ("accelerate_configs", "accelerate_configs/cpu.yaml", "accelerate_configs/cpu.yaml"),
        ("eval", "suites/quick", "eval/suites/quick.yaml"),
        ("recipes", "ablations/124m_rope", "recipes/ablations/124m_rope.yaml"),
        ("recipes", "recipes/laptop_law.json", "recipes/laptop_law.json"),
    ],
)
def test_launch_configs_and_evaluation_files_are_found_too(kind, name, file):
    assert find(kind, name) == PACKAGE / file


@pytest.mark.parametrize("own", ["llama3_1.5b.yaml", "recipes/llama3_1.5b.yaml"])
def test_a_users_own_file_comes_first(elsewhere, own):
    (elsewhere / own).parent.mkdir(exist_ok=True)
    (elsewhere / own).touch()
    for name in {"llama3_1.5b", own}:
        assert find("recipes", name) == Path(own)


def test_a_folder_of_a_shipped_name_does_not_hide_it(elsewhere):
    (elsewhere / "quickstart").mkdir()
    assert find("recipes", "quickstart") == PACKAGE / "recipes/quickstart.yaml"


@pytest.mark.parametrize(
    "name", ["../recipes/quickstart.yaml", "/recipes/quickstart.yaml", "other/quickstart.yaml", "", "a\0", "x" * 300]
)
def test_other_paths_are_not_looked_up_in_the_package(name):
    with pytest.raises(UserError, match=r"recipe .*does not exist"):
        find("recipes", name)


def test_a_missing_file_names_the_nearest(elsewhere):
    with pytest.raises(UserError, match=r"recipes/quickstrat\.yaml does not exist; did you mean recipes/quickstart.yaml\?"):
        find("recipes", "recipes/quickstrat.yaml")
    with pytest.raises(UserError, match=r"launch config 2gpu_dpp .* did you mean 2gpu_ddp\?"):
        find("accelerate_configs", "2gpu_dpp")
    Path("recipes").mkdir()
    Path("recipes/my_very_own.yaml").touch()
    with pytest.raises(UserError, match=r"did you mean recipes/my_very_own.yaml\?"):
        find("recipes", "recipes/my_very_on.yaml")


def test_every_shipped_name_is_found():
    assert {"llama3_1.5b", "ablations/124m_rope"} <= set(shipped("recipes"))
    assert "2node_8gpu_fsdp2" in shipped("accelerate_configs")
    for kind in ("recipes", "accelerate_configs", "eval"):
        assert all(os.path.isfile(find(kind, name)) for name in shipped(kind))
