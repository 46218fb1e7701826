"""What is prepared: the sources opened and cut into parts, the tokenizer and the engine, the folder in which parts gather."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from isoflop.data.encoding import Engine
from isoflop.data.manifest import SPLITS, Count, Few, Shard, SplitName, Texts, TokenizerFacts
from isoflop.data.order import keyed_uniform
from isoflop.data.sources import MAX_PARTS, Opened, Table
from isoflop.data.survey import Decided
from isoflop.data.windows import dtype_for
from isoflop.errors import UserError
from isoflop.recipe import Recipe
from isoflop.recipe_file import explain_errors
from isoflop.untrusted import MOST_JSON_BYTES, read_text

CORPUS_FILE = "corpus.json"


class PartName(NamedTuple):
    """One part of the corpus."""

    source: str
    number: int
    """Among the parts of its source."""

    def __str__(self) -> str:
        return f"{self.source}-{self.number:05d}"


class Facts(BaseModel):
    """What every part is made by; parts with other facts are not joined. Written to `corpus.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    made_from: dict[str, Any]
    engine: Engine
    tokenizer: TokenizerFacts
    revisions: Annotated[dict[str, str | None], Few]
    num_parts: Annotated[dict[str, Annotated[int, Field(ge=0, le=2 * MAX_PARTS)]], Few]
    """By source."""

    @model_validator(mode="after")
    def _of_the_same_sources(self) -> Self:
        if list(self.revisions) != list(self.num_parts):
            raise ValueError("revisions and num_parts are not of the same sources")
        return self

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """Type of the stored ids."""
        return dtype_for(self.tokenizer.num_ids)

    def digest(self) -> str:
        """SHA-256 of the facts."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def parts(self, shard: tuple[int, int] = (0, 1)) -> list[PartName]:
        """The parts of machine `shard[0]` of `shard[1]`, in the order of the windows."""
        parts = [PartName(source, index) for source, count in self.num_parts.items() for index in range(count)]
        return parts[shard[0] :: shard[1]]


class PartSplit(BaseModel):
    """What a part holds of one split."""

    documents: Count = 0
    bytes: Count = 0
    tokens: Count = 0
    shards: Annotated[list[Shard], FailFast()] = []
    tail: Annotated[list[Count], FailFast()] = []
    """Ids behind the last whole window; joined with other parts' tails in the end."""


class Record(BaseModel):
    """How far a part is; written when a shard is whole, so that a killed process goes on behind it."""

    corpus: str
    """Digest of the facts."""
    files: Texts
    """SHA-256 of the local files it is read from."""
    decided: str | None
    """SHA-256 of what the survey of all parts decided about this one."""
    rows: Annotated[int, Field(ge=-1, lt=2**53)] = 0
    """Rows of the part that are encoded."""
    done: bool = False
    left_out: Annotated[dict[str, Count], Few] = {}
    splits: Annotated[dict[SplitName, PartSplit], Few] = {"train": PartSplit(), "validation": PartSplit()}
    ngrams_found: Annotated[list[Count], FailFast()] = []
    """Runs of the evaluation sets that occur, by their place in the lookup."""

    @model_validator(mode="after")
    def _of_both_splits(self) -> Self:
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"splits are {', '.join(self.splits) or 'none'}, and not {' and '.join(SPLITS)}")
        return self


@dataclass(frozen=True)
class Corpus:
    """Everything a process needs to write any part."""

    recipe: Recipe
    opened: dict[str, Opened]
    folder: Path
    """Where parts gather until they are joined."""
    facts: Facts
    workers: int
    """Processes that share the parts."""
    threads: bool
    """Whether a process encodes with several threads: where it is alone, and was not told to be."""

    @property
    def needs_survey(self) -> bool:
        """Whether all documents have to be looked at before any is encoded."""
        scored = ["score_column" in table.columns for one in self.opened.values() for table in one.tables]
        return self.recipe.data.filter.drop_duplicates or any(scored)

    def record_file(self, part: PartName) -> Path:
        """Where the part's record lies."""
        return self.folder / f"{part}.json"

    def read_record(self, part: PartName, files: dict[str, str]) -> Record:
        """The part's record; a fresh one where there is none, or it was made by other facts, files or decisions."""
        decided = Decided.open(self.decided_file(part)).digest() if self.needs_survey else None
        fresh = Record(corpus=self.facts.digest(), files=files, decided=decided)
        try:
            found = read_document(self.record_file(part), Record)
        except FileNotFoundError:
            return fresh
        same = (found.corpus, found.files, found.decided) == (fresh.corpus, fresh.files, fresh.decided)
        return found if same else fresh

    def survey_file(self, part: PartName, files: dict[str, str]) -> Path:
        """Where the part's survey lies; the name holds what it was made by."""
        made_by = hashlib.sha256(f"{self.facts.digest()} {sorted(files.items())}".encode()).hexdigest()
        return self.folder / f"survey-{part}-{made_by[:16]}.npy"

    def decided_file(self, part: PartName) -> Path:
        """Where the rows lie that are left out after the survey."""
        return self.folder / f"decided-{part}.npz"


def table_of(opened: dict[str, Opened], part: PartName) -> tuple[Table, int]:
    """The table a part is read from, and its number there."""
    number = part.number
    for table in opened[part.source].tables:
        if number < table.num_parts:
            return table, number
        number -= table.num_parts
    raise IndexError(part)


def in_validation(recipe: Recipe, opened: dict[str, Opened], part: PartName, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether documents are held out: by their table's split, or by a keyed hash of source, part and row."""
    table, _ = table_of(opened, part)
    if table.split is not None:
        return np.full(len(rows), table.split == "validation")
    place = (list(opened).index(part.source) << 56) + (part.number << 40)
    return keyed_uniform(recipe.data.split_seed, rows + place) < recipe.data.validation_fraction


def num_parts(opened: dict[str, Opened]) -> dict[str, int]:
    """Parts of each source."""
    return {name: sum(table.num_parts for table in one.tables) for name, one in opened.items()}


def read_facts(folder: Path) -> Facts:
    """The facts of a folder of parts. Raises `UserError` where there are none."""
    file = folder / CORPUS_FILE
    if not file.exists():
        raise UserError(
            f"{folder} holds no parts ({CORPUS_FILE} is missing): prepare them first, or copy the machines' folders here"
        )
    return read_document(file, Facts)


Document = TypeVar("Document", bound=BaseModel)


def read_document(file: Path, kind: type[Document]) -> Document:
    """A file that `prepare` wrote into a folder of parts. Raises `UserError` where it is damaged."""
    remedy = "delete it, and the same command writes it again"
    try:
        return kind.model_validate_json(read_text(file, MOST_JSON_BYTES, remedy))
    except ValidationError as error:
        raise UserError(f"{file}: {explain_errors(error, kind)}; {remedy}") from None
