"""A run under a law: the prediction stands beside what came out, and from mid-run on a forecast."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import metrics_of, weights_of

from isoflop.plan import cost
from isoflop.scaling.laws import Prediction, load_law

COEFFICIENTS = {"E": 3.0, "A": 100.0, "alpha": 0.5, "B": 100.0, "beta": 0.5}
GAPS = [[0.5, math.log(0.04), 0.5, 0.25, 0.1], [0.9, math.log(0.01), 0.5, 0.25, 0.2]]
CENTER = [math.log(28832), math.log(2560)]  # of the toy and its tokens


@pytest.fixture
def law(tmp_path):
    """A law with draws, residuals and progress."""
    tree = {
        "form": "chinchilla", "coefficients": COEFFICIENTS, "counts": "total", "source": "made here",
        "draws": [[3.0 + i / 100, 100.0, 0.5, 100.0, 0.5] for i in range(-50, 51)],
        "residuals": [-0.01, 0.0, 0.01],
        "progress": {"schedule": "cosine", "center": CENTER, "covariance": np.diag([0.44, 1.0, 1.0]).tolist(), "gaps": GAPS},
    }  # fmt: skip
    (tmp_path / "law.json").write_text(json.dumps(tree))
    return str(tmp_path / "law.json")


def test_the_summary_has_what_was_predicted(law, toy_recipe, run_in_process, capsys, uninterrupted):
    recipe = toy_recipe(evaluation__validate_every=1).model_copy(update={"law": law})
    assert run_in_process(recipe) == 0
    summary = json.loads((Path(recipe.output.run_dir) / "summary.json").read_text())
    n, d = cost.parameters(recipe.model), 10 * 256
    predicted = 3.0 + 100 / math.sqrt(n) + 100 / math.sqrt(d)
    low, high = summary["predicted_loss_interval"]
    assert (summary["law"], summary["predicted_loss"]) == (law, pytest.approx(predicted, rel=1e-12))
    assert low < predicted - 0.45 < predicted + 0.45 < high
    assert summary["prediction_error"] == summary["predicted_loss"] / summary["val_loss"] - 1
    assert summary["inside_interval"] == (low <= summary["val_loss"] <= high)
    reported = capsys.readouterr()
    assert (
        f"law: {law} predicts a final validation loss of {predicted:.4f} (90%: {low:.4f} to {high:.4f})"
        in reported.out + reported.err
    )
    assert f"law {law} predicted {predicted:.4f}" in reported.out + reported.err
    rows = metrics_of(recipe)
    assert [row["step"] for row in rows if row.get("forecast_loss")] == [5, 6, 7, 8, 9]
    middle = rows[4]
    assert middle["forecast_loss"] == pytest.approx(middle["val_loss"] * math.exp(-0.04))
    assert middle["forecast_low"] == pytest.approx(middle["val_loss"] * math.exp(-0.04 * math.exp(1.645 * 0.1 * 1.2)))
    assert middle["forecast_high"] == pytest.approx(middle["val_loss"] * math.exp(-0.04 * math.exp(-1.645 * 0.1 * 1.2)))
    assert (Path(recipe.output.run_dir) / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_law_of_another_optimizer_predicts_nothing(law, toy_recipe, run_in_process, capsys):
    Path(law).write_text(json.dumps(json.loads(Path(law).read_text()) | {"optimizer": "muon"}))
    recipe = toy_recipe(evaluation__validate_every=1).model_copy(update={"law": law})
    assert run_in_process(recipe) == 0
    reported = capsys.readouterr()
    why = "its runs were trained with muon, and this one's optimizer.name is adamw"
    assert f"law: {law}: no prediction: {why}" in reported.out + reported.err
    summary = json.loads((Path(recipe.output.run_dir) / "summary.json").read_text())
    assert (summary["predicted_loss"], summary["outside"]) == (None, why)
    assert not [row for row in metrics_of(recipe) if row.get("forecast_loss")]


def test_a_law_changes_nothing_that_is_learnt(law, toy_recipe, run_in_process, uninterrupted):
    recipe = toy_recipe().model_copy(update={"law": law})
    assert run_in_process(recipe) == 0
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])
    summary = json.loads((Path(uninterrupted["llama"].output.run_dir) / "summary.json").read_text())
    assert "law" not in summary


def test_forecasts_follow_size_and_length_and_end_at_the_loss_itself(law, toy_recipe):
    loaded, model = load_law(law), toy_recipe().model
    assert loaded.forecast(4.0, 0.5, "wsd", model, 2560) is None
    assert loaded.forecast(4.0, 0.49, "cosine", model, 2560) is None
    assert loaded.forecast(4.0, 1.0, "cosine", model, 2560) is None
    falls = np.array([0.04 * math.exp(z * 1.645 * 0.1 * 1.2) for z in (0, 1, -1)])
    there = np.array([0.01 * math.exp(z * 1.645 * 0.2 * 1.2) for z in (0, 1, -1)])
    found = loaded.forecast(4.0, 0.7, "cosine", model, 2560)
    assert isinstance(found, Prediction)
    assert [found.loss, *found.interval] == pytest.approx((4 * np.exp(-(falls + there) / 2)).tolist())
    found = loaded.forecast(4.0, 0.95, "cosine", model, 2560)
    assert [found.loss, *found.interval] == pytest.approx((4 * np.exp(-there / 2)).tolist())
    longer = loaded.forecast(4.0, 0.5, "cosine", model, 16 * 2560)
    assert longer.loss == pytest.approx(4 * math.exp(-0.04 * 2))
    assert longer.interval[1] - longer.interval[0] > found.interval[1] - found.interval[0]


def test_a_law_that_is_not_there_is_refused_before_anything_is_loaded(toy_recipe, run_in_process):
    from isoflop.utils.errors import UserError

    with pytest.raises(UserError, match=r"law no_law\.json: neither a published law nor a file"):
        run_in_process(toy_recipe().model_copy(update={"law": "no_law.json"}))
