"""Set up a corpus: open the recipe's sources, load or train the tokenizer, choose the engine of the encoder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pyarrow as pa
from tokenizers import Tokenizer as FastTokenizer

from isoflop.config.recipe import Recipe
from isoflop.data.documents import read_documents
from isoflop.data.encoding import Encoder, Engine, choose_engine
from isoflop.data.manifest import TokenizerInfo, data_settings
from isoflop.data.sources import OpenSource, open_source
from isoflop.data.tokenizers import load_tokenizer, tokenizer_hash, train_tokenizer
from isoflop.prepare.corpus import CORPUS_FILE, Corpus, CorpusSpec, PartName, in_validation, num_parts, read_document, table_of
from isoflop.prepare.splits import split_sources
from isoflop.prepare.unknown import require_known_text
from isoflop.prepare.workers import default_workers
from isoflop.utils.io import atomic_write
from isoflop.utils.untrusted import read_json

# Most text that a tokenizer is trained on: its word counts grow with the text (1 GB of memory here), while its merges converge
# on far less.
TRAIN_BYTES = 256 * 2**20
COMPARED_BYTES = 256 * 2**10  # of each source's first documents, encoded by both engines beforehand: about a quarter second
COMPARED_CHARACTERS = 1 << 16  # of one document
ENGINE_FILE = "engine.json"
_log = logging.getLogger(__name__)


def set_up_corpus(recipe: Recipe, folder: Path, num_workers: int | None) -> Corpus:
    """Open the recipe's sources; write the tokenizer and `corpus.json` into the folder of parts.

    Hub sources stay at the commits of an earlier start. Raises `UserError` for what is missing or cannot be read.
    """
    earlier = _earlier_spec(recipe, folder)
    _log.info("prepare: opening %s", ", ".join(recipe.data.sources()))
    opened = {
        name: open_source(source, _key(recipe, name), earlier.revisions.get(name) if earlier else None)
        for name, source in recipe.data.sources().items()
    }
    opened = split_sources(recipe, opened)
    tokenizer = _corpus_tokenizer(recipe, opened, folder, earlier)
    spec = CorpusSpec(
        made_from=data_settings(recipe),
        engine=_corpus_engine(recipe, opened, folder, tokenizer),
        tokenizer=tokenizer,
        revisions={name: one.revision for name, one in opened.items()},
        num_parts=num_parts(opened),
        split_by_position=[name for name, one in opened.items() if one.tables[0].held_out_tail is not None],
    )
    atomic_write(folder / CORPUS_FILE, spec.model_dump_json(indent=1) + "\n", shared=True)
    source_bytes = sum(file.bytes for one in opened.values() for table in one.tables for file in table.files)
    processes = min(num_workers or default_workers(len(spec.parts()), source_bytes), len(spec.parts()))
    corpus = Corpus(recipe, opened, folder, spec, processes, threads=processes == 1 and num_workers != 1)
    _require_known(corpus)
    return corpus


def write_engine(folder: Path, tokenizer: TokenizerInfo, engine: Engine, why: str) -> None:
    """Record the engine for this tokenizer, and log why."""
    _log.info("prepare: %s", why)
    atomic_write(
        folder / ENGINE_FILE, json.dumps({"tokenizer": tokenizer.sha256, "engine": engine, "why": why}) + "\n", shared=True
    )


def _key(recipe: Recipe, name: str) -> str:
    return "data.source" if recipe.data.source.kind != "mixture" else f"data.source.sources.{name}.source"


def _earlier_spec(recipe: Recipe, folder: Path) -> CorpusSpec | None:
    file = folder / CORPUS_FILE
    spec = read_document(file, CorpusSpec) if file.exists() else None
    if spec and spec.made_from != data_settings(recipe):
        _log.info("prepare: the parts in %s were made from other values and are written again", folder)
        return None
    return spec


def _corpus_tokenizer(recipe: Recipe, opened: dict[str, OpenSource], folder: Path, earlier: CorpusSpec | None) -> TokenizerInfo:
    """Load or train the tokenizer into the folder, or keep that of an earlier start; return what describes it."""
    there, trained_on = folder / "tokenizer", folder / "tokenizer.trained_on"
    if earlier and earlier.tokenizer.revision and there.exists() and tokenizer_hash(there) == earlier.tokenizer.sha256:
        return earlier.tokenizer
    revision = digest = None
    if recipe.tokenizer.train_vocab_size is None:
        tokenizer, revision = load_tokenizer(recipe.tokenizer)
    else:
        digest = _digest(_training_texts(recipe, opened))
        if earlier and trained_on.exists() and trained_on.read_text(encoding="utf-8") == digest:
            return earlier.tokenizer
        _log.info(f"prepare: training a byte-level BPE tokenizer of {recipe.tokenizer.train_vocab_size:,} entries")
        tokenizer = train_tokenizer(_training_texts(recipe, opened), recipe.tokenizer.train_vocab_size)
    tokenizer.save_pretrained(there)
    if digest is not None:
        atomic_write(trained_on, digest, shared=True)
    return TokenizerInfo(
        sha256=tokenizer_hash(there),
        num_ids=max(tokenizer.get_vocab().values()) + 1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        revision=revision,
    )


def _training_texts(recipe: Recipe, opened: dict[str, OpenSource]) -> Iterator[list[str]]:
    """Yield the first training documents of each source by its share of the tokens, TRAIN_BYTES in all."""
    for name, share in recipe.data.shares().items():
        for texts in _first_texts(recipe, opened, name, round(TRAIN_BYTES * share)):
            yield texts.to_pylist()


def _first_texts(recipe: Recipe, opened: dict[str, OpenSource], source: str, limit_bytes: int) -> Iterator[pa.LargeStringArray]:
    """Yield batches of training documents from the start of a source, about `limit_bytes` of text."""
    seen = 0
    for part in (PartName(source, index) for index in range(num_parts(opened)[source])):
        table, number = table_of(opened, part)
        for batch in read_documents(table, number, recipe.data.filter):
            texts = batch.texts.filter(pa.array(~in_validation(recipe, opened, part, batch.rows)))
            seen += texts.nbytes
            yield texts
            if seen >= limit_bytes:
                return


def _digest(batches: Iterator[list[str]]) -> str:
    digest = hashlib.sha256()
    for texts in batches:
        digest.update("\0".join(texts).encode())
    return digest.hexdigest()


def _first_documents(recipe: Recipe, opened: dict[str, OpenSource], source: str) -> list[str]:
    """Return training documents from the start of a source, long ones cut: COMPARED_BYTES in all."""
    first: list[str] = []
    batch = next(_first_texts(recipe, opened, source, COMPARED_BYTES), pa.array([], pa.large_string()))
    size = 0
    for text in batch:
        first.append(text.as_py()[:COMPARED_CHARACTERS])
        if (size := size + len(first[-1])) >= COMPARED_BYTES:
            break
    return first


def _corpus_engine(recipe: Recipe, opened: dict[str, OpenSource], folder: Path, tokenizer: TokenizerInfo) -> Engine:
    """Return gigatoken where it gives the tokenizer's ids. The choice is recorded and holds for this folder."""
    file = folder / ENGINE_FILE
    recorded = read_json(file, "delete it, and the same command writes it again") if file.exists() else {}
    if recorded.get("tokenizer") == tokenizer.sha256 and recorded.get("engine") in get_args(Engine):
        engine: Engine = recorded["engine"]
        return engine
    first = [text for name in opened for text in _first_documents(recipe, opened, name)]
    backend = FastTokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    engine, why = choose_engine(backend, tokenizer.eos_token_id, pa.array(first, pa.large_string()))
    write_engine(folder, tokenizer, engine, why)
    return engine


def _require_known(corpus: Corpus) -> None:
    encoder = _encoder(corpus)
    for name in corpus.opened if encoder.unknown_id is not None else ():
        require_known_text(corpus.recipe, encoder, name, _first_documents(corpus.recipe, corpus.opened, name))


def _encoder(corpus: Corpus) -> Encoder:
    backend = FastTokenizer.from_file(str(corpus.folder / "tokenizer" / "tokenizer.json"))
    return Encoder(backend, corpus.spec.tokenizer.eos_token_id, corpus.spec.engine, threads=True)
