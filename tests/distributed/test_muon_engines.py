"""Muon under every engine: each matrix is orthogonalized by one rank, and the losses are those of one process."""

import shutil
from pathlib import Path

import pytest
from conftest import TOY_MODELS, curve_of, metrics_of, weights_of, write_toy

from isoflop.config.loading import load_recipe

HSDP = {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 2}
MUON = {"optimizer__name": "muon", "optimizer__adamw_learning_rate": 2e-3, "training__micro_batch_size": 1}
SIZES = {"training__tokens_per_step": 384, "training__max_steps": 20, "output__checkpoint_every": 10}
# Launch config, ranks, further options. Three shards cut rows unevenly; with 4 replicas some ranks own no matrix of a shape.
UNDER = {
    "DDP 3": ("2gpu_ddp", 3, {}), "FSDP2 2": ("2gpu_fsdp2", 2, {}), "FSDP2 3": ("2gpu_fsdp2", 3, {}),
    "HSDP 2x2": ("8gpu_hsdp", 4, HSDP),
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(toy_tree, ranks, tmp_path_factory):
    """Twenty steps of each family in one process, made when first asked for."""
    runs = {}

    def run(family):
        if family not in runs:
            runs[family] = file = write(toy_tree, family, tmp_path_factory.mktemp(family), "alone")
            ranks.run("cpu", file)
        return runs[family]

    return run


def write(toy_tree, family, folder, name):
    return write_toy(toy_tree, TOY_MODELS[family], folder / f"{name}.yaml", folder / name, MUON | SIZES)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("under", "family"),
    [("DDP 3", "gpt2"), ("FSDP2 2", "hybrid"), ("FSDP2 3", "llama"), ("HSDP 2x2", "gpt2"), ("HSDP 2x2", "llama")],
)
def test_every_engine_trains_as_one_process_and_resumes_bit_for_bit(under, family, alone, toy_tree, ranks, tmp_path):
    config, processes, options = UNDER[under]
    file = write(toy_tree, family, tmp_path, "complete")
    ranks.run(config, file, processes=processes, **options)
    recipe = load_recipe(file)
    for row, other in zip(metrics_of(recipe), metrics_of(load_recipe(alone(family))), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
    resumed = load_recipe(write(toy_tree, family, tmp_path, "resumed"))
    shutil.copytree(recipe.output.run_dir, resumed.output.run_dir)
    (Path(resumed.output.run_dir) / "summary.json").unlink()
    ranks.run(config, tmp_path / "resumed.yaml", "--resume-from", "10", processes=processes, **options)
    assert curve_of(resumed) == curve_of(recipe)
    assert weights_of(resumed) == weights_of(recipe)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("saver", "loader"), [("1", "FSDP2 3"), ("FSDP2 3", "HSDP 2x2"), ("HSDP 2x2", "1"), ("FSDP2 2", "DDP 3")]
)
def test_a_checkpoint_of_any_engine_resumes_under_any_other(saver, loader, alone, toy_tree, ranks, tmp_path):
    under = UNDER | {"1": ("cpu", None, {})}
    file, recipe = write(toy_tree, "llama", tmp_path, "run"), load_recipe(tmp_path / "run.yaml")
    for (config, processes, options), arguments in ((under[saver], []), (under[loader], ["--resume-from", "10"])):
        ranks.run(config, file, *arguments, processes=processes, **options)
        summary = Path(recipe.output.run_dir) / "summary.json"
        summary.unlink()
    for row, other in zip(metrics_of(recipe), metrics_of(load_recipe(alone("llama"))), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-6 if row["step"] == 11 and saver == "1" else 1e-5)


@pytest.mark.distributed
def test_zero1_is_refused_and_the_config_to_use_is_named(write_recipe, ranks):
    launched = ranks.start("2gpu_zero1", write_recipe(optimizer__name="muon"))
    assert launched.wait() == [2, 2]
    assert "optimizer.name = 'muon': not with DeepSpeed" in launched.text()
    assert "2gpu_fsdp2 instead of 2gpu_zero1" in launched.text()


COUNT = """
import os
from isoflop.train import muon
seen, original = [], muon.orthogonalize
def counting(matrices):
    seen.extend(matrix for matrix in matrices if matrix.abs().sum() > 0)
    with open(os.environ["COUNT_IN"] + "/rank-" + os.environ["RANK"], "w") as file:
        file.write(str(len(seen)))
    return original(matrices)
muon.orthogonalize = counting
"""


@pytest.mark.distributed
@pytest.mark.parametrize("under", ["DDP 3", "FSDP2 3", "HSDP 2x2"])
def test_each_matrix_is_orthogonalized_by_one_rank(under, toy_tree, ranks, tmp_path):
    config, processes, options = UNDER[under]
    file = write(toy_tree, "llama", tmp_path, "run")
    ranks.start(config, file, code=COUNT, env={"COUNT_IN": str(tmp_path)}, processes=processes, **options).succeed()
    counts = [int((tmp_path / f"rank-{rank}").read_text()) for rank in range(processes)]
    assert sum(counts) == 20 * 7 * load_recipe(file).model.num_hidden_layers
    assert max(counts) <= sum(counts) / 2


@pytest.mark.distributed
def test_in_bf16_the_sharded_run_learns_as_in_fp32(alone, toy_tree, ranks, tmp_path):
    file = write(toy_tree, "llama", tmp_path, "bf16")
    ranks.run("2gpu_fsdp2", file, fp32=False)
    ours, theirs = metrics_of(load_recipe(file)), metrics_of(load_recipe(alone("llama")))
    assert ours[0]["loss"] != theirs[0]["loss"]
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], rel=1e-2)


@pytest.mark.distributed
@pytest.mark.slow
def test_compiled_layers_learn_as_eager(alone, toy_tree, ranks, tmp_path):
    file = write(toy_tree, "llama", tmp_path, "compiled")
    ranks.start("2gpu_fsdp2", file, "training.compile=true").succeed(timeout=500)
    ours, theirs = metrics_of(load_recipe(file)), metrics_of(load_recipe(alone("llama")))
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], rel=1e-4)
