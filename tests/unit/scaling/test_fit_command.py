"""The command as a user types it: report, numbers, files, exit codes; a law that is none is not written."""

import html
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from conftest import ROOT, run_command
from test_fit_runs import WIDTHS, write_run

from isoflop.cli.plan import main as plan
from isoflop.scaling.approaches import fit_laws
from isoflop.scaling.fit import fit as fit_runs
from isoflop.scaling.fit import fit_command
from isoflop.scaling.laws import LossDecayModel, load_law
from isoflop.scaling.options import FitOptions
from isoflop.scaling.report import FitReport, HeldOutBudget
from isoflop.scaling.result import valid_draws
from isoflop.scaling.table import read_table
from isoflop.scaling.text import METHODS, short
from isoflop.scaling.verdict import verdict_of
from isoflop.utils.errors import UserError

COURSE = ROOT.parent / "shared/data/isoflops_curves.json"
course = pytest.mark.skipif(not COURSE.is_file(), reason="no reference data beside the checkout")
TRUTH = {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 2000.0, "beta": 0.36}


def write_table(file, noise=0.002, proportional=False):
    """Five budgets of six sizes by TRUTH; or D = 20 N, which does not determine N and D separately."""
    generator = np.random.default_rng(0)
    rows = []
    for flops in (1e18, 3e18, 1e19, 3e19, 1e20):
        for n in math.sqrt(flops / 120) * np.geomspace(0.25, 4, 6):
            d = 20 * n if proportional else flops / 6 / n
            loss = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
            rows.append({"parameters": n, "tokens": d, "loss": loss * math.exp(noise * generator.standard_normal())})
    file.write_text(json.dumps(rows))
    return str(file)


@pytest.fixture
def fit(tmp_path):
    """Fit a table with few resamples; returns the exit code."""
    return lambda table, **more: fit_command(
        FitOptions((table,), **{"resamples": 60, "out": str(tmp_path / "out/law.json"), **more})
    )


def test_files_beside_the_law_hold_what_is_printed(fit, tmp_path, capsys):
    assert fit(write_table(tmp_path / "t.json"), predict=(1e21, 1e22)) == 0
    out, folder = capsys.readouterr().out, tmp_path / "out"
    assert sorted(file.name for file in folder.iterdir()) == ["law.json", "law.md", "law.png", "law_report.json"]
    assert (folder / "law.png").read_bytes().startswith(b"\x89PNG")
    numbers, page = json.loads((folder / "law_report.json").read_text()), (folder / "law.md").read_text()
    assert numbers["predict"] == [1e21, 1e22]
    for label in METHODS.values():
        assert f"  {label} " in out
        assert f"| {label} |" in page
    for name in TRUTH:
        assert f"  {name} " in out
        assert f"{numbers['parametric'][name]:.6g}" in out
    assert "* note: FLOPs are 6 N D: t.json has no column of them" in out
    assert f"law: {folder}/law.json; use it by: isoflop plan budget --flops 1e+21 --law" in out
    assert page.count("\n| 1e+18 |") == 3  # a row of the budgets, of the parabolas and of the lines
    points = page.split("log(measured / fitted) |")[1].split("Parabolas")[0]
    assert points.count("\n| ") == 1 + 30


def test_the_law_file_is_a_law(fit, tmp_path):
    fit(write_table(tmp_path / "t.json"))
    law, numbers = (json.loads((tmp_path / f"out/{name}.json").read_text()) for name in ("law", "law_report"))
    read = load_law(str(tmp_path / "out/law.json"))
    assert read.coefficients == {name: numbers["parametric"][name] for name in TRUTH}
    assert read.coefficients["E"] == pytest.approx(1.7, rel=0.05)
    assert (read.form, read.counts, read.progress) == ("chinchilla", "total", None)
    assert read.source == "fitted by scripts/fit.py to 30 points of t.json"
    assert list(read.fitted_on.parameters) == numbers["points"]["parameters"]
    assert len(read.draws) == numbers["parametric"]["resamples"]
    assert len(read.residuals) == 30
    assert np.std(read.residuals) == pytest.approx(numbers["parametric"]["residual_std"], rel=1e-6)
    assert law["draws"][0] == [float(f"{value:.8g}") for value in law["draws"][0]]


