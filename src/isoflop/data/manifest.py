"""`manifest.json`: what a prepared folder holds, what it was made from, and how to tell that it is whole."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, NonNegativeInt, ValidationError, model_validator
from tqdm import tqdm

from isoflop.data.order import Order
from isoflop.disk import sha256
from isoflop.errors import UserError
from isoflop.recipe import Recipe, flatten
from isoflop.recipe_file import explain_errors
from isoflop.untrusted import MOST_JSON_BYTES, leaves_folder, named, read_text

FILE_NAME = "manifest.json"
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


Count = Annotated[int, Field(ge=0, lt=2**53)]
"""As far as a floating-point number counts."""


def _few(given: Any) -> Any:
    """Refuse a mapping of many keys, of which pydantic would explain every one, in a kilobyte each."""
    if isinstance(given, dict) and len(given) > MOST_KEYS:
        raise ValueError(f"it has {len(given):,} keys, and {MOST_KEYS:,} at most belong there")
    return given


def _texts(given: Any) -> Any:
    """Refuse a mapping by its first value that is no text; it may have many keys."""
    if isinstance(given, dict) and (wrong := next((key for key, value in given.items() if not isinstance(value, str)), None)):
        raise ValueError(f"{named(wrong)} is no text")
    return given


MOST_KEYS = 1000
Few = BeforeValidator(_few)
Texts = Annotated[dict[str, str], BeforeValidator(_texts)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    few_keys = model_validator(mode="before")(staticmethod(_few))


class Shard(_Part):
    """One Arrow file of windows."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """A file of the prepared folder itself: a path that leaves it is refused."""
    bytes: Count
    sha256: str
    windows: Annotated[Count, Field(gt=0)]


class Split(_Part):
    """One split of a source. `tokens` = windows x sequence_length + dropped_tokens - repeated_tokens."""

    documents: Count
    bytes: Count
    """UTF-8 bytes of the documents."""
    tokens: Count
    """With one end-of-text token a document."""
    windows: Count
    dropped_tokens: Count
    """The last partial window, where it is dropped."""
    repeated_tokens: Count
    """What a last window shares with the one before it, where it overlaps."""
    unigram_entropy_nats: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    """Entropy of the token frequencies: the loss of the best model that knows frequencies alone. Of validation."""
    shards: Annotated[list[Shard], FailFast()]

    @model_validator(mode="after")
    def _windows_are_those_of_the_shards(self) -> Self:
        if self.windows != (held := sum(shard.windows for shard in self.shards)):
            raise ValueError(f"windows = {self.windows}, and the shards hold {held}")
        return self


class PreparedSource(_Part):
    """One source of the recipe: where its text came from, and its windows."""

    files: Texts
    """SHA-256 of every local file, by path."""
    revision: str | None
    """Commit of a dataset on the Hub."""
    left_out: Annotated[dict[str, int], Few]
    """Documents left out, by reason."""
    splits: Annotated[dict[SplitName, Split], Few]


class Overlap(_Part):
    """How much of an evaluation set's text stands in the training text, in runs of `ngram_tokens` equal tokens."""

    ngram_tokens: int
    documents: int
    """Examples of the set that are long enough to have a run."""
    documents_found: int
    """Of which a run was found."""
    documents_mostly_found: int
    """Of which 80% of the runs were found (Llama 2 calls these dirty)."""
    ngrams: int
    """Different runs in the set."""
    ngrams_found: int


class TokenizerFacts(_Part):
    """The tokenizer that lies in `tokenizer/`."""

    sha256: str
    num_ids: Annotated[int, Field(gt=0, le=2**32)]
    """1 + the largest id it can give."""
    eos_token_id: NonNegativeInt
    bos_token_id: NonNegativeInt | None
    revision: str | None
    """Commit of a tokenizer from the Hub."""


