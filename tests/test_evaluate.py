"""scripts/run_eval.py as a user runs it: the numbers are plain lm-eval's, whatever is named."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_command
from transformers import AutoModelForCausalLM

from isoflop.errors import UserError
from isoflop.evaluate import Request, evaluate_model, model_folder
from isoflop.export import export_checkpoint


@pytest.fixture
def run(undisturbed, tmp_path):
    """A copy of a finished toy run."""
    return Path(shutil.copytree(undisturbed["llama"].output.run_dir, tmp_path / "run"))


def evaluated(model, **settings):
    """The results of the quick suite on a few documents, and the folder they were written to."""
    assert evaluate_model(Request(model=str(model), limit=6, **settings)) == 0


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
    for said in ("stdlib_continuation", "acc_per_token", "bits_per_byte", "nearest published", "results: "):
        assert said in done.stdout
    page = (run / "evaluations/quick/results.md").read_text()
    assert page.count("\n| stdlib_continuation |") == 3
    assert page.count("\n| stdlib_perplexity |") == 3


def test_a_checkpoint_is_evaluated_as_what_it_would_be_exported_to(run, undisturbed, capsys):
    first, last = run / "checkpoints/step-5", run / "checkpoints/step-10"
    for path in (first, last, run):
        evaluated(path)
    of = {name: numbers(json.loads((run / f"evaluations/{name}/results.json").read_text())) for name in
          ("step-5/quick", "step-10/quick", "quick")}  # fmt: skip
    assert of["step-10/quick"] == of["quick"]
    assert of["step-5/quick"] != of["quick"]
    exported = run / "exported"
    export_checkpoint(undisturbed["llama"], first, exported)
    evaluated(exported, output=str(run / "elsewhere"))
    assert numbers(json.loads((run / "elsewhere/results.json").read_text())) == of["step-5/quick"]
    assert not list(run.glob(".export-*"))


def test_a_hybrid_is_opened_by_this_packages_class_without_its_code_being_run(undisturbed, tmp_path):
    run = Path(shutil.copytree(undisturbed["hybrid"].output.run_dir, tmp_path / "run"))
    for path in (run, run / "checkpoints/step-10"):
        evaluated(path)
    ours = (json.loads((run / f"evaluations/{name}/results.json").read_text()) for name in ("quick", "step-10/quick"))
    assert numbers(next(ours)) == numbers(next(ours))


def test_a_run_that_is_still_training_is_its_newest_whole_checkpoint(run, capsys):
    shutil.rmtree(run / "model")
    (run / "checkpoints/step-10/checksums.json").write_text("{}")
    shutil.rmtree(run / "checkpoints/step-10")
    with model_folder(str(run)) as (pretrained, results):
        assert results == run / "evaluations/step-5"
        assert AutoModelForCausalLM.from_pretrained(pretrained).num_parameters() == 28_832
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has neither a model nor a whole checkpoint yet"), model_folder(str(run)):
        pass


def test_what_cannot_be_evaluated_is_said(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"is a folder without config.json or recipe.yaml"):
        evaluate_model(Request(model=str(tmp_path)))
    (run / "checkpoints/step-5/trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-5 is not whole \(trainer_state.json does not match its checksum\)"):
        evaluate_model(Request(model=str(run / "checkpoints/step-5")))
    with pytest.raises(UserError, match=r"'someone/nothing' cannot be opened by lm-eval's 'hf': .*; give a run's folder"):
        evaluate_model(Request(model="someone/nothing"))
    with pytest.raises(UserError, match=r"cannot be opened by lm-eval's 'hff'"):
        evaluate_model(Request(model=str(run), backend="hff"))
    with pytest.raises(UserError, match=r"--suite: 'quik' is neither a suite"):
        evaluate_model(Request(model=str(run), suite="quik"))


def test_a_wrong_mapping_is_said():
    done = run_command("python", "scripts/run_eval.py", "x", "--metadata", "file", check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == """error: --metadata file: give a JSON object, e.g. '{"file": "mine.jsonl"}'\n"""
