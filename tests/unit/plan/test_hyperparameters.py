"""`plan hyperparameters`, what `plan --write` takes from it, and what `plan RECIPE` says of a recipe's own values."""

import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from isoflop.cli.plan import main
from isoflop.config.loading import load_recipe
from isoflop.plan.hyperparameter_comparison import compare_hyperparameters
from isoflop.plan.hyperparameters import choose, law_for
from isoflop.plan.planner import plan as make_plan
from isoflop.plan.shape import parameters_without_vocabulary
from isoflop.scaling.hyperparameter_laws import HYPERPARAMETER_LAWS, NANOCHAT, STEP_LAW
from isoflop.scaling.laws import load_law
from isoflop.utils.errors import UserError

SIZE = ("hyperparameters", "--parameters-without-vocabulary", "1e9", "--tokens", "2e10")


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def ask(capsys):
    def answer(*arguments):
        assert main([*map(str, arguments), "--json"], "plan") == 0
        return json.loads(capsys.readouterr().out)

    return answer


@pytest.mark.new_process
def test_the_command_prints_values_with_intervals_and_their_law():
    command = [sys.executable, "-m", "isoflop", "plan", *SIZE]
    found = json.loads(subprocess.run([*command, "--json"], cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert found["law"] == "step_law"
    assert found["peak_learning_rate"]["value"] == pytest.approx(1.79 * 1e9**-0.713 * 2e10**0.307)
    assert found["tokens_per_step"]["value"] == pytest.approx(0.58 * 2e10**0.571)
    for key in ("peak_learning_rate", "tokens_per_step"):
        assert found[key]["low"] < found[key]["value"] < found[key]["high"]
    assert found["weight_decay"] == {"value": 0.1, "low": None, "high": None}
    assert found["schedule"] == {"name": "cosine", "warmup_steps": 2000, "final_learning_rate": 1e-5, "decay_fraction": 0.2}
    assert found["warnings"] == []
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "peak_learning_rate 0.000996: 1.79 N^-0.713 D^0.307 = 0.000996 (90%: 0.0009415 to 0.001054)" in text
    assert "tokens_per_step 441,892: 0.58 D^0.571 = 441,892 (90%: 425,044 to 459,407); critical batch 2e8 / loss^" in text


def test_the_batch_is_what_divides_and_the_learning_rate_follows(ask):
    plain = ask(*SIZE)
    found = ask(*SIZE, "--sequence-length", 2048, "--micro-batch-size", 8, "--gpus", 8)
    batch = found["tokens_per_step"]["value"]
    assert batch == round(plain["tokens_per_step"]["value"] / 131_072) * 131_072
    assert found["tokens_per_step"]["low"] == plain["tokens_per_step"]["low"]  # the law's interval
    follows = (batch / plain["tokens_per_step"]["value"]) ** (0.0119 / (2 * 0.0153))
    for key, value in found["peak_learning_rate"].items():
        assert value == pytest.approx(plain["peak_learning_rate"][key] * follows)


@given(st.sampled_from(list(HYPERPARAMETER_LAWS.values())), st.floats(1e6, 1e11), st.floats(1e7, 1e13), st.integers(1, 100_000))
def test_every_choice_is_a_run(law, n, d, unit):
    found = choose(law, n, d, batch_unit=unit)
    assert found.tokens_per_step.value % unit == 0
    assert found.steps >= 1
    assert 0 <= found.schedule.warmup_steps <= found.steps / 10
    assert found.schedule.final_learning_rate >= 0
    assert found.peak_learning_rate.value > 0
    if law.decay_timescale:
        timescale = found.tokens_per_step.value / (found.peak_learning_rate.value * found.weight_decay.value * d)
        assert timescale == pytest.approx(law.decay_timescale)


def test_muon_takes_nanochats_rules_and_a_power_of_two(ask):
    found = ask("hyperparameters", "--parameters-without-vocabulary", 1e8, "--tokens", 2e9, "--optimizer", "muon")
    assert found["law"] == "nanochat"
    assert math.log2(found["tokens_per_step"]["value"]).is_integer()
    assert found["peak_learning_rate"]["low"] is None
    assert found["schedule"]["name"] == "wsd"
    small = ask("hyperparameters", "--parameters-without-vocabulary", 2_029_632, "--tokens", 1_024_000, "--optimizer", "muon")
    assert (small["law"], small["warnings"]) == ("quickstart_muon", [])
    assert small["peak_learning_rate"]["value"] == pytest.approx(3e-3)


def test_outside_its_range_a_law_warns_and_gives_fewer_digits(ask, capsys):
    found = ask("hyperparameters", "--parameters-without-vocabulary", 7e9, "--tokens", 1e12)
    assert found["warnings"] == [
        "law step_law is extrapolated: N = 7e+09 parameters without vocabulary (fitted on 2.15e+08 to 1.07e+09); D = 1e+12 tokens"
        " (fitted on 4e+09 to 1e+11)"
    ]
    main(["hyperparameters", "--parameters-without-vocabulary", "7e9", "--tokens", "1e12"])
    assert "peak_learning_rate 0.00083: " in capsys.readouterr().out


def test_a_batch_that_many_gpus_enlarge_is_warned_of(ask):
    warnings = ask(*SIZE, "--sequence-length", 8192, "--micro-batch-size", 8, "--gpus", 64)["warnings"]
    assert any("is above the critical batch of" in warning for warning in warnings)
    assert any("a multiple of 4,194,304, is far from the 441,892 of law step_law" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (*SIZE, "--law", "step-law"),
            "law step-law: neither a law of learning rate and batch nor a law file; did you mean step_law",
        ),
        (
            (*SIZE, "--law", "nanochat"),
            "law nanochat is of optimizer muon, and adamw was asked for; give --optimizer muon, or a law",
        ),
        ((*SIZE, "--law", "deepseek", "--optimizer", "muon"), "such as nanochat"),
        ((*SIZE, "--gpus", "2"), "--gpus rounds the batch to what divides, which needs --sequence-length"),
        ((*SIZE[:-1], "0"), "--tokens 0 is not a positive number"),
        ((*SIZE[:-1], "1e4"), "10,000 tokens are less than one step of 16,384"),
        ((*SIZE, "--optimizer", "sgd"), "invalid choice: 'sgd'"),
    ],
)
def test_bad_input_names_the_remedy(arguments, message):
    arguments = (*arguments, "--sequence-length", "16384") if arguments[-1] == "1e4" else arguments
    with pytest.raises(UserError, match=message):
        main(list(arguments))