def test_a_law_of_runs_carries_their_progress_and_at_most_a_thousand_draws(tmp_path):
    progress = LossDecayModel(
        schedule="cosine", center=(9.0, 15.0), covariance=np.eye(3).tolist(), gaps=[(0.5, -2.0, 0.1, 0.2, 0.01)]
    )
    measured = read_table(write_table(tmp_path / "t.json"))
    measured = replace(measured, progress=progress, origin="3 runs", counts="without_vocabulary")
    fit = fit_laws(measured, FitOptions(resamples=60))
    bad = np.vstack([fit.draws[0] * [1, 1, -1, 1, 1], fit.draws[0] * [1, 1, 1, 1, 100]])
    fit = replace(fit, draws=np.vstack([bad, *[fit.draws] * 20]))
    law = fit.law
    assert law.progress == progress
    assert (law.source, law.counts, len(law.draws)) == ("fitted by scripts/fit.py to 3 runs", "without_vocabulary", 1000)
    assert len(valid_draws(fit.draws)) == len(fit.draws) - 2


def test_a_fit_that_is_no_law_is_reported_and_not_written(fit, tmp_path, capsys):
    assert fit(write_table(tmp_path / "t.json", proportional=True)) == 1
    reported = capsys.readouterr()
    assert "Verdict: do not use this law. The parametric fit is ill conditioned: " in reported.out
    assert f"error: {tmp_path}/out/law.json is not written: the parametric fit is ill conditioned: " in reported.err
    assert "let N and D vary" in reported.err
    assert not (tmp_path / "out/law.json").exists()
    assert (tmp_path / "out/law.png").exists()


def test_figures_can_lie_elsewhere_and_nothing_is_written_unasked(fit, tmp_path):
    table = write_table(tmp_path / "t.json")
    assert fit(table, out=None) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["t.json"]
    assert fit(table, out=str(tmp_path / "mine.json"), figures=str(tmp_path / "figures")) == 0
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == ["mine.md", "mine.png", "mine_report.json"]
    assert (tmp_path / "mine.json").exists()


def test_json_is_the_numbers_alone(fit, tmp_path, capsys):
    fit(write_table(tmp_path / "t.json"), as_json=True)
    numbers = json.loads(capsys.readouterr().out)
    assert numbers == json.loads((tmp_path / "out/law_report.json").read_text())
    assert numbers["predict"] == [10 * numbers["points"]["flops"][1]]
    assert FitReport.model_validate(numbers).to_dict() == numbers


def test_warnings_of_the_table_come_before_those_of_the_fit(fit, tmp_path, capsys):
    table = tmp_path / "t.json"
    write_table(table)
    rows = json.loads(table.read_text())
    table.write_text(json.dumps([*rows, rows[3]]))
    fit(str(table), as_json=True, out=None)
    assert json.loads(capsys.readouterr().out)["warnings"][0] == (
        "t.json: row 31 repeats an earlier row's N, D and loss; each is counted once"
    )


def test_folders_of_runs_are_fitted(tmp_path, capsys):
    for width in WIDTHS:
        for steps in (60, 100, 200, 400):
            write_run(tmp_path / "sweep" / f"w{width}_s{steps}", width, steps)
    assert fit_command(FitOptions((str(tmp_path / "sweep"),), out=str(tmp_path / "law.json"), resamples=60)) == 0
    law = load_law(str(tmp_path / "law.json"))
    assert law.coefficients == pytest.approx({"E": 1.0, "A": 40.0, "alpha": 0.34, "B": 60.0, "beta": 0.28}, rel=1e-3)
    assert law.source.startswith("fitted by scripts/fit.py to 12 runs; tokenizer: a byte-level BPE of 300 entries")
    assert law.progress.schedule == "cosine"
    assert "  envelope of the loss curves " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resamples": 5}, "--resamples 5: give at least 20"),
        ({"seed": -1}, "--seed -1: give 0 or more"),
        ({"asymmetry": 1.0}, "--asymmetry 1: give within 0 to 1; 0.5 weighs both sides alike"),
        ({"delta": 0.0}, "--delta 0: give above 0"),
        ({"predict": (1e21, -1.0)}, "--predict -1: give a budget in FLOPs"),
        ({"runs": ("a.csv", "b.csv")}, "a.csv, b.csv: several tables; put their rows into one"),
        ({"runs": (str(ROOT),), "loss": "x"}, "--batch, --sequence-length and --where are about a table"),
    ],
)
def test_invalid_options_are_refused(changes, message):
    with pytest.raises(UserError) as error:
        fit_command(FitOptions(**{"runs": ("t.json",), **changes}))
    assert message in str(error.value)


