"""`isoflop fit` of runs over learning rates and batches: from tables and run folders, into a law file that a plan reads."""

import csv
import json

import numpy as np
import pytest
from conftest import summary_with
from test_fit_runs import write_run
from test_hyperparameter_fit import AROUND, STEP_LAW, grids_of, known, published, runs, step_law

from isoflop.cli.fit import main as fit_cli
from isoflop.cli.plan import main as plan_cli
from isoflop.config.loading import load_recipe
from isoflop.plan.shape import parameters_without_vocabulary
from isoflop.scaling.fit import fit, fit_command
from isoflop.scaling.hyperparameter_laws import load_hyperparameter_law
from isoflop.scaling.laws import load_hyperparameters, load_law
from isoflop.scaling.options import FitOptions
from isoflop.scaling.report import HyperparameterReport
from isoflop.scaling.runs import measured_runs
from isoflop.utils.errors import UserError

TOKENS = ("parameters_without_vocabulary", "tokens", "learning_rate", "tokens_per_step", "loss")


def write_table(file, points=None, names=TOKENS, **columns):
    """Write runs as a CSV under these column names, with constant columns."""
    rows = zip(*(runs(noise=0.001) if points is None else points), strict=True)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*names, *columns])
        writer.writerows([*map(float, row), *columns.values()] for row in rows)
    return str(file)


def tuned(table, **more):
    return fit_command(FitOptions((table,), **{"resamples": 20, "hyperparameters": True, **more}))


def test_the_laws_of_a_table_alone(tmp_path, capsys):
    out = tmp_path / "out/law.json"
    assert tuned(write_table(tmp_path / "t.csv"), out=str(out)) == 0
    page = capsys.readouterr().out
    assert page.startswith("Learning rate and batch of adamw from 9 grids of runs; N without embeddings and head\n")
    assert "N 10M, D 100M" in page
    assert "held out, by laws fitted without the grid" in page
    assert page.endswith(f"law: {out}\n")
    tree = json.loads(out.read_text())
    assert list(tree) == ["hyperparameters"]
    law = load_hyperparameters(out)
    assert law.peak_learning_rate.parameters_exponent == pytest.approx(-0.4, abs=0.02)
    assert law.source == "fitted by `isoflop fit` to 225 points of t.csv"
    with pytest.raises(UserError, match="of learning rate and batch, and none of the loss; fit one without --hyperparameters"):
        load_law(out)
    assert tuned(write_table(tmp_path / "t.csv"), out=str(out)) == 0  # its own file is replaced


def test_both_laws_of_a_table(tmp_path, capsys):
    """The loss law is fitted to the best run at each N and D; the law file holds both, the page and the numbers too."""
    out = tmp_path / "law.json"
    assert fit_command(FitOptions((write_table(tmp_path / "t.csv", runs()),), out=str(out), resamples=20)) == 0
    page = capsys.readouterr().out
    assert "9 points: N 10M to 90M" in page
    assert "* note: the loss law is of the best of 225 runs at each N and D" in page
    assert "Learning rate and batch of adamw from 9 grids" in page
    assert "Learning rate and batch of adamw from 9 grids" in (tmp_path / "law.md").read_text()
    law = load_law(out)
    assert law.coefficients["E"] == pytest.approx(1.5, rel=0.02)
    assert law.counts == "without_vocabulary"
    assert law.hyperparameters == load_hyperparameters(out)
    at = law.hyperparameters.tokens_per_step.at(3e7, 1.2e9)
    assert at.value == pytest.approx(known(3e7, 1.2e9)[1], rel=0.01)
    numbers = json.loads((tmp_path / "law_report.json").read_text())
    assert len(HyperparameterReport.model_validate(numbers["hyperparameters"]).grids) == 9
    law.save(tmp_path / "again.json")
    assert load_hyperparameters(tmp_path / "again.json") == law.hyperparameters


def test_a_table_without_grids_has_a_law_of_the_loss_alone(tmp_path, capsys):
    table = write_table(tmp_path / "t.csv", runs(rates=(1.0,), batches=(1.0,)))
    result = fit(table, resamples=20)
    assert result.hyperparameters is None
    assert result.law.hyperparameters is None
    assert "Learning rate and batch" not in result.page()
    assert len(result.measured.points.loss) == 9
    with pytest.raises(UserError, match="no runs of the same N and D that differ in learning_rate or tokens_per_step"):
        tuned(table)


