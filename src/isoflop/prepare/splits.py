"""Check from sizes alone, before tokenizing, that training and validation get a window each."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from isoflop.config.recipe import Recipe
from isoflop.config.recipe_data import TextSource
from isoflop.data.documents import read_documents
from isoflop.data.manifest import SPLITS, SplitName
from isoflop.data.sources import OpenSource
from isoflop.prepare.corpus import PartName, in_validation, num_parts, table_of
from isoflop.utils.errors import UserError

# A byte becomes at most one token, and a tokenizer adds a few tokens to each document.
MOST_ADDED_TOKENS = 4
_log = logging.getLogger(__name__)


@dataclass
class Sizes:
    """Sizes of a source, or of as much of it as makes a window of each split."""

    rows: int = 0
    documents: Counter[SplitName] = field(default_factory=Counter)
    bytes: Counter[SplitName] = field(default_factory=Counter)

    def most_tokens(self, split: SplitName) -> int:
        """Return an upper bound of the tokens of a split."""
        return self.bytes[split] + MOST_ADDED_TOKENS * self.documents[split]

    def suffice(self, splits: tuple[SplitName, ...], window: int) -> bool:
        """Return whether there are two rows, and possibly a window of `window` tokens in each split."""
        return self.rows > 1 and all(self.most_tokens(split) >= window for split in splits)


def split_sources(recipe: Recipe, opened: dict[str, OpenSource]) -> dict[str, OpenSource]:
    """Return the sources; a source of a single document is split by position.

    Raises `UserError` where a split of a source is too small for a window.
    """
    split = dict(opened)
    for name in opened:
        sizes = _sizes(recipe, split, name)
        (table, *others), revision = split[name].tables, split[name].revision
        if sizes.rows == sizes.documents.total() == 1 and table.split is None and not others:
            fraction = recipe.data.validation_fraction
            split[name] = OpenSource([table.split_by_position(fraction)], revision)
            sizes = _sizes(recipe, split, name)
            held_out_bytes = f"{sizes.bytes['validation']:,}"
            _log.info(f"prepare: {name} is one document: its last {fraction:.4%}, {held_out_bytes} bytes, is validation")
        for part in SPLITS:
            if sizes.most_tokens(part) < recipe.training.sequence_length:
                raise no_window(recipe, name, part, sizes.documents[part], f"{sizes.bytes[part]:,} bytes")
    return split


def _sizes(recipe: Recipe, opened: dict[str, OpenSource], name: str) -> Sizes:
    """Read a source until each split has a window and there are two rows, or to its end."""
    found = Sizes()
    for part in (PartName(name, number) for number in range(num_parts(opened)[name])):
        table, number = table_of(opened, part)
        splits = SPLITS if table.split is None else (table.split,)
        if found.suffice(splits, recipe.training.sequence_length):
            continue
        for batch in read_documents(table, number, recipe.data.filter):
            found.rows += len(batch.rows) + batch.left_out.total()
            held_out = in_validation(recipe, opened, part, batch.rows)
            for split in SPLITS:
                chosen = held_out if split == "validation" else ~held_out
                found.documents[split] += int(chosen.sum())
                found.bytes[split] += int(pc.sum(pc.binary_length(batch.texts.filter(pa.array(chosen)))).as_py() or 0)
            if found.suffice(splits, recipe.training.sequence_length):
                break
    return found


def no_window(recipe: Recipe, source: str, split: SplitName, documents: int, amount: str) -> UserError:
    """Return the error for a source that has no window of a split."""
    several = len(recipe.data.sources()) > 1
    where = f"data.source.sources.{source}.source" if several else "data.source"
    way = f"{'lower' if split == 'train' else 'raise'} data.validation_fraction = {recipe.data.validation_fraction:g}"
    spec = recipe.data.sources()[source]
    by = isinstance(spec, TextSource) and spec.sample_by == "document"
    more = f", set {where}.sample_by=paragraph, which makes a document of each paragraph" if by else ""
    return UserError(
        f"{where} gives no complete {split} window: {documents} document(s), {amount}, and training.sequence_length ="
        f" {recipe.training.sequence_length}; {way}{more}, give it more text, or shorten the window"
    )
