"""Load the tokenizer that a recipe names, or train one on its data."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from isoflop.config.recipe_data import Tokenizer
from isoflop.data.hub import explain_hub_error, hub_commit, require_exists
from isoflop.utils.errors import UserError
from isoflop.utils.untrusted import MOST_JSON_BYTES, MOST_SHOWN, leaves_folder, read_json, shown

_log = logging.getLogger(__name__)
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
# No UTF-8 text contains these bytes (RFC 3629, section 3). A byte-level vocabulary names them by the characters of their numbers.
_UNUSED_BYTES = [chr(byte) for byte in range(0xFF, 0xF4, -1)]
# Keys of tokenizer_config.json that neither a run nor prepare writes.
_REFUSED = {"auto_map": "code of its own, which is never run here"}
_REFUSED |= dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file"), "a file elsewhere, which is not opened")


def train_tokenizer(texts: Iterable[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE as GPT-2's, of `vocab_size` entries; it encodes and decodes any string without loss."""
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
    """Load the fast tokenizer of a local folder or a Hub name; return it with the Hub's commit.

    Raises `UserError` where it cannot be loaded, or has no fast form or no end-of-text token.
    """
    name = str(wanted.name)
    require_exists("tokenizer.name", name)
    commit = None if Path(name).is_dir() else hub_commit("tokenizer.name", name, wanted.revision, "model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=commit or "main", trust_remote_code=False)
    except Exception as error:  # of the Hub client, the parser and transformers: one remedy for all
        reason = explain_hub_error(error, name, "model") or f"{error}; it needs a tokenizer.json"
        raise UserError(f"tokenizer.name = {name!r} cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer.name = {name!r} has no fast form (tokenizer.json); convert it or choose one that has")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer.name = {name!r} has no end-of-text token, which joins documents; set its eos_token")
    _remove_appended_eos(tokenizer)
    return tokenizer, commit


def _remove_appended_eos(tokenizer: Any) -> None:
    """Make a tokenizer not append its end-of-text: `prepare` adds it to documents, and a prompt must not end with it."""
    from isoflop.data.encoding import added_ids  # its imports are needed by prepare alone

    backend, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    if end not in added_ids(backend)[1]:
        return
    if getattr(tokenizer, "add_eos_token", False):  # a setting from which transformers builds a post-processor
        tokenizer.add_eos_token = tokenizer.init_kwargs["add_eos_token"] = False
    before, after = ([backend.id_to_token(one) for one in added if one != end] for added in added_ids(backend))
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}]
    )
    _log.info(
        f"prepare: the tokenizer ends every text with {tokenizer.eos_token}; its copy in the prepared folder does not, and each"
        " document gets it once"
    )


def open_tokenizer(prepared_dir: str) -> Any:
    """Open the tokenizer of a prepared folder without running code of its own. Raises `UserError` where it cannot be opened.

    The folder may be untrusted: transformers neither runs its code nor prompts on the terminal.
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
        tokenizer.decode(tokenizer("a")["input_ids"])  # some settings are first used here
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # errors of transformers, and panics of the tokenizers library, which are not of Exception
        reason = " ".join(str(error).split())[:MOST_SHOWN]
        raise UserError(f"{folder} cannot be opened: {type(error).__name__}: {reason}; {remedy}") from None


def set_pad_token(tokenizer: Any, num_ids: int) -> None:
    """Give a tokenizer a pad token other than its end-of-text, in place, for a model of `num_ids` rows.

    transformers' collators ignore pad tokens in the loss, so that a pad token equal to the end-of-text would hide the ends of
    texts from fine-tuning. No id changes. The pad token is its own one, else a row that no token uses, else the entry of a
    byte that no text contains, else the unknown token, else the end-of-text.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return
    if len(tokenizer) < num_ids or _free_byte(tokenizer.backend_tokenizer):
        tokenizer.add_special_tokens({"pad_token": PAD})
    else:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _free_byte(tokenizer: FastTokenizer) -> bool:
    """Rename the entry of a byte that no text contains to `PAD`, where a byte-level BPE has one that no other entry uses."""
    tree = json.loads(tokenizer.to_str())
    model = tree["model"]
    steps = tree["pre_tokenizer"] or {}
    byte_level = any(step.get("type") == "ByteLevel" for step in steps.get("pretokenizers", [steps]))
    if model["type"] != "BPE" or not byte_level:
        return False
    used = set("".join(token for token in model["vocab"] if len(token) > 1))
    for byte in _UNUSED_BYTES:
        if byte in model["vocab"] and byte not in used:
            model["vocab"][PAD] = model["vocab"].pop(byte)
            model["merges"] = [tuple(pair) for pair in model["merges"]]
            tokenizer.model = models.BPE(**{key: value for key, value in model.items() if key != "type" and value is not None})
            return True
    return False


def tokenizer_hash(folder: Path) -> str:
    """Return the SHA-256 of `tokenizer.json`, the file that decides every id."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
