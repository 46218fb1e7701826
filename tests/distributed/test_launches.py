"""Every file of accelerate_configs/, as many ranks as it says, stock families; and the command of the README."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
from conftest import ROOT, launch, metrics_of, run_command, weights_of

from isoflop.config.loading import load_recipe

CONFIGS = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("[2-9]gpu*.yaml"))
ENGINE = {"ddp": "MULTI_CPU", "zero1": "DEEPSPEED", "fsdp2": "FSDP", "hsdp": "FSDP"}
# Each engine in fp32 and in bf16, each family under one of them at least; the other combinations are marked slow.
COVERING = [
    ("2gpu_fsdp2", True, "llama"), ("2gpu_fsdp2", False, "hybrid"), ("2gpu_zero1", True, "hybrid"), ("2gpu_zero1", False, "gpt2"),
]  # fmt: skip
TRAINED = COVERING + [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(("2gpu_fsdp2", "2gpu_zero1"), (True, False), ("llama", "gpt2", "hybrid"))
    if case not in COVERING
]
TOY_LLAMA = [
    "model.hidden_size=64", "model.intermediate_size=128", "model.num_hidden_layers=2", "model.num_attention_heads=4",
    "model.max_position_embeddings=64",
]  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_comes_up_as_what_it_says(config, family, write_recipe, ranks):
    """In bf16, as the file says: the first loss is that of fp32 to four digits, not rounded to bf16's three."""
    processes = int(config[0])
    file = write_recipe(family=family, training__micro_batch_size=1)
    printed = ranks.run(config, file, "--dry-run", fp32=False)
    assert f"launch: {processes} process(es) ({ENGINE[config.split('_')[1]]}) on cpu, bf16 matrix products" in printed
    first = float(re.search(r"one step: loss ([\d.]+)", printed)[1])
    assert first == pytest.approx(math.log(320), rel=0.02)
    assert first * 64 != round(first * 64)  # bf16 has steps of 1/32 here


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["2gpu_ddp", "2gpu_fsdp2", "2gpu_zero1"])
def test_several_processes_train_on_a_cpu_only_where_that_is_asked_for(config, write_recipe, ranks):
    launched = ranks.start(config, write_recipe(), env={"ACCELERATE_USE_CPU": "false"})
    assert launched.wait() == [2, 2]
    assert "asks for a GPU, and torch sees none: " in launched.text()
    assert "set ACCELERATE_USE_CPU=true in the environment of a launch of several processes" in launched.text()


@pytest.mark.new_process  # the command line of the parent process is read
@pytest.mark.parametrize("config", ["1gpu", pytest.param("1gpu_fp32", marks=pytest.mark.slow)])
def test_a_config_for_one_gpu_trains_on_a_cpu_only_by_the_flag(config, write_recipe):
    """`accelerate launch` sets ACCELERATE_USE_CPU of one process itself, by its config and by `--cpu`."""
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    file = write_recipe(**{f"model__{key}": value for key, value in widths.items()})
    refused = launch(config, file, "--dry-run", check=False)
    assert refused.returncode != 0
    assert f"accelerate launch --config_file accelerate_configs/{config}.yaml asks for a GPU" in refused.stderr
    command = ["accelerate", "launch", "--cpu", "--config_file", f"accelerate_configs/{config}.yaml", "scripts/pretrain.py"]
    precision = {"1gpu": "bf16", "1gpu_fp32": "fp32"}[config]
    assert f"1 process(es) (NO) on cpu, {precision} matrix products" in run_command(*command, file, "--dry-run").stdout


@pytest.mark.new_process  # the command line of the parent process is read
def test_accelerate_launch_without_a_config_asks_for_no_gpu(write_recipe, tmp_path):
    home = {"HF_HOME": str(tmp_path)}  # without a default_config.yaml
    done = run_command("accelerate", "launch", "scripts/pretrain.py", write_recipe(), "--dry-run", env=home)
    assert "1 process(es) (NO) on cpu, fp32 matrix products" in done.stdout


def toy_overrides(toy_tree, tmp_path):
    sections = {name: toy_tree[name] for name in ("training", "tokenizer", "data")}
    values = [f"{section}.{key}={json.dumps(value)}" for section, part in sections.items() for key, value in part.items()]
    return [*TOY_LLAMA, *values, f"output.run_dir={tmp_path}/run", "evaluation.sample_tokens=4", "evaluation.max_windows=8"]


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["2gpu_zero1", pytest.param("2gpu_fsdp2", marks=pytest.mark.slow)])
def test_the_documented_command(config, toy_tree, tmp_path):
    """`accelerate launch --config_file accelerate_configs/2gpu_zero1.yaml scripts/pretrain.py recipes/llama2_1.36b.yaml`."""
    done = launch(config, "recipes/llama2_1.36b.yaml", *toy_overrides(toy_tree, tmp_path))
    assert f"launch: 2 process(es) ({ENGINE[config[5:]]}) on cpu, bf16 matrix products" in done.stdout
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 10
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").dtype.itemsize == 4