def test_a_written_recipe_takes_the_laws_values_and_names_them(ask, tmp_path):
    path = tmp_path / "mine.yaml"
    found = ask("budget", "--flops", 1e19, "--family", "gpt2", "--write", path)["recipe"]["hyperparameters"]
    recipe, text = load_recipe(path), path.read_text()
    assert recipe.optimizer.name == "adamw"
    assert recipe.optimizer.peak_learning_rate == float(f"{found['peak_learning_rate']['value']:.2g}")  # beyond 4B to 100B tokens
    assert recipe.training.tokens_per_step == found["tokens_per_step"]["value"]
    assert recipe.schedule.final_learning_rate == 1e-5
    assert recipe.schedule.warmup_steps == min(2000, recipe.training.max_steps // 10)
    assert "# Law step_law: Step Law (arXiv:2503.04715)" in text
    assert f"# peak_learning_rate {recipe.optimizer.peak_learning_rate:g}: 1.79 N^-0.713 D^0.307 = " in text
    assert "(90%: " in text
    own = make_plan(path).hyperparameters
    assert own.nats < 1e-3


def test_a_muon_recipe_is_written_and_its_rate_is_that_of_the_law(ask, tmp_path):
    path = tmp_path / "muon.yaml"
    found = ask("budget", "--flops", 1e19, "--family", "gpt2", "--optimizer", "muon", "--write", path)
    recipe = load_recipe(path)
    assert (recipe.optimizer.name, recipe.schedule.name) == ("muon", "wsd")
    assert recipe.optimizer.peak_learning_rate == pytest.approx(
        found["recipe"]["hyperparameters"]["peak_learning_rate"]["value"], rel=1e-3
    )
    assert make_plan(path).hyperparameters.law.law.name == "nanochat"


@pytest.mark.parametrize("command", [("shape", "--parameters", "182.4e6", "--aspect", "32"), ("models", "gpt2-small")])
def test_other_questions_write_by_a_law_too(ask, command, tmp_path):
    ask(*command, "--hyperparameter-law", "deepseek", "--write", tmp_path / "mine.yaml")
    assert "# Law deepseek: DeepSeek LLM" in (tmp_path / "mine.yaml").read_text()


def test_a_law_file_with_hyperparameters_is_used_by_plan(ask, tmp_path):
    law, path = tmp_path / "law.json", tmp_path / "mine.yaml"
    fitted = STEP_LAW.model_copy(update={"name": "", "source": "my runs", "schedule": None})
    load_law("hoffmann").model_copy(update={"hyperparameters": fitted}).save(law)
    found = ask("budget", "--flops", 1e19, "--family", "gpt2", "--law", law, "--write", path)
    assert found["recipe"]["hyperparameters"]["law"] == str(law)
    assert ask(*SIZE, "--law", law)["source"] == "my runs"
    assert make_plan(path, law=law).hyperparameters.law.law.source == "my runs"


def test_far_from_the_laws_runs_the_familys_values_are_kept_and_said_so(ask, tmp_path):
    path = tmp_path / "small.yaml"
    arguments = ("budget", "--flops", 4e11, "--family", "laptop", "--law", "recipes/laptop_law.json", "--write")
    found = ask(*arguments, path)
    assert found["recipe"]["hyperparameters"] is None
    assert load_recipe(path).optimizer == load_recipe("laptop").optimizer
    assert "# learning rate and batch: those of laptop, law step_law is far from its runs: N = " in path.read_text()
    named = ask(*arguments, tmp_path / "named.yaml", "--hyperparameter-law", "step_law")
    assert named["recipe"]["hyperparameters"]["law"] == "step_law"


def test_a_recipes_own_values_are_compared():
    recipe = load_recipe("gpt2_1.36b")
    found = make_plan(recipe).hyperparameters
    rate, batch = found.law.peak_learning_rate.value, found.law.tokens_per_step.value
    r, b = math.log(3e-4 / rate), math.log(524_288 / batch)
    assert found.nats == pytest.approx(0.0153 * r * r + 0.0144 * b * b - 0.0119 * r * b)
    assert found.nats_interval == pytest.approx((0.5 * found.nats, 3 * found.nats))
    law, n, d = load_law("hoffmann"), 1_405_452_800, make_plan(recipe).stats.tokens
    longer = math.exp(-math.log(1 - found.compute_share) / 2)  # of N and of D
    assert float(law.loss(n, d) - law.loss(n * longer, d * longer)) == pytest.approx(found.nats, rel=0.05)
    assert found.summary().startswith("learning rate 0.0003, batch 524K, decay 0.1; by step_law, extrapolated: 0.0007")
    assert "  extrapolated: N = 1.28e+09 parameters without vocabulary (fitted on 2.15e+08 to 1.07e+09)" in found.lines()


def test_what_is_not_compared_says_why():
    quickstart = make_plan("quickstart", ["optimizer.name=adamw"]).hyperparameters
    assert quickstart.law is None
    assert quickstart.outside.startswith("law step_law is far from its runs: N = 2.03e+06 parameters")
    muon = make_plan("gpt2_124m", ["optimizer.name=muon"]).hyperparameters
    assert (muon.law.law, muon.nats) == (NANOCHAT, None)
    assert muon.summary().endswith("no estimate of the cost")
    far = make_plan("gpt2_1.36b", ["optimizer.peak_learning_rate=1e-5"]).hyperparameters
    assert (far.nats, far.nats_above, far.compute_share) == (None, 0.1, None)


def test_under_completep_the_law_is_read_at_the_size_of_the_base():
    completep = ["parametrization.name=completep", "parametrization.base_hidden_size=640", "parametrization.base_num_layers=10"]
    scaled = make_plan("gpt2_124m", ["training.max_steps=20000", *completep]).hyperparameters
    n = parameters_without_vocabulary(load_recipe("gpt2_124m").model) * (640 / 768) ** 2 * 10 / 12
    assert scaled.law.parameters_without_vocabulary == pytest.approx(n)
    assert scaled.law.peak_learning_rate.value == pytest.approx(choose(STEP_LAW, n, 20000 * 524288).peak_learning_rate.value)


def test_the_comparison_takes_the_law_of_the_recipes_optimizer():
    fitted = load_law("hoffmann").model_copy(update={"hyperparameters": NANOCHAT.model_copy(update={"name": "mine"})})
    recipe = load_recipe("gpt2_124m")
    assert compare_hyperparameters(recipe, 10**10, fitted).law.law is STEP_LAW
    muon = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"name": "muon"})})
    assert compare_hyperparameters(muon, 10**10, fitted).law.law.name == "mine"
    assert law_for("muon", 1e8, 2e9) is NANOCHAT


def test_the_manual_lists_every_law_with_its_formulas():
    manual = (ROOT / "docs/manual.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in manual.splitlines() if line.startswith("| `") and line.count("|") == 7}
    assert set(rows) == set(HYPERPARAMETER_LAWS)
    for name, law in HYPERPARAMETER_LAWS.items():
        assert f"| {law.optimizer} |" in rows[name]
        if name != "deepseek":  # whose formulas are of 6ND there
            assert law.peak_learning_rate.formula().replace("^-0.1667", "^-1/6") in rows[name]
            assert law.tokens_per_step.formula() in rows[name]
        if law.decay_timescale:
            assert f"{law.decay_timescale:.3g} D)" in rows[name]


def test_a_fixed_final_learning_rate_is_never_above_the_peak():
    far = choose(STEP_LAW, 1e12, 2e10)
    assert far.peak_learning_rate.value < 1e-5
    assert far.schedule.final_learning_rate == far.peak_learning_rate.value
