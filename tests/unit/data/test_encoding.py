import json

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from isoflop.data import encoding
from isoflop.data.encoding import Encoder, EngineDiffers, choose_engine, odd_strings
from isoflop.data.tokenizers import train_tokenizer
from isoflop.utils.errors import UserError

TEXTS = ["Some text, and some more text.", "def read(self, size=-1):\n    return self._buffer\n", "naïve café — 12345 words"] * 30


def gpt2_like():
    return train_tokenizer([TEXTS], 300).backend_tokenizer, 0


def llama2_like():
    """SentencePiece's way: spaces are a letter, no words, single bytes for what is unknown, a BOS."""
    tokens = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *tokens], show_progress=False)
    tokenizer.train_from_iterator([word for text in TEXTS for word in text.split(" ")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] not in tokens]
    return Tokenizer.from_str(json.dumps(described)), 2


def llama3_like():
    """tiktoken's way: another pattern of words, whole words looked up before merges, a BOS."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return tokenizer, 1


FAMILIES = {"gpt2": gpt2_like, "llama2": llama2_like, "llama3": llama3_like}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES, scope="module")
def family(request):
    return request.param()


def strings(texts):
    return pa.array(texts, pa.large_string())


def test_gigatoken_is_chosen_for_every_family(family):
    tokenizer, eos = family
    engine, why = choose_engine(tokenizer, eos, strings(TEXTS))
    assert engine == "gigatoken"
    odd = len(odd_strings([f"special {i}" for i in range(eos + 1)]))
    assert why == f"gigatoken gives the ids of tokenizers on 90 first documents and {odd} odd strings"


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=12))
def test_ids_are_those_of_the_tokenizer_by_default_and_the_end_of_text(family, texts):
    tokenizer, eos = family
    ids, lengths = Encoder(tokenizer, eos, "gigatoken", threads=False)(strings(texts))
    assert ids.dtype == np.uint32
    pieces = np.split(ids, np.cumsum(lengths)[:-1]) if texts else []
    assert [piece.tolist() for piece in pieces] == [[*tokenizer.encode(text).ids, eos] for text in texts]


POST_PROCESSORS = {
    "nothing": (None, []),
    "a BOS": (processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]), [1]),
    "an end": (processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)]), []),
    "both": (processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]), [1]),
    "both, by BERT's": (processors.BertProcessing(("</s>", 2), ("<s>", 1)), [1]),
    "its end first": (processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)]), []),
}


@pytest.mark.parametrize("case", POST_PROCESSORS)
@pytest.mark.parametrize("engine", ["gigatoken", "tokenizers"])
def test_a_document_has_one_end_of_text_whatever_the_tokenizer_adds(case, engine):
    tokenizer, eos = llama2_like()
    tokenizer.post_processor, before = POST_PROCESSORS[case]
    texts = ["some text", "", "other </s> words"]
    ids, lengths = Encoder(tokenizer, eos, engine, threads=False)(strings(texts))
    tokenizer.encode_special_tokens = True
    plain = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids.tolist() == [one for document in plain for one in (*before, *document, eos)]
    assert lengths.tolist() == [len(before) + len(document) + 1 for document in plain]
    assert (ids == eos).sum() == len(texts)


def test_both_engines_and_both_ways_of_running_agree(family):
    tokenizer, eos = family
    texts = strings([*TEXTS, *odd_strings(["<s>", "<|endoftext|>"])])
    expected = Encoder(tokenizer, eos, "tokenizers", threads=False)(texts)
    for threads in (False, True):
        for got in (
            Encoder(tokenizer, eos, "gigatoken", threads)(texts),
            Encoder(tokenizer, eos, "gigatoken", threads)(texts[:]),
        ):
            assert np.array_equal(got[0], expected[0])
            assert np.array_equal(got[1], expected[1])
    part = Encoder(tokenizer, eos, "gigatoken", False)(texts[7:31])  # a slice of a larger buffer
    assert part[0].tolist() == expected[0][expected[1][:7].sum() : expected[1][:31].sum()].tolist()


def test_special_tokens_in_a_document_are_plain_text(family):
    tokenizer, eos = family
    name = tokenizer.id_to_token(eos)
    ids, _ = Encoder(tokenizer, eos, "gigatoken", threads=False)(strings([f"before {name} after"]))
    assert (ids == eos).sum() == 1
    assert ids[-1] == eos


def test_tokenizers_encodes_what_gigatoken_cannot_read():
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    engine, why = choose_engine(words, 2, strings(["a b a"]))
    assert engine == "tokenizers"
    assert "it cannot read this tokenizer: Unsupported model type" in why
    assert Encoder(words, 2, engine, threads=False)(strings(["a b a"]))[0].tolist() == [0, 1, 0, 2]


def test_a_difference_is_found_and_its_text_named(monkeypatch):
    tokenizer, eos = gpt2_like()
    real = encoding._gigatoken

    def wrong_about_tabs(backend, threads):
        encode = real(backend, threads)

        def with_a_fault(texts):
            ids, lengths = encode(texts)
            for i, text in enumerate(texts.to_pylist()):
                if "\t" in text:
                    ids = ids.copy()
                    ids[lengths[:i].sum()] += 1
            return ids, lengths

        return with_a_fault

    monkeypatch.setattr(encoding, "_gigatoken", wrong_about_tabs)
    assert choose_engine(tokenizer, eos, strings(["no such thing"]))[0] == "tokenizers"  # an odd string tells
    encoder = Encoder(tokenizer, eos, "gigatoken", threads=False)
    encoder.check(strings(["fine", "fine too"]))
    with pytest.raises(EngineDiffers, match=r"a\\tb"):
        encoder.check(strings(["fine", "a\tb"]))
    with pytest.raises(EngineDiffers):
        encoder.check_sample(np.array([0]), strings(["a\tb"]), first=True)
    encoder.check_sample(np.array([0]), strings(["a\tb" * 40_000]), first=True)  # too long to be encoded twice
    rows = np.arange(200_000)
    with pytest.raises(EngineDiffers):  # one in 8,192 is looked at
        encoder.check_sample(rows, strings(["a\tb"] * len(rows)), first=False)


def test_ids_that_the_tokenizer_does_not_have(monkeypatch):
    tokenizer, eos = gpt2_like()
    monkeypatch.setattr(encoding, "_gigatoken", lambda *_: lambda _: (np.array([70_000], np.uint32), np.array([1])))
    with pytest.raises(UserError, match=r"gave id 70000, and its vocabulary has 300: fix its tokenizer.json"):
        Encoder(tokenizer, eos, "gigatoken", threads=False)(strings(["a"]))


def test_an_end_of_text_that_text_can_hold_is_refused():
    tokenizer, _ = gpt2_like()
    with pytest.raises(
        UserError, match=r"the end-of-text token \(id \d+\) also comes out of text, 'x\.': documents could not be separated"
    ):
        Encoder(tokenizer, tokenizer.token_to_id("."), "gigatoken", threads=False)(strings(["fine", "x."]))


def test_every_character_is_encoded_as_the_tokenizer_does(family):
    """In a word, after a digit, a space and a sign; also those that the two libraries' Unicode tables tell apart."""
    tokenizer, eos = family
    codes = [chr(code) for code in (*range(0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0xFFFE), *range(0x10000, 0x1FFFE))]
    codes = [code for code in codes if not 0xD800 <= ord(code) < 0xE000]
    texts = strings([f'a{c}b 1{c}2 {c} "{c}",' for c in codes])
    fast, slow = (Encoder(tokenizer, eos, engine, threads=False)(texts) for engine in ("gigatoken", "tokenizers"))
    assert np.array_equal(fast[0], slow[0])
    assert np.array_equal(fast[1], slow[1])


def test_tokenizers_encodes_unassigned_characters():
    found = pa.compute.match_substring_regex(
        strings(["plain", "\U00016ec1", "x\u0378y", "\u00e9\u4e00\U0001f600", "\ufffe"]), encoding.unassigned()
    )
    assert found.to_pylist() == [False, True, True, False, True]
