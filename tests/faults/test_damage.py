"""Damaged files: the checksum names the one, and what is intact is used."""

import shutil
from pathlib import Path

import pytest
from conftest import curve_of, run_command, weights_of

from isoflop.config.loading import load_recipe


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {"truncated": truncate, "bit-flipped": flip_a_bit, "missing": Path.unlink}
SAYS = {"truncated": "does not match its checksum", "bit-flipped": "does not match its checksum", "missing": "is missing"}
# Each file, and each damage; the other pairs are marked slow.
COVERING = {
    "__0_0.distcp": "truncated",
    "__1_0.distcp": "bit-flipped",
    ".metadata": "missing",
    "trainer_state.json": "bit-flipped",
}
CASES = [*COVERING.items()] + [
    pytest.param(name, damage, marks=pytest.mark.slow) for name in COVERING for damage in DAMAGES if COVERING[name] != damage
]


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_damaged_shard_of_the_newest_checkpoint(name, damage, uninterrupted_two, ranks, tmp_path, tried):
    origin = uninterrupted_two
    recipe = load_recipe(origin / "run.yaml", [f"output.run_dir={tmp_path}/run"])
    folder = shutil.copytree(origin / "run", tmp_path / "run")
    (folder / "summary.json").unlink()
    DAMAGES[damage](folder / "checkpoints/step-10" / name)
    printed = ranks.run("2gpu_fsdp2", origin / "run.yaml", f"output.run_dir={tmp_path}/run")
    assert f"step-10 is broken ({name} {SAYS[damage]}): using an older one" in printed
    assert "resuming from" in printed
    assert "step-5" in printed
    assert curve_of(recipe) == curve_of(load_recipe(origin / "run.yaml"))
    assert weights_of(recipe) == weights_of(load_recipe(origin / "run.yaml"))
    tried(f"a {damage} file in the newest checkpoint")


@pytest.fixture(scope="module")
def uninterrupted_two(toy_tree, ranks, tmp_path_factory):
    """A run of two FSDP2 ranks: two shard files a checkpoint."""
    import json

    import yaml

    folder = tmp_path_factory.mktemp("two")
    tree = json.loads(json.dumps(toy_tree)) | {}
    tree["output"]["run_dir"] = str(folder / "run")
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    ranks.run("2gpu_fsdp2", folder / "run.yaml")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_of_the_prepared_data_is_named_and_refused(damage, toy_tree, write_recipe, ranks, tmp_path, tried):
    data = shutil.copytree(toy_tree["data"]["prepared_dir"], tmp_path / "data")
    DAMAGES[damage](data / "text-train-00000-000.arrow")
    launched = ranks.start("cpu", write_recipe(), f"data.prepared_dir={data}")
    assert launched.wait() == [2]
    assert "error: prepared data is damaged: " in launched.text()
    assert "text-train-00000-000.arrow" in launched.text()
    tried(f"a {damage} shard of the prepared data", proof="refused before any work, the shard named")


def test_the_command_of_a_user(uninterrupted, tmp_path, tried):
    """The same through the command, by its own launcher."""
    origin = Path(uninterrupted["llama"].output.run_dir)
    folder = shutil.copytree(origin, tmp_path / "run")
    (folder / "summary.json").unlink()
    flip_a_bit(folder / "checkpoints/step-10/__0_0.distcp")
    done = run_command("python", "scripts/pretrain.py", folder / "recipe.yaml", f"output.run_dir={folder}")
    assert "step-10 is broken (__0_0.distcp does not match its checksum): using an older one" in done.stderr
    assert (folder / "model/model.safetensors").read_bytes() == (origin / "model/model.safetensors").read_bytes()
    tried("a bit-flipped file in the newest checkpoint")
