"""What a sweep's file may say."""

import pytest
import yaml
from conftest import ROOT

from isoflop.sweep.config import Rule, SizeGrid, SweepConfig, load_sweep_config
from isoflop.utils.errors import UserError

CUBE = {"recipe": "r.yaml", "budgets": [1e9, 1e10], "sizes": {}, "aspect_ratio": 32, "output_dir": "runs/s"}


@pytest.mark.parametrize("file", sorted((ROOT / "recipes/sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_sweeps_load(file):
    assert load_sweep_config(file).base().data.prepared_dir.startswith("data/")


def test_defaults_and_rules(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(CUBE | {"peak_learning_rate": {"coefficient": 4.0, "exponent": -0.5}}))
    suite = load_sweep_config(tmp_path / "s.yaml")
    assert suite.sizes == SizeGrid(tokens_per_parameter=20.0, count=5, ratio=2.0)
    assert suite.peak_learning_rate == Rule(coefficient=4.0, exponent=-0.5)
    assert suite.peak_learning_rate.at(1e4) == pytest.approx(0.04, rel=1e-12)
    assert (suite.warmup_fraction, suite.final_learning_rate_fraction, suite.validations, suite.branch) == (0.1, 0.1, 20, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": None}, "budgets"),
        ({"tokens_per_parameter": [20]}, "budgets"),
        ({"parameters": [1e4]}, "sizes"),
        ({"budgets": None, "tokens_per_parameter": [20]}, "sizes around a budget's centre need budgets"),
        ({"branch": True}, "branch: true trains each size once"),
        ({"budgets": [-1.0]}, "budgets.0"),
        ({"budgets": []}, "budgets"),
        ({"sizes": {"count": 2}}, "sizes.count"),
        ({"sizes": {"ratio": 1.0}}, "sizes.ratio"),
        ({"bugdets": [1e9]}, "did you mean budgets"),
        ({"seeds": [-1]}, "seeds.0"),
        ({"num_layers": 3}, "aspect_ratio"),
        ({"aspect_ratio": None}, "num_layers"),
        ({"peak_learning_rate": []}, "peak_learning_rate"),
        ({"peak_learning_rate": [1e-3, -1e-3]}, "peak_learning_rate.values.1"),
        ({"peak_learning_rate": [1e-3, 1e-3]}, "peak_learning_rate = [0.001, 0.001] has a value twice"),
        ({"peak_learning_rate": {"coefficient": 1.0}}, "peak_learning_rate.rule.exponent"),
        ({"peak_learning_rate": 1e-3}, "peak_learning_rate.rule = 0.001: must be a mapping"),
        ({"tokens_per_step": [256, 512.5]}, "tokens_per_step.values.1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    tree = {key: value for key, value in (CUBE | changes).items() if value is not None}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as error:
        load_sweep_config(tmp_path / "s.yaml")
    assert str(error.value).startswith(f"sweep {tmp_path}/s.yaml: ")
    assert message in str(error.value)


def test_files_that_are_no_sweep(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_sweep_config(tmp_path / "none.yaml")
    for text, message in (
        ("a: [", "is not YAML"),
        ("- 1", "is not a mapping; its keys are recipe, overrides, budgets"),
        ("budgets: [1e9]\nsizes: {}\nbudgets: [1e10]\n", "is not YAML: the key budgets is given in lines 1 and 3"),
    ):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            load_sweep_config(tmp_path / "s.yaml")


def test_overrides_are_the_recipes_own_keys(write_recipe):
    suite = SweepConfig(**CUBE | {"recipe": str(write_recipe()), "overrides": {"optimizer.peak_learning_rate": 0.5, "seed": 7}})
    assert (suite.base().optimizer.peak_learning_rate, suite.base().seed) == (0.5, 7)
    with pytest.raises(UserError, match="unknown key; did you mean peak_learning_rate"):
        suite.model_copy(update={"overrides": {"optimizer.peak_learning_rat": 0.5}}).base()


def test_only_a_schedule_that_does_not_know_its_end_can_branch(write_recipe):
    tree = CUBE | {"recipe": str(write_recipe()), "branch": True, "sizes": None, "parameters": [2e4]}
    with pytest.raises(UserError, match=r"branch: true needs schedule.name = 'wsd'.* has 'cosine'"):
        SweepConfig(**tree).base()
    assert SweepConfig(**tree | {"overrides": {"schedule.name": "wsd"}}).base().schedule.name == "wsd"
