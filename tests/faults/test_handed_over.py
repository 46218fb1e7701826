"""Folders and files from somebody else: what leaves its folder, asks for code or would fill the memory is refused by name."""

import gzip
import hashlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_command
from torch.distributed.checkpoint import save

from isoflop.checkpoint.folder import verify
from isoflop.checkpoint.state import read
from isoflop.config.loading import load_recipe, parse_yaml
from isoflop.config.recipe import Recipe
from isoflop.data.manifest import read_manifest
from isoflop.data.tokenizers import open_tokenizer
from isoflop.data.windows import ShardWriter
from isoflop.publish.files import run_files
from isoflop.train.export import export_checkpoint
from isoflop.train.run_folder import RunFolder
from isoflop.train.setup import check_data
from isoflop.utils.errors import UserError

LITTLE = 700 * 2**20  # bytes beyond what Python and its libraries take


@pytest.fixture
def data(toy_tree, tmp_path):
    """A recipe over a copy of the prepared folder."""
    folder = Path(shutil.copytree(toy_tree["data"]["prepared_dir"], tmp_path / "data"))
    return folder, Recipe.model_validate({**toy_tree, "data": {**toy_tree["data"], "prepared_dir": str(folder)}})


@pytest.fixture
def checkpoint(uninterrupted, tmp_path):
    """A copy of a run's last checkpoint."""
    return Path(shutil.copytree(f"{uninterrupted['llama'].output.run_dir}/checkpoints/step-10", tmp_path / "run/step-10"))


def bounded(code, *arguments):
    """Run Python code in a process of its own, and return what it prints: how far it got, and its peak of memory in bytes."""
    code = (
        "import resource\nfrom isoflop.utils.errors import UserError\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"{code}\nbefore = peak()\ntry:\n    call()\n    print('read')\nexcept UserError as error:\n    print(error)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *printed, needed = done.stdout.splitlines()
    return "\n".join(printed), int(needed)


def refusal_of(recipe, folder):
    """What a real run of a recipe that is refused says; every question would be answered with yes."""
    (folder / "toy.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    done = run_command(
        "python", "scripts/pretrain.py", folder / "toy.yaml", f"output.run_dir={folder}/run", input="y\ny\n", check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


# --- tokenizers


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_that_asks_for_code_is_refused(data, tmp_path, file, tried):
    folder, recipe = data
    mark = tmp_path / "ran"
    (folder / "tokenizer/evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = folder / "tokenizer" / file
    config.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}))
    printed = refusal_of(recipe, tmp_path)
    assert (
        f"error: {config}: auto_map = {{'AutoTokenizer': ['evil.Evil', None]}}: the tokenizer asks for code of its own, which is"
        " never run here; copy the prepared folder again, or prepare it again with a tokenizer that transformers has"
    ) in printed
    assert not mark.exists()
    tried(
        "a prepared folder whose tokenizer asks for code of its own",
        proof="refused by name, the code did not run, no question asked",
    )


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file"])
def test_a_tokenizer_cannot_name_files_elsewhere(data, key):
    folder, _ = data
    config = folder / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: "../../elsewhere.json"}))
    with pytest.raises(
        UserError, match=rf"{key} = '../../elsewhere.json': the tokenizer asks for a file elsewhere, which is not"
    ):
        open_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be opened"),
        (b"{}", "cannot be opened"),
        (b"\xff\xfe\0", "cannot be opened"),
        (b"[" * 100_000, "cannot be opened"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 18446744073709551616}, "merges": []}}', "cannot be opened"),
    ],
)
def test_a_damaged_tokenizer_is_named(data, content, reason):
    folder, _ = data
    (folder / "tokenizer/tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"{folder}/tokenizer {reason}: .*; copy the prepared folder again"):
        open_tokenizer(str(folder))


def test_an_export_without_a_tokenizer_is_refused(data, checkpoint, tmp_path):
    folder, recipe = data
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match=f"{folder}/tokenizer cannot be opened"):
        export_checkpoint(recipe, checkpoint, tmp_path / "model")


# --- names and links


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "a/b.arrow", "..", ""])
def test_a_manifest_that_names_other_files_is_refused_in_one_line(data, name):
    folder, _ = data
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sources"]["text"]["splits"]["train"]["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        read_manifest(str(folder))
    printed = str(error.value)
    assert f"manifest.json is not a manifest: sources.text.splits.train.shards.0.name = {name!r}: " in printed
    assert printed.endswith("; copy the folder again, or set another data.prepared_dir")
    assert "\n" not in printed
    assert len(printed) < 500


