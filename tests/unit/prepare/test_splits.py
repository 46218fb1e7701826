"""Corpora of one document or of few: how they are split, and that a split without a window is refused before tokenizing."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from isoflop.data.manifest import read_manifest
from isoflop.data.windows import Windows
from isoflop.prepare.run import prepare
from isoflop.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("on_the_console")

BOOK = "".join(f"Line {number} of a book, é, with {number * number} words.\n" for number in range(2000))


def decoded(recipe, split):
    manifest = read_manifest(recipe.data.prepared_dir)
    windows = Windows(recipe.data.prepared_dir, manifest.shards(split), manifest.sequence_length)
    tokenizer = AutoTokenizer.from_pretrained(Path(recipe.data.prepared_dir) / "tokenizer")
    return tokenizer.decode(windows.take(np.arange(len(windows))).reshape(-1), clean_up_tokenization_spaces=False)


def written(folder, kind):
    if kind == "text":
        (folder / "book.txt").write_text(BOOK, encoding="utf-8")
        return {"kind": "text", "files": [f"{folder}/book.txt"]}
    if kind == "json":
        (folder / "book.jsonl").write_text(json.dumps({"text": BOOK}) + "\n\n", encoding="utf-8")
        return {"kind": "json", "files": [f"{folder}/book.jsonl"]}
    pa.parquet.write_table(pa.table({"body": [BOOK], "score": [1]}), folder / "book.parquet")
    return {"kind": "parquet", "files": [f"{folder}/book.parquet"], "text_column": "body"}


@pytest.mark.parametrize("kind", ["text", "json", "parquet"])
def test_one_document_is_split_by_position(kind, toy_recipe, tmp_path, capsys):
    recipe = toy_recipe(
        data__prepared_dir=str(tmp_path / "p"), data__source=written(tmp_path, kind), data__validation_fraction=0.1
    )
    manifest = prepare(recipe)
    end = round(len(BOOK) * 0.9)
    tail = len(BOOK[end:].encode())
    assert f"prepare: {kind} is one document: its last 10.0000%, {tail:,} bytes, is validation\n" in capsys.readouterr().out
    splits = manifest.sources[kind].splits
    assert (splits["train"].documents, splits["validation"].documents) == (1, 1)
    assert (splits["train"].bytes, splits["validation"].bytes) == (len(BOOK.encode()) - tail, tail)
    train, validation = decoded(recipe, "train"), decoded(recipe, "validation")
    assert BOOK[:end].startswith(train.removesuffix("<|endoftext|>"))
    assert BOOK[end:].startswith(validation.removesuffix("<|endoftext|>"))
    assert len(train) > 0.99 * end


def test_parts_prepared_before_the_split_are_written_again(toy_recipe, tmp_path):
    """A folder of parts whose `corpus.json` does not know of splits by position holds the document in one split."""
    recipe = toy_recipe(
        data__prepared_dir=str(tmp_path / "p"), data__source=written(tmp_path, "text"), data__validation_fraction=0.1
    )
    prepare(recipe)
    manifest = read_manifest(recipe.data.prepared_dir)
    spec = {"made_from": manifest.made_from, "engine": manifest.engine, "tokenizer": manifest.tokenizer.model_dump()}
    spec |= {"revisions": {"text": None}, "num_parts": {"text": 1}}
    from isoflop.prepare.corpus import CorpusSpec

    old, new = CorpusSpec(**spec), CorpusSpec(**spec, split_by_position=["text"])
    assert old.digest() != new.digest()
    # the digest of a corpus of several documents is the one that earlier versions wrote into its records
    import hashlib

    text = old.model_dump_json(exclude={"split_by_position"})
    assert old.digest() == hashlib.sha256(text.encode()).hexdigest()


def test_two_documents_are_not_cut(toy_recipe, tmp_path):
    (tmp_path / "b.txt").write_text(BOOK[:3500], encoding="utf-8")
    source = written(tmp_path, "text")
    source["files"] = [f"{tmp_path}/*.txt"]
    recipe = toy_recipe(
        data__prepared_dir=str(tmp_path / "p"), data__source=source, data__validation_fraction=0.5, data__split_seed=2
    )
    (source,) = prepare(recipe).sources.values()
    assert sorted(split.bytes for split in source.splits.values()) == [len(BOOK[:3500].encode()), len(BOOK.encode())]


@pytest.mark.parametrize(
    ("texts", "fraction", "split", "message"),
    [
        (["words " * 9000], 0.0001, "validation", "1 document(s), 5 bytes"),
        (["x" * 33], 0.5, "train", "1 document(s), 16 bytes"),
        (["words " * 900] * 3, 0.0001, "validation", "0 document(s), 0 bytes"),
        (["words " * 900] * 3, 0.9999, "train", "0 document(s), 0 bytes"),
    ],
)
def test_a_split_without_a_window_is_refused_before_the_tokenizer_is_trained(
    texts, fraction, split, message, toy_recipe, tmp_path, capsys
):
    for number, text in enumerate(texts):
        (tmp_path / f"doc{number}.txt").write_text(text)
    recipe = toy_recipe(
        data__prepared_dir=str(tmp_path / "p"),
        data__source={"kind": "text", "files": [f"{tmp_path}/doc*.txt"]},
        data__validation_fraction=fraction,
    )
    with pytest.raises(UserError) as error:
        prepare(recipe)
    assert str(error.value) == (
        f"data.source gives no complete {split} window: {message}, and training.sequence_length = 32;"
        f" {'raise' if split == 'validation' else 'lower'} data.validation_fraction = {fraction:g}, set"
        " data.source.sample_by=paragraph, which makes a document of each paragraph, give it more text, or shorten the window"
    )
    assert "training a byte-level BPE" not in capsys.readouterr().out
    assert not (tmp_path / "p.partial" / "tokenizer").exists()
