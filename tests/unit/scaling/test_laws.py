import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from isoflop.config.loading import load_recipe
from isoflop.plan.families import load_family
from isoflop.plan.search import search
from isoflop.scaling.laws import (
    PF_DAY,
    PUBLISHED,
    NoPrediction,
    Prediction,
    critical_batch_tokens,
    effective_tokens,
    kaplan_optimum,
    load_law,
    prediction_json,
)
from isoflop.utils.errors import UserError

CHINCHILLA = {"E": 1.5, "A": 400.0, "alpha": 0.3, "B": 1000.0, "beta": 0.35}


def write_law(path, **changes):
    law = {"form": "chinchilla", "coefficients": CHINCHILLA, "counts": "total", "source": "a test"} | changes
    path.write_text(yaml.safe_dump({key: value for key, value in law.items() if value is not None}))
    return str(path)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        # E + A / N^alpha + B / D^beta at N = 1e9, D = 2e10, by hand
        ("hoffmann", 1.693374 + 406.401 / 1e9**0.33917084 + 410.723 / 2e10**0.2849083),
        ("hoffmann-rounded", 1.69 + 406.4 / 1e9**0.34 + 410.7 / 2e10**0.28),
        ("besiroglu", 1.8172 + 482.01 / 1e9**0.3478 + 2085.43 / 2e10**0.3658),
        ("kaplan", ((8.8e13 / 1e9) ** (0.076 / 0.095) + 5.4e13 / 2e10) ** 0.095),
    ],
)
def test_published_laws_are_their_papers(name, loss):
    assert float(load_law(name).loss(1e9, 2e10)) == pytest.approx(loss, rel=1e-12)


def test_what_n_counts():
    model = load_recipe(ROOT / "recipes/llama2_1.36b.yaml").model
    assert load_law("hoffmann").model_size(model) == 1_294_159_104
    assert load_law("kaplan").model_size(model) == 1_294_159_104 - 2 * 73_728_000


@pytest.mark.parametrize("name", PUBLISHED)
@given(exponent=st.floats(17, 26))
def test_the_optimum_in_closed_form_is_the_least_loss(name, exponent):
    law, flops = load_law(name), 10**exponent
    n, d = law.optimum(flops)
    assert 6 * n * d == pytest.approx(flops, rel=1e-9)
    found = minimize_scalar(
        lambda log_n: float(law.loss(math.exp(log_n), flops / 6 / math.exp(log_n))), bounds=(5, 40), method="bounded"
    )
    assert math.log(n) == pytest.approx(found.x, abs=1e-2)
    assert float(law.loss(n, d)) <= found.fun + 1e-12


@given(st.floats(6, 12), st.floats(6, 14))
def test_more_parameters_and_more_tokens_never_hurt(log_n, log_d):
    for name in PUBLISHED:
        law = load_law(name)
        assert float(law.loss(10 ** (log_n + 0.1), 10**log_d)) < float(law.loss(10**log_n, 10**log_d))
        assert float(law.loss(10**log_n, 10 ** (log_d + 0.1))) < float(law.loss(10**log_n, 10**log_d))


def test_besiroglus_interval_holds_its_own_loss_and_others_have_none():
    law = load_law("besiroglu")
    model = load_recipe(ROOT / "recipes/llama2_1.36b.yaml").model
    loss, (low, high) = law.predict(model, 2.8e10)
    assert loss == float(law.loss(1_294_159_104, 2.8e10))
    assert low < loss < high
    assert 0.002 < high - low < 0.02
    assert len(law.draws) == 100
    # the published standard errors: A 124.58, B 1293.23, E 0.03, alpha 0.02, beta 0.02
    assert np.std(law.draws, axis=0) == pytest.approx([0.03, 124.58, 0.02, 1293.23, 0.02], rel=0.35)
    assert all(load_law(name).predict(model, 1e10).interval is None for name in PUBLISHED if name != "besiroglu")


def test_the_interval_is_a_percentile_of_the_draws_and_of_single_runs(tmp_path):
    draws = [[1.0 + i / 100, 400.0, 0.3, 1000.0, 0.35] for i in range(101)]
    model = load_recipe(ROOT / "recipes/quickstart.yaml").model
    law = load_law(write_law(tmp_path / "law.yaml", draws=draws))
    loss, interval = law.predict(model, 1e10)
    assert interval == pytest.approx((loss - 0.45, loss + 0.45))
    law = load_law(write_law(tmp_path / "runs.yaml", draws=[draws[50]], residuals=[i / 1000 for i in range(-10, 11)]))
    loss, interval = law.predict(model, 1e10)
    assert interval == pytest.approx((loss * math.exp(-0.009), loss * math.exp(0.009)))


def test_a_law_from_a_file_is_used_as_it_is(tmp_path):
    law = load_law(write_law(tmp_path / "mine.yaml"))
    assert law.name == str(tmp_path / "mine.yaml")
    assert float(law.loss(1e8, 1e9)) == pytest.approx(1.5 + 400 / 1e8**0.3 + 1000 / 1e9**0.35)
    assert law.extrapolates(1, 1) == []


