"""Prepare: a recipe's text becomes packed, checksummed windows of token ids.

Entered by `prepare(recipe)`. Writes `data.prepared_dir`: `tokenizer/`, Arrow shards a split, `manifest.json`. The folder is
written aside and renamed, so that it is either whole or not there. Running it again does nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from isoflop.data.manifest import FILE_NAME, Manifest, Split, TokenizerFacts, made_from, read_manifest
from isoflop.data.sources import Documents, Origin, hash_files, open_source
from isoflop.data.tokenizers import load_tokenizer, tokenizer_hash, train_tokenizer
from isoflop.data.windows import SplitWriter, dtype_for
from isoflop.errors import UserError, is_disk_full
from isoflop.recipe import Recipe, differences


def prepare(recipe: Recipe) -> Manifest:
    """Write the prepared folder, or find it already there and unchanged."""
    folder = Path(recipe.data.prepared_dir)
    if folder.exists() and any(folder.iterdir()):
        return _require_unchanged(recipe, folder)
    print(f"prepare: reading {recipe.data.source.kind} source", flush=True)
    documents, origin = open_source(recipe.data)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        manifest = _write(recipe, documents, origin, aside)
    except Exception as error:
        if not is_disk_full(error):
            raise
        written = sum(file.stat().st_size for file in aside.rglob("*") if file.is_file())
        shutil.rmtree(aside)
        raise UserError(
            f"data.prepared_dir = {str(folder)!r}: no space left after {written:,} bytes, of which none are kept;"
            f" {shutil.disk_usage(folder.parent).free:,} bytes are free there: free more, or name a prepared_dir on another disk"
        ) from error
    aside.replace(folder)  # also over an empty folder
    for name, split in manifest.splits.items():
        print(
            f"prepare: {name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens"
            f" ({split.bytes / split.tokens:.2f} bytes a token), {split.windows:,} windows of {manifest.sequence_length}"
        )
    print(f"prepare: wrote {folder}", flush=True)
    return manifest


def _write(recipe: Recipe, documents: Documents, origin: Origin, aside: Path) -> Manifest:
    """Tokenizer, splits and manifest, into the folder aside."""
    tokenizer, tokenizer_revision = _tokenizer(recipe, documents)
    tokenizer.save_pretrained(aside / "tokenizer")
    num_ids = max(tokenizer.get_vocab().values()) + 1
    splits = {name: _write_split(name, recipe, documents, tokenizer, num_ids, aside) for name in ("train", "validation")}
    _require_windows(recipe, splits)
    manifest = Manifest(
        made_from=made_from(recipe),
        source_files=origin.files,
        dataset_revision=origin.revision,
        dtype=dtype_for(num_ids),
        sequence_length=recipe.training.sequence_length,
        tokenizer=TokenizerFacts(
            sha256=tokenizer_hash(aside / "tokenizer"),
            num_ids=num_ids,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            revision=tokenizer_revision,
        ),
        splits=splits,
    )
    (aside / FILE_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def _require_unchanged(recipe: Recipe, folder: Path) -> Manifest:
    """The manifest of a folder that is there. What came from the Hub stays at the commits it names; the rest is compared."""
    if not (folder / FILE_NAME).exists():
        raise UserError(
            f"data.prepared_dir = {str(folder)!r} exists and is not a prepared folder (no {FILE_NAME}); name another, or empty it"
        )
    manifest = read_manifest(str(folder))
    changes = differences(manifest.made_from, made_from(recipe))
    if not changes and manifest.dataset_revision is None:
        changes = differences(manifest.source_files, hash_files(recipe.data))
    if not changes and recipe.tokenizer.name is not None and manifest.tokenizer.revision is None:
        with tempfile.TemporaryDirectory() as copy:
            load_tokenizer(recipe.tokenizer)[0].save_pretrained(copy)
            changes = differences({"tokenizer.json": manifest.tokenizer.sha256}, {"tokenizer.json": tokenizer_hash(Path(copy))})
    if changes:
        more = f" and {len(changes) - 8} more" if len(changes) > 8 else ""
        raise UserError(
            f"data.prepared_dir = {str(folder)!r} was prepared from something else: {'; '.join(changes[:8])}{more};"
            " name another prepared_dir or delete this one"
        )
    print(f"prepare: {folder} is already prepared and nothing changed", flush=True)
    return manifest


def _tokenizer(recipe: Recipe, documents: Documents) -> tuple[Any, str | None]:
    if recipe.tokenizer.train_vocab_size is None:
        return load_tokenizer(recipe.tokenizer)
    print(f"prepare: training a byte-level BPE tokenizer of {recipe.tokenizer.train_vocab_size:,} entries", flush=True)
    return train_tokenizer(documents.batches("train"), recipe.tokenizer.train_vocab_size), None


def _write_split(name: str, recipe: Recipe, documents: Documents, tokenizer: Any, num_ids: int, aside: Path) -> Split:
    """Tokenize one split: each document as the tokenizer encodes it by default (with its BOS, if it adds one), then EOS."""
    writer = SplitWriter(aside, name, recipe.training.sequence_length, dtype_for(num_ids), num_ids)
    encoder, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    encoder.encode_special_tokens = True  # the text of a special token inside a document is plain text
    encoder.no_truncation()
    with tqdm(desc=f"tokenize {name}", unit="tok", unit_scale=True) as progress:
        for texts in documents.batches(name):
            encodings = encoder.encode_batch_fast(texts, add_special_tokens=True)
            ids = np.concatenate([np.asarray([*encoding.ids, eos], dtype=np.int64) for encoding in encodings])
            writer.add(ids, documents=len(texts), num_bytes=sum(len(text.encode()) for text in texts))
            progress.update(len(ids))
    return writer.close()


def _require_windows(recipe: Recipe, splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        if split.windows == 0:
            raise UserError(
                f"data.source gives no whole {name} window: {split.documents} document(s), {split.tokens} tokens, and"
                f" training.sequence_length = {recipe.training.sequence_length}; give it more text, "
                + ("shorten the window" if name == "train" else "raise data.validation_fraction, or split into more documents")
            )
