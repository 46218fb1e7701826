"""Which column of a table holds what, by the names that such tables commonly have."""

from __future__ import annotations

import re
from typing import NamedTuple

from isoflop.errors import UserError, nearest

# Compared without case, spaces, underscores and hyphens.
NAMES = {
    "parameters": (
        "parameters", "params", "n", "nparams", "nparameters", "numparams", "numparameters", "parametercount", "modelsize",
        "totalparameters", "nonembedding", "nonembeddingparameters", "nonembeddingparams", "nnoemb",
    ),
    "tokens": ("tokens", "d", "ntokens", "numtokens", "traintokens", "trainingtokens", "totaltokens", "throughput/totaltokens"),
    "flops": ("flops", "flop", "c", "compute", "computebudget", "trainingflop", "trainingflops", "trainflops", "totalflops"),
    "loss": ("loss", "finalloss", "valloss", "validationloss", "finalvalloss"),
    "weight": ("weight", "weights"),
    "unique_tokens": ("uniquetokens",),
    "run": ("run", "runname", "name"),
}  # fmt: skip
FLAGS = {"parameters": "--parameters", "tokens": "--tokens", "flops": "--flops", "loss": "--loss-column"}
WITHOUT_VOCABULARY = ("nonembedding", "noemb", "noembedding")  # in a column's name: N leaves the embeddings out


class Columns(NamedTuple):
    """Names of the columns, as the table has them."""

    parameters: str
    loss: str
    tokens: str | None
    flops: str | None
    weight: str | None = None
    unique_tokens: str | None = None
    run: str | None = None

    @property
    def without_vocabulary(self) -> bool:
        """Whether N, by its column's name, leaves the embeddings out."""
        return any(sign in plain(self.parameters) for sign in WITHOUT_VOCABULARY)


def plain(name: str) -> str:
    """A column's name as it is compared."""
    return re.sub(r"[\s_\-]", "", name).lower()


def find_columns(header: list[str], file: str, given: dict[str, str | None]) -> Columns:
    """The columns of a table, those of `given` (by the keys of `FLAGS`) as they are.

    Raises `UserError` where a column is missing, or several may be meant.
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
    candidates = [name for name in header if plain(name) in NAMES[key]]
    if key == "run":  # `run` before `name`
        candidates = sorted(candidates, key=lambda name: NAMES[key].index(plain(name)))[:1]
    if len(candidates) > 1:
        remedy = f"say which by {FLAGS[key]}" if key in FLAGS else "keep one of them"
        raise UserError(f"{file}: columns {' and '.join(candidates)} may both be the {key.replace('_', ' ')}; {remedy}")
    return candidates[0] if candidates else None
