"""`manifest.json`: what a prepared folder holds, what it was made from, and checks that it is intact."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, NonNegativeInt, ValidationError, model_validator
from tqdm import tqdm

from isoflop.config.loading import explain_errors
from isoflop.config.recipe import Recipe, flatten
from isoflop.data.order import Order
from isoflop.utils.errors import UserError
from isoflop.utils.io import sha256
from isoflop.utils.untrusted import MOST_JSON_BYTES, leaves_folder, named, read_text

FILE_NAME = "manifest.json"
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


Count = Annotated[int, Field(ge=0, lt=2**53)]
"""Below 2^53, so that it is exact in floating point."""


def _few(given: Any) -> Any:
    """Refuse a mapping of many keys: pydantic would explain each invalid one in a kilobyte."""
    if isinstance(given, dict) and len(given) > MOST_KEYS:
        raise ValueError(f"it has {len(given):,} keys; at most {MOST_KEYS:,} are allowed")
    return given


def _texts(given: Any) -> Any:
    """Refuse a mapping at its first value that is not text; it may have many keys."""
    if isinstance(given, dict) and (wrong := next((key for key, value in given.items() if not isinstance(value, str)), None)):
        raise ValueError(f"{named(wrong)} is not text")
    return given


MOST_KEYS = 1000
FewKeys = BeforeValidator(_few)
TextMapping = Annotated[dict[str, str], BeforeValidator(_texts)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    few_keys = model_validator(mode="before")(staticmethod(_few))


class Shard(_Entry):
    """One Arrow file of windows."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """A file directly in the prepared folder: no path that leaves it matches."""
    bytes: Count
    sha256: str
    windows: Annotated[Count, Field(gt=0)]


class Split(_Entry):
    """One split of a source. `tokens` = windows x sequence_length + dropped_tokens - repeated_tokens."""

    documents: Count
    bytes: Count
    """UTF-8 bytes of the documents."""
    tokens: Count
    """Includes one end-of-text token per document."""
    unknown_tokens: Count = 0
    """Those of the tokens that are the unknown token."""
    windows: Count
    dropped_tokens: Count
    """Tokens of the last partial window, where it is dropped."""
    repeated_tokens: Count
    """Tokens that an overlapping last window shares with the one before."""
    unigram_entropy_nats: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    """Entropy of the token frequencies, the loss of the best model of frequencies alone; for validation only."""
    shards: Annotated[list[Shard], FailFast()]

    @model_validator(mode="after")
    def _windows_match_shards(self) -> Self:
        if self.windows != (total := sum(shard.windows for shard in self.shards)):
            raise ValueError(f"windows = {self.windows}, and the shards hold {total}")
        return self


class PreparedSource(_Entry):
    """One source of the recipe: the origin of its text, and its windows."""

    files: TextMapping
    """SHA-256 of every local file, by path."""
    revision: str | None
    """Commit of a dataset on the Hub."""
    left_out: Annotated[dict[str, int], FewKeys]
    """Documents left out, by reason."""
    splits: Annotated[dict[SplitName, Split], FewKeys]


class TokenizerInfo(_Entry):
    """The tokenizer in `tokenizer/`."""

    sha256: str
    num_ids: Annotated[int, Field(gt=0, le=2**32)]
    """1 + its largest id."""
    eos_token_id: NonNegativeInt
    bos_token_id: NonNegativeInt | None
    revision: str | None
    """Commit of a tokenizer from the Hub."""


class Manifest(_Entry):
    """Contents of a prepared folder."""

    format: Literal[2] = 2
    made_from: dict[str, Any]
    """The recipe's values that decide the windows (`data_settings`), by dotted key."""
    engine: str
    """The library that encoded the text."""
    dtype: Literal["uint16", "uint32"]
    sequence_length: Annotated[Count, Field(ge=2)]
    tokenizer: TokenizerInfo
    sources: Annotated[dict[str, PreparedSource], Field(min_length=1), FewKeys]

    @model_validator(mode="before")
    @classmethod
    def _without_contamination(cls, given: Any) -> Any:
        """Drop the contamination report of earlier versions and its settings, which do not affect the windows."""
        if not isinstance(given, dict):
            return given
        kept = {key: value for key, value in given.items() if key != "contamination"}
        if isinstance(made_from := given.get("made_from"), dict):
            kept["made_from"] = {key: made_from[key] for key in made_from if not str(key).startswith("data.contamination")}
        return kept

    @model_validator(mode="after")
    def _every_split_has_windows(self) -> Self:
        for name, source in self.sources.items():
            for split in SPLITS:
                if split not in source.splits or not source.splits[split].windows or not source.splits[split].tokens:
                    raise ValueError(f"sources.{name}.splits.{split} is missing or empty")
        return self

    def split(self, name: SplitName) -> list[Split]:
        """Return a split of every source, in order."""
        return [source.splits[name] for source in self.sources.values()]

    def shards(self, name: SplitName | None = None) -> list[Shard]:
        """Return the shards of a split, or of both, in the order of their windows."""
        return [shard for split in ([name] if name else SPLITS) for part in self.split(split) for shard in part.shards]

    def windows(self, name: SplitName) -> int:
        """Return the number of windows of a split over all sources."""
        return sum(split.windows for split in self.split(name))

    def order(self, shares: dict[str, float], seed: int) -> Order:
        """Return the order in which a run reads the training windows, each source by its share of the tokens."""
        return Order.of([split.windows for split in self.split("train")], list(shares.values()), seed)

    def fingerprint(self) -> str:
        """Return a SHA-256 over windows and tokenizer: it identifies the data of a run, wherever the folder is."""
        shards = [shard.sha256 for shard in self.shards()]
        return hashlib.sha256("".join([self.tokenizer.sha256, *shards]).encode()).hexdigest()


def validation_statistics(manifest: Manifest, shares: dict[str, float]) -> tuple[float, float]:
    """Return bytes per token and unigram entropy (nats) of the validation text, each source by its share of the tokens."""
    of_shares = [(share, manifest.sources[name].splits["validation"]) for name, share in shares.items()]
    bytes_per_token = sum(share * split.bytes / split.tokens for share, split in of_shares)
    return bytes_per_token, sum(share * (split.unigram_entropy_nats or 0.0) for share, split in of_shares)


def data_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values that decide what `prepare` writes, by dotted key: `made_from` in the manifest."""
    data = recipe.data.model_dump(mode="json", exclude={"prepared_dir"})
    for part in data["source"].get("sources", {}).values():
        del part["weight"]  # affects the order of the windows, not their content
    tokenizer = recipe.tokenizer.model_dump(mode="json", exclude={"max_unknown_fraction"})
    return flatten({"data": data, "tokenizer": tokenizer, "training": {"sequence_length": recipe.training.sequence_length}})


def read_manifest(prepared_dir: str) -> Manifest:
    """Read a folder's manifest. Raises `UserError` where it is missing or invalid."""
    file, remedy = Path(prepared_dir) / FILE_NAME, "copy the folder again, or set another data.prepared_dir"
    try:
        return Manifest.model_validate_json(read_text(file, MOST_JSON_BYTES, remedy))
    except FileNotFoundError:
        raise UserError(
            f"data.prepared_dir = {prepared_dir!r} has no {FILE_NAME}; run: isoflop prepare RECIPE (same overrides)"
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
        raise UserError(f"prepared data is damaged: {'; '.join(faults)}; copy it again, or delete it and run isoflop prepare")