LLAMA = ("recipes/llama2_1.36b.yaml", "recipes/quickstart.yaml")


def test_far_beyond_its_runs_a_law_has_no_prediction():
    """Hoffmann et al.: 7e7 to 1.6e10 parameters on 5e9 to 5e11 tokens; ten times beyond is the border."""
    law, (model, small) = load_law("hoffmann"), (load_recipe(ROOT / path).model for path in LLAMA)
    assert law.predict(model, 2e10) == Prediction(float(law.loss(1_294_159_104, 2e10)), None)
    assert law.predict(model, 5e8) == Prediction(float(law.loss(1_294_159_104, 5e8)), None)
    assert law.predict(model, 4.9e8) == NoPrediction("its data begin at 5B tokens (here 490M)")
    assert law.predict(model, 5e12) == Prediction(float(law.loss(1_294_159_104, 5e12)), None)
    assert law.predict(model, 15e12) == NoPrediction("its data end at 500B tokens (here 15T)")
    assert law.predict(small, 1.024e6) == NoPrediction("its data begin at 70M parameters and 5B tokens (here 2.82M and 1.02M)")
    assert law.predict(small, 15e12) == NoPrediction(
        "its data begin at 70M parameters (here 2.82M), and end at 500B tokens (here 15T)"
    )
    assert str(law.predict(small, 1e10)) == "no prediction: its data begin at 70M parameters (here 2.82M)"


def test_a_law_of_one_optimizer_is_not_taken_for_the_other(tmp_path):
    law, of_muon = load_law("hoffmann"), load_law(write_law(tmp_path / "muon.yaml", optimizer="muon"))
    assert (law.optimizer, law.parametrization, of_muon.optimizer) == ("adamw", "standard", "muon")
    assert law.predict(1e9, 2e10, "adamw") == law.predict(1e9, 2e10)
    assert of_muon.predict(1e9, 2e10, "muon") == of_muon.predict(1e9, 2e10)
    assert law.predict(1e9, 2e10, "muon").reason == "its runs were trained with adamw, and this one's optimizer.name is muon"
    assert of_muon.predict(1e9, 2e10, "adamw").reason == "its runs were trained with muon, and this one's optimizer.name is adamw"
    model = load_recipe(ROOT / "recipes/gpt2_124m.yaml").model
    assert of_muon.describe(model, 2e9, "adamw") == f"{of_muon.name}: {of_muon.predict(model, 2e9, 'adamw')}"
    of_muon.save(tmp_path / "again.json")
    saved = json.loads((tmp_path / "again.json").read_text())
    assert (saved["optimizer"], saved["parametrization"]) == ("muon", "standard")


def test_a_loss_above_that_of_guessing_is_no_prediction(tmp_path):
    """Also of a law that does not say what it was fitted to."""
    law, model = load_law(write_law(tmp_path / "law.yaml")), load_recipe(ROOT / LLAMA[1]).model
    loss = 1.5 + 400 / 2_816_064**0.3 + 1000 / 1e6**0.35
    assert loss > math.log(4096)
    reason = f"it gives {loss:.2f} nats, more than guessing: ln(vocabulary) = 8.32"
    assert law.predict(model, 1e6) == NoPrediction(reason)
    assert prediction_json(law.predict(model, 1e6)) == {
        "predicted_loss": None, "predicted_loss_interval": None, "outside": reason,
    }  # fmt: skip
    assert prediction_json(law.predict(model, 1e9))["outside"] is None


@given(log_n=st.floats(3, 14), log_d=st.floats(3, 16), name=st.sampled_from(PUBLISHED))
def test_no_law_predicts_more_than_guessing_or_far_beyond_its_runs(log_n, log_d, name):
    law, n, d = load_law(name), 10**log_n, 10**log_d
    ranges = zip((n, d), (law.fitted_on.parameters, law.fitted_on.tokens), strict=True)
    near = all(low / 10 <= value <= high * 10 for value, (low, high) in ranges)
    assert (law.outside(n, d, 32000) is None) == (near and float(law.loss(n, d)) <= math.log(32000))


