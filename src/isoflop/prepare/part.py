"""One part, in one process: read, filter and encode its documents, and write them as shards of windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer as FastTokenizer

from isoflop.data.documents import Batch, prefetch, read_documents
from isoflop.data.encoding import Encoder
from isoflop.data.manifest import SPLITS, SplitName
from isoflop.data.selection import DropList, hash_documents, is_in
from isoflop.data.windows import SHARD_BYTES, ShardWriter
from isoflop.prepare.corpus import Corpus, PartName, PartSplit, in_validation, table_of
from isoflop.utils.io import atomic_write


class WorkDone(NamedTuple):
    """A finished piece of work, for the progress bar."""

    part: PartName
    bytes: int
    tokens: int
    finished: bool


OnProgress = Callable[[WorkDone], None]


@dataclass
class WorkerContext:
    """What each process sets up once."""

    encoder: Encoder

    @classmethod
    def of(cls, corpus: Corpus) -> WorkerContext:
        """Set up from the corpus's folder."""
        backend = FastTokenizer.from_file(str(corpus.folder / "tokenizer" / "tokenizer.json"))
        return cls(Encoder(backend, corpus.spec.tokenizer.eos_token_id, corpus.spec.engine, corpus.threads))


class _Split:
    """A split of a part while it is being written."""

    def __init__(self, corpus: Corpus, part: PartName, name: SplitName, progress: PartSplit) -> None:
        stem, spec = f"{part.source}-{name}-{part.number:05d}", corpus.spec
        for temporary in corpus.folder.glob(f".{stem}-*"):  # left by a killed process
            temporary.unlink()
        self.writer = ShardWriter(corpus.folder, stem, corpus.recipe.training.sequence_length, spec.dtype)
        self.writer.shards = list(progress.shards)
        self.writer.add(np.array(progress.tail, dtype=spec.dtype))
        self._counts = progress.model_copy()

    def add(self, texts: pa.LargeStringArray, ids: np.ndarray, unknown_id: int | None) -> int:
        """Append encoded documents; return their bytes."""
        size = int(pc.sum(pc.binary_length(texts)).as_py() or 0)
        self.writer.add(ids)
        self._counts.documents += len(texts)
        self._counts.bytes += size
        self._counts.tokens += len(ids)
        self._counts.unknown_tokens += 0 if unknown_id is None else int((ids == unknown_id).sum())
        return size

    def cut(self) -> PartSplit:
        """Finish the shard; return the state of the split."""
        self.writer.cut()
        return self._counts.model_copy(update={"shards": list(self.writer.shards), "tail": self.writer.tail.tolist()})


def write_part(corpus: Corpus, context: WorkerContext, part: PartName, files: dict[str, str], report: OnProgress) -> None:
    """Write a part's shards and progress, resuming where it stopped. Raises what reading and encoding raise."""
    before = corpus.read_part_progress(part, files)
    if before.done:
        return
    left_out = Counter(before.left_out)
    splits = {name: _Split(corpus, part, name, before.splits[name]) for name in SPLITS}

    def save(rows: int, done: bool) -> None:
        written = {name: split.cut() for name, split in splits.items()}
        now = before.model_copy(update={"rows": rows, "done": done, "left_out": dict(left_out), "splits": written})
        atomic_write(corpus.progress_file(part), now.model_dump_json())

    for batch in prefetch(_documents(corpus, part, before.rows)):
        left_out += batch.left_out
        held_out = in_validation(corpus.recipe, corpus.opened, part, batch.rows)
        for name in SPLITS:
            chosen = held_out if name == "validation" else ~held_out
            if not chosen.any():
                continue
            texts = batch.texts.filter(pa.array(chosen))
            ids, _ = context.encoder(texts)
            context.encoder.check_sample(batch.rows[chosen], texts, first=splits[name].writer.open_bytes == 0)
            report(WorkDone(part, splits[name].add(texts, ids, context.encoder.unknown_id), len(ids), finished=False))
        if batch.end is not None and splits["train"].writer.open_bytes >= SHARD_BYTES:
            save(batch.end, done=False)
    save(-1, done=True)
    report(WorkDone(part, 0, 0, finished=True))


def _documents(corpus: Corpus, part: PartName, start: int) -> Iterator[Batch]:
    """Yield a part's documents from row `start` on, without those of its drop list."""
    table, number = table_of(corpus.opened, part)
    batches = read_documents(table, number, corpus.recipe.data.filter, start)
    if not corpus.needs_selection:
        yield from batches
        return
    drop_list = DropList.open(corpus.drop_list_file(part))
    for batch in batches:
        duplicate, low = is_in(batch.rows, drop_list.duplicates), is_in(batch.rows, drop_list.low_scores)
        left_out = batch.left_out + Counter({"duplicate": int(duplicate.sum()), "low score": int(low.sum())})
        kept = ~(duplicate | low)
        yield batch._replace(rows=batch.rows[kept], texts=batch.texts.filter(pa.array(kept)), left_out=left_out)


def hash_part(corpus: Corpus, _: WorkerContext, part: PartName, files: dict[str, str], report: OnProgress) -> None:
    """Write the hashes and scores of a part's documents, unless they are there already."""
    file = corpus.hashes_file(part, files)

    def reported() -> Iterator[Batch]:
        table, number = table_of(corpus.opened, part)
        for batch in read_documents(table, number, corpus.recipe.data.filter):
            report(WorkDone(part, batch.texts.nbytes, 0, finished=False))
            yield batch

    if not file.exists():
        for pattern in (f"survey-{part}-*", f".survey-{part}-*.partial"):  # of other values or files; left by a killed process
            for outdated in corpus.folder.glob(pattern):
                outdated.unlink()
        hash_documents(reported(), file)
    report(WorkDone(part, 0, 0, finished=True))
