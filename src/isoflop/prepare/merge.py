"""Join finished parts into a prepared folder: join their tails, write a manifest, rename the folder. No window is copied."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from isoflop.config.loading import explain_errors
from isoflop.config.recipe import Recipe
from isoflop.data.manifest import FILE_NAME, SPLITS, Manifest, PreparedSource, Shard, Split, SplitName
from isoflop.data.windows import Ids, ShardWriter, Windows
from isoflop.prepare.corpus import CORPUS_FILE, CorpusSpec, PartName, PartProgress, read_document
from isoflop.prepare.splits import no_window
from isoflop.prepare.unknown import require_known_tokens
from isoflop.utils.errors import UserError
from isoflop.utils.io import atomic_write
from isoflop.utils.untrusted import shown

# Files of the folder of parts that the prepared folder does not keep. Earlier versions wrote contamination.npz.
_OF_PARTS = re.compile(
    r"corpus\.json|engine\.json|lock(-\d+-of-\d+)?|tokenizer\.trained_on|contamination\.npz"
    r"|(survey|decided)-.+\.np[yz]|.+-\d{5}\.json|\..+\.partial|\.?.+-(train|validation)-(\d{5}|tails)-\d{3,}\.arrow(\.\d+)?"
)


def join_parts(recipe: Recipe, spec: CorpusSpec, folder: Path) -> Manifest:
    """Join the parts in `folder` and rename it to the recipe's `prepared_dir`. Raises `UserError` where parts are missing."""
    if list(spec.num_parts) != list(recipe.data.sources()):
        raise UserError(
            f"{folder}/{CORPUS_FILE}: num_parts names {shown(list(spec.num_parts))}, and the recipe's sources are"
            f" {', '.join(recipe.data.sources())}; copy the folder again, or delete it and prepare it again"
        )
    progress = _read_all_progress(spec, folder)
    sources = {
        name: _join_source(recipe, spec, folder, name, [record for part, record in progress.items() if part.source == name])
        for name in spec.num_parts
    }
    _require_usable(recipe, sources)
    try:
        manifest = Manifest(
            made_from=spec.made_from,
            engine=spec.engine,
            dtype=spec.dtype,
            sequence_length=recipe.training.sequence_length,
            tokenizer=spec.tokenizer,
            sources=sources,
        )
    except ValidationError as error:  # of counts that contradict each other
        raise UserError(f"{folder}: {explain_errors(error, Manifest)}; delete it and prepare it again") from None
    atomic_write(folder / FILE_NAME, manifest.model_dump_json(indent=1) + "\n", durable=True)
    kept = {FILE_NAME, "tokenizer", *(shard.name for shard in manifest.shards())}
    for file in folder.iterdir():
        if file.name not in kept and _OF_PARTS.fullmatch(file.name) and file.is_file():
            file.unlink()
    folder.replace(recipe.data.prepared_dir)  # also over an empty folder
    return manifest


def _read_all_progress(spec: CorpusSpec, folder: Path) -> dict[PartName, PartProgress]:
    progress, missing = {}, []
    for part in spec.parts():
        file = folder / f"{part}.json"
        record = read_document(file, PartProgress) if file.exists() else None
        if record is None or not record.done or record.corpus != spec.digest():
            missing.append(str(part))
        else:
            progress[part] = record
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(spec.parts())} parts are not finished, or were made from other values or by"
            f" another engine than {CORPUS_FILE} says ({', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}): prepare"
            " them, or copy them here"
        )
    return progress


def _join_source(recipe: Recipe, spec: CorpusSpec, folder: Path, name: str, progress: list[PartProgress]) -> PreparedSource:
    left_out = Counter[str]()
    files: dict[str, str] = {}
    for record in progress:
        left_out.update(record.left_out)
        files |= record.files
    return PreparedSource(
        files=dict(sorted(files.items())),
        revision=spec.revisions[name],
        left_out={reason: count for reason, count in left_out.items() if count},
        splits={split: _join_split(recipe, spec, folder, name, split, progress) for split in SPLITS},
    )


def _join_split(
    recipe: Recipe, spec: CorpusSpec, folder: Path, name: str, split: SplitName, progress: list[PartProgress]
) -> Split:
    """Return the shards of all parts in order, then a shard of the windows that their tails fill together."""
    parts, length = [record.splits[split] for record in progress], recipe.training.sequence_length
    shards = [shard for part in parts for shard in part.shards]
    ids = np.array([token for part in parts for token in part.tail], dtype=np.int64)
    _require_ids(spec, folder, ids)
    tails: Ids = ids.astype(spec.dtype)
    complete = len(tails) // length * length
    dropped, repeated = len(tails) - complete, 0
    writer = ShardWriter(folder, f"{name}-{split}-tails", length, spec.dtype)
    writer.add(tails[:complete])
    if recipe.data.tail == "overlap" and dropped and (complete or shards):
        writer.add((tails if complete else np.concatenate([_last_window(folder, shards, length), tails]))[-length:])
        dropped, repeated = 0, length - dropped
    writer.cut()
    shards += writer.shards
    return Split(
        documents=sum(part.documents for part in parts),
        bytes=sum(part.bytes for part in parts),
        tokens=sum(part.tokens for part in parts),
        unknown_tokens=sum(part.unknown_tokens for part in parts),
        windows=sum(shard.windows for shard in shards),
        dropped_tokens=dropped,
        repeated_tokens=repeated,
        unigram_entropy_nats=_unigram_entropy(folder, shards, spec, length) if split == "validation" else None,
        shards=shards,
    )


def _require_ids(spec: CorpusSpec, folder: Path, ids: NDArray[np.integer]) -> None:
    if len(ids) and int(ids.max()) >= spec.tokenizer.num_ids:
        raise UserError(
            f"{folder}: a part has the id {int(ids.max())}, and its tokenizer has {spec.tokenizer.num_ids} ids; copy the parts"
            " again, or delete the folder and prepare it again"
        )


def _last_window(folder: Path, shards: list[Shard], length: int) -> NDArray[np.int64]:
    windows = Windows(folder, shards[-1:], length)
    last: NDArray[np.int64] = windows.take(np.array([len(windows) - 1]))[0]
    return last


def _unigram_entropy(folder: Path, shards: list[Shard], spec: CorpusSpec, length: int) -> float:
    counts = np.zeros(spec.tokenizer.num_ids, dtype=np.int64)
    for block in Windows(folder, shards, length).blocks:
        _require_ids(spec, folder, block.reshape(-1))
        counts += np.bincount(block.reshape(-1), minlength=len(counts))
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log(share)).sum())


def _require_usable(recipe: Recipe, sources: dict[str, PreparedSource]) -> None:
    for source, prepared in sources.items():
        for name, split in prepared.splits.items():
            if split.windows == 0:
                raise no_window(recipe, source, name, split.documents, f"{split.tokens:,} tokens")
            require_known_tokens(recipe, f"{name} of {source}", split.unknown_tokens, split.tokens)
