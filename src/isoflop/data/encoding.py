"""Encode text to token ids with the fastest library that gives the tokenizer's own ids.

gigatoken encodes tens of times faster than `tokenizers`, the reference implementation. It must give the same ids on the corpus's
first documents, on odd strings, and on a sample of every shard. Where it does not, `tokenizers` encodes the entire corpus.
"""

from __future__ import annotations

import functools
import json
import random
import unicodedata
from typing import Any, Literal, Protocol

import awkward as ak
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from gigatoken import gigatoken_rs
from numpy.typing import NDArray
from tokenizers import Tokenizer as FastTokenizer

from isoflop.data.order import keyed_uniform
from isoflop.utils.errors import UserError

Engine = Literal["gigatoken", "tokenizers"]
Ids = NDArray[np.uint32]

SAMPLED = 1 / 8192  # of the documents are encoded by both: under 1% of the time at a speed of 60 to 1
LONGEST_SAMPLED_BYTES = 1 << 16
_PLANES_IN_USE = 0x40000  # above it Unicode has only tags and variation selectors (U+E0001 to U+E01EF) and private use


class EngineDiffers(Exception):
    """gigatoken gave other ids than `tokenizers`; the message quotes the text."""


class _Backend(Protocol):
    def __call__(self, texts: pa.LargeStringArray) -> tuple[Ids, NDArray[np.int64]]:
        """Return the concatenated ids of all texts, and the number of each; nothing is added."""


def added_ids(backend: FastTokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and after a text by default."""
    added, plain = backend.encode("x").ids, backend.encode("x", add_special_tokens=False).ids
    at = next(i for i in range(len(added)) if added[i : i + len(plain)] == plain)
    return added[:at], added[at + len(plain) :]


def unknown_id(backend: FastTokenizer) -> int | None:
    """Return the id of a tokenizer's unknown token; None where it has none."""
    model: dict[str, Any] = json.loads(backend.to_str())["model"]
    if model["type"] == "Unigram":
        found: int | None = model.get("unk_id")
        return found
    return backend.token_to_id(model["unk_token"]) if model.get("unk_token") else None


class Encoder:
    """Encodes documents as the tokenizer does by default (with its BOS, if it adds one), each followed by one end-of-text id.

    Where the BOS is the end-of-text token, that of the previous document serves as BOS. The text of a special token inside a
    document is plain text. `threads` lets gigatoken use a thread pool.
    """

    def __init__(self, backend: FastTokenizer, eos_token_id: int, engine: Engine, threads: bool) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.num_ids = max(backend.get_vocab().values()) + 1
        self.unknown_id = unknown_id(backend)
        self._eos = eos_token_id
        before, after = ([one for one in added if one != eos_token_id] for added in added_ids(backend))
        self._before, self._after = before, [*after, eos_token_id]
        self._reference = _reference(backend)
        self._encode = self._reference if engine == "tokenizers" else _gigatoken(backend, threads)
        self._engine = engine

    def __call__(self, texts: pa.LargeStringArray) -> tuple[Ids, NDArray[np.int64]]:
        """Return the concatenated ids of all documents, (tokens,), and the tokens of each, (documents,)."""
        ids, lengths = self._encode(texts)
        if len(ids) and ids.max() >= self.num_ids:
            raise UserError(
                f"the tokenizer gave id {ids.max()}, and its vocabulary has {self.num_ids}: fix its"
                " tokenizer.json, which contradicts itself"
            )
        ends = np.cumsum(lengths)
        if (ids == self._eos).any():
            document = int(np.searchsorted(ends, int(np.flatnonzero(ids == self._eos)[0]), side="right"))
            raise UserError(
                f"the end-of-text token (id {self._eos}) also comes out of text, {texts[document].as_py()[:60]!r}: documents"
                " could not be separated; give the tokenizer an end-of-text token of its own, marked as special"
            )
        width = len(self._before) + len(self._after)
        places = np.stack([ends - lengths] * len(self._before) + [ends] * len(self._after), axis=1).reshape(-1)
        return np.insert(ids, places, np.tile(self._before + self._after, len(lengths))), lengths + width

    def check(self, texts: pa.LargeStringArray) -> None:
        """Raise `EngineDiffers` where `tokenizers` gives other ids."""
        if self._engine == "tokenizers" or not len(texts):
            return
        (ids, lengths), (expected, expected_lengths) = self._encode(texts), self._reference(texts)
        if np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected):
            return
        starts, expected_starts = np.cumsum(lengths) - lengths, np.cumsum(expected_lengths) - expected_lengths
        for text, start, length, other, other_length in zip(
            texts.to_pylist(), starts, lengths, expected_starts, expected_lengths, strict=True
        ):
            if not np.array_equal(ids[start : start + length], expected[other : other + other_length]):
                raise EngineDiffers(f"{text[:80]!r}{' ...' if len(text) > 80 else ''}")

    def check_sample(self, rows: NDArray[np.int64], texts: pa.LargeStringArray, first: bool) -> None:
        """Check one document in 8,192, and with `first` the first one, as at the start of a shard."""
        chosen = keyed_uniform(0, rows) < SAMPLED
        chosen[: int(first)] = True
        chosen &= pc.binary_length(texts).to_numpy() < LONGEST_SAMPLED_BYTES
        self.check(texts.filter(pa.array(chosen)))


