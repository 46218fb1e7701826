"""Prepare a recipe's data: find the prepared folder unchanged, or write its parts and join them.

Entered by `prepare`. Parts gather in `<prepared_dir>.partial`, each complete or absent, so that a killed `prepare` resumes there.
The folder is renamed when all are joined. Of several machines each writes a share of the parts (`shard`), and one joins them
(`merge`).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe, differences
from isoflop.data.encoding import EngineDiffers
from isoflop.data.files import hash_files, name_of, source_files
from isoflop.data.manifest import FILE_NAME, Manifest, data_settings, read_manifest, verify_shards
from isoflop.data.notes import data_notes
from isoflop.data.selection import DocumentHashes, duplicates, rows_to_drop, score_threshold
from isoflop.data.sources import PART_BYTES
from isoflop.data.tokenizers import load_tokenizer, tokenizer_hash
from isoflop.prepare.corpus import CORPUS_FILE, HASHES_ID, Corpus, PartName, read_corpus_spec, table_of
from isoflop.prepare.merge import join_parts
from isoflop.prepare.part import hash_part, write_part
from isoflop.prepare.setup import set_up_corpus, write_engine
from isoflop.prepare.workers import progress_bar, run_parts
from isoflop.utils.errors import UserError, is_disk_full
from isoflop.utils.io import has_keys, is_lock, lock, require_own_folder

_log = logging.getLogger(__name__)
MOST_LISTED = 8  # changes in a message


@overload
def prepare(
    recipe: Recipe | str | Path, overrides: Sequence[str] = (), num_workers: int | None = None, shard: None = None
) -> Manifest: ...
@overload
def prepare(
    recipe: Recipe | str | Path, overrides: Sequence[str] = (), num_workers: int | None = None, *, shard: tuple[int, int]
) -> None: ...
def prepare(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    num_workers: int | None = None,
    shard: tuple[int, int] | None = None,
) -> Manifest | None:
    """Write the prepared folder of a recipe, or find it there and unchanged; return its manifest.

    `recipe` may be a path or the name of a shipped recipe, with `section.key=value` overrides. `num_workers` processes share the
    parts; default: as many as are worth their start. With `shard` = (i, n) only every n-th part from the i-th on is written,
    nothing is joined, and None is returned. Raises `UserError`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, list(overrides))
    folder, parts_folder = Path(recipe.data.prepared_dir), partial_folder(recipe)
    _require_own_folders(recipe)
    if folder.exists() and any(folder.iterdir()):
        return _require_unchanged(recipe, folder)
    lock_name = "lock" if shard is None else f"lock-{shard[0]}-of-{shard[1]}"
    with (
        lock(parts_folder / lock_name, f"data.prepared_dir = {str(folder)!r}", "wait for that process, or stop it"),
        _finished_parts_kept(folder, parts_folder),
    ):
        while not _write_parts(recipe, parts_folder, num_workers, shard or (0, 1)):
            pass  # once more, with the other engine
        if shard is not None:
            return None
        manifest = join_parts(recipe, read_corpus_spec(parts_folder), parts_folder)
    _report(recipe, manifest)
    return manifest


@contextlib.contextmanager
def _finished_parts_kept(folder: Path, parts_folder: Path) -> Iterator[None]:
    """Report what an interrupt keeps; raise `UserError` for a full disk."""
    try:
        yield
    except KeyboardInterrupt:
        _log.info("prepare: interrupted; finished parts are kept in %s, and the same command resumes", parts_folder)
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"data.prepared_dir = {str(folder)!r}: no space left, {shutil.disk_usage(parts_folder).free:,} bytes are free there;"
            f" finished parts are kept in {parts_folder}: free some space and run the same command, or name a prepared_dir on"
            " another disk"
        ) from error


