"""The tokenizer a recipe names, or one trained on its data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from isoflop.data.hub import hub_commit, why_not
from isoflop.errors import UserError
from isoflop.recipe_data import Tokenizer
from isoflop.untrusted import MOST_JSON_BYTES, MOST_SHOWN, leaves_folder, read_json, shown

END_OF_TEXT = "<|endoftext|>"
# Keys of tokenizer_config.json that no tokenizer is saved with by a run or by prepare.
_REFUSED = {"auto_map": "code of its own, which is never run here"}
_REFUSED |= dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file"), "a file elsewhere, which is not opened")


def train_tokenizer(texts: Iterable[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A GPT-2 style byte-level BPE of `vocab_size` entries; any string survives encoding and decoding."""
    bpe = FastTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise UserError(
            f"tokenizer.train_vocab_size = {vocab_size}: the training text yields only {bpe.get_vocab_size()} entries;"
            " ask for fewer or give it more text"
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, unk_token=END_OF_TEXT)


def load_tokenizer(wanted: Tokenizer) -> tuple[Any, str | None]:
    """The fast tokenizer of a local folder or a Hub name, and the commit of the latter.

    Raises `UserError` where it cannot be loaded, has no fast form or no end-of-text token.
    """
    name = str(wanted.name)
    commit = None if Path(name).is_dir() else hub_commit("tokenizer.name", name, wanted.revision, "model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=commit or "main", trust_remote_code=False)
    except Exception as error:  # the Hub client's, the parser's and transformers' own: one remedy for all
        reason = why_not(error, name, "model") or f"{error}; it needs a tokenizer.json"
        raise UserError(f"tokenizer.name = {name!r} cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer.name = {name!r} has no fast form (tokenizer.json); convert it or choose one that has")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer.name = {name!r} has no end-of-text token, which joins documents; set its eos_token")
    return tokenizer, commit


def open_tokenizer(prepared_dir: str) -> Any:
    """The tokenizer of a prepared folder, without any code of its own. Raises `UserError` where it cannot be opened.

    The folder may come from somebody else: transformers is never asked to run what it brings, and never asks on the terminal.
    """
    folder = Path(prepared_dir) / "tokenizer"
    remedy = "copy the prepared folder again, or prepare it again with a tokenizer that transformers has"
    for file in (folder, *folder.rglob("*")):
        if outside := leaves_folder(file, Path(prepared_dir)):
            raise UserError(outside)
        if file.is_file() and file.stat().st_size > MOST_JSON_BYTES:
            raise UserError(f"{file} is larger than {MOST_JSON_BYTES:,} bytes, which no file of a tokenizer is; {remedy}")
    for name in ("tokenizer_config.json", "config.json"):
        config = read_json(folder / name, remedy) if (folder / name).exists() else {}
        for key in _REFUSED.keys() & config.keys():
            raise UserError(f"{folder / name}: {key} = {shown(config[key])}: the tokenizer asks for {_REFUSED[key]}; {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer.decode(tokenizer("a")["input_ids"])  # some of its settings matter first here
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers' many errors, and a panic of the tokenizers library, which is no Exception
        reason = " ".join(str(error).split())[:MOST_SHOWN]
        raise UserError(f"{folder} cannot be opened: {type(error).__name__}: {reason}; {remedy}") from None


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of `tokenizer.json`, the file that decides every id."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
