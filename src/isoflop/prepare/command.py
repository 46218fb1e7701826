"""The verb: find the prepared folder unchanged, or write its parts and join them.

Parts gather in `<prepared_dir>.partial`, each whole or not there, so that a killed `prepare` goes on where it was; the folder is
renamed when all are joined. Several machines each write a share of the parts (`shard`), and one joins them (`merge`).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from isoflop.data.encoding import EngineDiffers
from isoflop.data.files import hash_files, local_files, name_of
from isoflop.data.manifest import FILE_NAME, Manifest, made_from, read_manifest, verify_shards
from isoflop.data.sources import PART_BYTES
from isoflop.data.survey import Survey, decide, duplicates, score_threshold
from isoflop.data.tokenizers import load_tokenizer, tokenizer_hash
from isoflop.disk import has_keys, is_lock, lock, require_own_folder
from isoflop.errors import UserError, is_disk_full
from isoflop.prepare.corpus import CORPUS_FILE, Corpus, PartName, read_facts, table_of
from isoflop.prepare.join import join
from isoflop.prepare.part import survey_part, write_part
from isoflop.prepare.setting_up import set_engine, set_up
from isoflop.prepare.workers import progress, run_parts
from isoflop.recipe import Recipe, differences


def prepare(recipe: Recipe, workers: int | None = None, shard: tuple[int, int] | None = None) -> Manifest | None:
    """Write the prepared folder, or find it already there and unchanged.

    `workers` processes share the parts; where not given, as many as are worth it. With `shard` (i, n) only every n-th part from
    the i-th on is written, nothing is joined, and None is returned.
    """
    folder = Path(recipe.data.prepared_dir)
    _require_own_folders(recipe)
    if folder.exists() and any(folder.iterdir()):
        return _require_unchanged(recipe, folder)
    aside = partial_folder(recipe)
    which = "lock" if shard is None else f"lock-{shard[0]}-of-{shard[1]}"
    with lock(aside / which, f"data.prepared_dir = {str(folder)!r}", "wait for that process, or stop it"):
        try:
            while not _written(recipe, aside, workers, shard or (0, 1)):
                pass  # by the other engine, then
            if shard is not None:
                return None
            manifest = join(recipe, read_facts(aside), aside)
        except KeyboardInterrupt:
            print(f"prepare: interrupted; what is finished is kept in {aside}, the same command goes on", flush=True)
            raise
        except Exception as error:
            if not is_disk_full(error):
                raise
            raise UserError(
                f"data.prepared_dir = {str(folder)!r}: no space left, {shutil.disk_usage(aside).free:,} bytes are free there;"
                f" what is finished is kept in {aside}: free some space and run the same command, or name a prepared_dir on"
                " another disk"
            ) from error
    _tell(recipe, manifest)
    return manifest


def _require_own_folders(recipe: Recipe) -> None:
    """Refuse a prepared folder, or one of parts, that holds something else. Raises `UserError`."""
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
    """Where parts gather until they are joined."""
    folder = Path(recipe.data.prepared_dir)
    return folder.with_name(f"{folder.name}.partial")


def merge(recipe: Recipe) -> Manifest:
    """Join parts that several machines wrote, copied into one folder or written into a shared one."""
    aside = partial_folder(recipe)
    facts = read_facts(aside)
    if changes := differences(facts.made_from, made_from(recipe)):
        raise UserError(f"{aside}: its parts were made by other values ({'; '.join(changes)}); give the recipe they were made by")
    manifest = join(recipe, facts, aside)
    _tell(recipe, manifest)
    return manifest


def verify(recipe: Recipe) -> Manifest:
    """Check every byte of a prepared folder, copied here from where it was made; nothing else is needed."""
    prepared_dir = recipe.data.prepared_dir
    manifest = read_manifest(prepared_dir)
    verify_shards(prepared_dir, manifest, full=True)
    if tokenizer_hash(Path(prepared_dir) / "tokenizer") != manifest.tokenizer.sha256:
        raise UserError(f"{prepared_dir}/tokenizer/tokenizer.json is not the one of {FILE_NAME}; copy the folder again")
    total = sum(shard.bytes for shard in manifest.shards())
    print(
        f"prepare: {prepared_dir}: {len(manifest.shards())} shards, {total:,} bytes, every byte as {FILE_NAME} says", flush=True
    )
    return manifest


def _written(recipe: Recipe, aside: Path, workers: int | None, shard: tuple[int, int]) -> bool:
    """Write this machine's parts; False where gigatoken was found to differ, and the corpus has to be encoded anew."""
    corpus = set_up(recipe, aside, workers)
    parts = corpus.facts.parts(shard)
    tables = [table_of(corpus.opened, part) for part in parts]
    digests = hash_files(list(dict.fromkeys(file for table, number in tables for file in table.files_of(number))))
    files = {
        part: {name_of(file): digests[name_of(file)] for file in table.files_of(number)}
        for part, (table, number) in zip(parts, tables, strict=True)
    }
    if corpus.needs_survey and not _surveyed(corpus, files, shard):
        return True
    missing = {part: hashes for part, hashes in files.items() if not corpus.read_record(part, hashes).done}
    if len(missing) < len(files):
        print(f"prepare: {len(files) - len(missing)} of {len(files)} parts are there already", flush=True)
    try:
        with progress("tokenize", _sizes(corpus, missing), "tok") as bar:
            run_parts(corpus, write_part, missing, bar)
    except EngineDiffers as difference:
        why = f"gigatoken gave other ids than tokenizers for {difference}; tokenizers encodes the corpus anew, many times slower"
        set_engine(aside, corpus.facts.tokenizer, "tokenizers", why)
        return False
    if shard[1] > 1:
        print(
            f"prepare: shard {shard[0]}/{shard[1]} is done: {len(parts)} of {len(corpus.facts.parts())} parts in {aside}",
            flush=True,
        )
    return True


