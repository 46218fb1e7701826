"""`manifest.json`: what a prepared folder holds, what it was made from, and how to tell that it is whole."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isoflop.errors import UserError
from isoflop.recipe import Recipe, flatten

FILE_NAME = "manifest.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Part):
    """One Arrow file of windows."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """A file of the prepared folder itself: a path that leaves it is refused."""
    bytes: int
    sha256: str
    windows: int


class Split(_Part):
    """One split's counts. `tokens` = windows x sequence_length + dropped_tokens."""

    documents: int
    bytes: int
    """UTF-8 bytes of the documents."""
    tokens: int
    """With one end-of-text token a document."""
    windows: int
    dropped_tokens: int
    """The last partial window."""
    unigram_entropy_nats: float
    """Entropy of this split's token frequencies: the loss of the best model that knows frequencies alone."""
    shards: list[Shard]


class TokenizerFacts(_Part):
    """The tokenizer that lies in `tokenizer/`."""

    sha256: str
    num_ids: int
    """1 + the largest id it can give."""
    eos_token_id: int
    bos_token_id: int | None
    revision: str | None
    """Commit of a tokenizer from the Hub."""


class Manifest(_Part):
    """The whole of a prepared folder."""

    format: Literal[1] = 1
    made_from: dict[str, Any]
    """The recipe's values that decide the windows, by dotted key."""
    source_files: dict[str, str]
    """SHA-256 of every local source file."""
    dataset_revision: str | None
    dtype: str
    sequence_length: int
    tokenizer: TokenizerFacts
    splits: dict[str, Split]

    def fingerprint(self) -> str:
        """SHA-256 over the windows and the tokenizer: what a run trained on, wherever the folder lies."""
        shards = [shard.sha256 for name in sorted(self.splits) for shard in self.splits[name].shards]
        return hashlib.sha256("".join([self.tokenizer.sha256, *shards]).encode()).hexdigest()


def made_from(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values that decide what `prepare` writes."""
    data = recipe.data.model_dump(mode="json", exclude={"prepared_dir"})
    tokenizer = recipe.tokenizer.model_dump(mode="json")
    return flatten({"data": data, "tokenizer": tokenizer, "training": {"sequence_length": recipe.training.sequence_length}})


def read_manifest(prepared_dir: str) -> Manifest:
    """Read a folder's manifest. Raises `UserError` where there is none or it is not one."""
    file = Path(prepared_dir) / FILE_NAME
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"data.prepared_dir = {prepared_dir!r} has no {FILE_NAME}; run: python scripts/prepare.py RECIPE (same overrides)"
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a manifest: {error}; delete {prepared_dir} and run scripts/prepare.py again") from None


def verify_shards(prepared_dir: str, manifest: Manifest, full: bool) -> None:
    """Check every shard's size and, with `full`, its SHA-256 (about 1 GB/s a thread). Raises `UserError` naming the shard."""

    def fault(shard: Shard) -> str | None:
        file = Path(prepared_dir) / shard.name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != shard.bytes:
            return f"{file} has {file.stat().st_size} bytes, its manifest says {shard.bytes}"
        if full:
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != shard.sha256:
                    return f"{file} does not match its SHA-256 in {FILE_NAME}"
        return None

    with ThreadPoolExecutor() as pool:
        faults = [f for f in pool.map(fault, [s for split in manifest.splits.values() for s in split.shards]) if f]
    if faults:
        raise UserError(f"prepared data is damaged: {'; '.join(faults)}; copy it again, or delete it and run scripts/prepare.py")