def _require_own_folders(recipe: Recipe) -> None:
    """Refuse a prepared folder, or a folder of parts, that holds something else. Raises `UserError`."""
    folder, parts = Path(recipe.data.prepared_dir), partial_folder(recipe)
    require_own_folder(
        folder, "data.prepared_dir", "a prepared folder", (), lambda: has_keys(folder / FILE_NAME, ["made_from", "sources"])
    )
    require_own_folder(
        parts,
        "data.prepared_dir + .partial",
        "a folder of parts that prepare wrote",
        ("lock",),
        lambda: has_keys(parts / CORPUS_FILE, ["made_from", "num_parts"]) or any(map(is_lock, parts.glob("lock*"))),
    )


def partial_folder(recipe: Recipe) -> Path:
    """Return the folder in which parts gather until they are joined."""
    folder = Path(recipe.data.prepared_dir)
    return folder.with_name(f"{folder.name}.partial")


def merge(recipe: Recipe) -> Manifest:
    """Join the parts that several machines wrote, copied into one folder or written to a shared one. Raises `UserError`."""
    folder = partial_folder(recipe)
    spec = read_corpus_spec(folder)
    if changes := differences(spec.made_from, data_settings(recipe)):
        raise UserError(
            f"{folder}: its parts were made from other values ({'; '.join(changes)}); give the recipe they were made from"
        )
    manifest = join_parts(recipe, spec, folder)
    _report(recipe, manifest)
    return manifest


def verify(recipe: Recipe) -> Manifest:
    """Check every byte of a prepared folder. Needs neither the text nor the Hub. Raises `UserError` naming the damaged file."""
    prepared_dir = recipe.data.prepared_dir
    manifest = read_manifest(prepared_dir)
    verify_shards(prepared_dir, manifest, full=True)
    if tokenizer_hash(Path(prepared_dir) / "tokenizer") != manifest.tokenizer.sha256:
        raise UserError(f"{prepared_dir}/tokenizer/tokenizer.json is not the one of {FILE_NAME}; copy the folder again")
    shards = manifest.shards()
    total = sum(shard.bytes for shard in shards)
    _log.info("prepare: %s: %d shards, %s bytes, every byte as %s says", prepared_dir, len(shards), f"{total:,}", FILE_NAME)
    return manifest


def _write_parts(recipe: Recipe, folder: Path, num_workers: int | None, shard: tuple[int, int]) -> bool:
    """Write this machine's parts. Return False where gigatoken gave other ids, so that all have to be encoded again."""
    corpus = set_up_corpus(recipe, folder, num_workers)
    parts = corpus.spec.parts(shard)
    tables = [table_of(corpus.opened, part) for part in parts]
    digests = hash_files(list(dict.fromkeys(file for table, number in tables for file in table.files_of(number))))
    files = {
        part: {name_of(file): digests[name_of(file)] for file in table.files_of(number)}
        for part, (table, number) in zip(parts, tables, strict=True)
    }
    if corpus.needs_selection and not _select_documents(corpus, files, shard):
        return True
    missing = {part: hashes for part, hashes in files.items() if not corpus.read_part_progress(part, hashes).done}
    if len(missing) < len(files):
        _log.info("prepare: %d of %d parts are there already", len(files) - len(missing), len(files))
    try:
        with progress_bar("tokenize", _source_bytes(corpus, missing), "tok") as bar:
            run_parts(corpus, write_part, missing, bar)
    except EngineDiffers as difference:
        why = f"gigatoken gave other ids than tokenizers for {difference}; tokenizers encodes the corpus again, many times slower"
        write_engine(folder, corpus.spec.tokenizer, "tokenizers", why)
        return False
    if shard[1] > 1:
        total = len(corpus.spec.parts())
        _log.info("prepare: shard %d/%d is done: %d of %d parts in %s", *shard, len(parts), total, folder)
    return True


def _source_bytes(corpus: Corpus, parts: dict[PartName, dict[str, str]]) -> dict[PartName, int]:
    """Return the bytes of each part's files; of files that are not on this machine, the intended size of a part."""
    sizes = {}
    for part in parts:
        table, _ = table_of(corpus.opened, part)
        sizes[part] = sum(file.bytes for file in table.files) // table.num_parts or PART_BYTES
    return sizes


