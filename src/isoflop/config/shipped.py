"""Find recipes, launch configs and evaluation files: the user's own first, else those that the package ships.

Entered by `find` and `shipped`. The package's folders are symbolic links in a checkout and real folders in a wheel.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Literal

import isoflop
from isoflop.utils.errors import UserError, nearest
from isoflop.utils.untrusted import named

Kind = Literal["recipes", "accelerate_configs", "eval"]
PACKAGE = Path(isoflop.__file__).parent
_ONE = {"recipes": "recipe", "accelerate_configs": "launch config", "eval": "evaluation file"}
_SUFFIXES = ("", ".yaml")


def find(kind: Kind, name: str) -> Path:
    """Return the file that `name` stands for: a path from the working directory, else a file that the package ships.

    `name` may lack its `.yaml` and the leading folder: `llama3_1.5b`, `llama3_1.5b.yaml` and `recipes/llama3_1.5b.yaml` are the
    same recipe. A user's own `recipes/llama3_1.5b.yaml` comes before the shipped one. Raises `UserError` where there is none,
    with the nearest known name.
    """
    own = [name + suffix for suffix in _SUFFIXES] + [f"{kind}/{name}{suffix}" for suffix in _SUFFIXES]
    for path in own:
        if os.path.isfile(path) or (path == name and os.path.exists(path) and not _shipped_file(kind, name)):
            return Path(path)
    if packaged := _shipped_file(kind, name):
        return packaged
    known = {*shipped(kind), *(path.stem for path in Path(kind).glob("*.yaml"))}
    if name.startswith(f"{kind}/") or name.endswith(".yaml"):
        known = {f"{kind}/{short}.yaml" for short in known}
    raise UserError(f"{_ONE[kind]} {named(name)} does not exist{nearest(name, sorted(known))}")


def _shipped_file(kind: Kind, name: str) -> Path | None:
    inside = PurePosixPath(name.removeprefix(f"{kind}/"))
    if inside.is_absolute() or ".." in inside.parts or not inside.name:
        return None
    paths = [f"{PACKAGE / kind / inside}{suffix}" for suffix in _SUFFIXES]
    return next((Path(path) for path in paths if os.path.isfile(path)), None)


def shipped(kind: Kind) -> list[str]:
    """Return the names of the YAML files that the package ships, e.g. `llama3_1.5b` and `ablations/124m_rope`, sorted."""
    folder = PACKAGE / kind
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
