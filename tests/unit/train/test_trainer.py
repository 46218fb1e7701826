import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, curve_of, launch, metrics_of, run_command, weights_of
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from isoflop.checkpoint import folder as checkpoint
from isoflop.config.loading import load_recipe
from isoflop.train import trainer as pretrain_module

pytestmark = pytest.mark.processes

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


# --- what a run leaves --------------------------------------------------------------------------------------


def test_a_run_leaves_what_others_rely_on(uninterrupted):
    recipe = uninterrupted["llama"]
    folder = Path(recipe.output.run_dir)
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints", "model", "loss.png",
        "lock",
    }  # fmt: skip
    assert load_recipe(folder / "recipe.yaml") == recipe
    rows = metrics_of(recipe)
    assert [row["step"] for row in rows] == list(range(1, 11))
    keys = [
        "step", "tokens", "loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "peak_memory_bytes",
        "anomalies", "elapsed_s",
    ]  # fmt: skip
    assert all(list(row) == keys for row in rows)
    assert [row["tokens"] for row in rows] == [256 * step for step in range(1, 11)]
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [5, 10]
    assert rows[-1]["learning_rate"] == pytest.approx(3e-4)
    assert rows[-1]["mfu"] is None
    assert [path.name for path in checkpoint.list_checkpoints(folder / "checkpoints")] == ["step-5", "step-10"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["launch"]["num_processes"] == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val_loss"] == rows[-1]["val_loss"]
    assert summary["tokens"] == 2560
    assert 50e6 < summary["predicted_memory_bytes"] <= 1.05 * summary["peak_memory_bytes"]  # a CPU's process caches more
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def assert_as_trained(model, recipe):
    accelerator = pretrain_module.build_accelerator(recipe.output)
    manifest = pretrain_module.check_data(recipe, True)
    job = pretrain_module.build_job(recipe, manifest, accelerator, pretrain_module.StopRequest())
    pretrain_module.load_checkpoint(job, "newest", eval_only=True)
    ids = torch.from_numpy(job.validation_windows.take(job.validation_order()))
    with torch.no_grad():
        trained = job.causal_lm(input_ids=ids, use_cache=False).logits
        reloaded = model(input_ids=ids).logits
        losses = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(reloaded, trained, rtol=1e-5, atol=1e-5)
    assert losses.item() == pytest.approx(metrics_of(recipe)[-1]["val_loss"], abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "hybrid"])
def test_the_saved_model_is_the_trained_one(family, uninterrupted, run_in_process):
    """OpenSource by transformers alone, its loss on the held-out windows is the one that was measured while training."""
    recipe = uninterrupted[family]
    folder = Path(recipe.output.run_dir)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert type(model).__name__ == {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "hybrid": "HybridForCausalLM"}[family]
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # ties hold after a reload
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert_as_trained(model, recipe)


@pytest.mark.parametrize(("preset", "name"), [("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM")])
def test_a_hybrid_that_amounts_to_a_stock_model_is_saved_as_that(preset, name, write_recipe, run_in_process):
    file = write_recipe(
        family="hybrid", model__preset=preset, model__num_attention_heads=4, model__head_dim=8, model__norm_position="pre",
        model__mlp={"gpt2": "relu2", "llama": "swiglu"}[preset], model__qk_norm=False, model__final_logit_softcapping=None,
        training__max_steps=2,
    )  # fmt: skip
    recipe = load_recipe(file)
    assert run_in_process(recipe) == 0
    folder = Path(recipe.output.run_dir) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (type(model).__name__, list(folder.glob("*.py"))) == (name, [])
    assert_as_trained(model, recipe)


def test_pipeline_and_tokenizer_open_it(uninterrupted):
    folder = Path(uninterrupted["llama"].output.run_dir) / "model"
    text = pipeline("text-generation", model=str(folder))("import os", max_new_tokens=8)[0]["generated_text"]
    assert text.startswith("import os")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 64
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert "isoflop" not in json.dumps(config)