def _reference(backend: FastTokenizer) -> _Backend:
    def encode(texts: pa.LargeStringArray) -> tuple[Ids, NDArray[np.int64]]:
        encodings = backend.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        parts = [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return np.concatenate([*parts, np.empty(0, np.uint32)]), lengths

    return encode


@functools.lru_cache(maxsize=1)  # a quarter of a second for 32,000 entries
def _load_gigatoken(tokenizer_json: str) -> Any:
    """Raises `EngineDiffers` where gigatoken cannot read the tokenizer."""
    described: dict[str, Any] = json.loads(tokenizer_json)
    described["added_tokens"] = [token for token in described["added_tokens"] if not token["special"]]
    try:
        return gigatoken_rs.load_hf_json(json.dumps(described))
    except BaseException as error:  # its panics are not of Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise EngineDiffers(f"it cannot read this tokenizer: {error}") from error


def _gigatoken(backend: FastTokenizer, threads: bool) -> _Backend:
    tokenizer, reference = _load_gigatoken(backend.to_str()), _reference(backend)

    def encode(texts: pa.LargeStringArray) -> tuple[Ids, NDArray[np.int64]]:
        if not len(texts):
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        encoded = tokenizer.encode_batch(ak.from_arrow(texts), parallel=threads)
        ids, lengths = np.asarray(ak.flatten(encoded)), np.asarray(ak.num(encoded)).astype(np.int64)
        others = np.flatnonzero(pc.invert(pc.string_is_ascii(texts)))
        places = others[np.asarray(pc.match_substring_regex(texts.take(others), unassigned()))]
        if not len(places):
            return ids, lengths
        pieces = np.split(ids, np.cumsum(lengths)[:-1])
        their_ids, their_lengths = reference(texts.take(places))
        for place, piece in zip(places, np.split(their_ids, np.cumsum(their_lengths)[:-1]), strict=True):
            pieces[place], lengths[place] = piece, len(piece)
        return np.concatenate(pieces), lengths

    return encode


@functools.cache
def unassigned() -> str:
    """Return a pattern for the characters that Python's Unicode version does not assign (14.0 in Python 3.11).

    Whether such a character is a letter, and so where words end, depends on a library's Unicode version: U+16EC1 became one in
    17.0. `tokenizers` encodes documents with such a character, some in a million.
    """
    unknown = np.array([unicodedata.category(chr(code)) == "Cn" for code in range(_PLANES_IN_USE)], dtype=np.int8)
    borders = np.flatnonzero(np.diff(unknown, prepend=0, append=0)).reshape(-1, 2)  # first of a run, first after it
    runs = "".join(f"\\x{{{first:X}}}-\\x{{{after - 1:X}}}" for first, after in borders)
    return f"[{runs}\\x{{{_PLANES_IN_USE:X}}}-\\x{{DFFFF}}\\x{{E01F0}}-\\x{{EFFFF}}]"


_ODD = (
    "", " ", "  ", "\n", " \n ", "\t\t", "\r\n\r\n", "\0", "\x00\x01\x7f", " " * 77, "\n" * 300, " \t" * 50, "a" * 3000,
    "é" * 999, "I'm you'll we'VE they'd 'S's ''", "1234567890 12 345,678.90 ½ ²³ \u0663\u0664 \u4e00",
    "don\u2019t \u201cquote\u201d \u2014 \u2026", "e\u0301 \u00e9 \u1e9b\u0323 \ufb01 \u0130i \u00df \u03c2",
    "\u200d\u200b\u00a0\u3000\u2028\u2029\u0085\ufeff", "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b \ud55c\uad6d\uc5b4", "\ufffd \uffff \U0010ffff \ue000",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
)  # fmt: skip
_PLANES = (0x20, 0x7F), (0x80, 0x24F), (0x370, 0x6FF), (0x900, 0xDFF), (0x2000, 0x2BFF), (0x3000, 0xD7FF), (0x1F300, 0x1FAFF)


def odd_strings(special_tokens: list[str]) -> list[str]:
    """Return strings on which tokenizers are likely to differ: whitespace, Unicode, invalid bytes, special tokens, noise."""
    rng = random.Random(0)
    odd = [*_ODD, *(bytes(rng.randrange(256) for _ in range(200)).decode(how, "replace") for how in ("utf-8", "cp1252"))]
    odd += [template.format(token) for token in special_tokens[:32] for template in ("{0}", "a{0}b", " {0} \n{0}{0}", "<{0}>")]
    for _ in range(300):
        plane, length = rng.choice(_PLANES), rng.randrange(1, 80)
        odd.append("".join(rng.choice([" ", " ", "\n", "'", "1", "a", chr(rng.randrange(*plane))]) for _ in range(length)))
    return odd


def choose_engine(backend: FastTokenizer, eos_token_id: int, first_texts: pa.LargeStringArray) -> tuple[Engine, str]:
    """Return the engine for a corpus, and why, from comparing both on its first documents and on odd strings."""
    special = [token.content for token in backend.get_added_tokens_decoder().values()]
    odd = pa.array(odd_strings(special), pa.large_string())
    try:
        encoder = Encoder(backend, eos_token_id, "gigatoken", threads=False)
        for texts in (first_texts, odd):
            encoder.check(texts)
    except EngineDiffers as difference:
        return "tokenizers", f"gigatoken does not give this tokenizer's ids ({difference}); tokenizers encodes, many times slower"
    return "gigatoken", f"gigatoken gives the ids of tokenizers on {len(first_texts)} first documents and {len(odd)} odd strings"