def test_a_law_knows_the_depths_of_its_runs(tmp_path):
    ranges = {"parameters": [1e5, 1e7], "tokens": [1e6, 1e8], "layers": [3, 3]}
    law = load_law(write_law(tmp_path / "law.yaml", fitted_on=ranges))
    assert law.extrapolates(1e6, 1e7, 3) == []
    assert law.extrapolates(1e6, 1e7, 5) == ["5 layers (fitted on 3 to 3)"]
    found = search(load_family("quickstart"), 1e17, law)
    assert {candidate.model.num_hidden_layers for candidate in found} == {3}
    assert sorted(c.model.hidden_size for c in found) == list(range(32, 1025, 32))  # whatever the aspect ratio
    assert {c.model.hidden_size for c in found if c.on_grid_edge} == {32, 1024}
    several = load_law(write_law(tmp_path / "several.yaml", fitted_on=ranges | {"layers": [2, 3]}))
    assert {candidate.model.num_hidden_layers for candidate in search(load_family("quickstart"), 1e15, several)} == {2, 3}
    with pytest.raises(UserError, match=r"was fitted to models of 2 to 3 layers, and family llama3 has none of these depths"):
        search(load_family("llama3"), 1e21, several)
    with pytest.raises(UserError, match=r"layers: \[4, 3\] is not lowest first"):
        load_law(write_law(tmp_path / "law2.yaml", fitted_on=ranges | {"layers": [4, 3]}))


def test_extrapolation_names_value_and_fitted_range():
    assert load_law("hoffmann").extrapolates(1e9, 2e10) == []
    assert load_law("hoffmann").extrapolates(1e6, 2e10) == ["1e+06 parameters (fitted on 7e+07 to 1.6e+10)"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "linear"}, r"form: must be 'chinchilla' or 'kaplan'"),
        ({"coefficients": {"E": 1.0}}, r"coefficients of form chinchilla are E, A, alpha, B, beta; given: E"),
        ({"coefficients": CHINCHILLA | {"A": -4.0}}, r"coefficients.A: must be above 0"),
        ({"coefficients": CHINCHILLA | {"E": float("inf")}}, r"coefficients.E: must be a finite number"),
        ({"coefficients": CHINCHILLA | {"alpha": 1e-300}}, r"alpha = 1e-300 is not an exponent from 0.001 to 10"),
        ({"draws": [[1.0, 2.0]]}, r"every draw has 5 numbers"),
        ({"draws": [[1.0, 2.0, -0.3, 1.0, 0.3]]}, r"draws.0.2: must be above 0"),
        ({"fitted_on": {"parameters": [1e10, 1e7], "tokens": [1, 2]}}, r"parameters: \[1e\+10, 1e\+07\] is not lowest first"),
        ({"form": None}, r"not a law: a YAML mapping of form, coefficients, counts, source"),
        ({"colour": "red"}, r"colour: Extra inputs are not permitted"),
        ({"source": None}, r"source: must be given"),
    ],
)
def test_a_broken_law_file_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_law(write_law(tmp_path / "law.yaml", **changes))


def test_a_law_that_gives_a_key_twice_is_refused(tmp_path):
    file = write_law(tmp_path / "law.yaml")
    lines = Path(file).read_text().splitlines()
    Path(file).write_text("\n".join([*lines, "form: kaplan"]))
    number = next(number for number, line in enumerate(lines, 1) if line.startswith("form"))
    with pytest.raises(UserError, match=rf"\(the key form is given in lines {number} and {len(lines) + 1};"):
        load_law(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hofmann", "law hofmann: neither a published law nor a file that can be read; did you mean hoffmann?"),
        ("README.md", "law README.md: not YAML; a law is a mapping of form, coefficients, counts, source"),
        ("src", "src cannot be read: Is a directory; give a law that `isoflop fit` wrote"),
        ("x" * 5000, "cannot be read: File name too long; give a law that `isoflop fit` wrote"),
        ("recipes/quickstart.yaml", "not a law: a YAML mapping of form"),
    ],
)
def test_a_law_that_is_none_is_refused(name, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        load_law(name)


def test_repeated_data_by_muennighoff():
    assert effective_tokens(5e9, 6e9) == 5e9
    assert effective_tokens(13.1072e9, 6e9) == pytest.approx(6e9 * (1 + 15.39 * (1 - math.exp(-(13.1072 / 6 - 1) / 15.39))))
    assert effective_tokens(4 * 6e9, 6e9) == pytest.approx(24e9, rel=0.08)  # four epochs are nearly free
    assert effective_tokens(1e6 * 6e9, 6e9) == pytest.approx((1 + 15.39) * 6e9)  # and no number of them is worth more than this


@given(st.floats(1, 500), st.floats(1, 500))
def test_repeated_tokens_are_worth_less_and_never_nothing(epochs, more):
    first, second = effective_tokens(epochs * 1e9, 1e9), effective_tokens((epochs + more) * 1e9, 1e9)
    assert 1e9 <= first <= epochs * 1e9 * (1 + 1e-12)
    assert first <= second


def test_the_critical_batch_is_kaplans():
    assert critical_batch_tokens(2.0) == pytest.approx(2e8 / 2 ** (1 / 0.21))
    assert critical_batch_tokens(2.3) == pytest.approx(3.79e6, rel=1e-3)


def test_kaplans_optimum_at_one_pf_day():
    assert kaplan_optimum(PF_DAY) == pytest.approx((1.3e9, 2.0e6, 5.4e3, 2e10, 3.1e8**0.050))
    assert kaplan_optimum(10 * PF_DAY).parameters == pytest.approx(1.3e9 * 10**0.73)
