"""Finished parts become a prepared folder: tails joined, a manifest written, the folder renamed. No window is copied."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from isoflop.data.contamination import overlaps
from isoflop.data.manifest import FILE_NAME, SPLITS, Manifest, Overlap, PreparedSource, Shard, Split, SplitName
from isoflop.data.windows import Ids, ShardWriter, Windows
from isoflop.disk import write_aside
from isoflop.errors import UserError
from isoflop.prepare.corpus import CORPUS_FILE, Facts, PartName, Record, read_document
from isoflop.prepare.part import LOOKUP_FILE
from isoflop.recipe import Recipe
from isoflop.recipe_file import explain_errors
from isoflop.untrusted import shown

# What prepare writes while parts gather, and leaves out of the prepared folder.
_OF_PARTS = re.compile(
    r"corpus\.json|engine\.json|lock(-\d+-of-\d+)?|tokenizer\.trained_on|contamination\.npz"
    r"|(survey|decided)-.+\.np[yz]|.+-\d{5}\.json|\..+\.partial|\.?.+-(train|validation)-(\d{5}|tails)-\d{3,}\.arrow(\.\d+)?"
)


def join(recipe: Recipe, facts: Facts, folder: Path) -> Manifest:
    """Join the parts in `folder` and rename it to the recipe's `prepared_dir`. Raises `UserError` where some are missing."""
    if list(facts.num_parts) != list(recipe.data.sources()):
        raise UserError(
            f"{folder}/{CORPUS_FILE}: num_parts are of {shown(list(facts.num_parts))}, and the recipe's sources are"
            f" {', '.join(recipe.data.sources())}; copy the folder again, or delete it and prepare it again"
        )
    records = _read_records(facts, folder)
    sources = {
        name: _join_source(recipe, facts, folder, name, [record for part, record in records.items() if part.source == name])
        for name in facts.num_parts
    }
    _require_windows(recipe, sources)
    contamination = _contamination(recipe, folder, list(records.values()))
    try:
        manifest = Manifest(
            made_from=facts.made_from,
            engine=facts.engine,
            dtype=facts.dtype,
            sequence_length=recipe.training.sequence_length,
            tokenizer=facts.tokenizer,
            sources=sources,
            contamination=contamination,
        )
    except ValidationError as error:  # of counts in the records that do not go together
        raise UserError(f"{folder}: {explain_errors(error, Manifest)}; delete it and prepare it again") from None
    write_aside(folder / FILE_NAME, manifest.model_dump_json(indent=1) + "\n")
    kept = {FILE_NAME, "tokenizer", *(shard.name for shard in manifest.shards())}
    for file in folder.iterdir():
        if file.name not in kept and _OF_PARTS.fullmatch(file.name) and file.is_file():
            file.unlink()
    folder.replace(recipe.data.prepared_dir)  # also over an empty folder
    return manifest


def _read_records(facts: Facts, folder: Path) -> dict[PartName, Record]:
    records, missing = {}, []
    for part in facts.parts():
        file = folder / f"{part}.json"
        record = read_document(file, Record) if file.exists() else None
        if record is None or not record.done or record.corpus != facts.digest():
            missing.append(str(part))
        else:
            records[part] = record
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(facts.parts())} parts are not finished, or were made by other values or by another"
            f" engine than {CORPUS_FILE} says ({', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}): prepare them, or"
            " copy them here"
        )
    return records


def _join_source(recipe: Recipe, facts: Facts, folder: Path, name: str, records: list[Record]) -> PreparedSource:
    left_out = Counter[str]()
    files: dict[str, str] = {}
    for record in records:
        left_out.update(record.left_out)
        files |= record.files
    return PreparedSource(
        files=dict(sorted(files.items())),
        revision=facts.revisions[name],
        left_out={reason: count for reason, count in left_out.items() if count},
        splits={split: _join_split(recipe, facts, folder, name, split, records) for split in SPLITS},
    )


def _join_split(recipe: Recipe, facts: Facts, folder: Path, name: str, split: SplitName, records: list[Record]) -> Split:
    """Shards of all parts in their order, then one of the windows that their tails make together."""
    parts, length = [record.splits[split] for record in records], recipe.training.sequence_length
    shards = [shard for part in parts for shard in part.shards]
    ids = np.array([token for part in parts for token in part.tail], dtype=np.int64)
    _require_ids(facts, folder, ids)
    tails: Ids = ids.astype(facts.dtype)
    whole = len(tails) // length * length
    left, repeated = len(tails) - whole, 0
    writer = ShardWriter(folder, f"{name}-{split}-tails", length, facts.dtype)
    writer.add(tails[:whole])
    if recipe.data.tail == "overlap" and left and (whole or shards):
        writer.add((tails if whole else np.concatenate([_last_window(folder, shards, length), tails]))[-length:])
        left, repeated = 0, length - left
    writer.cut()
    shards += writer.shards
    return Split(
        documents=sum(part.documents for part in parts),
        bytes=sum(part.bytes for part in parts),
        tokens=sum(part.tokens for part in parts),
        windows=sum(shard.windows for shard in shards),
        dropped_tokens=left,
        repeated_tokens=repeated,
        unigram_entropy_nats=_unigram_entropy(folder, shards, facts, length) if split == "validation" else None,
        shards=shards,
    )


def _require_ids(facts: Facts, folder: Path, ids: NDArray[np.integer]) -> None:
    if len(ids) and int(ids.max()) >= facts.tokenizer.num_ids:
        raise UserError(
            f"{folder}: a part holds the id {int(ids.max())}, and its tokenizer has {facts.tokenizer.num_ids} ids; copy the parts"
            " again, or delete the folder and prepare it again"
        )


def _last_window(folder: Path, shards: list[Shard], length: int) -> NDArray[np.int64]:
    windows = Windows(folder, shards[-1:], length)
    last: NDArray[np.int64] = windows.take(np.array([len(windows) - 1]))[0]
    return last


def _unigram_entropy(folder: Path, shards: list[Shard], facts: Facts, length: int) -> float:
    counts = np.zeros(facts.tokenizer.num_ids, dtype=np.int64)
    for block in Windows(folder, shards, length).blocks:
        _require_ids(facts, folder, block.reshape(-1))
        counts += np.bincount(block.reshape(-1), minlength=len(counts))
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log(share)).sum())


def _contamination(recipe: Recipe, folder: Path, records: list[Record]) -> dict[str, Overlap]:
    if recipe.data.contamination is None:
        return {}
    found = np.array([place for record in records for place in record.ngrams_found], dtype=np.int64)
    try:
        return overlaps(folder / LOOKUP_FILE, found)
    except Exception as error:  # numpy's and the zip reader's, of a file that is damaged or not of these parts
        raise UserError(
            f"{folder / LOOKUP_FILE} cannot be read ({type(error).__name__}: {shown(str(error))}); delete it, and the same"
            " command writes it again"
        ) from None


def _require_windows(recipe: Recipe, sources: dict[str, PreparedSource]) -> None:
    for source, prepared in sources.items():
        for name, split in prepared.splits.items():
            if split.windows == 0:
                where = "data.source" if len(sources) == 1 else f"data.source.sources.{source}"
                raise UserError(
                    f"{where} gives no whole {name} window: {split.documents} document(s), {split.tokens} tokens, and"
                    f" training.sequence_length = {recipe.training.sequence_length}; give it more text, "
                    + (
                        "shorten the window"
                        if name == "train"
                        else "raise data.validation_fraction, or split into more documents"
                    )
                )