class Manifest(_Part):
    """The whole of a prepared folder."""

    format: Literal[2] = 2
    made_from: dict[str, Any]
    """The recipe's values that decide the windows, by dotted key."""
    engine: str
    """The library that turned text into ids."""
    dtype: Literal["uint16", "uint32"]
    sequence_length: Annotated[Count, Field(ge=2)]
    tokenizer: TokenizerFacts
    sources: Annotated[dict[str, PreparedSource], Field(min_length=1), Few]
    contamination: Annotated[dict[str, Overlap], Few]
    """By evaluation set, where the recipe names some."""

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        for name, source in self.sources.items():
            for split in SPLITS:
                if split not in source.splits or not source.splits[split].windows or not source.splits[split].tokens:
                    raise ValueError(f"sources.{name}.splits.{split} is missing or empty")
        return self

    def split(self, name: SplitName) -> list[Split]:
        """A split of every source, in their order."""
        return [source.splits[name] for source in self.sources.values()]

    def shards(self, name: SplitName | None = None) -> list[Shard]:
        """The shards of a split in the order of its windows, or of both."""
        return [shard for split in ([name] if name else SPLITS) for part in self.split(split) for shard in part.shards]

    def windows(self, name: SplitName) -> int:
        """Windows of a split over all sources."""
        return sum(split.windows for split in self.split(name))

    def order(self, shares: dict[str, float], seed: int) -> Order:
        """The order in which a run sees the training windows, each source by its share of the tokens."""
        return Order.of([split.windows for split in self.split("train")], list(shares.values()), seed)

    def fingerprint(self) -> str:
        """SHA-256 over the windows and the tokenizer: what a run trained on, wherever the folder lies."""
        shards = [shard.sha256 for shard in self.shards()]
        return hashlib.sha256("".join([self.tokenizer.sha256, *shards]).encode()).hexdigest()


def validation_facts(manifest: Manifest, shares: dict[str, float]) -> tuple[float, float]:
    """Bytes per token and unigram entropy (nats) of the validation text, each source by its share of the tokens."""
    of_shares = [(share, manifest.sources[name].splits["validation"]) for name, share in shares.items()]
    bytes_per_token = sum(share * split.bytes / split.tokens for share, split in of_shares)
    return bytes_per_token, sum(share * (split.unigram_entropy_nats or 0.0) for share, split in of_shares)


def made_from(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values that decide what `prepare` writes."""
    data = recipe.data.model_dump(mode="json", exclude={"prepared_dir"})
    for part in data["source"].get("sources", {}).values():
        del part["weight"]  # decides the order in which windows are seen, not what they hold
    tokenizer = recipe.tokenizer.model_dump(mode="json")
    return flatten({"data": data, "tokenizer": tokenizer, "training": {"sequence_length": recipe.training.sequence_length}})


def read_manifest(prepared_dir: str) -> Manifest:
    """Read a folder's manifest. Raises `UserError` where there is none or it is not one."""
    file, remedy = Path(prepared_dir) / FILE_NAME, "copy the folder again, or set another data.prepared_dir"
    try:
        return Manifest.model_validate_json(read_text(file, MOST_JSON_BYTES, remedy))
    except FileNotFoundError:
        raise UserError(
            f"data.prepared_dir = {prepared_dir!r} has no {FILE_NAME}; run: python scripts/prepare.py RECIPE (same overrides)"
        ) from None
    except ValidationError as error:
        raise UserError(f"{file} is not a manifest: {explain_errors(error, Manifest)}; {remedy}") from None


def verify_shards(prepared_dir: str, manifest: Manifest, full: bool) -> None:
    """Check every shard's size and, with `full`, its SHA-256 (about 1 GB/s a thread). Raises `UserError` naming the shard."""

    def fault(shard: Shard) -> str | None:
        file = Path(prepared_dir) / shard.name
        if not file.is_file():
            return f"{file} is missing"
        if outside := leaves_folder(file, Path(prepared_dir)):
            return outside
        if file.stat().st_size != shard.bytes:
            return f"{file} has {file.stat().st_size} bytes, its manifest says {shard.bytes}"
        if full and sha256(file) != shard.sha256:
            return f"{file} does not match its SHA-256 in {FILE_NAME}"
        return None

    shards = manifest.shards()
    with ThreadPoolExecutor() as pool, tqdm(total=len(shards), desc="check", unit="shard", delay=3) as progress:
        found = []
        for one in pool.map(fault, shards):
            found.append(one)
            progress.update()
    faults = [one for one in found if one]
    if faults:
        raise UserError(f"prepared data is damaged: {'; '.join(faults)}; copy it again, or delete it and run scripts/prepare.py")
