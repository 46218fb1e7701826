"""Prepare: a recipe's text becomes packed, checksummed windows of token ids.

Entered by `prepare(recipe)`. Writes `data.prepared_dir`: `tokenizer/`, Arrow shards a split, `manifest.json`. The folder is
written aside and renamed, so that it is either whole or not there. Running it again does nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from isoflop.data.manifest import FILE_NAME, Manifest, Split, TokenizerFacts, differences, made_from, read_manifest
from isoflop.data.sources import Documents, open_source
from isoflop.data.tokenizers import load_tokenizer, tokenizer_hash, train_tokenizer
from isoflop.data.windows import SplitWriter, dtype_for
from isoflop.errors import UserError
from isoflop.recipe import Recipe

FORMAT = 1


def prepare(recipe: Recipe) -> Manifest:
    """Write the prepared folder, or find it already there and unchanged."""
    folder = Path(recipe.data.prepared_dir)
    print(f"prepare: reading {recipe.data.source.kind} source", flush=True)
    documents, origin = open_source(recipe.data)
    if folder.exists():
        manifest = read_manifest(str(folder))
        changes = differences(
            manifest.made_from | manifest.source_files | {"dataset_revision": manifest.dataset_revision},
            made_from(recipe) | origin.files | {"dataset_revision": origin.revision},
        ) + _tokenizer_change(recipe, manifest)
        if changes:
            raise UserError(
                f"data.prepared_dir = {str(folder)!r} was prepared from something else: {'; '.join(changes[:8])}"
                f"{f' and {len(changes) - 8} more' if len(changes) > 8 else ''}; name another prepared_dir or delete this one"
            )
        print(f"prepare: {folder} is already prepared and nothing changed", flush=True)
        return manifest

    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tokenizer = _tokenizer(recipe, documents)
    tokenizer.save_pretrained(aside / "tokenizer")
    num_ids = max(tokenizer.get_vocab().values()) + 1
    splits = {name: _write_split(name, recipe, documents, tokenizer, num_ids, aside) for name in ("train", "validation")}
    _require_windows(recipe, splits)
    manifest = Manifest(
        format=FORMAT,
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
        ),
        splits=splits,
    )
    (aside / FILE_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    aside.rename(folder)
    for name, split in splits.items():
        print(
            f"prepare: {name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens"
            f" ({split.bytes / split.tokens:.2f} bytes a token), {split.windows:,} windows of {manifest.sequence_length}"
        )
    print(f"prepare: wrote {folder}", flush=True)
    return manifest


def _tokenizer(recipe: Recipe, documents: Documents) -> Any:
    if recipe.tokenizer.train_vocab_size is None:
        return load_tokenizer(recipe.tokenizer)
    print(f"prepare: training a byte-level BPE tokenizer of {recipe.tokenizer.train_vocab_size:,} entries", flush=True)
    return train_tokenizer(documents.batches("train"), recipe.tokenizer.train_vocab_size)


def _tokenizer_change(recipe: Recipe, manifest: Manifest) -> list[str]:
    """A tokenizer folder whose content changed under the same name."""
    name = recipe.tokenizer.name
    if name is None or not (Path(name) / "tokenizer.json").is_file():
        return []
    aside = Path(recipe.data.prepared_dir) / "tokenizer"
    same = (
        load_tokenizer(recipe.tokenizer).get_vocab()
        == load_tokenizer(recipe.tokenizer.model_copy(update={"name": str(aside)})).get_vocab()
    )
    return [] if same else [f"{name}/tokenizer.json: not the one the windows were made with"]


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
