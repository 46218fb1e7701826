"""A law of one optimizer is not taken for the other: plans of a recipe and of a budget say so, and rank no shape by it."""

import pytest
import yaml
from conftest import ROOT

from isoflop.plan.budgets import plan_budget
from isoflop.plan.planner import plan

WHY = "its runs were trained with {}, and this one's optimizer.name is {}"
NO_MUON = WHY.format("adamw", "muon")


@pytest.fixture
def muon_law(tmp_path):
    """A law file of Muon runs."""
    law = {
        "form": "chinchilla", "coefficients": {"E": 1.5, "A": 400.0, "alpha": 0.3, "B": 1000.0, "beta": 0.35},
        "counts": "total", "source": "a test", "optimizer": "muon",
    }  # fmt: skip
    (tmp_path / "muon.yaml").write_text(yaml.safe_dump(law))
    return str(tmp_path / "muon.yaml")


def test_a_plan_of_a_recipe(muon_law):
    recipe, muon = str(ROOT / "recipes/gpt2_124m.yaml"), ["optimizer.name=muon"]
    assert plan(recipe).prediction.outside is None
    assert plan(recipe, law=muon_law).prediction.outside == WHY.format("muon", "adamw")
    of_muon = plan(recipe, muon, law=muon_law)
    assert of_muon.prediction.predicted_loss is not None
    assert {of_muon.laws[name].outside for name in ("hoffmann", "kaplan")} == {NO_MUON}
    assert plan(recipe, muon).repeated_data.predicted_loss is None


def test_a_plan_of_a_budget(muon_law):
    by_default = plan_budget(1e20)
    assert by_default.outside is None
    found = plan_budget(1e20, optimizer="muon")
    assert found.outside == NO_MUON
    assert found.chosen_by.startswith("20 tokens a parameter")
    assert {shape.outside for shape in found.best_by_law.values()} == {NO_MUON}
    by_its_own = plan_budget(1e20, optimizer="muon", law=muon_law)
    assert by_its_own.outside is None
    assert by_its_own.near_optimal[0].predicted_loss is not None
    assert plan_budget(1e20, law=muon_law).outside == WHY.format("muon", "adamw")
