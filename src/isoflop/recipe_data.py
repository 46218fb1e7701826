"""The sections of a recipe that say which text is learnt from, and by which tokenizer."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from pydantic import model_validator as checked_by

from isoflop.credentials import REMEDY, find_in_tree
from isoflop.errors import UserError


class Section(BaseModel):
    """Frozen, strictly typed, and refusing every key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Document(Section):
    """A whole file of sections. It is published with its runs, so none may hold a credential."""

    @checked_by(mode="before")
    @classmethod
    def _hold_no_credential(cls, given: Any) -> Any:
        if found := find_in_tree(given):
            raise UserError(f"{found}; {REMEDY}")  # pydantic's own error would show the value
        return given


def require_one_of(section: Section, *keys: str) -> None:
    """Refuse a section in which not exactly one of these keys is given."""
    given = [key for key in keys if getattr(section, key) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(keys)} (given: {', '.join(given) or 'none'})")


class Tokenizer(Section):
    """Exactly one of `name` (with a revision, where it is the Hub's) and `train_vocab_size`."""

    name: str | None = None
    """A tokenizer on the Hub, or a local folder."""
    revision: str | None = None
    """The Hub's branch, tag or commit; the manifest records the commit it stood for."""
    train_vocab_size: Annotated[int, Field(ge=257)] | None = None
    """Train a byte-level BPE of so many entries (256 bytes and an end-of-text among them) on the training split."""

    @checked_by(mode="after")
    def _one_origin(self) -> Self:
        require_one_of(self, "name", "train_vocab_size")
        if self.revision is not None and self.name is None:
            raise ValueError("revision is of a tokenizer on the Hub, and this one is trained here; leave it out")
        return self


class TextSource(Section):
    """Local UTF-8 text files."""

    kind: Literal["text"]
    files: Annotated[list[str], Field(min_length=1)]
    """Paths or glob patterns, relative to the working directory."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What counts as one document: a whole file, a paragraph, or a line."""


class _Rows(Section):
    text_column: str = "text"
    score_column: str | None = None
    """A column of numbers that say how good a document is."""
    keep_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Keep this share of the documents: those with the highest score."""

    @checked_by(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.score_column is None) != (self.keep_fraction is None):
            raise ValueError("score_column and keep_fraction go together: give both, or neither")
        return self


class TableSource(_Rows):
    """Local JSON-lines or Parquet files, plain or under gzip or zstd."""

    kind: Literal["json", "parquet"]
    files: Annotated[list[str], Field(min_length=1)]
    """Paths or glob patterns, relative to the working directory."""


class HubSource(_Rows):
    """A dataset on the Hub, or a local folder with the layout of one."""

    kind: Literal["hub"]
    name: str
    config: str | None = None
    revision: str | None = None
    """The Hub's branch, tag or commit; the manifest records the commit it stood for."""
    streaming: bool = False
    """Read over the network document by document, instead of downloading the files first."""


class PythonSource(Section):
    """Python's own sources, test suites left out: text that every machine has."""

    kind: Literal["python_stdlib", "python_packages"]
    """The running Python's standard library (12 MB); with the packages installed beside it (250 MB where this project's are)."""


Source = Annotated[TextSource | TableSource | HubSource | PythonSource, Field(discriminator="kind")]


class Part(Section):
    """One source of a mixture."""

    weight: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Its share of the tokens that are trained on."""
    source: Source


class MixtureSource(Section):
    """Several sources, each drawn from by its weight; each is repeated as often as its share asks for."""

    kind: Literal["mixture"]
    sources: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")], Part], Field(min_length=2)]
    """By a name of your choice, which names its files too."""

    @checked_by(mode="after")
    def _weights_are_shares(self) -> Self:
        total = math.fsum(part.weight for part in self.sources.values())
        if abs(total - 1) > 1e-6:
            shares = ", ".join(f"{name} {part.weight / total:.6f}" for name, part in self.sources.items())
            raise ValueError(f"the weights sum to {total:.6g}, and shares sum to 1: in these proportions they are {shares}")
        return self


class Filter(Section):
    """Which documents are left out."""

    min_characters: NonNegativeInt = 0
    """Documents that are shorter (in Unicode characters) are left out."""
    drop_duplicates: bool = False
    """Of documents with the same text, over all sources, keep the first. Reads the text twice."""
    invalid_rows: Literal["refuse", "skip"] = "refuse"
    """A row whose text is null or not a string: `refuse` the data, or `skip` and count it."""


class Contamination(Section):
    """Texts of evaluation sets that are looked for in the training text; what is found is reported, nothing is left out."""

    sets: Annotated[dict[str, Source], Field(min_length=1)]
    """Texts by the name of their evaluation set, one document an example."""
    ngram_tokens: Annotated[int, Field(ge=2, le=64)] = 13
    """So many equal tokens in a row count as found (13 words in GPT-3's check, over 10 tokens in Llama 2's)."""


class Data(Section):
    """Which text, and where its packed windows lie."""

    source: Annotated[TextSource | TableSource | HubSource | PythonSource | MixtureSource, Field(discriminator="kind")]
    prepared_dir: str
    """Folder that `prepare` writes and `pretrain` reads."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.005
    """Share of documents held out, where the dataset brings no validation split of its own."""
    split_seed: NonNegativeInt = 0
    """Chooses the held-out documents; apart from `seed`, so that runs of several seeds share their data."""
    filter: Filter = Filter()
    tail: Literal["drop", "overlap"] = "drop"
    """The tokens at the very end that fill no window: `drop` them, or let a last window `overlap` the one before."""
    contamination: Contamination | None = None

    def sources(self) -> dict[str, Source]:
        """The sources by name; a single one bears its kind's."""
        if isinstance(self.source, MixtureSource):
            return {name: part.source for name, part in self.source.sources.items()}
        return {self.source.kind: self.source}

    def shares(self) -> dict[str, float]:
        """Each source's share of the tokens that are trained on."""
        if isinstance(self.source, MixtureSource):
            return {name: part.weight for name, part in self.source.sources.items()}
        return {self.source.kind: 1.0}