def replace_by_link(file, elsewhere):
    """Move a file out of its folder and leave a link."""
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize("name", ["text-train-00000-000.arrow", "tokenizer", "tokenizer/tokenizer.json"])
def test_links_out_of_a_prepared_folder_are_refused(data, tmp_path, name, tried):
    folder, recipe = data
    replace_by_link(folder / name, tmp_path / "elsewhere")
    with pytest.raises(UserError) as error:
        open_tokenizer(str(folder)) if name.startswith("tokenizer") else check_data(recipe, every_byte=True)
    assert f"{folder / name} is a link to {tmp_path}/elsewhere, outside its folder; copy what it points to in its" in str(
        error.value
    )
    assert "place (cp -rL)" in str(error.value)
    copied = Path(shutil.copytree(folder, tmp_path / "copied", symlinks=False))  # what cp -rL does
    there = recipe.model_copy(update={"data": recipe.data.model_copy(update={"prepared_dir": str(copied)})})
    check_data(there, every_byte=True)
    open_tokenizer(str(copied))
    tried("a link out of a prepared folder or a checkpoint", proof="refused by name; what cp -rL makes is read")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "trainer_state.json", "checksums.json"])
def test_links_out_of_a_checkpoint_are_faults(checkpoint, tmp_path, name, tried):
    assert verify(checkpoint) == []
    replace_by_link(checkpoint / name, tmp_path / "elsewhere")
    assert verify(checkpoint) == [
        f"{checkpoint / name} is a link to {tmp_path}/elsewhere, outside its folder; copy what it points to in its place (cp -rL)"
    ]
    tried("a link out of a prepared folder or a checkpoint", proof="refused by name; what cp -rL makes is read")


def test_a_link_that_the_checksums_do_not_name_is_not_read(tmp_path):
    save({"model.a": torch.ones(3)}, checkpoint_id=tmp_path / "step-1")
    replace_by_link(tmp_path / "step-1/__0_0.distcp", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"__0_0\.distcp is a link to \S+elsewhere, outside its folder"):
        read(tmp_path / "step-1", {"model.a": torch.zeros(3)})


@pytest.mark.parametrize("name", ["model/notes.txt", "samples.jsonl", "evaluations/x/results.json"])
def test_links_out_of_a_run_are_not_published(uninterrupted, tmp_path, name, tried):
    run = Path(shutil.copytree(uninterrupted["llama"].output.run_dir, tmp_path / "run"))
    (tmp_path / "private").write_text("{}")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=rf"{run / name} is a link to {tmp_path}/private, outside its folder"):
        run_files(RunFolder(str(run)), load_recipe(run / "recipe.yaml"))
    tried("a link in a run's folder to a file elsewhere, when the run is published", proof="refused by name, not read")


# --- checkpoints


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path):
    save({"model.a": torch.ones(3)}, checkpoint_id=tmp_path / "step-1")
    for tensors, printed in (
        ({"model.b": torch.zeros(3)}, "RuntimeError: 'Missing key in checkpoint state_dict: model.b.'"[:40]),
        ({"model.a": torch.zeros(4)}, "cannot be loaded: ValueError: "),
        ({"model.a": torch.zeros(3, dtype=torch.bfloat16)}, "model.a is torch.float32, and the run's is torch.bfloat16"),
    ):
        with pytest.raises(UserError, match=re.escape(printed)) as error:
            read(tmp_path / "step-1", tensors)
        assert "; use another checkpoint, or the recipe that it was trained with" in str(error.value)


def metadata_of(path, change):
    """Write a checkpoint's table of contents anew."""
    content = pickle.loads((path / ".metadata").read_bytes())
    change(content)
    (path / ".metadata").write_bytes(pickle.dumps(content))


