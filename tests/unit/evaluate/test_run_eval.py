"""scripts/run_eval.py as a user runs it: the numbers are plain lm-eval's, whatever is named."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_command
from forks import REAL
from transformers import AutoModelForCausalLM

import isoflop
from isoflop.evaluate.run import evaluate, evaluate_command
from isoflop.train.export import export_checkpoint, model_folder
from isoflop.utils.errors import UserError

pytestmark = pytest.mark.processes


@pytest.fixture
def run(uninterrupted, tmp_path):
    """A copy of a finished toy run."""
    return Path(shutil.copytree(uninterrupted["llama"].output.run_dir, tmp_path / "run"))


def evaluated(model, **settings):
    """The results of the quick suite on a few documents, and the folder they were written to."""
    assert evaluate_command(model=str(model), limit=6, **settings) == 0


def numbers(results):
    return {task: {k: v for k, v in values.items() if isinstance(v, float)} for task, values in results["results"].items()}


def test_the_command_and_plain_lm_eval_give_the_same_numbers(run, tmp_path):
    done = run_command("python", "scripts/run_eval.py", run, "--suite", "quick", "--limit", 6, "--batch-size", 4)
    mine = json.loads((run / "evaluations/quick/results.json").read_text())
    plain = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={run}/model", "--tasks", "quick", "--include_path", "eval"]
    run_command(*plain, "--limit", 6, "--batch_size", 4, "--output_path", tmp_path / "plain", "--device", "cpu")
    theirs = json.loads(next((tmp_path / "plain").rglob("results_*.json")).read_text())
    for task, values in numbers(theirs).items():
        for key, value in values.items():
            assert numbers(mine)[task][key] == value, (task, key)
    assert mine["n-samples"] == theirs["n-samples"]
    assert set(theirs) - set(mine) == set()  # whatever lm-eval writes down is there
    assert mine["config"]["model_args"]["pretrained"] == str(run)
    for printed in (
        "stdlib_continuation",
        "acc_per_token",
        "bits_per_byte",
        "chance",
        "stdlib_perplexity: the first 4 KB of 20 modules",
        "results: ",
    ):
        assert printed in done.stdout
    assert mine["chance"] == {"stdlib_continuation": 0.25}
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith("  ")) <= 100
    page = (run / "evaluations/quick/results.md").read_text()
    assert page.count("\n| stdlib_continuation |") == 3
    assert page.count("\n| stdlib_perplexity |") == 3


def test_chance_is_counted_from_the_choices_of_each_document(run, tmp_path):
    """Three choices, two, and two again: (1/3 + 1/2 + 1/2) / 3."""
    choices = [["a", "b", "c"], ["a", "b"], ["the", "of"]]
    rows = [{"ctx": "def", "endings": endings, "label": 0} for endings in choices]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(run, "local_hellaswag", metadata={"file": str(tmp_path / "x.jsonl")}) is not None
    results = json.loads((run / "evaluations/local_hellaswag/results.json").read_text())
    assert results["chance"]["local_hellaswag"] == pytest.approx(4 / 9)
    page = (run / "evaluations/local_hellaswag/results.md").read_text()
    assert page.count("| 0.4444 | 3 |") == 3  # acc, acc_norm, acc_per_token


def test_a_checkpoint_is_evaluated_as_what_it_would_be_exported_to(run, uninterrupted, capsys):
    first, last = run / "checkpoints/step-5", run / "checkpoints/step-10"
    for path in (first, last, run):
        evaluated(path)
    of = {name: numbers(json.loads((run / f"evaluations/{name}/results.json").read_text())) for name in
          ("step-5/quick", "step-10/quick", "quick")}  # fmt: skip
    assert of["step-10/quick"] == of["quick"]
    assert of["step-5/quick"] != of["quick"]
    exported = run / "exported"
    export_checkpoint(uninterrupted["llama"], first, exported)
    evaluated(exported, output=str(run / "elsewhere"))
    assert numbers(json.loads((run / "elsewhere/results.json").read_text())) == of["step-5/quick"]
    assert not list(run.glob(".export-*"))


def test_a_hybrid_is_opened_by_this_packages_class_without_its_code_being_run(uninterrupted, tmp_path):
    run = Path(shutil.copytree(uninterrupted["hybrid"].output.run_dir, tmp_path / "run"))
    for path in (run, run / "checkpoints/step-10"):
        evaluated(path)
    ours = (json.loads((run / f"evaluations/{name}/results.json").read_text()) for name in ("quick", "step-10/quick"))
    assert numbers(next(ours)) == numbers(next(ours))


def test_an_unfinished_run_stands_for_its_newest_intact_checkpoint(run, capsys):
    shutil.rmtree(run / "model")
    (run / "checkpoints/step-10/checksums.json").write_text("{}")
    shutil.rmtree(run / "checkpoints/step-10")
    with model_folder(str(run)) as (pretrained, results):
        assert results == run / "evaluations/step-5"
        assert AutoModelForCausalLM.from_pretrained(pretrained).num_parameters() == 28_832
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has neither a model nor an intact checkpoint yet"), model_folder(str(run)):
        pass


def test_models_and_suites_that_cannot_be_evaluated_are_refused(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"is a folder without config.json or recipe.yaml"):
        evaluate(tmp_path)
    (run / "checkpoints/step-5/trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-5 is not intact \(trainer_state.json does not match its checksum\)"):
        evaluate(run / "checkpoints/step-5")
    with pytest.raises(UserError, match=r"'someone/nothing' cannot be opened by lm-eval's 'hf': .*; give a run folder"):
        evaluate("someone/nothing")
    with pytest.raises(UserError, match=r"cannot be opened by lm-eval's 'hff'"):
        evaluate(run, backend="hff")
    with pytest.raises(UserError, match=r"--suite: 'quik' is neither a suite"):
        evaluate(run, suite="quik")


def test_invalid_metadata_is_refused():
    done = run_command("python", "scripts/run_eval.py", "x", "--metadata", "file", check=False, cwd=ROOT)
    assert done.returncode == 2
    hint = """give a JSON object, e.g. '{"file": "mine.jsonl"}'"""
    assert done.stderr == f"error: --metadata file: {hint} (Expecting value: line 1 column 1 (char 0))\n"
    twice = '{"file": "a", "file": "b"}'
    done = run_command("python", "scripts/run_eval.py", "x", "--metadata", twice, check=False, cwd=ROOT)
    assert done.stderr == f"error: --metadata {twice}: {hint} (the key file is given twice; delete one of the two)\n"


def test_a_notebook_gets_scores_and_nothing_is_printed(run, capsys):
    result = isoflop.evaluate(run, limit=4)
    assert capsys.readouterr().out == ""
    frame = result.to_frame()
    assert set(frame["task"]) == {"stdlib_continuation", "stdlib_perplexity"}
    assert frame["value"].tolist() == [score["value"] for score in result.to_dict()["scores"]]
    assert (result.folder, result.parameters) == (run / "evaluations/quick", 28_832)
    assert result._repr_html_().count("<tr>") == 1 + len(frame)


def test_a_suite_of_the_working_directory_comes_first(run, tmp_path, monkeypatch):
    """The user's quick suite is one task of the package, and a suite may also be a file."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "eval/suites/quick.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("group: quick\ntask: [stdlib_perplexity]\nmetadata: {version: 1.0}\n")
    named = evaluate(run, "quick", limit=2)
    shutil.move(own, tmp_path / "mine.yaml")
    by_file = evaluate(run, "mine.yaml", limit=2)
    for result in (named, by_file):
        assert {score.task for score in result.scores} == {"stdlib_perplexity"}
    assert by_file.folder == run / "evaluations/mine"
    with pytest.raises(UserError, match=r"evaluation file eval/suites/quik.yaml does not exist"):
        evaluate(run, "eval/suites/quik.yaml")


def test_an_installed_copy_evaluates_from_an_empty_folder(run, tmp_path, monkeypatch):
    """A wheel has real folders where the checkout has links."""
    shutil.copytree(ROOT / "src/isoflop", tmp_path / "site/isoflop", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "empty").mkdir()
    code = f"import isoflop; assert 'site' in isoflop.__file__; print(len(isoflop.evaluate({str(run)!r}, limit=2).scores))"
    done = run_command(REAL, "-c", code, cwd=tmp_path / "empty", env={"PYTHONPATH": str(tmp_path / "site")})
    assert done.stdout.split()[-1] == "6"
