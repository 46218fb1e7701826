"""The model card: every number is that of the run's files, and nothing in it is of the machine."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, metrics_of
from huggingface_hub import ModelCard

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe
from isoflop.evaluate.scores import Score, write_results
from isoflop.plan import cost
from isoflop.publish import sections
from isoflop.publish.card import hub_names, metadata, model_card
from isoflop.publish.files import run_files
from isoflop.publish.redaction import published_recipe
from isoflop.scaling.laws import load_law
from isoflop.train.run_folder import RunFolder
from isoflop.train.summary import RunSummary

RESULTS = {
    "results": {
        "hellaswag": {"alias": "hellaswag", "acc,none": 0.28, "acc_stderr,none": 0.0045},
        "wikitext": {"alias": "wikitext", "word_perplexity,none": math.inf, "word_perplexity_stderr,none": "N/A"},
    },
    "higher_is_better": {"hellaswag": {"acc": True}, "wikitext": {"word_perplexity": False}},
    "chance": {"hellaswag": 0.25},
    "n-samples": {"hellaswag": {"original": 10042, "effective": 10042}, "wikitext": {"original": 62, "effective": 62}},
}


@pytest.fixture
def run(uninterrupted, tmp_path):
    """A finished toy run, free to be changed."""
    folder = tmp_path / "runs" / "toy"
    shutil.copytree(uninterrupted["llama"].output.run_dir, folder)
    return RunFolder(str(folder))


def summary_with(**values):
    """A summary of a run under no law, with some values."""
    zeros = dict.fromkeys(
        ("loss", "unigram_entropy_nats", "tokens_per_s", "predicted_memory_bytes", "peak_memory_bytes", "elapsed_s"), 0
    )
    ones = dict.fromkeys(("steps", "tokens", "parameters", "flops", "val_loss", "bits_per_byte"), 1)
    return RunSummary(**zeros | ones | {"mfu": None, "samples": []} | values)


def rows(card, header):
    """Cells of the card's table with such a header, by the first of each row."""
    lines = str(card).split(header + "\n")[1].splitlines()[1:]
    table = [line.strip("| ").split(" | ") for line in lines[: lines.index("")]]
    return {cells[0]: cells[1:] for cells in table}


def test_facts_and_training_are_those_of_the_run(run, uninterrupted):
    card = model_card(run, "user/toy", None)
    summary, reported = json.loads(run.summary.read_text()), rows(card, "|  |  |")
    assert reported == {
        "type": ["llama, stock transformers"],
        "opens in": ["transformers 4.57 and 5 (tested with 4.57.6 and 5.23.0)"],
        "parameters": ["28,832"],
        "layers": ["2"],
        "width": ["32"],
        "attention heads": ["4 of size 8, 2 of keys and values"],
        "feed-forward width": ["64"],
        "vocabulary": ["320, embedding and head tied"],
        "context": ["64 tokens"],
        "tokenizer": ["byte-level BPE with 300 ids, trained on this data"],
    }
    reported = rows(str(card).split("## Training")[1], "|  |  |")
    assert reported["tokens (D)"] == ["2,560 = 10 steps x 256"]
    assert reported["tokens per parameter (D/N)"] == [f"{2560 / 28832:.2f}"]
    flops = 2560 * cost.flops_per_token(uninterrupted["llama"].model, 32)
    assert reported["FLOPs"] == [f"{flops:.3e} (6 N D: {6 * 28832 * 2560:.3e})"]
    assert reported["hours"] == [f"{summary['elapsed_s'] / 3600:.3g}"]
    assert reported["median throughput"] == [f"{summary['tokens_per_s']:,.0f} tokens/s, MFU n/a"]
    environment = json.loads((run.path / "environment.json").read_text())
    assert reported["hardware"] == [f"CPU with {environment['hardware']['cpu_cores']} cores"]
    assert f"torch {environment['versions']['torch']}" in reported["versions"][0]
    assert reported["commit of the code"] == [environment["commit"] or "an installed copy"]
    assert f"**{summary['val_loss']:.4f} nats per token** ({summary['bits_per_byte']:.4f} bits per byte)" in str(card)
    assert f"```text\n{summary['samples'][0]}\n```" in str(card)


def test_a_hybrid_says_that_its_code_is_run(uninterrupted, toy_recipe):
    folder = RunFolder(uninterrupted["hybrid"].output.run_dir)
    card = model_card(folder, "user/toy", None, ["step-5"])
    assert rows(card, "|  |  |")["type"] == ["hybrid, with its code beside the weights"]
    assert 'AutoModelForCausalLM.from_pretrained("user/toy", trust_remote_code=True), AutoTokenizer' in str(card)
    assert 'from_pretrained("user/toy", revision="step-N", trust_remote_code=True)`' in str(card)
    code = {"compatibility_hybrid.py", "configuration_hybrid.py", "conversion_hybrid.py", "modeling_hybrid.py"}
    assert {name for name in run_files(folder, uninterrupted["hybrid"]) if name.endswith(".py")} == code
    stock = toy_recipe(model__model_type="hybrid", model__preset="llama")
    assert sections.remote_code(stock) == ""
    assert "hybrid, stock transformers" in sections.architecture(stock)


