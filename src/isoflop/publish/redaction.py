"""Removal of credentials, host names, user names and local folders from published files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import isoflop
from isoflop.config.recipe import Recipe
from isoflop.utils.credentials import hide_in_command, hide_in_tree

# At least two parts: `/s` is a slash in some text. The lookbehind excludes parts of URLs and of relative paths.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~*-])(?:~|\.\.)?(?:/[^\s/,;:'\"=()\[\]{}<>|\\]+){2,}/?")
CHECKOUT = Path(isoflop.__file__).parents[2]
_SECTIONS_WITH_PATHS = ("tokenizer", "data", "output")
_MACHINE_KEYS = {"pretty_env_info", "model_name_sanitized"}  # of lm-eval's results: the output of `lscpu`, and a local path


def published_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with every absolute path shortened to its last part."""
    tree = recipe.model_dump(mode="json")
    return Recipe.model_validate(tree | {section: _each(tree[section], _last_part) for section in _SECTIONS_WITH_PATHS})


def published_environment(environment: dict[str, Any]) -> dict[str, Any]:
    """Return versions, hardware and launches of `environment.json`, oldest launch first, without host and paths."""
    newest = {key: value for key, value in environment.items() if key != "earlier_launches"}
    launches = [*environment["earlier_launches"], newest]
    return {"launches": [hide_in_tree(_launch(launch)) for launch in launches]}


def _launch(launch: dict[str, Any]) -> dict[str, Any]:
    hardware = {key: value for key, value in launch["hardware"].items() if key != "host"}
    return launch | {"hardware": hardware, "command": [_typed(word) for word in hide_in_command(launch["command"])]}


def _typed(word: str) -> str:
    """Return a word of a command with local paths shortened: relative to the checkout, others to their name."""
    key, equals, value = word.partition("=")
    if equals:
        return f"{key}={_typed(value)}"
    if Path(word).is_relative_to(CHECKOUT):
        return str(Path(word).relative_to(CHECKOUT))
    return _ABSOLUTE_PATH.sub(lambda found: Path(found[0]).name, _last_part(word))


def published_results(results: dict[str, Any], run: Path) -> dict[str, Any]:
    """Return lm-eval's results without credentials and details of the machine, local paths shortened to their last part."""
    kept = {key: value for key, value in results.items() if key not in _MACHINE_KEYS}
    # Known folders first: their names may contain spaces, at which the pattern would end.
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
    """Return a JSON tree with `change` applied to every string."""
    if isinstance(tree, dict):
        return {key: _each(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_each(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree
