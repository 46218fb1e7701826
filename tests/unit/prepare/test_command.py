import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_command
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from isoflop.config.loading import load_recipe
from isoflop.data.manifest import read_manifest, verify_shards
from isoflop.data.tokenizers import train_tokenizer
from isoflop.data.windows import Windows
from isoflop.prepare.run import prepare
from isoflop.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("on_the_console")


@pytest.fixture
def fresh(toy_recipe, toy_tree, tmp_path):
    """The toy recipe over a prepared folder of its own."""
    return toy_recipe(data__prepared_dir=str(tmp_path / "prepared"))


def tokens_of(folder, name):
    manifest = read_manifest(str(folder))
    windows = Windows(str(folder), manifest.shards(name), manifest.sequence_length)
    return windows.take(np.arange(len(windows)))


def test_the_manifest_describes_the_folder(fresh, corpus):
    manifest = prepare(fresh)
    assert manifest == read_manifest(fresh.data.prepared_dir)
    (source,) = manifest.sources.values()
    splits = source.splits
    sizes = {file.name: file.stat().st_size for file in corpus.iterdir()}
    assert splits["train"].documents + splits["validation"].documents == len(sizes) == 40
    assert splits["train"].bytes + splits["validation"].bytes == sum(sizes.values())
    for split in splits.values():
        assert split.tokens == split.windows * 32 + split.dropped_tokens
        assert 0 <= split.dropped_tokens < 32
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer.num_ids == 300
    assert manifest.made_from["tokenizer.train_vocab_size"] == 300
    verify_shards(fresh.data.prepared_dir, manifest, full=True)


def test_windows_are_the_documents_joined_by_the_end_of_text(fresh, corpus):
    prepare(fresh)
    tokenizer = AutoTokenizer.from_pretrained(Path(fresh.data.prepared_dir) / "tokenizer")
    stream = tokens_of(fresh.data.prepared_dir, "validation").reshape(-1)
    documents = tokenizer.decode(stream, clean_up_tokenization_spaces=False).split(tokenizer.eos_token)
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    assert documents[0] in texts
    assert all(document in texts for document in documents[:-1])
    assert any(text.startswith(documents[-1]) for text in texts)  # the last one lost its partial window


def test_again_does_nothing_and_a_second_folder_is_equal(fresh, toy_recipe, tmp_path, capsys):
    prepare(fresh)
    before = {file: file.stat().st_mtime_ns for file in Path(fresh.data.prepared_dir).rglob("*")}
    capsys.readouterr()
    prepare(fresh)
    assert "already prepared and nothing changed" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in Path(fresh.data.prepared_dir).rglob("*")} == before
    other = toy_recipe(data__prepared_dir=str(tmp_path / "other"))
    assert prepare(other) == read_manifest(fresh.data.prepared_dir)


def test_what_changed_is_named(fresh, toy_recipe, tmp_path, corpus):
    prepare(fresh)
    folder = str(tmp_path / "prepared")
    with pytest.raises(UserError, match=r"training.sequence_length: 32 -> 64; name another prepared_dir or delete this one"):
        prepare(toy_recipe(data__prepared_dir=folder, training__sequence_length=64))
    with pytest.raises(UserError, match=r"tokenizer.train_vocab_size: 300 -> 290"):
        prepare(toy_recipe(data__prepared_dir=folder, tokenizer__train_vocab_size=290))
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    source = {"kind": "text", "files": [f"{copy}/*.txt"]}
    recipe = toy_recipe(data__prepared_dir=str(tmp_path / "p2"), data__source=source)
    prepare(recipe)
    changed = next(iter(sorted(copy.iterdir())))
    changed.write_text("changed\n")
    with pytest.raises(UserError, match=rf"{changed.name}: '\w+' -> '\w+'"):
        prepare(recipe)


def test_a_tokenizer_folder_that_changed_is_named(toy_recipe, tmp_path):
    folder = tmp_path / "tokenizer"
    train_tokenizer([["some text, and some more text"] * 9], 270).save_pretrained(folder)
    recipe = toy_recipe(data__prepared_dir=str(tmp_path / "p"), tokenizer={"name": str(folder)})
    prepare(recipe)
    prepare(recipe)
    train_tokenizer([["other words with other letters"] * 9], 270).save_pretrained(folder)
    with pytest.raises(UserError, match=r"tokenizer.json: '\w+' -> '\w+'"):
        prepare(recipe)


def test_a_tokenizer_that_now_adds_a_bos_is_another_one(toy_recipe, tmp_path):
    from tokenizers import processors

    tokenizer = train_tokenizer([["some text, and some more text"] * 9], 270)
    tokenizer.save_pretrained(tmp_path / "t")
    recipe = toy_recipe(data__prepared_dir=str(tmp_path / "p"), tokenizer={"name": str(tmp_path / "t")})
    prepare(recipe)
    start = ("<|endoftext|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    tokenizer.save_pretrained(tmp_path / "t")
    with pytest.raises(UserError, match=r"tokenizer.json: '\w+' -> '\w+'"):
        prepare(recipe)


@pytest.fixture
def toy_recipe(toy_recipe, write_recipe):
    """As in conftest, with whole sections replaceable."""

    def load(**changes):
        tokenizer = changes.pop("tokenizer", None)
        file = write_recipe(**changes)
        extra = [f"tokenizer.name={tokenizer['name']}"] if tokenizer else []
        return load_recipe(file, extra)

    return load


def test_a_tokenizer_that_adds_a_bos_gets_it_before_every_document(toy_recipe, tmp_path):
    from tokenizers import processors

    tokenizer = train_tokenizer([["some text, and some more text"] * 9], 270)
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(["<s>"])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<s>").save_pretrained(tmp_path / "t")
    recipe = toy_recipe(data__prepared_dir=str(tmp_path / "p"), tokenizer={"name": str(tmp_path / "t")})
    manifest = prepare(recipe)
    stream = tokens_of(tmp_path / "p", "train").reshape(-1)
    eos = manifest.tokenizer.eos_token_id
    ends = np.flatnonzero(stream[:-1] == eos)
    assert stream[0] == start
    assert (stream[ends + 1] == start).all()
    assert (stream == start).sum() == len(ends) + 1
    assert manifest.tokenizer.num_ids == start + 1 == 271


def test_the_text_of_a_special_token_is_plain_text(toy_recipe, tmp_path):
    for i in range(20):
        (tmp_path / f"doc{i}.txt").write_text(f"before <|endoftext|> after, document {i}\n" * 20)
    source = {"kind": "text", "files": [f"{tmp_path}/doc*.txt"]}
    recipe = toy_recipe(
        data__prepared_dir=str(tmp_path / "p"),
        data__source=source,
        data__validation_fraction=0.2,
        tokenizer__train_vocab_size=270,
    )
    manifest = prepare(recipe)
    stream = tokens_of(tmp_path / "p", "train").reshape(-1)
    assert (stream == manifest.tokenizer.eos_token_id).sum() in (
        manifest.split("train")[0].documents,
        manifest.split("train")[0].documents - 1,  # the last end of text may lie in the dropped part
    )


def test_an_empty_folder_is_filled_and_another_is_not_touched(fresh):
    folder = Path(fresh.data.prepared_dir)
    folder.mkdir()
    prepare(fresh)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"is not empty and is not a prepared folder: it holds"):
        prepare(fresh)


def test_an_interrupted_prepare_leaves_no_prepared_folder(fresh, monkeypatch):
    from isoflop.prepare import run as command

    monkeypatch.setattr(command, "write_part", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare(fresh)
    assert not Path(fresh.data.prepared_dir).exists()
    monkeypatch.undo()
    prepare(fresh)


@pytest.mark.parametrize("documents", [1, 3])
def test_too_little_text_for_both_splits_is_refused(documents, toy_recipe, tmp_path):
    for i in range(documents):
        (tmp_path / f"doc{i}.txt").write_text("some words to train on, " * 50)
    source = {"kind": "text", "files": [f"{tmp_path}/doc*.txt"]}
    with pytest.raises(UserError, match=rf"gives no complete validation window: {documents % 3} document\(s\), \d+ bytes"):
        prepare(
            toy_recipe(
                data__prepared_dir=str(tmp_path / "p"), data__source=source, data__validation_fraction=0.01,
                tokenizer__train_vocab_size=260,
            )
        )  # fmt: skip


def test_damaged_shards_are_named(fresh):
    manifest = prepare(fresh)
    shard = Path(fresh.data.prepared_dir) / manifest.shards("train")[0].name
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"text-train-00000-000.arrow does not match its SHA-256"):
        verify_shards(fresh.data.prepared_dir, manifest, full=True)
    shard.write_bytes(content[:-1])
    with pytest.raises(
        UserError, match=rf"text-train-00000-000.arrow has {len(content) - 1} bytes, its manifest says {len(content)}"
    ):
        verify_shards(fresh.data.prepared_dir, manifest, full=False)
    shard.unlink()
    with pytest.raises(UserError, match=r"text-train-00000-000.arrow is missing"):
        verify_shards(fresh.data.prepared_dir, manifest, full=False)


def test_the_command_prepares_and_ends_with_code_2_on_bad_input(write_recipe, tmp_path):
    file = write_recipe(data__prepared_dir=str(tmp_path / "p"))
    done = run_command("python", "scripts/prepare.py", file, "training.sequence_length=16", "training.tokens_per_step=64")
    assert "windows of 16" in done.stdout
    assert json.loads((tmp_path / "p" / "manifest.json").read_text())["sequence_length"] == 16
    bad = run_command("python", "scripts/prepare.py", "recipes/quickstart.yaml", "data.sorce=1", check=False, cwd=ROOT)
    assert bad.returncode == 2
    assert bad.stderr == "error: recipe recipes/quickstart.yaml: data.sorce: unknown key; did you mean source?\n"