def test_batches_in_sequences_need_their_length(tmp_path):
    points = runs()
    names = ("non_embedding_parameters", "tokens", "lr", "batch_size", "loss")
    table = write_table(tmp_path / "t.csv", points._replace(tokens_per_step=points.tokens_per_step / 64), names)
    with pytest.raises(UserError, match="column batch_size counts sequences, by its name; give the tokens of one by --sequence-"):
        tuned(table)
    result = fit(table, resamples=20)
    assert result.hyperparameters is None
    assert [text for text in result.report.warnings if text.startswith("no laws of learning rate and batch: t.csv: column batch")]
    found = fit(table, resamples=20, sequence_length=64).hyperparameters
    assert found.tokens_per_step.at(3e7, 1.2e9).value == pytest.approx(known(3e7, 1.2e9)[1])


def test_columns_by_name(tmp_path):
    points = runs()
    table = write_table(tmp_path / "t.csv", points, ("n_without", "tokens", "eta", "step_tokens", "loss"))
    with pytest.raises(UserError, match=r"no column of model sizes"):
        tuned(table)
    with pytest.raises(UserError, match=r"counts all parameters, by its name; .* name it by --parameters"):
        tuned(table, parameters="n_without", learning_rate="eta", batch="step_tokens")
    table = write_table(tmp_path / "t.csv", points, (TOKENS[0], "tokens", "eta", "step_tokens", "loss"))
    with pytest.raises(UserError, match=r"no column of learning rates \(name one by --learning-rate\) and of batches"):
        tuned(table)
    assert tuned(table, learning_rate="eta", batch="step_tokens") == 0
    with pytest.raises(UserError, match=r"--batch stepp: t\.csv has no such column; known here: eta, "):
        tuned(table, learning_rate="eta", batch="stepp")


def test_optimizers_are_not_pooled(tmp_path, capsys):
    rows = [dict(zip(TOKENS, map(float, row), strict=True)) for row in zip(*runs(), strict=True)]
    rows = [row | {"optimizer": name, "loss": row["loss"] - less} for name, less in (("adamw", 0), ("muon", 0.1)) for row in rows]
    file = tmp_path / "t.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"several optimizers \(adamw, muon\) .* by --where optimizer=adamw"):
        tuned(str(file))
    assert tuned(str(file), where=("optimizer=muon",), out=str(tmp_path / "law.json")) == 0
    assert load_hyperparameters(tmp_path / "law.json").optimizer == "muon"
    assert fit(file, where=["optimizer=muon"], resamples=20).law.optimizer == "muon"
    file.write_text(json.dumps([row | {"optimizer": "lion"} for row in rows[:225]]))
    with pytest.raises(UserError, match="optimizer = 'lion' is not one of adamw, muon"):
        tuned(str(file))


def test_runs_with_the_same_loss_are_not_taken_for_repeated_rows(tmp_path):
    points = runs()
    result = fit(write_table(tmp_path / "t.csv", points._replace(loss=np.round(points.loss, 2))), resamples=20)
    assert not [text for text in result.report.warnings if "repeat" in text]
    assert {grid.runs for grid in result.report.hyperparameters.grids} == {25}


def test_numbers_as_json(tmp_path, capsys):
    assert fit_cli([write_table(tmp_path / "t.csv"), "--hyperparameters", "--json", "--resamples", "20"], "isoflop fit") == 0
    report = HyperparameterReport.model_validate_json(capsys.readouterr().out)
    assert len(report.grids) == 9
    assert report.law.peak_learning_rate.covariance is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "--sequence-length 0: give the tokens of a sequence"),
        ({"out": "other.json"}, r"other\.json exists already"),
    ],
)
def test_options_that_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        tuned(write_table(tmp_path / "t.csv"), **options)