def test_a_folder_that_cannot_be_written_is_named(fit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: .*; give --out and --figures where files can be written"):
        fit(write_table(tmp_path / "t.json"), out=str(tmp_path / "file/law.json"))


@pytest.mark.parametrize(("value", "text"), [(91.892e9, "91.9B"), (43104, "43.1K"), (999.6e6, "1B"), (2.5e12, "2.5T"), (7, "7")])
def test_counts_have_three_digits(value, text):
    assert short(value) == text


def test_the_verdict_rests_on_what_was_measured(tmp_path):
    measured = read_table(write_table(tmp_path / "t.json"))
    report = fit_laws(measured, FitOptions(resamples=60, predict=(1e21,))).report
    assert verdict_of(report).startswith("Verdict: this law can be trusted as far as these budgets: all grounds for trust hold.")
    assert "* holds: 1e+21 FLOPs are 10 times the largest budget it was fitted to" in verdict_of(report)
    isoflop = report.isoflop.model_copy(update={"n_opt": [2 * report.parametric.n_opt[0]]})
    report = report.model_copy(update={"predict": [1.2e21], "isoflop": isoflop})
    reported = verdict_of(report)
    assert reported.startswith("Verdict: take this law with caution: of 3 grounds for trust 2 fail.")
    assert "* fails: at 1.2e+21 FLOPs the N of parametric, isoflop differ by a factor of 2" in reported
    assert "* fails: 1.2e+21 FLOPs are 12 times" in reported
    none = HeldOutBudget(status="not fitted", reason="one budget")
    report = report.model_copy(update={"leave_largest_out": none})
    assert "* fails: not tested on a held-out larger budget: one budget" in verdict_of(report)


def test_a_notebook_fits_a_frame_or_a_file_and_prints_nothing(tmp_path, capsys):
    table = write_table(tmp_path / "t.json")
    from_file = fit_runs(table, predict=[1e21], resamples=60)
    from_frame = fit_runs(pandas.DataFrame(json.loads(Path(table).read_text())), predict=[1e21], resamples=60)
    assert capsys.readouterr() == ("", "")
    untimed = [
        {key: value for key, value in one.to_dict()["parametric"].items() if "seconds" not in key}
        for one in (from_file, from_frame)
    ]
    assert untimed[0] == untimed[1]
    assert from_frame.law.source.endswith("to 30 points of the DataFrame")
    frame = from_file.to_frame()
    assert frame["loss"].tolist() == from_file.measured.points.loss.tolist()
    assert np.log(frame["loss"] / frame["predicted_loss"]).to_numpy() == pytest.approx(frame["residual"].to_numpy())
    assert from_file._repr_html_().count("data:image/png;base64,") == 1
    assert from_file.page() in html.unescape(from_file._repr_html_())
    predicted = from_file.law.predict(1e9, 2e10)
    assert predicted.interval[0] < predicted.loss < predicted.interval[1]
    assert predicted.loss == float(from_file.law.loss(1e9, 2e10))


def test_a_saved_law_is_read_again_even_under_the_same_name(tmp_path):
    for noise in (0.002, 0.004):
        found = fit_runs(write_table(tmp_path / "t.json", noise), resamples=60)
        found.save(tmp_path / "law.json")
        assert load_law(tmp_path / "law.json").coefficients == found.law.coefficients
    assert sorted(file.name for file in tmp_path.glob("law*")) == ["law.json", "law.md", "law.png", "law_report.json"]
    with pytest.raises(UserError, match="no law: the parametric fit is ill conditioned"):
        fit_runs(write_table(tmp_path / "p.json", proportional=True), resamples=60).save(tmp_path / "other.json")
    assert not list(tmp_path.glob("other*"))


@course
def test_the_course_data_by_the_script_and_a_plan_by_its_law(tmp_path, capsys, monkeypatch):
    law = tmp_path / "law.json"
    command = [sys.executable, "scripts/fit.py", COURSE, "--out", law, "--predict", 1e23, 1e24, "--resamples", 100, "--json"]
    numbers = json.loads(run_command(*command).stdout)
    assert numbers["argmin_linear"]["n_opt"] == pytest.approx([5.0022e10, 1.2676e11], rel=1e-4)
    assert numbers["argmin_linear"]["d_opt"] == pytest.approx([3.3319e11, 1.3148e12], rel=1e-4)
    assert numbers["parametric"]["n_opt"] == pytest.approx([9.1892e10, 3.00307e11], rel=1e-4)
    found = load_law(str(law)).coefficients
    assert found == pytest.approx({"E": 2.69, "A": 1606.4, "alpha": 0.34, "B": 3210.7, "beta": 0.36}, rel=1e-5)
    monkeypatch.chdir(ROOT)
    assert plan(["--flops", "1e21", "--family", "llama3", "--law", str(law), "--json"], "isoflop plan") == 0
    best = json.loads(capsys.readouterr().out)
    assert best["law"] == str(law)