def _select_documents(corpus: Corpus, files: dict[PartName, dict[str, str]], shard: tuple[int, int]) -> bool:
    """Hash all documents, then list the rows to drop. Return False where other machines have not hashed their parts yet."""
    with progress_bar("hash documents", _source_bytes(corpus, files), "B") as bar:
        run_parts(corpus, hash_part, files, bar)
    parts = corpus.spec.parts()
    found = {part: sorted(corpus.folder.glob(f"survey-{part}-{HASHES_ID}.npy")) for part in parts}
    if missing := sum(not there for there in found.values()):
        _log.info(
            "prepare: shard %d/%d is hashed; duplicates and scores are compared over all parts, and %d of %d are not hashed yet:"
            " run this command again when all machines have come this far",
            *(*shard, missing, len(parts)),
        )
        return False
    hashes = {part: DocumentHashes.open(there[-1]) for part, there in found.items()}
    if corpus.recipe.data.filter.drop_duplicates:
        duplicate = dict(zip(parts, duplicates(list(hashes.values())), strict=True))
    else:
        duplicate = {part: np.zeros(len(of_part.documents), dtype=bool) for part, of_part in hashes.items()}
    for source, spec in corpus.recipe.data.sources().items():
        own = [part for part in parts if part.source == source]
        fraction = getattr(spec, "keep_fraction", None)
        dropped = [duplicate[part] for part in own]
        threshold = score_threshold([hashes[part] for part in own], dropped, fraction) if fraction else None
        for part in own:
            rows_to_drop(hashes[part], duplicate[part], threshold).save(corpus.drop_list_file(part))
    return True


def _require_unchanged(recipe: Recipe, folder: Path) -> Manifest:
    """Return the manifest of an existing folder. Hub sources stay at the commits it names; local files are compared.

    Raises `UserError` listing what changed.
    """
    manifest = read_manifest(str(folder))
    changes = differences(manifest.made_from, data_settings(recipe))
    changes += differences({"sources": list(manifest.sources)}, {"sources": list(recipe.data.shares())})
    for name, source in recipe.data.sources().items() if not changes else ():
        if manifest.sources[name].revision is None:
            changes += differences(manifest.sources[name].files, hash_files(source_files(source, "data.source")))
    if not changes and recipe.tokenizer.name is not None and manifest.tokenizer.revision is None:
        with tempfile.TemporaryDirectory() as copy:
            load_tokenizer(recipe.tokenizer)[0].save_pretrained(copy)
            changes = differences({"tokenizer.json": manifest.tokenizer.sha256}, {"tokenizer.json": tokenizer_hash(Path(copy))})
    if changes:
        more = f" and {len(changes) - MOST_LISTED} more" if len(changes) > MOST_LISTED else ""
        raise UserError(
            f"data.prepared_dir = {str(folder)!r} was prepared from something else: {'; '.join(changes[:MOST_LISTED])}{more};"
            " name another prepared_dir or delete this one"
        )
    _log.info("prepare: %s is already prepared and nothing changed", folder)
    _report_notes(recipe, manifest)
    return manifest


def _report_notes(recipe: Recipe, manifest: Manifest) -> None:
    for note in data_notes(recipe, manifest):
        _log.info("prepare: note: %s", note)


def _report(recipe: Recipe, manifest: Manifest) -> None:
    """Log what was written, source by source."""
    for name, source in manifest.sources.items():
        of = f"{name}, " if len(manifest.sources) > 1 else ""
        for split_name, split in source.splits.items():
            unknown = f", {split.unknown_tokens / split.tokens:.2%} of them unknown" if split.unknown_tokens else ""
            _log.info(
                f"prepare: {of}{split_name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens"
                f" ({split.bytes / split.tokens:.2f} bytes a token){unknown}, {split.windows:,} windows of"
                f" {manifest.sequence_length}"
            )
        if source.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in source.left_out.items())
            _log.info(f"prepare: {of}left out: {reasons}")
    _log.info("prepare: wrote %s, encoded by %s", recipe.data.prepared_dir, manifest.engine)
    _report_notes(recipe, manifest)
