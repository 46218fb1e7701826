"""Nothing that is read can run code or reach outside its folder."""

import ast
import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from isoflop.checkpoint import folder as checkpoints
from isoflop.checkpoint.state import read
from isoflop.data.manifest import read_manifest
from isoflop.utils.errors import UserError


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def stopped_run(uninterrupted, tmp_path):
    """A copy of a run that is to be gone on with."""
    folder = shutil.copytree(uninterrupted["llama"].output.run_dir, tmp_path / "run")
    (folder / "summary.json").unlink()
    return folder


def reseal(path):
    """Make the checksums fit what is there, as an attacker would."""
    names = [file.name for file in path.iterdir() if file.name != "checksums.json"]
    sums = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / "checksums.json").write_text(json.dumps(sums))


def test_a_pickle_in_a_checkpoint_is_refused_unopened(stopped_run, ranks, tmp_path, tried):
    path, mark = stopped_run / "checkpoints/step-10", tmp_path / "ran"
    (path / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    reseal(path)
    assert checkpoints.verify(path) == []
    launched = ranks.start("cpu", stopped_run / "recipe.yaml", f"output.run_dir={stopped_run}")
    assert launched.wait() == [2], launched.text()
    assert re.search(r"error: \S*step-10/\.metadata: it names \S+, which no description of tensors needs", launched.text())
    assert not mark.exists()
    tried("a pickle that runs code, as a checkpoint's metadata", proof="refused, the code did not run")


def test_a_pickle_in_place_of_tensors_is_refused_unopened(stopped_run, ranks, tmp_path, tried):
    """torch reads them with weights_only."""
    path, mark = stopped_run / "checkpoints/step-10", tmp_path / "ran"
    shard = path / "__0_0.distcp"
    evil = pickle.dumps(Evil(mark))
    shard.write_bytes(evil + shard.read_bytes()[len(evil) :])
    reseal(path)
    launched = ranks.start("cpu", stopped_run / "recipe.yaml", f"output.run_dir={stopped_run}")
    assert launched.wait() != [0]
    assert not mark.exists()
    tried("a pickle that runs code, in place of tensors", proof="refused, the code did not run")


def test_what_is_not_a_tensor_is_never_unpickled(tmp_path):
    """DCP would read it with weights_only=False."""
    import torch
    from torch.distributed.checkpoint import save

    mark = tmp_path / "ran"
    save({"model.a": Evil(mark)}, checkpoint_id=tmp_path / "step-1")
    with pytest.raises(UserError, match="BytesStorageMetadata, which no description of tensors needs"):
        read(tmp_path / "step-1", {"model.a": torch.zeros(3)})
    assert not mark.exists()


def test_metadata_that_points_outside_its_folder_is_refused(tmp_path):
    import torch
    from torch.distributed.checkpoint import save

    save({"model.a": torch.ones(3)}, checkpoint_id=tmp_path / "step-1")
    metadata = tmp_path / "step-1/.metadata"
    content = pickle.loads(metadata.read_bytes())
    for place in content.storage_data.values():
        place.relative_path = "../" + place.relative_path
    metadata.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"it names the file '\.\./__0_0\.distcp', which is not in this folder"):
        read(tmp_path / "step-1", {"model.a": torch.zeros(3)})


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "a/b.arrow", "..", ""])
def test_a_manifest_cannot_name_a_file_outside_its_folder(name, toy_tree, tmp_path, tried):
    folder = shutil.copytree(toy_tree["data"]["prepared_dir"], tmp_path / "data")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sources"]["text"]["splits"]["train"]["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"(?s)is not a manifest: .*shards\.0\.name"):
        read_manifest(str(folder))
    tried("a path in a manifest, or in a checkpoint's metadata, that leaves its folder", proof="refused")


def test_checksums_cannot_name_a_file_outside_their_folder(stopped_run):
    path = stopped_run / "checkpoints/step-10"
    sums = json.loads((path / "checksums.json").read_text()) | {"../../recipe.yaml": "0"}
    (path / "checksums.json").write_text(json.dumps(sums))
    assert checkpoints.verify(path) == ["checksums.json names '../../recipe.yaml', which is no file of this folder"]


def test_no_remote_code_and_no_unsafe_loads_are_in_the_code():
    """What can run someone else's code is asked for nowhere; a card may tell its reader to."""
    arguments = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False}
    for folder in ("src", "modeling", "scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.keyword) and node.arg in arguments:
                    assert isinstance(node.value, ast.Constant), (file, node.arg)
                    assert node.value.value is not arguments[node.arg], (file, node.arg)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    assert (node.value.id, node.attr) not in {("pickle", "load"), ("pickle", "loads"), ("torch", "load")}, file