def write_tuned_runs(folder, optimizer="adamw", rates=(1.0,)):
    """Run folders of three widths, three lengths, and these multiples of the best rate at each of five batches."""
    recipes = []
    for width in (16, 32, 64):
        for steps in (128, 256, 512):
            for r in rates:
                for b in (1, 2, 4, 8):
                    name = f"w{width}_s{steps}_r{r}_b{b}"
                    tokens = 256 * steps
                    training = {"tokens_per_step": 128 * b, "max_steps": tokens // (128 * b)}
                    rate = float(f"{r * known(1e6 * width, tokens)[0]:.6g}")
                    changes = {"training": training, "optimizer": {"name": optimizer, "peak_learning_rate": rate}}
                    recipe = write_run(folder / name, width, steps, **changes)
                    n = parameters_without_vocabulary(recipe.model)
                    loss = 2 + 40 / n**0.34 + 60 / tokens**0.28 + 0.012 * np.log(r) ** 2 + 0.01 * np.log(b / 2.5) ** 2
                    summary = summary_with(tokens=tokens, flops=6 * n * tokens, val_loss=loss)
                    (folder / name / "summary.json").write_text(json.dumps(summary))
                    recipes.append(recipe)
    return recipes


def test_run_folders(tmp_path, capsys):
    recipes = write_tuned_runs(tmp_path / "sweep", "muon", AROUND)
    measured = measured_runs([str(tmp_path / "sweep")])
    assert (measured.optimizer, measured.parametrization, len(measured.points.loss)) == ("muon", "standard", 9)
    assert len(measured.curves) == 9
    assert measured.notes == ["the loss law is of the best of 180 runs at each N and D"]
    sizes = sorted({float(parameters_without_vocabulary(recipe.model)) for recipe in recipes})
    assert sorted(set(measured.tuned.parameters)) == sizes
    assert [len(grid.loss) for grid in grids_of(measured.tuned)] == [20] * 9
    out = str(tmp_path / "law.json")
    assert fit_cli([str(tmp_path / "sweep"), "--out", out, "--resamples", "20"], "isoflop fit") == 0
    law = load_law(out)
    assert (law.optimizer, law.hyperparameters.optimizer) == ("muon", "muon")
    assert law.hyperparameters.tokens_per_step.at(sizes[1], 65_536).value == pytest.approx(128 * 2.5, rel=0.05)
    rate = law.hyperparameters.peak_learning_rate.at(sizes[1], 65_536).value
    assert rate == pytest.approx(known(32e6, 65_536)[0], rel=0.05)
    assert law.hyperparameters.curvature.rate == pytest.approx(0.012, rel=0.05)
    assert law.hyperparameters.weight_decay == 0.1
    with pytest.raises(UserError, match="--batch, --sequence-length and --where are about a table"):
        fit(str(tmp_path / "sweep"), sequence_length=32)


def test_runs_of_two_optimizers_are_refused(tmp_path):
    write_tuned_runs(tmp_path / "sweep")
    write_tuned_runs(tmp_path / "muon", "muon")
    with pytest.raises(UserError, match=r"optimizer\.name: .*; fit runs of one tokenizer, .* optimizer and parametrization"):
        measured_runs([str(tmp_path / "sweep"), str(tmp_path / "muon")])


@step_law
def test_a_plan_by_nine_published_grids_suits_the_other_four(tmp_path, capsys):
    """Through the files and commands of a user: fit 9 of the 13 grids, plan the other 4 by the law, take the nearest run."""
    grids = grids_of(published())
    held_out = [grids[index] for index in (1, 5, 8, 12)]
    sizes = [(grid.parameters, grid.tokens) for grid in held_out]
    with STEP_LAW.open() as stream:
        rows = list(csv.DictReader(stream))
    kept = [row for row in rows if (float(row[TOKENS[0]]), float(row["tokens"])) not in sizes]
    with (tmp_path / "nine.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(kept)
    law = str(tmp_path / "law.json")
    assert (
        fit_cli([str(tmp_path / "nine.csv"), "--sequence-length", "2048", "--hyperparameters", "--out", law], "isoflop fit") == 0
    )
    assert load_hyperparameter_law(law).name == law
    capsys.readouterr()
    costs = []
    for grid, (n, d) in zip(held_out, sizes, strict=True):
        assert plan_cli(["hyperparameters", f"--parameters-without-vocabulary={n}", f"--tokens={d}", "--law", law, "--json"]) == 0
        chosen = json.loads(capsys.readouterr().out)
        rate, batch = chosen["peak_learning_rate"], chosen["tokens_per_step"]
        assert rate["low"] < rate["value"] < rate["high"]
        costs.append(grid.cost(np.log(rate["value"]), np.log(batch["value"])))
    assert np.mean(costs) <= 0.006
    assert max(costs) <= 0.012


def test_a_plan_of_a_budget_by_a_law_file_writes_its_learning_rate_and_batch(tmp_path, capsys):
    law, recipe = str(tmp_path / "law.json"), str(tmp_path / "planned.yaml")
    assert fit_command(FitOptions((write_table(tmp_path / "t.csv"),), out=law, resamples=50)) == 0
    assert plan_cli(["budget", "--flops", "1e17", "--family", "gpt2", "--law", law, "--write", recipe]) == 0
    written = load_recipe(recipe)
    n, d = parameters_without_vocabulary(written.model), written.training.num_steps(1) * written.training.tokens_per_step
    rate, batch = known(n, d)
    assert written.training.tokens_per_step == pytest.approx(batch, rel=0.1)
    assert written.optimizer.peak_learning_rate == pytest.approx(rate, rel=0.1)
    capsys.readouterr()
    assert plan_cli(["recipe", recipe, "--law", law]) == 0
    assert "the same within 0.001 nats" in capsys.readouterr().out