def zip_of(source, compression, size=None):
    """A tensor's zip with its records compressed, or claiming another size."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, bytes(size) if size and "/data/" in entry.filename else content)
    return out.getvalue()


@pytest.mark.parametrize("what", ["deflated", "claims"])
def test_tensors_that_unfold_in_memory_are_refused(tmp_path, what, tried):
    path, size = tmp_path / "step-1", 2**30
    save({"model.a": torch.ones(8)}, checkpoint_id=path)
    file = path / "__0_0.distcp"
    if what == "deflated":
        content = zip_of(file.read_bytes(), zipfile.ZIP_DEFLATED, size)  # 1 MB that stands for 1 GB
        assert len(content) < 2**21
    else:  # the directory says that a record extends far behind the file's end
        content = bytearray(file.read_bytes())
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entry = next(entry for entry in archive.infolist() if "/data/" in entry.filename and "seria" not in entry.filename)
        place = content.rindex(b"PK\1\2", 0, content.rindex(entry.filename.encode()))
        content[place + 20 : place + 28] = size.to_bytes(4, "little") * 2
        content = bytes(content)
    file.write_bytes(content)

    def grow(metadata):
        for place in metadata.storage_data.values():
            place.length = len(content)

    metadata_of(path, grow)
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom isoflop.checkpoint.state import read\n"
        "def call(): read(Path(sys.argv[1]), {'model.a': torch.zeros(8)})"
    )
    printed, needed = bounded(code, path)
    assert "__0_0.distcp is compressed, or claims more bytes than it has" in printed
    assert needed < 100 * 2**20
    tried("a compressed tensor, or one that claims more bytes than there are", proof="refused before memory is taken")


def test_a_table_of_contents_that_claims_much_takes_no_memory(tmp_path, tried):
    claims = {
        "a place in the memo": b"\x80\x04Nr\xff\xff\xff\x1f.",  # pickle's LONG_BINPUT: C's unpickler takes 8 GB
        "a text": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
        "an array": b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b"x.",
        "a frame": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"N.",
        "lists in lists": b"\x80\x04" + b"]" * 500_000 + b"a" * 499_999 + b".",
    }
    for name, content in claims.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").write_bytes(content)
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom isoflop.checkpoint.state import read\n"
        "def call():\n"
        "    for folder in Path(sys.argv[1]).iterdir():\n"
        "        try: read(folder, {'model.a': torch.zeros(8)})\n"
        "        except UserError as error: print(error)"
    )
    printed, needed = bounded(code, tmp_path)
    assert printed.count("/.metadata: it is not metadata of a checkpoint (") == len(claims)
    assert needed < LITTLE
    tried("a checkpoint's table of contents that claims much memory", len(claims), "refused, little memory taken")


def test_a_table_of_contents_changes_no_class(tmp_path):
    save({"model.a": torch.ones(8)}, checkpoint_id=tmp_path / "step-1")
    module = "torch.distributed.checkpoint.metadata"
    content = b"\x80\x02c" + f"{module}\nMetadata\n".encode() + b"N}U\x08__repr__cpathlib\nPosixPath\ns\x86b."
    (tmp_path / "step-1/.metadata").write_bytes(content)
    with pytest.raises(UserError, match="it sets fields of something that is not a description of tensors"):
        read(tmp_path / "step-1", {"model.a": torch.zeros(8)})
    sys.modules[module].Metadata({}, None, None)
    assert "PosixPath" not in repr(sys.modules[module].Metadata.__repr__)


# --- bombs in text

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        (LAUGHS, "it has more than 200,000 values"),
        ("&a [*a]", "an alias refers to a value that contains it"),
        ("a: &a {b: *a}", "an alias refers to a value that contains it"),
        ("[" * 20_000, "it is nested too deeply"),
        ("a: " * 1, None),
        ("- " * 20_000 + "x", "it is nested too deeply"),
        ('a: "x\\0y"', "it holds a NUL character"),
        ("a: 2026-99-99", "month must be in 1..12"),
    ],
    ids=["laughs", "itself", "itself in a mapping", "deep", "none", "deep in dashes", "NUL", "date"],
)  # fmt: skip
def test_yaml_that_unfolds_is_refused(text, printed):
    if printed is None:
        assert parse_yaml(text) == {"a": None}
        return
    with pytest.raises(yaml.YAMLError, match=printed):
        parse_yaml(text)


READERS = {
    "recipe": "from isoflop.config.loading import load_recipe as read_file",
    "law": "from isoflop.scaling.laws import load_law\ndef read_file(file): load_law(str(file))",
    "sweep": "from isoflop.sweep.config import load_sweep_config as read_file",
    "manifest": "from isoflop.data.manifest import read_manifest\ndef read_file(file): read_manifest(str(file.parent))",
    "JSON object": "from isoflop.utils.untrusted import read_json\ndef read_file(file): read_json(file, 'remove it')",
}
BOMBS = {
    "aliases": LAUGHS.encode(),
    "nested": b"[" * 2_000_000,
    "long": b'{"' + b"a" * 1_000_000 + b'": "' + b"b" * 500_000 + b'"}',
    "numbers": b"[" + b"1," * 1_500_000 + b"1]",
    "keys": b'{"sources": {' + b",".join(b'"%d": 1' % number for number in range(300_000)) + b"}}",
    "digits": b'{"form": ' + b"9" * 1_000_000 + b"}",
}


@pytest.mark.parametrize("reader", READERS)
def test_bombs_take_little_memory(tmp_path, reader, tried):
    for name, content in BOMBS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(content)
    (tmp_path / "large").mkdir()
    with (tmp_path / "large/manifest.json").open("wb") as stream:
        stream.truncate(40 * 2**30)  # sparse
    code = (
        f"import sys\nfrom pathlib import Path\n{READERS[reader]}\n"
        "def call():\n"
        "    for folder in sorted(Path(sys.argv[1]).iterdir()):\n"
        "        try:\n            read_file(folder / 'manifest.json')\n            print('read')\n"
        "        except UserError as error: print(error)"
    )
    printed, needed = bounded(code, tmp_path)
    lines = printed.splitlines()[:-1]
    assert len(lines) == len(BOMBS) + 1
    assert all(len(line) < 3_000 for line in lines)
    assert lines.count("read") == (2 if reader == "JSON object" else 0)  # two are objects
    assert needed < LITTLE, f"{needed:,} bytes"
    tried(f"a {reader} of aliases, nesting, 40 GiB or long values", len(lines), "refused in a line, little memory taken")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_line_without_end_is_refused(tmp_path, suffix, tried):
    import pyarrow as pa

    file = tmp_path / f"rows.jsonl.{suffix}"
    piece = b"x" * 2**22
    with gzip.open(file, "wb", 1) if suffix == "gz" else pa.output_stream(file, compression="zstd") as stream:
        stream.write(b'{"text": "a"}\n{"text": "')
        for _ in range(512 if suffix == "zst" else 160):  # 2 GiB, 640 MiB
            stream.write(piece)
    code = (
        "import sys\nfrom isoflop.data.documents import read_documents\nfrom isoflop.data.sources import open_source\n"
        "from isoflop.config.recipe_data import Filter, TableSource\n"
        "def call():\n"
        "    for table in open_source(TableSource(kind='json', files=[sys.argv[1]]), 'data.source').tables:\n"
        "        for _ in read_documents(table, 0, Filter()): pass"
    )
    printed, needed = bounded(code, file)
    assert printed == (
        f"{file}: a line has more than 268,435,456 bytes, and a line is read at once; write one document a line, or leave out"
        " the file"
    )
    assert needed < 3 * LITTLE
    tried("a compressed file of one line without end", proof="refused, memory stays bounded")


def test_a_shard_of_compressed_ids_takes_no_memory(tmp_path, tried):
    import pyarrow as pa

    ids = pa.FixedSizeListArray.from_buffers(  # 1 GiB of zeros
        pa.list_(pa.uint16(), 2**20), 2**9, [None], children=[pa.array(np.zeros(2**29, np.uint16))]
    )
    table = pa.table({"input_ids": ids})
    with pa.ipc.new_stream(tmp_path / "x.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table)
    code = (
        "import sys\nfrom isoflop.data.manifest import Shard\nfrom isoflop.data.windows import Windows\n"
        "def call(): Windows(sys.argv[1], [Shard(name='x.arrow', bytes=0, sha256='', windows=2**9)], 2**20)"
    )
    printed, needed = bounded(code, tmp_path)
    assert "holds no windows: its record batches are compressed" in printed
    assert needed < LITTLE
    tried("a shard of compressed ids", proof="refused, none unpacked")


def test_ids_that_the_tokenizer_does_not_have_end_a_run_by_name(data, tmp_path, tried):
    """Of all sums right: on a GPU an embedding of one ends in an assertion of CUDA that names nothing."""
    folder, recipe = data
    manifest = json.loads((folder / "manifest.json").read_text())
    num_ids = manifest["tokenizer"]["num_ids"]
    split = manifest["sources"]["text"]["splits"]["train"]
    name = split["shards"][0]["name"]
    (folder / name).unlink()
    writer = ShardWriter(folder, name.removesuffix("-000.arrow"), manifest["sequence_length"], manifest["dtype"])
    writer.add(np.full(split["shards"][0]["windows"] * manifest["sequence_length"], num_ids))
    writer.cut()
    split["shards"] = [shard.model_dump() for shard in writer.shards]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    printed = refusal_of(recipe, tmp_path)
    assert (
        f"error: data.prepared_dir = '{folder}': a window holds the id {num_ids}, and its tokenizer has {num_ids} ids; copy the"
        " folder again, or run isoflop prepare again"
    ) in printed
    tried("a prepared folder with ids that its tokenizer does not have", proof="refused by name at their batch")


def test_sealed_files_of_another_kind_are_refused(data):
    """A folder, a number, a list, half a pair of escapes: in place of a JSON object."""
    folder, _ = data
    config = folder / "tokenizer/tokenizer_config.json"
    for content, printed in (
        (b"[]", "holds a list where a JSON object belongs"),
        (b'{"a": "\\ud800"}', "is not JSON: 'utf-8' codec can't encode"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8 text"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    ):
        config.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(printed)):
            open_tokenizer(str(folder))
    config.unlink()
    config.mkdir()
    with pytest.raises(UserError, match=r"tokenizer_config\.json cannot be read: Is a directory"):
        open_tokenizer(str(folder))
    digest = hashlib.sha256((folder / "tokenizer/tokenizer.json").read_bytes()).hexdigest()
    assert read_manifest(str(folder)).tokenizer.sha256 == digest
