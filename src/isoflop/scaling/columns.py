"""Finds the columns of a table by the names that such tables commonly have."""

from __future__ import annotations

import re
from typing import NamedTuple

from isoflop.utils.errors import UserError, nearest

# Case, spaces, underscores and hyphens are ignored.
NAMES = {
    "parameters": (
        "parameters", "params", "n", "nparams", "nparameters", "numparams", "numparameters", "parametercount", "modelsize",
        "totalparameters", "nonembedding", "nonembeddingparameters", "nonembeddingparams", "nnoemb",
        "parameterswithoutvocabulary",
    ),
    "tokens": ("tokens", "d", "ntokens", "numtokens", "traintokens", "trainingtokens", "totaltokens", "throughput/totaltokens"),
    "flops": ("flops", "flop", "c", "compute", "computebudget", "trainingflop", "trainingflops", "trainflops", "totalflops"),
    "loss": ("loss", "finalloss", "valloss", "validationloss", "finalvalloss"),
    "weight": ("weight", "weights"),
    "unique_tokens": ("uniquetokens",),
    "run": ("run", "runname", "name"),
    "learning_rate": ("peaklearningrate", "learningrate", "maxlearningrate", "peaklr", "maxlr", "lr"),
    "batch": (
        "tokensperstep", "batchtokens", "batchsizetokens", "globalbatchtokens", "batchsequences", "globalbatchsize", "batchsize",
        "sequencesperstep", "bs",
    ),
    "optimizer": ("optimizer", "optimizername"),
}  # fmt: skip
FLAGS = {
    "parameters": "--parameters", "tokens": "--tokens", "flops": "--flops", "loss": "--loss-column",
    "learning_rate": "--learning-rate", "batch": "--batch",
}  # fmt: skip
FIRST_OF_SEVERAL = ("run", "learning_rate", "batch", "optimizer")  # the first of their names counts; the others are ignored
WITHOUT_VOCABULARY = (
    "nonembedding",
    "noemb",
    "noembedding",
    "withoutvocabulary",
)  # in the name of the column of N: it excludes the embeddings


class Columns(NamedTuple):
    """Names of a table's columns, by what they hold."""

    parameters: str
    loss: str
    tokens: str | None
    flops: str | None
    weight: str | None = None
    unique_tokens: str | None = None
    run: str | None = None
    learning_rate: str | None = None
    batch: str | None = None
    optimizer: str | None = None

    @property
    def without_vocabulary(self) -> bool:
        """Whether N excludes the embeddings, by its column's name."""
        return any(sign in normalized(self.parameters) for sign in WITHOUT_VOCABULARY)

    @property
    def batch_in_tokens(self) -> bool:
        """Whether a batch is counted in tokens, by its column's name; else in sequences."""
        return self.batch is not None and "token" in normalized(self.batch)


def normalized(name: str) -> str:
    """Return a column's name for comparison."""
    return re.sub(r"[\s_\-]", "", name).lower()


def find_columns(header: list[str], file: str, given: dict[str, str | None]) -> Columns:
    """Return the columns of a table; those in `given` (by the keys of `FLAGS`) override their names.

    Raises `UserError` if a column is missing or ambiguous.
    """
    for key, name in given.items():
        if name is not None and name not in header:
            raise UserError(f"{FLAGS[key]} {name}: {file} has no such column{nearest(name, header)}")
    found = {key: given.get(key) or _find(key, header, file) for key in NAMES}
    shown = f"; its columns: {', '.join(header)}"
    parameters, loss = found.pop("parameters"), found.pop("loss")
    if parameters is None:
        raise UserError(f"{file} has no column of model sizes by name; name it by --parameters, or add one{shown}")
    if loss is None:
        raise UserError(f"{file} has no column of losses by name; name it by --loss-column{shown}")
    if not found["tokens"] and not found["flops"]:
        raise UserError(f"{file} has no column of tokens or FLOPs by name; name one by --tokens or --flops{shown}")
    return Columns(parameters, loss, **found)


def _find(key: str, header: list[str], file: str) -> str | None:
    candidates = [name for name in header if normalized(name) in NAMES[key]]
    if key in FIRST_OF_SEVERAL:
        candidates = sorted(candidates, key=lambda name: NAMES[key].index(normalized(name)))[:1]
    if len(candidates) > 1:
        remedy = f"say which by {FLAGS[key]}" if key in FLAGS else "keep one of them"
        raise UserError(f"{file}: columns {' and '.join(candidates)} may both be the {key.replace('_', ' ')}; {remedy}")
    return candidates[0] if candidates else None
