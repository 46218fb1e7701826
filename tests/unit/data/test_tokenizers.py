import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from isoflop.config.recipe_data import Tokenizer
from isoflop.data.tokenizers import END_OF_TEXT, load_tokenizer, open_tokenizer, tokenizer_hash, train_tokenizer
from isoflop.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("on_the_console")

TEXT = ["the quick brown fox jumps over the lazy dog\n" * 20, "a man, a plan, a canal: panama\n" * 20]
SMALL = train_tokenizer([TEXT], 280)


@given(st.text())
def test_any_string_is_encoded_and_decoded(text):
    assert SMALL.decode(SMALL(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_training_is_deterministic_and_yields_the_given_entries(tmp_path):
    for name in ("a", "b"):
        train_tokenizer([TEXT], 280).save_pretrained(tmp_path / name)
    assert tokenizer_hash(tmp_path / "a") == tokenizer_hash(tmp_path / "b")
    loaded, revision = load_tokenizer(Tokenizer(name=str(tmp_path / "a")))
    assert revision is None
    assert len(loaded) == 280
    assert loaded.eos_token == loaded.bos_token == END_OF_TEXT


def test_too_little_text_for_the_entries_is_refused():
    with pytest.raises(UserError, match=r"train_vocab_size = 5000: the training text yields only \d+ entries"):
        train_tokenizer([["abc abc"]], 5000)


def test_unusable_tokenizers_are_refused(tmp_path):
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


def with_post_processor(post_processor):
    backend = train_tokenizer([TEXT], 280).backend_tokenizer
    backend.add_special_tokens(["<s>", "<sep>"])
    backend.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, bos_token="<s>")


END, START, SEPARATOR = (END_OF_TEXT, 0), ("<s>", 280), ("<sep>", 281)


@pytest.mark.parametrize(
    ("post_processor", "added"),
    [
        (processors.TemplateProcessing(single=f"$A {END_OF_TEXT}", special_tokens=[END]), ([], [])),
        (processors.TemplateProcessing(single=f"<s> $A {END_OF_TEXT}", special_tokens=[START, END]), ([280], [])),
        (processors.TemplateProcessing(single=f"$A <sep> {END_OF_TEXT}", special_tokens=[SEPARATOR, END]), ([], [281])),
        (processors.RobertaProcessing(END, START), ([280], [])),
    ],
    ids=["an end", "a start and an end", "a separator and an end", "RoBERTa's"],
)
def test_a_tokenizer_that_ends_texts_no_longer_does_in_the_prepared_folder(post_processor, added, tmp_path, capsys):
    with_post_processor(post_processor).save_pretrained(tmp_path / "given")
    loaded, _ = load_tokenizer(Tokenizer(name=str(tmp_path / "given")))
    assert capsys.readouterr().out == (
        f"prepare: the tokenizer ends every text with {END_OF_TEXT}; its copy in the prepared folder does not, and each document"
        " gets it once\n"
    )
    loaded.save_pretrained(tmp_path / "prepared" / "tokenizer")
    tokenizer = open_tokenizer(str(tmp_path / "prepared"))
    plain = tokenizer("the quick fox", add_special_tokens=False)["input_ids"]
    assert tokenizer("the quick fox")["input_ids"] == [*added[0], *plain, *added[1]]
    load_tokenizer(Tokenizer(name=str(tmp_path / "prepared" / "tokenizer")))
    assert capsys.readouterr().out == ""


def test_the_setting_that_ends_texts_is_switched_off(tmp_path):
    """LLaMA's class rebuilds its post-processor from `add_bos_token` and `add_eos_token` whenever it is opened."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    given = LlamaTokenizer(vocab=vocabulary, merges=[("▁", "a")], add_bos_token=True, add_eos_token=True)
    assert given("a")["input_ids"] == [1, 5, 2]
    given.save_pretrained(tmp_path / "given")
    load_tokenizer(Tokenizer(name=str(tmp_path / "given")))[0].save_pretrained(tmp_path / "prepared" / "tokenizer")
    assert open_tokenizer(str(tmp_path / "prepared"))("a")["input_ids"] == [1, 5]


@pytest.mark.parametrize("start", [[], ["<s>"], [END_OF_TEXT]], ids=["nothing", "a start", "its end as a start"])
def test_a_tokenizer_that_does_not_end_texts_is_unchanged(start, tmp_path, capsys):
    special = [START, END] if start else []
    post_processor = processors.TemplateProcessing(single=[*start, "$A"], special_tokens=special)
    with_post_processor(post_processor).save_pretrained(tmp_path / "given")
    loaded, _ = load_tokenizer(Tokenizer(name=str(tmp_path / "given")))
    loaded.save_pretrained(tmp_path / "prepared")
    assert tokenizer_hash(tmp_path / "given") == tokenizer_hash(tmp_path / "prepared")
    assert capsys.readouterr().out == ""
