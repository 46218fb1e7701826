"""One part, in one process: its documents are read, filtered, encoded and written as shards of windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer as FastTokenizer

from isoflop.data.contamination import Lookup
from isoflop.data.documents import Batch, ahead, read_documents
from isoflop.data.encoding import Encoder
from isoflop.data.manifest import SPLITS, SplitName
from isoflop.data.survey import Decided, is_in, survey
from isoflop.data.windows import SHARD_BYTES, ShardWriter
from isoflop.disk import write_aside
from isoflop.prepare.corpus import Corpus, PartName, PartSplit, in_validation, table_of

LOOKUP_FILE = "contamination.npz"


class Done(NamedTuple):
    """A piece of work, for the progress bar."""

    part: PartName
    bytes: int
    tokens: int
    finished: bool


Report = Callable[[Done], None]


@dataclass
class Tools:
    """What a process sets up once."""

    encoder: Encoder
    lookup: Lookup | None

    @classmethod
    def of(cls, corpus: Corpus) -> Tools:
        """From the corpus's folder."""
        backend = FastTokenizer.from_file(str(corpus.folder / "tokenizer" / "tokenizer.json"))
        encoder = Encoder(backend, corpus.facts.tokenizer.eos_token_id, corpus.facts.engine, corpus.threads)
        lookup = Lookup.open(corpus.folder / LOOKUP_FILE) if corpus.recipe.data.contamination else None
        return cls(encoder, lookup)


class _Split:
    """A split of a part while it is written."""

    def __init__(self, corpus: Corpus, part: PartName, name: SplitName, so_far: PartSplit) -> None:
        stem, facts = f"{part.source}-{name}-{part.number:05d}", corpus.facts
        for left in corpus.folder.glob(f".{stem}-*"):  # by a process that was killed
            left.unlink()
        self.writer = ShardWriter(corpus.folder, stem, corpus.recipe.training.sequence_length, facts.dtype)
        self.writer.shards = list(so_far.shards)
        self.writer.add(np.array(so_far.tail, dtype=facts.dtype))
        self._counts = so_far.model_copy()

    def add(self, texts: pa.LargeStringArray, ids: np.ndarray) -> int:
        """Append encoded documents; returns their bytes."""
        size = int(pc.sum(pc.binary_length(texts)).as_py() or 0)
        self.writer.add(ids)
        self._counts.documents += len(texts)
        self._counts.bytes += size
        self._counts.tokens += len(ids)
        return size

    def cut(self) -> PartSplit:
        """End the shard; what the split holds now."""
        self.writer.cut()
        return self._counts.model_copy(update={"shards": list(self.writer.shards), "tail": self.writer.tail.tolist()})


def write_part(corpus: Corpus, tools: Tools, part: PartName, files: dict[str, str], report: Report) -> None:
    """Write a part's shards and its record, from where it was left. Raises what reading and encoding raise."""
    record = corpus.read_record(part, files)
    if record.done:
        return
    left_out = Counter(record.left_out)
    splits = {name: _Split(corpus, part, name, record.splits[name]) for name in SPLITS}
    found = set(record.ngrams_found)

    def save(rows: int, done: bool) -> None:
        held = {name: split.cut() for name, split in splits.items()}
        now = record.model_copy(
            update={"rows": rows, "done": done, "left_out": dict(left_out), "splits": held, "ngrams_found": sorted(found)}
        )
        write_aside(corpus.record_file(part), now.model_dump_json())

    for batch in ahead(_documents(corpus, part, record.rows)):
        left_out += batch.left_out
        held_out = in_validation(corpus.recipe, corpus.opened, part, batch.rows)
        for name in SPLITS:
            chosen = held_out if name == "validation" else ~held_out
            if not chosen.any():
                continue
            texts = batch.texts.filter(pa.array(chosen))
            ids, _ = tools.encoder(texts)
            tools.encoder.check_sample(batch.rows[chosen], texts, first=splits[name].writer.open_bytes == 0)
            if tools.lookup and name == "train":
                found.update(tools.lookup.find(ids).tolist())
            report(Done(part, splits[name].add(texts, ids), len(ids), finished=False))
        if batch.end is not None and splits["train"].writer.open_bytes >= SHARD_BYTES:
            save(batch.end, done=False)
    save(-1, done=True)
    report(Done(part, 0, 0, finished=True))


def _documents(corpus: Corpus, part: PartName, start: int) -> Iterator[Batch]:
    """A part's documents from a row on, without those that the survey decided against."""
    table, number = table_of(corpus.opened, part)
    batches = read_documents(table, number, corpus.recipe.data.filter, start)
    if not corpus.needs_survey:
        yield from batches
        return
    decided = Decided.open(corpus.decided_file(part))
    for batch in batches:
        duplicate, low = is_in(batch.rows, decided.duplicates), is_in(batch.rows, decided.low_scores)
        left_out = batch.left_out + Counter({"duplicate": int(duplicate.sum()), "low score": int(low.sum())})
        kept = ~(duplicate | low)
        yield batch._replace(rows=batch.rows[kept], texts=batch.texts.filter(pa.array(kept)), left_out=left_out)


def survey_part(corpus: Corpus, _: Tools, part: PartName, files: dict[str, str], report: Report) -> None:
    """Write the hashes and scores of a part's documents, where they are not there yet."""
    file = corpus.survey_file(part, files)

    def told() -> Iterator[Batch]:
        table, number = table_of(corpus.opened, part)
        for batch in read_documents(table, number, corpus.recipe.data.filter):
            report(Done(part, batch.texts.nbytes, 0, finished=False))
            yield batch

    if not file.exists():
        for outdated in corpus.folder.glob(f"survey-{part}-*"):
            outdated.unlink()
        survey(told(), file)
    report(Done(part, 0, 0, finished=True))
