"""From a recipe to a corpus that parts can be written of: sources opened, tokenizer settled, engine chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pyarrow as pa
from tokenizers import Tokenizer as FastTokenizer

from isoflop.data.contamination import save_sets
from isoflop.data.documents import read_documents
from isoflop.data.encoding import Encoder, Engine, choose_engine
from isoflop.data.manifest import TokenizerFacts, made_from
from isoflop.data.sources import Opened, open_source
from isoflop.data.tokenizers import load_tokenizer, tokenizer_hash, train_tokenizer
from isoflop.disk import write_aside
from isoflop.prepare.corpus import CORPUS_FILE, Corpus, Facts, PartName, in_validation, num_parts, read_document, table_of
from isoflop.prepare.part import LOOKUP_FILE
from isoflop.prepare.workers import default_workers
from isoflop.recipe import Recipe
from isoflop.recipe_data import Filter
from isoflop.untrusted import read_json

# A tokenizer is trained on so much text at most: its counts of words grow with the text (some 1 GB of memory here), while its
# merges settle on far less.
TRAIN_BYTES = 256 * 2**20
COMPARED_BYTES = 256 * 2**10  # of each source's first documents, by both engines before the corpus: about a quarter second
COMPARED_CHARACTERS = 1 << 16  # of one document
ENGINE_FILE = "engine.json"


def set_up(recipe: Recipe, folder: Path, workers: int | None) -> Corpus:
    """Open what the recipe names and write the tokenizer and `corpus.json` into the folder of parts.

    What came from the Hub stays at the commits of an earlier start. Raises `UserError` for what cannot be had.
    """
    before = _facts_before(recipe, folder)
    print(f"prepare: opening {', '.join(recipe.data.sources())}", flush=True)
    opened = {
        name: open_source(source, _key(recipe, name), before.revisions.get(name) if before else None)
        for name, source in recipe.data.sources().items()
    }
    tokenizer = _settle_tokenizer(recipe, opened, folder, before)
    facts = Facts(
        made_from=made_from(recipe),
        engine=_settle_engine(recipe, opened, folder, tokenizer),
        tokenizer=tokenizer,
        revisions={name: one.revision for name, one in opened.items()},
        num_parts=num_parts(opened),
    )
    write_aside(folder / CORPUS_FILE, facts.model_dump_json(indent=1) + "\n")
    source_bytes = sum(file.stat().st_size for one in opened.values() for table in one.tables for file in table.files)
    processes = min(workers or default_workers(len(facts.parts()), source_bytes), len(facts.parts()))
    corpus = Corpus(recipe, opened, folder, facts, processes, threads=processes == 1 and workers != 1)
    _save_evaluation_sets(corpus)
    return corpus


def set_engine(folder: Path, tokenizer: TokenizerFacts, engine: Engine, why: str) -> None:
    """Settle the engine for this tokenizer, and say so."""
    print(f"prepare: {why}", flush=True)
    write_aside(folder / ENGINE_FILE, json.dumps({"tokenizer": tokenizer.sha256, "engine": engine, "why": why}) + "\n")


def _key(recipe: Recipe, name: str) -> str:
    return "data.source" if recipe.data.source.kind != "mixture" else f"data.source.sources.{name}.source"


def _facts_before(recipe: Recipe, folder: Path) -> Facts | None:
    file = folder / CORPUS_FILE
    facts = read_document(file, Facts) if file.exists() else None
    if facts and facts.made_from != made_from(recipe):
        print(f"prepare: the parts in {folder} were made by other values and are made anew", flush=True)
        return None
    return facts


def _settle_tokenizer(recipe: Recipe, opened: dict[str, Opened], folder: Path, before: Facts | None) -> TokenizerFacts:
    """The tokenizer's folder and facts: loaded, trained, or left from an earlier start."""
    there = folder / "tokenizer"
    if before and before.tokenizer.revision and there.exists() and tokenizer_hash(there) == before.tokenizer.sha256:
        return before.tokenizer
    revision = None
    if recipe.tokenizer.train_vocab_size is None:
        tokenizer, revision = load_tokenizer(recipe.tokenizer)
    else:
        digest, trained_on = _digest(_training_texts(recipe, opened)), folder / "tokenizer.trained_on"
        if before and trained_on.exists() and trained_on.read_text(encoding="utf-8") == digest:
            return before.tokenizer
        print(f"prepare: training a byte-level BPE tokenizer of {recipe.tokenizer.train_vocab_size:,} entries", flush=True)
        tokenizer = train_tokenizer(_training_texts(recipe, opened), recipe.tokenizer.train_vocab_size)
        write_aside(trained_on, digest)
    tokenizer.save_pretrained(there)
    return TokenizerFacts(
        sha256=tokenizer_hash(there),
        num_ids=max(tokenizer.get_vocab().values()) + 1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        revision=revision,
    )


def _training_texts(recipe: Recipe, opened: dict[str, Opened]) -> Iterator[list[str]]:
    """The first documents of the training split of each source, TRAIN_BYTES in all, by the shares of the tokens."""
    for name, share in recipe.data.shares().items():
        for texts in _first_texts(recipe, opened, name, round(TRAIN_BYTES * share)):
            yield texts.to_pylist()


def _first_texts(recipe: Recipe, opened: dict[str, Opened], source: str, limit_bytes: int) -> Iterator[pa.LargeStringArray]:
    """Batches of training documents from the start of a source, about `limit_bytes` of text."""
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


def _settle_engine(recipe: Recipe, opened: dict[str, Opened], folder: Path, tokenizer: TokenizerFacts) -> Engine:
    """gigatoken where it gives the tokenizer's ids; once it did not, never again for this folder."""
    file = folder / ENGINE_FILE
    settled = read_json(file, "delete it, and the same command writes it again") if file.exists() else {}
    if settled.get("tokenizer") == tokenizer.sha256 and settled.get("engine") in get_args(Engine):
        engine: Engine = settled["engine"]
        return engine
    first: list[str] = []
    for name in opened:
        batch = next(_first_texts(recipe, opened, name, COMPARED_BYTES), pa.array([], pa.large_string()))
        size = 0
        for text in batch:
            first.append(text.as_py()[:COMPARED_CHARACTERS])
            if (size := size + len(first[-1])) >= COMPARED_BYTES:
                break
    backend = FastTokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    engine, why = choose_engine(backend, tokenizer.eos_token_id, pa.array(first, pa.large_string()))
    set_engine(folder, tokenizer, engine, why)
    return engine


def _save_evaluation_sets(corpus: Corpus) -> None:
    """The ids of every example of the evaluation sets, for the processes that look for them."""
    wanted, facts = corpus.recipe.data.contamination, corpus.facts
    if wanted is None:
        return
    backend = FastTokenizer.from_file(str(corpus.folder / "tokenizer" / "tokenizer.json"))
    encoder = Encoder(backend, facts.tokenizer.eos_token_id, facts.engine, threads=True)
    sets = {}
    for name, source in wanted.sets.items():
        examples = []
        for table in open_source(source, f"data.contamination.sets.{name}").tables:
            for number in range(table.num_parts):
                for batch in read_documents(table, number, Filter()):
                    examples += encoder.plain(batch.texts)
        sets[name] = examples
        print(f"prepare: looking for {len(examples):,} examples of {name} in the training text", flush=True)
    save_sets(corpus.folder / LOOKUP_FILE, wanted.ngram_tokens, sets)
