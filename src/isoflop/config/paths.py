"""Paths in a recipe are relative to the working directory; note those that exist only beside the recipe."""

from __future__ import annotations

import glob
import os
import sys
from pathlib import Path

from isoflop.config.recipe import Recipe
from isoflop.config.recipe_data import HubSource, MixtureSource, Source, TableSource, TextSource

OUTPUT_KEYS = ("data.prepared_dir", "output.run_dir")


def recipe_paths(recipe: Recipe) -> dict[str, list[str]]:
    """Return every path of a recipe, and every name that may be one, by its key."""
    data = recipe.data
    paths = {"data.prepared_dir": [data.prepared_dir], "output.run_dir": [recipe.output.run_dir]}
    if isinstance(data.source, MixtureSource):
        for name, part in data.source.sources.items():
            paths |= _of_source(f"data.source.sources.{name}.source", part.source)
    else:
        paths |= _of_source("data.source", data.source)
    named = {"tokenizer.name": recipe.tokenizer.name, "law": recipe.law}
    return paths | {key: [name] for key, name in named.items() if name is not None}


def _of_source(key: str, source: Source) -> dict[str, list[str]]:
    if isinstance(source, TextSource | TableSource):
        return {f"{key}.files": source.files}
    return {f"{key}.name": [source.name]} if isinstance(source, HubSource) else {}


def note_paths_elsewhere(recipe: Recipe, file: Path) -> None:
    """Print a note on stderr for each missing path that exists in the recipe's folder or the one above it.

    Also note output folders where the working directory is below that folder, e.g. `scripts/`.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    here, folders = Path.cwd(), file.resolve().parents[:2]
    for key, paths in recipe_paths(recipe).items():
        for path in (path for path in paths if not glob.glob(path)):
            there = next((folder for folder in folders if glob.glob(str(folder / path))), None)
            above = folders[-1] in here.parents and here != folders[0] and key in OUTPUT_KEYS and not Path(path).is_absolute()
            if there is None and not above:
                continue
            print(
                f"note: {key} = {path!r} is not in the working directory {here}{f', and is in {there}' if there else ''}: paths"
                f" in a recipe are relative to the working directory; cd {there or folders[-1]} first, or give the full path",
                file=sys.stderr,
                flush=True,
            )
