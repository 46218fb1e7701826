"""The corpus: what all its parts share, how far each part is, and the folder in which they gather."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from isoflop.config.loading import explain_errors
from isoflop.config.recipe import Recipe
from isoflop.data.encoding import Engine
from isoflop.data.manifest import SPLITS, Count, FewKeys, Shard, SplitName, TextMapping, TokenizerInfo
from isoflop.data.order import keyed_uniform
from isoflop.data.selection import DropList
from isoflop.data.sources import MAX_PARTS, OpenSource, Table
from isoflop.data.windows import dtype_for
from isoflop.utils.errors import UserError
from isoflop.utils.untrusted import MOST_JSON_BYTES, read_text

CORPUS_FILE = "corpus.json"
HASHES_ID = "[0-9a-f]" * 16  # glob of what `hashes_file` ends its names with


class PartName(NamedTuple):
    """Identifies one part of the corpus."""

    source: str
    number: int
    """Its number among the parts of its source."""

    def __str__(self) -> str:
        return f"{self.source}-{self.number:05d}"


class CorpusSpec(BaseModel):
    """What every part is made from, written to `corpus.json`. Parts of another specification are not joined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    made_from: dict[str, Any]
    engine: Engine
    tokenizer: TokenizerInfo
    revisions: Annotated[dict[str, str | None], FewKeys]
    num_parts: Annotated[dict[str, Annotated[int, Field(ge=0, le=2 * MAX_PARTS)]], FewKeys]
    """Parts of each source."""
    split_by_position: list[str] = []
    """Sources of a single document, whose end is held out."""

    @model_validator(mode="after")
    def _require_same_sources(self) -> Self:
        if list(self.revisions) != list(self.num_parts):
            raise ValueError("revisions and num_parts name different sources")
        return self

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """Return the type of the stored ids."""
        return dtype_for(self.tokenizer.num_ids)

    def digest(self) -> str:
        """Return the SHA-256 of the specification."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()

    def parts(self, shard: tuple[int, int] = (0, 1)) -> list[PartName]:
        """Return the parts of machine `shard[0]` of `shard[1]`, in the order of the windows."""
        parts = [PartName(source, index) for source, count in self.num_parts.items() for index in range(count)]
        return parts[shard[0] :: shard[1]]


class PartSplit(BaseModel):
    """One split of a part."""

    documents: Count = 0
    bytes: Count = 0
    tokens: Count = 0
    unknown_tokens: Count = 0
    shards: Annotated[list[Shard], FailFast()] = []
    tail: Annotated[list[Count], FailFast()] = []
    """Ids after the last complete window; `merge` joins the tails of all parts."""


class PartProgress(BaseModel):
    """How far a part is. Written after every complete shard, so that a killed process resumes there."""

    corpus: str
    """Digest of the corpus's specification."""
    files: TextMapping
    """SHA-256 of the local files that the part is read from."""
    decided: str | None
    """SHA-256 of the part's drop list, where documents are selected."""
    rows: Annotated[int, Field(ge=-1, lt=2**53)] = 0
    """Rows of the part that are encoded; -1 when it is done."""
    done: bool = False
    left_out: Annotated[dict[str, Count], FewKeys] = {}
    splits: Annotated[dict[SplitName, PartSplit], FewKeys] = {"train": PartSplit(), "validation": PartSplit()}

    @model_validator(mode="after")
    def _require_both_splits(self) -> Self:
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"splits are {', '.join(self.splits) or 'none'}; they must be {' and '.join(SPLITS)}")
        return self


@dataclass(frozen=True)
class Corpus:
    """What a process needs to write any part."""

    recipe: Recipe
    opened: dict[str, OpenSource]
    folder: Path
    """Folder in which parts gather until they are joined."""
    spec: CorpusSpec
    num_workers: int
    """Number of processes that share the parts."""
    threads: bool
    """Whether a process encodes with several threads: where it is the only one and one was not asked for."""

    @property
    def needs_selection(self) -> bool:
        """Whether all documents must be read before any is encoded, to select by duplicates or by score."""
        scored = [table.columns.score is not None for one in self.opened.values() for table in one.tables]
        return self.recipe.data.filter.drop_duplicates or any(scored)

    def progress_file(self, part: PartName) -> Path:
        """Return the path of the part's progress."""
        return self.folder / f"{part}.json"

    def read_part_progress(self, part: PartName, files: dict[str, str]) -> PartProgress:
        """Return the part's progress: a new one where there is none, or where specification, files or drop list changed."""
        decided = DropList.open(self.drop_list_file(part)).digest() if self.needs_selection else None
        fresh = PartProgress(corpus=self.spec.digest(), files=files, decided=decided)
        try:
            found = read_document(self.progress_file(part), PartProgress)
        except FileNotFoundError:
            return fresh
        same = (found.corpus, found.files, found.decided) == (fresh.corpus, fresh.files, fresh.decided)
        return found if same else fresh

    def hashes_file(self, part: PartName, files: dict[str, str]) -> Path:
        """Return the path of the part's document hashes. Its name identifies the specification and the files."""
        made_by = hashlib.sha256(f"{self.spec.digest()} {sorted(files.items())}".encode()).hexdigest()
        return self.folder / f"survey-{part}-{made_by[:16]}.npy"

    def drop_list_file(self, part: PartName) -> Path:
        """Return the path of the part's drop list."""
        return self.folder / f"decided-{part}.npz"


def table_of(opened: dict[str, OpenSource], part: PartName) -> tuple[Table, int]:
    """Return the table that a part is read from, and the part's number there."""
    number = part.number
    for table in opened[part.source].tables:
        if number < table.num_parts:
            return table, number
        number -= table.num_parts
    raise IndexError(part)


def in_validation(recipe: Recipe, opened: dict[str, OpenSource], part: PartName, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether documents are held out: by their table's split, by position, or by a keyed hash of source, part and row."""
    table, _ = table_of(opened, part)
    if table.split is not None:
        return np.full(len(rows), table.split == "validation")
    if table.held_out_tail is not None:
        tail: NDArray[np.bool_] = rows == 1
        return tail
    place = (list(opened).index(part.source) << 56) + (part.number << 40)
    return keyed_uniform(recipe.data.split_seed, rows + place) < recipe.data.validation_fraction


def num_parts(opened: dict[str, OpenSource]) -> dict[str, int]:
    """Return the number of parts of each source."""
    return {name: sum(table.num_parts for table in one.tables) for name, one in opened.items()}


def read_corpus_spec(folder: Path) -> CorpusSpec:
    """Return the specification of a folder of parts. Raises `UserError` where there is none."""
    file = folder / CORPUS_FILE
    if not file.exists():
        raise UserError(
            f"{folder} holds no parts ({CORPUS_FILE} is missing): prepare them first, or copy the machines' folders here"
        )
    return read_document(file, CorpusSpec)


Document = TypeVar("Document", bound=BaseModel)


def read_document(file: Path, kind: type[Document]) -> Document:
    """Read a file that `prepare` wrote into a folder of parts. Raises `UserError` where it is damaged."""
    remedy = "delete it, and the same command writes it again"
    try:
        return kind.model_validate_json(read_text(file, MOST_JSON_BYTES, remedy))
    except ValidationError as error:
        raise UserError(f"{file}: {explain_errors(error, kind)}; {remedy}") from None