def _sizes(corpus: Corpus, parts: dict[PartName, dict[str, str]]) -> dict[PartName, int]:
    """Bytes of the files of each part; where they are not here, what a part is meant to have."""
    sizes = {}
    for part in parts:
        table, _ = table_of(corpus.opened, part)
        sizes[part] = sum(file.stat().st_size for file in table.files) // table.num_parts or PART_BYTES
    return sizes


def _surveyed(corpus: Corpus, files: dict[PartName, dict[str, str]], shard: tuple[int, int]) -> bool:
    """Look at all documents, then decide which stay; False where other machines have not looked at theirs yet."""
    with progress("survey", _sizes(corpus, files), "B") as bar:
        run_parts(corpus, survey_part, files, bar)
    parts = corpus.facts.parts()
    found = {part: sorted(corpus.folder.glob(f"survey-{part}-*.npy")) for part in parts}
    if lacking := [str(part) for part, there in found.items() if not there]:
        print(
            f"prepare: shard {shard[0]}/{shard[1]} is surveyed; duplicates and scores are decided over all parts, and"
            f" {len(lacking)} of {len(parts)} are not surveyed yet: run this command again when all machines have come so far",
            flush=True,
        )
        return False
    surveys = {part: Survey.open(there[-1]) for part, there in found.items()}
    if corpus.recipe.data.filter.drop_duplicates:
        again = dict(zip(parts, duplicates(list(surveys.values())), strict=True))
    else:
        again = {part: np.zeros(len(survey.documents), dtype=bool) for part, survey in surveys.items()}
    for source, spec in corpus.recipe.data.sources().items():
        mine = [part for part in parts if part.source == source]
        fraction = getattr(spec, "keep_fraction", None)
        dropped = [again[part] for part in mine]
        threshold = score_threshold([surveys[part] for part in mine], dropped, fraction) if fraction else None
        for part in mine:
            decide(surveys[part], again[part], threshold).save(corpus.decided_file(part))
    return True


def _require_unchanged(recipe: Recipe, folder: Path) -> Manifest:
    """The manifest of a folder that is there. What came from the Hub stays at the commits it names; the rest is compared."""
    manifest = read_manifest(str(folder))
    changes = differences(manifest.made_from, made_from(recipe))
    changes += differences({"sources": list(manifest.sources)}, {"sources": list(recipe.data.shares())})
    for name, source in recipe.data.sources().items() if not changes else ():
        if manifest.sources[name].revision is None:
            changes += differences(manifest.sources[name].files, hash_files(local_files(source, "data.source")))
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


def _tell(recipe: Recipe, manifest: Manifest) -> None:
    """What was written, source by source."""
    for name, source in manifest.sources.items():
        of = f"{name}, " if len(manifest.sources) > 1 else ""
        for split_name, split in source.splits.items():
            print(
                f"prepare: {of}{split_name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens"
                f" ({split.bytes / split.tokens:.2f} bytes a token), {split.windows:,} windows of {manifest.sequence_length}"
            )
        if source.left_out:
            print(f"prepare: {of}left out: " + ", ".join(f"{count:,} {reason}" for reason, count in source.left_out.items()))
    for name, found in manifest.contamination.items():
        print(
            f"prepare: {name}: {found.documents_found:,} of {found.documents:,} examples have {found.ngram_tokens} tokens in a"
            " row"
            f" standing in the training text, {found.documents_mostly_found:,} most of theirs; {found.ngrams_found:,} of"
            f" {found.ngrams:,} runs are found"
        )
    print(f"prepare: wrote {recipe.data.prepared_dir}, encoded by {manifest.engine}", flush=True)