def test_lm_eval_opens_it(uninterrupted, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"import os, sys  # {i}\n"}) + "\n" for i in range(4)))
    (tmp_path / "bits.yaml").write_text(
        f"task: local_bits\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\nmetadata: {version: 1.0}\n"
    )
    model = Path(uninterrupted["llama"].output.run_dir) / "model"
    done = run_command(
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}", "--tasks", "local_bits", "--include_path", tmp_path,
        "--device", "cpu", "--output_path", tmp_path / "out",
    )  # fmt: skip
    assert "bits_per_byte" in done.stdout
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]["local_bits"]
    assert 1 < results["bits_per_byte,none"] < 12


def test_a_finished_run_is_left_alone(uninterrupted, run_in_process, capsys):
    recipe = uninterrupted["llama"]
    before = {file: file.stat().st_mtime_ns for file in Path(recipe.output.run_dir).rglob("*")}
    assert run_in_process(recipe) == 0
    assert "is finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in Path(recipe.output.run_dir).rglob("*")} == before


# --- the first loss -----------------------------------------------------------------------------------------

TOY_WIDTHS = {
    "llama": [
        "hidden_size=64",
        "intermediate_size=128",
        "num_hidden_layers=3",
        "num_attention_heads=4",
        "max_position_embeddings=64",
    ],
    "gpt2": ["n_embd=64", "n_inner=128", "n_layer=3", "n_head=4", "n_positions=64"],
    "hybrid": [
        "hidden_size=64",
        "intermediate_size=128",
        "num_hidden_layers=3",
        "num_attention_heads=3",
        "head_dim=15",
        "max_position_embeddings=64",
    ],
}


@pytest.mark.parametrize("config", ["cpu", pytest.param("2cpu_ddp", marks=pytest.mark.distributed)])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_starts_at_the_logarithm_of_its_vocabulary(name, config, toy_tree, tmp_path, ranks):
    model = load_recipe(ROOT / f"recipes/{name}.yaml").model
    overrides = [f"model.{change}" for change in TOY_WIDTHS[model.model_type]]
    if model.model_type == "llama" and model.num_key_value_heads:
        overrides.append("model.num_key_value_heads=2")
    if load_recipe(ROOT / f"recipes/{name}.yaml").parametrization.name == "completep":
        overrides += ["parametrization.base_hidden_size=32", "parametrization.base_num_layers=2"]  # heads of 16, as above
    toy = {**toy_tree, "training": {**toy_tree["training"], "max_steps": 1}}
    overrides += [
        f"{section}.{key}={json.dumps(value)}"
        for section in ("training", "tokenizer", "data")
        for key, value in toy[section].items()
    ]
    printed = ranks.run(
        config,
        f"recipes/{name}.yaml",
        *overrides,
        f"output.run_dir={tmp_path}/run",
        "evaluation.sample_tokens=4",
        "evaluation.tasks={}",
        "--dry-run",
    )
    first = float(re.search(r"one step: loss ([\d.]+)", printed)[1])
    assert first == pytest.approx(math.log(model.vocab_size), rel=0.025)  # and half the variance of the first logits
    assert not (tmp_path / "run").exists()


# --- the same training, however it is cut -------------------------------------------------------------------


def test_accumulation_changes_nothing(toy_recipe, run_in_process, uninterrupted):
    """Sums are taken in another order: equal to 1e-5 in loss after ten steps, not to the bit."""
    recipe = toy_recipe(training__micro_batch_size=1)
    assert run_in_process(recipe) == 0
    for row, other in zip(metrics_of(recipe), metrics_of(uninterrupted["llama"]), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["llama", "gpt2", "hybrid"])
