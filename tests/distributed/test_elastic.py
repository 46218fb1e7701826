"""A checkpoint of any engine resumes under any other: the same losses, the same order of the data."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TOY_MODELS, metrics_of, write_toy

from isoflop.config.loading import load_recipe

SIZES = {
    "training__tokens_per_step": 384,
    "training__micro_batch_size": 1,
    "training__max_steps": 6,
    "output__checkpoint_every": 3,
}
SAVED_UNDER = {"1": ("cpu", None), "DDP 2": ("2gpu_ddp", 2), "FSDP2 2": ("2gpu_fsdp2", 2), "ZeRO-1 2": ("2gpu_zero1", 2)}
RESUMED_UNDER = {
    **SAVED_UNDER, "DDP 3": ("2gpu_ddp", 3), "FSDP2 4": ("4gpu_fsdp2", 4), "ZeRO-1 3": ("2gpu_zero1", 3),
    "HSDP 2x2": ("8gpu_hsdp", 4),
}  # fmt: skip
# Every engine saves, every engine loads, world sizes change up and down. The other pairs are marked slow.
COVERING = [
    ("1", "DDP 3"), ("1", "FSDP2 4"), ("DDP 2", "1"), ("DDP 2", "ZeRO-1 3"), ("FSDP2 2", "DDP 2"), ("FSDP2 2", "HSDP 2x2"),
    ("FSDP2 2", "ZeRO-1 2"), ("ZeRO-1 2", "1"), ("ZeRO-1 2", "FSDP2 2"),
]  # fmt: skip
CASES = [(saver, loader, "llama" if saver in ("1", "DDP 2") else "gpt2") for saver, loader in COVERING]
CASES += [
    pytest.param(saver, loader, "llama" if loader in ("1", "DDP 3", "FSDP2 2", "ZeRO-1 2") else "gpt2", marks=pytest.mark.slow)
    for saver in SAVED_UNDER
    for loader in RESUMED_UNDER
    if (saver, loader) not in COVERING
]
HSDP = {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 2}


@pytest.fixture(scope="module")
def saved(toy_tree, ranks, tmp_path_factory):
    """The complete toy run under each engine, made when first asked for."""
    runs = {}

    def run(under, family):
        if (under, family) not in runs:
            folder = tmp_path_factory.mktemp("saved")
            config, processes = SAVED_UNDER[under]
            file = write(toy_tree, family, folder, "run")
            ranks.run(config, file, processes=processes)
            runs[under, family] = folder
        return runs[under, family]

    return run


def write(toy_tree, family, folder, name):
    model = TOY_MODELS[family] | {"tie_word_embeddings": family == "gpt2"}
    return write_toy(toy_tree, model, folder / f"{name}.yaml", folder / name, SIZES)


@pytest.mark.distributed
@pytest.mark.parametrize(("saver", "loader", "family"), CASES)
def test_a_checkpoint_of_any_engine_resumes_under_any_other(saver, loader, family, saved, toy_tree, ranks, tmp_path, tried):
    origin, alone = saved(saver, family), saved("1", family)
    file = write(toy_tree, family, tmp_path, "resumed")
    recipe = load_recipe(file)
    shutil.copytree(origin / "run", recipe.output.run_dir)
    (Path(recipe.output.run_dir) / "summary.json").unlink()
    config, processes = RESUMED_UNDER[loader]
    ranks.run(config, file, "--resume-from", "3", processes=processes, **(HSDP if "HSDP" in loader else {}))
    launch = json.loads((Path(recipe.output.run_dir) / "environment.json").read_text())["launch"]
    assert launch["resumed_from_step"] == 3
    expected = metrics_of(load_recipe(alone / "run.yaml"))
    for row, other in zip(metrics_of(recipe), expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-6 if row["step"] == 4 else 1e-5)
    tried(f"a checkpoint of {saver}, resumed under {', '.join(RESUMED_UNDER)}", proof="the next loss within 1e-6, fp32")
