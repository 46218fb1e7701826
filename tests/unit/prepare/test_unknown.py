"""Text that a tokenizer does not know: counted, reported, and refused where it is more than a recipe allows."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from isoflop.config.loading import load_recipe
from isoflop.data.encoding import unknown_id
from isoflop.data.manifest import read_manifest
from isoflop.data.tokenizers import train_tokenizer
from isoflop.data.windows import Windows
from isoflop.prepare.run import prepare
from isoflop.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("on_the_console")

WORDS = [f"word{number}" for number in range(98)]


@pytest.fixture
def words(tmp_path):
    """A tokenizer of whole words, which turns every other one into its unknown token."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.fixture
def recipe_of(words, write_recipe, tmp_path):
    """A recipe over 40 documents of 100 words, of which the last `strange` are not known."""

    def make(strange, *overrides, later=None):
        rng = np.random.default_rng(0)
        for number in range(40):
            odd = strange if number < 20 or later is None else later
            known = [WORDS[one] for one in rng.integers(0, len(WORDS), 100 - odd)]
            (tmp_path / f"doc{number:02}.txt").write_text(" ".join([*known, *["strange"] * odd]))
        source = {"kind": "text", "files": [f"{tmp_path}/doc*.txt"]}
        file = write_recipe(data__source=source, data__prepared_dir=str(tmp_path / "p"), data__validation_fraction=0.2)
        return load_recipe(file, [f"tokenizer.name={words}", *overrides])

    return make


def test_unknown_tokens_are_counted_and_reported(recipe_of, capsys):
    recipe = recipe_of(4)
    (source,) = prepare(recipe).sources.values()
    printed = capsys.readouterr().out
    for name in ("train", "validation"):
        split = source.splits[name]
        assert split.unknown_tokens == 4 * split.documents
        assert split.tokens == 101 * split.documents
        assert f"{split.tokens:,} tokens ({split.bytes / split.tokens:.2f} bytes a token), 3.96% of them unknown, " in printed
    manifest = read_manifest(recipe.data.prepared_dir)
    windows = Windows(recipe.data.prepared_dir, manifest.shards("train"), 32)
    stored = int((windows.take(np.arange(len(windows))) == 0).sum())
    assert 0 <= source.splits["train"].unknown_tokens - stored < 32


def test_a_tokenizer_that_does_not_know_the_text_is_refused_before_it_is_encoded(recipe_of, tmp_path, capsys):
    with pytest.raises(UserError) as error:
        prepare(recipe_of(40))
    assert str(error.value) == (
        f"tokenizer.name = '{tmp_path}/words': 39.6% of the tokens of the first documents of text are its unknown token, and"
        " tokenizer.max_unknown_fraction = 0.05: a model learns nothing from them; choose a tokenizer that knows this text, or"
        " raise the limit"
    )
    assert not list((tmp_path / "p.partial").glob("text-*"))


def test_the_limit_may_be_raised_without_preparing_again(recipe_of, tmp_path, capsys):
    raised = recipe_of(40, "tokenizer.max_unknown_fraction=0.5")
    manifest = prepare(raised)
    assert "39.60% of them unknown" in capsys.readouterr().out
    assert "tokenizer.max_unknown_fraction" not in manifest.made_from
    assert prepare(recipe_of(40, "tokenizer.max_unknown_fraction=0.6")) == manifest
    assert "tokenizer.max_unknown_fraction" not in raised.identity_fields()


def test_unknown_text_after_the_first_documents_is_refused_at_the_end(recipe_of, monkeypatch, tmp_path):
    """All parts are kept: with a higher limit the same command has only to join them."""
    from isoflop.prepare import setup as setting_up

    monkeypatch.setattr(setting_up, "COMPARED_BYTES", 300)
    with pytest.raises(UserError, match=r"of the tokens of train of text are its unknown token"):
        prepare(recipe_of(0, later=50))
    parts = {file: file.stat().st_mtime_ns for file in (tmp_path / "p.partial").glob("text-*")}
    assert parts
    prepare(recipe_of(0, "tokenizer.max_unknown_fraction=1.0", later=50))
    assert all((tmp_path / "p" / file.name).stat().st_mtime_ns == at for file, at in parts.items() if file.suffix == ".arrow")


def test_the_unknown_token_of_each_kind_of_model():
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False))
    assert unknown_id(unigram) == 0
    assert unknown_id(Tokenizer(models.Unigram([("a", -1.0), ("<unk>", 0.0)], unk_id=1, byte_fallback=False))) == 1
    assert unknown_id(Tokenizer(models.WordPiece({"[UNK]": 3, "a": 0}, unk_token="[UNK]"))) == 3
    assert unknown_id(Tokenizer(models.BPE({"a": 0}, [], unk_token="a"))) == 0
    assert unknown_id(Tokenizer(models.BPE({"a": 0}, []))) is None
    assert unknown_id(train_tokenizer([["some text"] * 9], 257).backend_tokenizer) is None


def test_an_earlier_manifest_is_still_read(toy_tree, tmp_path):
    """Without the counts of unknown tokens."""
    from pathlib import Path

    tree = json.loads((Path(toy_tree["data"]["prepared_dir"]) / "manifest.json").read_text())
    for split in tree["sources"]["text"]["splits"].values():
        assert split.pop("unknown_tokens") == 0
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    assert read_manifest(str(tmp_path)) == read_manifest(toy_tree["data"]["prepared_dir"])