def test_two_processes_equal_one_that_accumulates_twice(family, uninterrupted, write_recipe):
    file = write_recipe(family=family)
    launch("2cpu_ddp", file)
    recipe = load_recipe(file)
    assert json.loads((Path(recipe.output.run_dir) / "environment.json").read_text())["launch"]["num_processes"] == 2
    for row, other in zip(metrics_of(recipe), metrics_of(uninterrupted[family]), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert metrics_of(recipe)[-1]["val_loss"] == pytest.approx(metrics_of(uninterrupted[family])[-1]["val_loss"], abs=1e-5)


NO_DDP_IS_LEFT_AT_THE_END = """
import gc, sys
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from isoflop.train.command import pretrain_command
import isoflop.train.trainer as pretrain
from isoflop.config.loading import load_recipe
built, end = [], Accelerator.end_training
def prepared(*arguments):
    job = build_job(*arguments)
    built.append(isinstance(job.model, DistributedDataParallel))
    return job
def ending(accelerator):
    left = [o for o in gc.get_objects() if isinstance(o, DistributedDataParallel)]
    print("DDP was built", built, "and is left", len(left), flush=True)
    end(accelerator)
build_job, pretrain.build_job, Accelerator.end_training = pretrain.build_job, prepared, ending
sys.exit(pretrain_command(load_recipe(sys.argv[1]), dry_run=True))
"""


@pytest.mark.distributed
def test_the_reducer_is_gone_before_the_process_group(write_recipe, tmp_path):
    """Else processes hang at their end, now and then, each waiting for a lock that the other holds."""
    script = tmp_path / "script.py"
    script.write_text(NO_DDP_IS_LEFT_AT_THE_END)
    config = ["--config_file", "accelerate_configs/2cpu_ddp.yaml", "--main_process_port", "0"]
    done = run_command("accelerate", "launch", *config, script, write_recipe())
    assert done.stdout.count("DDP was built [True] and is left 0") == 2


def test_measuring_and_sampling_leave_training_untouched(toy_recipe, run_in_process, uninterrupted, monkeypatch):
    overrides = {"evaluation__validate_every": 1, "evaluation__sample_every": 2, "output__layer_norms": True}
    recipe = toy_recipe(**overrides, output__trackers=["tensorboard"])
    assert run_in_process(recipe) == 0
    assert [row[:2] + row[3:] for row in curve_of(recipe)] == [row[:2] + row[3:] for row in curve_of(uninterrupted["llama"])]
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])
    rows = metrics_of(recipe)
    assert all(row["val_loss"] for row in rows)
    assert set(rows[0]["grad_norms"]) == {"embed_tokens", "layers.0", "layers.1", "norm"}
    total = math.sqrt(sum(norm**2 for norm in rows[0]["grad_norms"].values()))
    assert total == pytest.approx(rows[0]["grad_norm"], rel=1e-4)
    samples = [json.loads(line) for line in (Path(recipe.output.run_dir) / "samples.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in samples] == [2, 4, 6, 8, 10]
    assert list(Path(recipe.output.run_dir).rglob("events.out.tfevents*"))


@pytest.mark.parametrize("override", ["training.activation_checkpointing=true", "optimizer.moments_dtype=bfloat16"])
def test_memory_choices_start_alike_and_learn(override, write_recipe, run_in_process, uninterrupted):
    recipe = load_recipe(write_recipe(), [override])
    assert run_in_process(recipe) == 0
    ours, theirs = metrics_of(recipe), metrics_of(uninterrupted["llama"])
    assert ours[0]["loss"] == theirs[0]["loss"]
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], rel=2e-3)


def test_bf16_learns_as_fp32(write_recipe, uninterrupted):
    file = write_recipe()
    run_command("accelerate", "launch", "--cpu", "--mixed_precision", "bf16", "scripts/pretrain.py", file)
    ours, theirs = metrics_of(load_recipe(file)), metrics_of(uninterrupted["llama"])
    assert ours[0]["loss"] != theirs[0]["loss"]
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], rel=5e-3)


@pytest.mark.slow
def test_compiled_layers_learn_as_eager(write_recipe, run_in_process, uninterrupted):
    recipe = load_recipe(write_recipe(), ["training.compile=true"])
    assert run_in_process(recipe) == 0
    assert metrics_of(recipe)[-1]["val_loss"] == pytest.approx(metrics_of(uninterrupted["llama"])[-1]["val_loss"], rel=1e-4)


def test_training_learns_more_than_token_frequencies(toy_recipe, run_in_process):
    recipe = toy_recipe(training__max_steps=250, optimizer__peak_learning_rate=1e-2)
    assert run_in_process(recipe) == 0
    summary = json.loads((Path(recipe.output.run_dir) / "summary.json").read_text())
    assert summary["val_loss"] < summary["unigram_entropy_nats"] - 0.3


# --- the Hub ------------------------------------------------------------------------------------------------