@pytest.mark.distributed
@pytest.mark.parametrize(("config", "fp32", "family"), TRAINED)
def test_every_engine_trains_as_one_process(config, fp32, family, uninterrupted, write_recipe, ranks):
    """fp32: to 1e-5 over ten steps. bf16 computes otherwise than autocast, weights too being rounded: to 1%."""
    file = write_recipe(family=family)
    ranks.run(config, file, fp32=fp32)
    ours, theirs = metrics_of(load_recipe(file)), metrics_of(uninterrupted[family])
    for row, other in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5 if fp32 else 1e-2)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3 if fp32 else 5e-2)
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], abs=1e-5 if fp32 else 1e-2)


@pytest.mark.distributed
def test_engines_agree_in_bf16_from_the_second_step_on(write_recipe, ranks):
    """DeepSpeed would start its fp32 weights from bf16 ones: the second loss would differ in the fourth digit."""
    losses = {}
    for config in ("2gpu_fsdp2", "2gpu_zero1"):
        file = write_recipe(config)
        ranks.run(config, file, fp32=False)
        losses[config] = [row["loss"] for row in metrics_of(load_recipe(file))]
    assert losses["2gpu_zero1"][:3] == pytest.approx(losses["2gpu_fsdp2"][:3], abs=2e-4)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "override"),
    [
        ("2gpu_fsdp2", "training.activation_checkpointing=true"),
        ("2gpu_fsdp2", "optimizer.moments_dtype=bfloat16"),
        ("2gpu_zero1", "training.micro_batch_size=1"),
        pytest.param("2gpu_zero1", "training.activation_checkpointing=true", marks=pytest.mark.slow),
        pytest.param("2gpu_zero1", "optimizer.moments_dtype=bfloat16", marks=pytest.mark.slow),
    ],
)
def test_memory_choices_under_every_engine(config, override, uninterrupted, write_recipe, ranks):
    file = write_recipe()
    ranks.run(config, file, override)
    ours, theirs = metrics_of(load_recipe(file, [override])), metrics_of(uninterrupted["llama"])
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-6)
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], rel=2e-3)


@pytest.mark.distributed
def test_layer_norms_of_shards_are_those_of_the_whole(uninterrupted, write_recipe, ranks):
    file = write_recipe()
    ranks.run("2gpu_fsdp2", file, "output.layer_norms=true")
    row = metrics_of(load_recipe(file))[0]
    total = math.sqrt(sum(norm**2 for norm in row["grad_norms"].values()))
    assert total == pytest.approx(row["grad_norm"], rel=1e-3)
    assert row["loss"] == pytest.approx(metrics_of(uninterrupted["llama"])[0]["loss"], abs=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("config", ["2gpu_ddp", "2gpu_fsdp2", "2gpu_zero1"])
def test_compiled_layers_under_every_engine(config, uninterrupted, write_recipe, ranks):
    file = write_recipe()
    ranks.start(config, file, "training.compile=true").succeed(timeout=500)
    assert metrics_of(load_recipe(file))[-1]["val_loss"] == pytest.approx(
        metrics_of(uninterrupted["llama"])[-1]["val_loss"], rel=1e-4
    )


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["2gpu_ddp", "2gpu_fsdp2", "2gpu_zero1"])
def test_samples_evaluation_alone_and_a_finished_run(config, uninterrupted, write_recipe, ranks):
    """The texts are those of one process, once each."""
    file = write_recipe()
    ranks.run(config, file, "evaluation.sample_every=4")
    folder = Path(load_recipe(file).output.run_dir)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in samples] == [4, 8, 10]
    alone = Path(uninterrupted["llama"].output.run_dir) / "samples.jsonl"
    assert samples[-1] == json.loads(alone.read_text().splitlines()[-1])
    assert samples[-1]["samples"][0].startswith("The")
    loss = float(re.search(r"step 10: validation loss ([\d.]+)", ranks.run(config, file, "--eval-only"))[1])
    assert loss == pytest.approx(metrics_of(load_recipe(file))[-1]["val_loss"], abs=1e-6)
    assert "is finished" in ranks.run(config, file)


def test_deepspeed_is_needed_by_its_own_configs_alone(uninterrupted, write_recipe, ranks):
    hidden = "import sys, importlib.util as util\nsys.modules['deepspeed'] = None\nfind = util.find_spec\n"
    hidden += "util.find_spec = lambda name, *rest: None if name == 'deepspeed' else find(name, *rest)\n"
    file = write_recipe()
    ranks.run("cpu", file, code=hidden)
    assert weights_of(load_recipe(file)) == weights_of(uninterrupted["llama"])
    launched = ranks.start("2gpu_zero1", write_recipe("zero"), code=hidden)
    assert launched.wait() == [2, 2]
    assert "DeepSpeed, which is not installed; run: pip install 'deepspeed>=0.19.8,<0.20'" in launched.text()


def test_a_launcher_that_starts_again_does_not_go_back_again(write_recipe, ranks):
    """`--resume-from 5` under a launcher with restarts: the second time it resumes from the newest."""
    file = write_recipe()
    ranks.run("cpu", file)
    folder = Path(load_recipe(file).output.run_dir)
    (folder / "summary.json").unlink()
    for variable in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        assert "step-10" in ranks.run("cpu", file, "--resume-from", "5", env={variable: 1})
        (folder / "summary.json").unlink()
    assert "step-5" in ranks.run("cpu", file, "--resume-from", "5", env={"TORCHELASTIC_RESTART_COUNT": 0})
