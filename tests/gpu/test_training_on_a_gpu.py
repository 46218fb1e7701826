"""`scripts/pretrain.py` on one GPU: it trains there, holds what was predicted, and resumes as if never stopped."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import curve_of, launch, metrics_of, run_command, weights_of

from isoflop.config.loading import load_recipe
from isoflop.plan import cost
from isoflop.train.devices import why_no_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=f"needs ISOFLOP_TEST_GPU=1: {why_no_gpu()}"),
]

# Under torch's deterministic algorithms, which a bit-for-bit comparison needs on a GPU; a warning names what has no such form.
DETERMINISTIC = """
import sys, torch
torch.use_deterministic_algorithms(True, warn_only=True)
from isoflop.train.command import pretrain_command as pretrain
from isoflop.config.loading import load_recipe
sys.exit(pretrain(load_recipe(sys.argv[1]), resume=sys.argv[2] or None))
"""
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}


@pytest.mark.parametrize(
    ("config", "family", "compiled"),
    [
        ("1gpu", "llama", "auto"),
        ("1gpu", "gpt2", False),
        ("1gpu", "hybrid", "auto"),
        ("1gpu_fp32", "llama", False),
        ("1gpu_fp8", "llama", "auto"),
    ],
)
def test_three_steps(config, family, compiled, write_recipe):
    sizes = {}
    if config == "1gpu_fp8":
        pytest.importorskip("torchao")
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip(f"{torch.cuda.get_device_name()} has no float8 arithmetic")
        sizes = {"model__hidden_size": 64, "model__intermediate_size": 128}
    file = write_recipe(family=family, training__max_steps=3, training__compile=compiled, schedule__warmup_steps=1, **sizes)
    done = launch(config, file)
    recipe = load_recipe(file)
    rows = metrics_of(recipe)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(320), rel=0.03)
    environment = json.loads((Path(recipe.output.run_dir) / "environment.json").read_text())
    precision = {"1gpu": "bf16", "1gpu_fp32": "no", "1gpu_fp8": "fp8"}[config]
    assert environment["launch"]["device"].startswith("cuda")
    assert environment["launch"]["mixed_precision"] == precision
    assert environment["hardware"]["gpus"][0] == torch.cuda.get_device_name()
    assert f"on {torch.cuda.get_device_name()}, {'fp32' if precision == 'no' else precision} matrix products" in done.stdout


def test_ten_fp32_steps_are_those_of_a_cpu(write_recipe):
    """Rounding differs by 6e-8 a sum; Adam divides by small second moments, so it grows about tenfold in a few steps."""
    files = {config: write_recipe(config, training__compile=False) for config in ("1gpu_fp32", "cpu")}
    for config, file in files.items():
        launch(config, file)
    ours, theirs = (metrics_of(load_recipe(file)) for file in files.values())
    for row, other in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], rel=1e-3)


@pytest.mark.parametrize(("compiled", "checkpointing"), [(False, False), ("auto", False), ("auto", True)])
def test_the_allocators_peak_is_predicted(compiled, checkpointing, write_recipe, tmp_path):
    """Of the real run in bf16, at 140M parameters and 16,384 tokens a micro-batch, two of which make a step."""
    file = write_recipe(
        model__hidden_size=1024, model__intermediate_size=2816, model__num_hidden_layers=8, model__num_attention_heads=16,
        model__num_key_value_heads=16, model__vocab_size=32768, model__max_position_embeddings=1024,
        data__prepared_dir=str(tmp_path / "windows"), training__sequence_length=1024, training__micro_batch_size=16,
        training__tokens_per_step=2 * 16 * 1024, training__max_steps=3, training__activation_checkpointing=checkpointing,
        training__compile=compiled, schedule__warmup_steps=1, evaluation__validate_every=100,
    )  # fmt: skip
    run_command("python", "scripts/prepare.py", file)
    launch("1gpu", file)
    recipe = load_recipe(file)
    launched = cost.Launch("1gpu", "single", gpu=True)
    predicted = cost.predicted_memory(recipe.model, recipe.training, recipe.optimizer, launched).total
    peak = max(row["peak_memory_bytes"] for row in metrics_of(recipe))
    assert peak == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("compiled", [False, "auto"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(compiled, write_recipe):
    """Ten steps; then steps 6 to 10 again, from the checkpoint of step 5."""
    file = write_recipe(training__compile=compiled)
    recipe = load_recipe(file)
    run_command(sys.executable, "-c", DETERMINISTIC, file, "", env=ENVIRONMENT)
    assert metrics_of(recipe)[0]["peak_memory_bytes"] > 0
    curve, weights = curve_of(recipe), weights_of(recipe)
    (Path(recipe.output.run_dir) / "summary.json").unlink()
    printed = run_command(sys.executable, "-c", DETERMINISTIC, file, "5", env=ENVIRONMENT).stdout
    assert "step-5" in printed
    assert [row[0] for row in curve] == list(range(1, 11))
    assert curve_of(recipe) == curve
    assert weights_of(recipe) == weights