def test_a_saved_card_gives_the_same_metadata(run, tmp_path):
    write_results(RESULTS, run.evaluations / "quick", 28832)
    card = model_card(run, "user/toy", "mit")
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    summary = json.loads(run.summary.read_text())
    assert loaded.data.to_dict() == card.data.to_dict()
    assert loaded.text == card.text
    assert (loaded.data.license, loaded.data.library_name, loaded.data.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert loaded.data.tags == ["isoflop", "pretraining", "llama"]
    measured = {(result.dataset_type, result.metric_type): result for result in loaded.data.eval_results}
    assert measured["text", "loss"].metric_value == summary["val_loss"]
    assert measured["text", "bits_per_byte"].metric_value == summary["bits_per_byte"]
    assert measured["hellaswag", "acc"].metric_value == 0.28
    assert measured["hellaswag", "acc"].metric_args == {"documents": 10042, "standard_error": 0.0045}
    assert set(measured) == {("text", "loss"), ("text", "bits_per_byte"), ("hellaswag", "acc")}  # no infinite perplexity
    assert "| hellaswag | acc | 0.2800 | 0.0045 | 0.2500 | 10,042 |" in loaded.text


def test_without_scores_the_card_says_how_to_make_some(run):
    assert "None yet. With isoflop installed: `isoflop eval user/toy --suite quick`." in str(model_card(run, "user/toy", None))


def test_the_same_files_make_the_same_card(run):
    assert str(model_card(run, "user/toy", None, ["step-5"])) == str(model_card(run, "user/toy", None, ["step-5"]))


def test_licence_is_the_commands_then_the_recipes_then_unknown(run):
    assert model_card(run, "user/toy", None).data.license == "unknown"
    tree = yaml.safe_load((run.path / "recipe.yaml").read_text())
    tree["hub"]["license"] = "odc-by"
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert model_card(run, "user/toy", None).data.license == "odc-by"
    assert model_card(run, "user/toy", "mit").data.license == "mit"


def test_laws_stand_beside_what_was_measured(run, uninterrupted):
    reported = rows(model_card(run, "user/toy", None), "| law | predicted loss | interval | measured validation loss |")
    measured = f"{json.loads(run.summary.read_text())['val_loss']:.4f}"
    reasons = {"hoffmann": "70M parameters and 5B tokens", "besiroglu": "57M parameters and 250M tokens"}
    assert reported == {
        name: [f"no prediction: its data begin at {edges} (here 28.8K and 2.56K)", "n/a", measured]
        for name, edges in reasons.items()
    }
    card = str(model_card(run, "user/toy", None))
    assert f"{load_law('hoffmann').loss(28832, 2560):.4f}" not in card
    assert "Extrapolated by law" not in card


def test_published_laws_stand_on_the_card_of_a_run_of_their_size():
    recipe = load_recipe(ROOT / "recipes/llama2_1.36b.yaml")
    summary = summary_with(tokens=2_000_000_000, val_loss=2.9)
    low, high = load_law("besiroglu").predict(recipe.model, 2e9).interval
    n = 1_294_159_104
    assert sections.laws(recipe, summary).splitlines()[2:] == [
        f"| hoffmann | {load_law('hoffmann').loss(n, 2e9):.4f} | n/a | 2.9000 |",
        f"| besiroglu | {load_law('besiroglu').loss(n, 2e9):.4f} | {low:.4f} to {high:.4f} | 2.9000 |",
    ]
    assert sections.extrapolations(recipe, summary.tokens) == ["hoffmann: 2e+09 tokens (fitted on 5e+09 to 5e+11)"]
    own = {"law": "mine.json", "predicted_loss": None, "predicted_loss_interval": None, "outside": "its data end at 1B tokens"}
    assert "| mine.json | no prediction: its data end at 1B tokens | n/a | 2.9000 |" in sections.laws(
        recipe, summary.model_copy(update=own)
    )


def test_a_law_of_ones_own_stands_first(run):
    summary = json.loads(run.summary.read_text())
    own = {"law": "runs/law.json", "predicted_loss": 4.5, "predicted_loss_interval": [4.25, 4.75]}
    run.summary.write_text(json.dumps(summary | own))
    card = model_card(run, "user/toy", None)
    reported = rows(card, "| law | predicted loss | interval | measured validation loss |")
    assert list(reported) == ["runs/law.json", "hoffmann", "besiroglu"]
    assert reported["runs/law.json"][:2] == ["4.5000", "4.2500 to 4.7500"]
    assert "`runs/law.json` is the run's own" in str(card)
    run.summary.write_text(json.dumps(summary))


def test_checkpoints_are_listed_by_step_with_their_losses(run, uninterrupted):
    step = {row["step"]: row for row in metrics_of(uninterrupted["llama"])}
    card = model_card(run, "user/toy", None, ["step-10", "step-5", "step-400"])  # the last is of another past
    assert rows(card, "| revision | tokens | training loss | validation loss |") == {
        "step-5": ["1,280", f"{step[5]['loss']:.4f}", f"{step[5]['val_loss']:.4f}"],
        "step-10": ["2,560", f"{step[10]['loss']:.4f}", f"{step[10]['val_loss']:.4f}"],
    }
    assert list(rows(card, "| revision | tokens | training loss | validation loss |")) == ["step-5", "step-10"]


def test_data_by_source_with_epochs_if_the_prepared_folder_is_there(toy_recipe):
    recipe = toy_recipe()
    windows = json.loads((Path(recipe.data.prepared_dir) / "manifest.json").read_text())["sources"]["text"]["splits"]["train"][
        "windows"
    ]
    reported = sections.data(published_recipe(recipe), recipe.data.prepared_dir, 2560)
    assert reported.splitlines()[-1] == f"| local files *.txt | 100.00% | {80 / windows:.2f} | n/a |"
    reported = sections.data(published_recipe(recipe), "data/elsewhere", 2560)
    assert reported.splitlines()[-1] == "| local files *.txt | 100.00% | n/a | n/a |"


def test_every_dataset_of_the_hub_in_a_mixture_is_named(toy_recipe, tmp_path):
    parts = {
        "web": {"weight": 0.5, "source": {"kind": "hub", "name": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT"}},
        "wiki": {"weight": 0.25, "source": {"kind": "hub", "name": "wikimedia/wikipedia"}},
        "own": {"weight": 0.25, "source": {"kind": "hub", "name": str(tmp_path)}},
    }
    recipe = toy_recipe(data__source={"kind": "mixture", "sources": parts})
    assert hub_names(published_recipe(recipe)) == ["HuggingFaceFW/fineweb-edu", "wikimedia/wikipedia"]
    data = metadata(published_recipe(recipe), summary_with(val_loss=3.0, bits_per_byte=1.0), [], "user/toy", None)
    assert data.datasets == ["HuggingFaceFW/fineweb-edu", "wikimedia/wikipedia"]
    assert str(tmp_path.parent) not in data.to_yaml()


def test_a_launch_reads_as_it_was_typed():
    launch = {
        "command": ["scripts/pretrain.py", "recipes/modern_124m.yaml", "output.run_dir=runs/a b"],
        "launch": {"num_processes": 2, "distributed_type": "MULTI_GPU", "mixed_precision": "bf16", "resumed_from_step": 5000},
    }
    assert sections.command_line(launch) == (
        "scripts/pretrain.py recipes/modern_124m.yaml 'output.run_dir=runs/a b'  # 2 processes (MULTI_GPU), bf16, from step 5,000"
    )


def test_gpus_are_counted_by_process(run, uninterrupted):
    launch = {
        "hardware": {"gpus": ["NVIDIA H100 80GB HBM3"] * 8, "cpu_cores": 64},
        "launch": {"num_processes": 16, "device": "cuda:0"},
        "versions": {},
        "commit": None,
    }
    reported = sections.training(uninterrupted["llama"], run.read_summary().model_copy(update={"mfu": 0.41}), [launch])
    assert "| hardware | 16 x NVIDIA H100 80GB HBM3 |" in reported
    assert "MFU 41.0%" in reported
    assert "| commit of the code | an installed copy |" in reported


def test_a_sample_stays_in_its_block_whatever_it_holds():
    assert sections.fenced("a ```` b") == "`````text\na ```` b\n`````"


@pytest.mark.parametrize(
    ("count", "text"), [(124_475_904, "124.5M"), (9_999_220_736, "9.999B"), (28_832, "28.83k"), (320, "320")]
)
def test_counts_have_four_digits(count, text):
    assert sections.rounded(count) == text


def test_the_citation_is_that_of_the_project(run):
    project = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    card = str(model_card(run, "user/toy", None))
    assert f"title = {{{project['title']}}}" in card
    assert f"author = {{{project['authors'][0]['name']}}}" in card
    assert f"version = {{{project['version']}}}" in card


def test_losses_are_of_the_dataset_and_scores_of_their_tasks():
    recipe = Recipe.model_validate(load_recipe(ROOT / "recipes/gpt2_124m.yaml").model_dump(mode="json"))
    data = metadata(
        recipe, summary_with(val_loss=3.2, bits_per_byte=0.99), [Score("piqa", "acc", 0.6, None, 9, True)], "u/gpt2", "mit"
    )
    assert data.datasets == ["HuggingFaceFW/fineweb-edu"]
    assert [(r.dataset_type, r.metric_value) for r in data.eval_results] == [
        ("HuggingFaceFW/fineweb-edu", 3.2), ("HuggingFaceFW/fineweb-edu", 0.99), ("piqa", 0.6),
    ]  # fmt: skip
