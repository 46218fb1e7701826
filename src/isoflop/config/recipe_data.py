"""The sections of a recipe on its text and its tokenizer."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from isoflop.utils.credentials import REMEDY, find_in_tree


class Section(BaseModel):
    """A section: frozen, strictly typed, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ConfigFile(Section):
    """A file of sections. It is published with its runs and must not hold a credential."""

    model_config = ConfigDict(hide_input_in_errors=True)  # pydantic's own message would show the credential

    @model_validator(mode="before")
    @classmethod
    def _require_no_credential(cls, given: Any) -> Any:
        if found := find_in_tree(given):
            raise ValueError(f"{found}; {REMEDY}")
        return given


def require_one_of(section: Section, *keys: str) -> None:
    """Refuse a section unless exactly one of these keys is given."""
    given = [key for key in keys if getattr(section, key) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(keys)} (given: {', '.join(given) or 'none'})")


class Tokenizer(Section):
    """Exactly one of `name` (on the Hub with an optional revision) and `train_vocab_size`."""

    name: str | None = None
    """A tokenizer on the Hub, or a local folder."""
    revision: str | None = None
    """The Hub's branch, tag or commit; the manifest records its commit."""
    train_vocab_size: Annotated[int, Field(ge=257)] | None = None
    """Train a byte-level BPE of this many entries, including 256 bytes and an end-of-text, on the training split."""
    max_unknown_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """`prepare` refuses text that the tokenizer turns into more than this share of unknown tokens."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        require_one_of(self, "name", "train_vocab_size")
        if self.revision is not None and self.name is None:
            raise ValueError("revision belongs to a tokenizer on the Hub, and this one is trained here; leave it out")
        return self


class TextSource(Section):
    """UTF-8 text files."""

    kind: Literal["text"]
    files: Annotated[list[str], Field(min_length=1)]
    """Paths or glob patterns, relative to the working directory, or URLs (https, hf, s3, gs)."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """Unit of a document: a file, a paragraph, or a line."""


class _Rows(Section):
    text_column: str = "text"
    score_column: str | None = None
    """A numeric column with the quality score of each document."""
    keep_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the documents to keep: those with the highest scores."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.score_column is None) != (self.keep_fraction is None):
            raise ValueError("score_column and keep_fraction go together: give both, or neither")
        return self


class TableSource(_Rows):
    """Files of rows: JSON lines or CSV (also compressed by gzip or zstd), Parquet or Arrow."""

    kind: Literal["json", "parquet", "arrow", "csv"]
    files: Annotated[list[str], Field(min_length=1)]
    """Paths or glob patterns, relative to the working directory, or URLs (https, hf, s3, gs)."""


class HubSource(_Rows):
    """A dataset on the Hub, or a local folder with the layout of one."""

    kind: Literal["hub"]
    name: str
    config: str | None = None
    revision: str | None = None
    """The Hub's branch, tag or commit; the manifest records its commit."""
    streaming: bool = False
    """Read over the network instead of downloading the files first."""


class PythonSource(Section):
    """Python's own source files without test suites: text that every machine has."""

    kind: Literal["python_stdlib", "python_packages"]
    """The running Python's standard library (12 MB), or with all installed packages (250 MB with this project's)."""


Source = Annotated[TextSource | TableSource | HubSource | PythonSource, Field(discriminator="kind")]


class MixturePart(Section):
    """One source of a mixture."""

    weight: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Share of the training tokens."""
    source: Source


class MixtureSource(Section):
    """Several sources, each sampled by its weight and repeated as often as its share needs."""

    kind: Literal["mixture"]
    sources: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")], MixturePart], Field(min_length=2)]
    """By a name of your choice, which its files bear too."""

    @model_validator(mode="after")
    def _weights_are_shares(self) -> Self:
        total = math.fsum(part.weight for part in self.sources.values())
        if abs(total - 1) > 1e-6:
            shares = ", ".join(f"{name} {part.weight / total:.6f}" for name, part in self.sources.items())
            raise ValueError(f"the weights sum to {total:.6g}, and must sum to 1: in these proportions they are {shares}")
        return self


class Filter(Section):
    """Documents to leave out."""

    min_characters: NonNegativeInt = 0
    """Leave out documents with fewer Unicode characters."""
    drop_duplicates: bool = False
    """Keep only the first of documents with the same text, over all sources. Reads the text twice."""
    invalid_rows: Literal["refuse", "skip"] = "refuse"
    """Rows that cannot be read, or whose text is null or not a string: `refuse` the data, or `skip` and count them."""


class Data(Section):
    """The text, and the folder of its packed windows."""

    source: Annotated[TextSource | TableSource | HubSource | PythonSource | MixtureSource, Field(discriminator="kind")]
    prepared_dir: str
    """Folder that `prepare` writes and `pretrain` reads."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.005
    """Share of documents held out, where the dataset has no validation split of its own."""
    split_seed: NonNegativeInt = 0
    """Random seed of the held-out documents; separate from `seed`, so that runs of several seeds share their data."""
    filter: Filter = Filter()
    tail: Literal["drop", "overlap"] = "drop"
    """Tokens at the end that do not fill a window: `drop` them, or let a last window `overlap` the one before."""

    @model_validator(mode="before")
    @classmethod
    def _without_contamination(cls, given: Any) -> Any:
        """Refuse a key of earlier versions, whose runs saved it as null where it was not set."""
        if not isinstance(given, dict) or "contamination" not in given:
            return given
        if given["contamination"] is not None:
            raise ValueError(
                "contamination is not reported any more; delete the key, which never changed the windows. datatrove looks for"
                " n-grams of evaluation sets in a training corpus and leaves such documents out: its NGramsDecontIndexer and"
                " NGramsDecontFilter (https://github.com/huggingface/datatrove)"
            )
        return {key: value for key, value in given.items() if key != "contamination"}

    def sources(self) -> dict[str, Source]:
        """Return the sources by name; a single source is named by its kind."""
        if isinstance(self.source, MixtureSource):
            return {name: part.source for name, part in self.source.sources.items()}
        return {self.source.kind: self.source}

    def shares(self) -> dict[str, float]:
        """Return each source's share of the training tokens."""
        if isinstance(self.source, MixtureSource):
            return {name: part.weight for name, part in self.source.sources.items()}
        return {self.source.kind: 1.0}
