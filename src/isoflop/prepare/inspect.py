"""Print windows in the order of training, decoded, with the ends of documents marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from isoflop.config.recipe import Recipe
from isoflop.data.manifest import Manifest, read_manifest
from isoflop.data.windows import Windows


def show_windows(recipe: Recipe, count: int) -> None:
    """Print the first `count` windows of the recipe's training order."""
    manifest = read_manifest(recipe.data.prepared_dir)
    windows = Windows(recipe.data.prepared_dir, manifest.shards("train"), manifest.sequence_length)
    tokenizer = AutoTokenizer.from_pretrained(Path(recipe.data.prepared_dir) / "tokenizer")
    per_step = recipe.training.tokens_per_step // recipe.training.sequence_length
    order = manifest.order(recipe.data.shares(), recipe.seed)
    for position, index in enumerate(order.windows(np.arange(count, dtype=np.int64))):
        ids = windows.take(np.array([index]))[0]
        pieces = documents_of(ids, manifest.tokenizer.eos_token_id)
        step, row = divmod(position, per_step)
        print(
            f"━━━ window {index:,} of {len(windows):,} ({_source_of(manifest, int(index))}), step {step + 1}, row {row + 1}:"
            f" {len(ids):,} tokens of {len(pieces)} document(s)"
        )
        for piece in pieces:
            print(tokenizer.decode(piece))
            print(
                f"─── {len(piece):,} tokens, " + ("the document ends" if piece[-1] == manifest.tokenizer.eos_token_id else "cut")
            )


def documents_of(ids: NDArray[np.int64], eos_token_id: int) -> list[NDArray[np.int64]]:
    """Split a window into its documents, or parts of them, each with its end-of-text id where it ends."""
    ends = np.flatnonzero(ids == eos_token_id) + 1
    return [piece for piece in np.split(ids, ends) if len(piece)]


def _source_of(manifest: Manifest, index: int) -> str:
    ends = np.cumsum([split.windows for split in manifest.split("train")])
    return list(manifest.sources)[int(np.searchsorted(ends, index, side="right"))]
