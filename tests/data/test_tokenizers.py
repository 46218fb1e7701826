import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from isoflop.data.tokenizers import END_OF_TEXT, load_tokenizer, tokenizer_hash, train_tokenizer
from isoflop.errors import UserError
from isoflop.recipe_data import Tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog\n" * 20, "a man, a plan, a canal: panama\n" * 20]
SMALL = train_tokenizer([TEXT], 280)


@given(st.text())
def test_any_string_survives(text):
    assert SMALL.decode(SMALL(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_training_is_repeatable_and_has_the_entries_asked_for(tmp_path):
    for name in ("a", "b"):
        train_tokenizer([TEXT], 280).save_pretrained(tmp_path / name)
    assert tokenizer_hash(tmp_path / "a") == tokenizer_hash(tmp_path / "b")
    loaded, revision = load_tokenizer(Tokenizer(name=str(tmp_path / "a")))
    assert revision is None
    assert len(loaded) == 280
    assert loaded.eos_token == loaded.bos_token == END_OF_TEXT


def test_too_little_text_for_the_entries_is_said():
    with pytest.raises(UserError, match=r"train_vocab_size = 5000: the training text yields only \d+ entries"):
        train_tokenizer([["abc abc"]], 5000)


def test_tokenizers_that_cannot_serve(tmp_path):
    words = FastTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(Tokenizer(name=str(tmp_path / "no_eos")))
    with pytest.raises(
        UserError, match=r"tokenizer.name = 'someone/nowhere' at revision 'v2' cannot be reached.*or give a local folder"
    ):
        load_tokenizer(Tokenizer(name="someone/nowhere", revision="v2"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"tokenizer.name = .*empty' cannot be loaded"):
        load_tokenizer(Tokenizer(name=str(tmp_path / "empty")))
