"""What is published beside the card, and what of the machine is not."""

import json
import shutil

import pytest

from isoflop.config.loading import load_recipe, parse_yaml
from isoflop.publish.files import run_files
from isoflop.publish.redaction import CHECKOUT, published_environment, published_recipe, published_results
from isoflop.train.run_folder import RunFolder
from isoflop.utils.errors import UserError

LAUNCH = {
    "started_at": "2025-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "hardware": {"host": "node-17", "platform": "Linux", "cpu_cores": 2, "memory_bytes": 1, "gpus": ["NVIDIA H100"]},
    "command": [f"{CHECKOUT}/scripts/pretrain.py", "/home/ada/my recipes/x.yaml", "output.run_dir=/scratch/ada/x"],
    "launch": {"num_processes": 1, "device": "cuda:0"},
}


def test_an_environment_keeps_versions_hardware_and_launch_alone():
    earlier = LAUNCH | {"command": ["scripts/pretrain.py", "recipes/x.yaml", "data.source.files=[/home/ada/a.txt, b/*.txt]"]}
    reported = published_environment(LAUNCH | {"earlier_launches": [earlier]})
    assert [launch["command"] for launch in reported["launches"]] == [
        ["scripts/pretrain.py", "recipes/x.yaml", "data.source.files=[a.txt, b/*.txt]"],
        ["scripts/pretrain.py", "x.yaml", "output.run_dir=x"],
    ]
    assert reported["launches"][1]["hardware"] == {
        "platform": "Linux",
        "cpu_cores": 2,
        "memory_bytes": 1,
        "gpus": ["NVIDIA H100"],
    }
    assert "node-17" not in json.dumps(reported)
    assert LAUNCH["hardware"]["host"] == "node-17"  # the run's own file says it still


def test_a_recipe_keeps_what_others_can_use(toy_recipe):
    recipe = toy_recipe(data__prepared_dir="/scratch/ada/windows")
    source = {"kind": "text", "files": ["/home/ada/a.txt", "corpus/*.txt", "~/b.txt", "../c/*.txt"]}
    recipe = recipe.model_copy(update={"data": recipe.data.model_validate(recipe.data.model_dump() | {"source": source})})
    published = published_recipe(recipe)
    assert published.data.source.files == ["a.txt", "corpus/*.txt", "b.txt", "*.txt"]
    assert published.data.prepared_dir == "windows"
    assert published.output.run_dir == "toy"
    assert published.model == recipe.model
    assert published_recipe(published) == published


def test_results_of_lm_eval_keep_their_numbers_and_urls_and_lose_every_path(tmp_path):
    run = tmp_path / "my runs" / "x"
    run.mkdir(parents=True)
    results = {
        "results": {"piqa": {"acc,none": 0.5, "alias": "piqa"}},
        "config": {
            "model_args": f"pretrained={run}/model,dtype=float32",
            "data_files": {"test": "/mnt/ada/data/test.jsonl"},
            "page": "https://huggingface.co/datasets/ybisk/piqa",
            "doc_to_text": "a/b </s> and/or {{x}}/{{y}}",
        },
        "model_name": f"{run}/model",
        "model_name_sanitized": str(run).replace("/", "__"),
        "pretty_env_info": "CPU: everything about it",
    }
    assert published_results(results, run) == {
        "results": results["results"],
        "config": {
            "model_args": "pretrained=model,dtype=float32",
            "data_files": {"test": "test.jsonl"},
            "page": "https://huggingface.co/datasets/ybisk/piqa",
            "doc_to_text": "a/b </s> and/or {{x}}/{{y}}",
        },
        "model_name": "model",
    }


def test_a_finished_run_brings_all_its_files(uninterrupted, tmp_path):
    recipe = uninterrupted["llama"]
    shutil.copytree(recipe.output.run_dir, tmp_path / "toy")
    folder = RunFolder(str(tmp_path / "toy"))
    files = run_files(folder, recipe)
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "recipe.yaml",
        "training_environment.json", "metrics.jsonl", "samples.jsonl", "loss.png", "summary.json",
    }  # fmt: skip
    assert parse_yaml(files["recipe.yaml"].decode()) == published_recipe(recipe).model_dump(mode="json")
    shutil.rmtree(folder.model)
    with pytest.raises(UserError, match=r"model does not exist; delete .*summary\.json, and the command that trained the run"):
        run_files(folder, recipe)


def test_a_published_recipe_is_one_that_trains(uninterrupted, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(
        run_files(RunFolder(uninterrupted["gpt2"].output.run_dir), uninterrupted["gpt2"])["recipe.yaml"]
    )
    assert load_recipe(tmp_path / "recipe.yaml").model == uninterrupted["gpt2"].model
