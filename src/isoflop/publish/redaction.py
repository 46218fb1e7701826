"""What must not leave the machine: credentials, host names, user names and the folders they stand in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import isoflop
from isoflop.credentials import hide_in_command, hide_in_tree
from isoflop.recipe import Recipe

# Two parts or more: `/s` is no path, but a slash in some text. Not behind what makes it a part of an URL or a relative path.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~*-])(?:~|\.\.)?(?:/[^\s/,;:'\"=()\[\]{}<>|\\]+){2,}/?")
CHECKOUT = Path(isoflop.__file__).parents[2]
_PLACES = ("tokenizer", "data", "output")  # sections of a recipe that name files
_OF_THE_MACHINE = {
    "pretty_env_info",
    "model_name_sanitized",
}  # of lm-eval's results: `lscpu` and such, and a path by another name


def published_recipe(recipe: Recipe) -> Recipe:
    """The recipe with every absolute path shortened to its last part: what of it others can use, and nothing of the machine."""
    tree = recipe.model_dump(mode="json")
    return Recipe.model_validate(tree | {section: _each(tree[section], _last_part) for section in _PLACES})


def published_environment(environment: dict[str, Any]) -> dict[str, Any]:
    """Versions, hardware names and launches of `environment.json`, oldest launch first; no host, no paths."""
    newest = {key: value for key, value in environment.items() if key != "earlier_launches"}
    launches = [*environment["earlier_launches"], newest]
    return {"launches": [hide_in_tree(_launch(launch)) for launch in launches]}


def _launch(launch: dict[str, Any]) -> dict[str, Any]:
    hardware = {key: value for key, value in launch["hardware"].items() if key != "host"}
    return launch | {"hardware": hardware, "command": [_typed(word) for word in hide_in_command(launch["command"])]}


def _typed(word: str) -> str:
    """A word of a command as a reader can type it: files of the checkout from its root, others by their name alone."""
    key, equals, value = word.partition("=")
    if equals:
        return f"{key}={_typed(value)}"
    if Path(word).is_relative_to(CHECKOUT):
        return str(Path(word).relative_to(CHECKOUT))
    return _ABSOLUTE_PATH.sub(lambda found: Path(found[0]).name, _last_part(word))


def published_results(results: dict[str, Any], run: Path) -> dict[str, Any]:
    """lm-eval's results without credentials and what they say of the machine; local paths shortened to their last part."""
    kept = {key: value for key, value in results.items() if key not in _OF_THE_MACHINE}
    # As a whole first: a folder's name may hold spaces, where the pattern would end.
    folders = [str(path) for path in (run.resolve(), CHECKOUT, Path.home()) if len(path.parts) > 1]

    def shorten(text: str) -> str:
        for folder in folders:
            text = text.replace(f"{folder}/", "").replace(folder, Path(folder).name)
        return _ABSOLUTE_PATH.sub(lambda found: Path(found[0]).name, text)

    shortened: dict[str, Any] = _each(hide_in_tree(kept), shorten)
    return shortened


def _last_part(text: str) -> str:
    return Path(text).name if text.startswith(("/", "~", "..")) else text


def _each(tree: Any, change: Any) -> Any:
    """A tree of JSON with every string in it changed."""
    if isinstance(tree, dict):
        return {key: _each(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_each(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree
