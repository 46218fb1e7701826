"""Recipes as files: YAML and dotted overrides in, a checked `Recipe` out; and back.

Entered by `load_recipe`. `python -m isoflop.recipe_file` prints the JSON schema that editors use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from isoflop.errors import UserError, nearest
from isoflop.recipe import Recipe

_EXCLUSIVE = (  # naming one on the command line drops the recipe's other
    ("training.max_steps", "training.max_tokens", "training.tokens_per_parameter"),
    ("tokenizer.name", "tokenizer.train_vocab_size"),
)


class _Yaml12Loader(yaml.SafeLoader):
    """YAML whose floats are those of YAML 1.2: PyYAML reads `3e-4` as a string."""


_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML with scientific notation read as numbers."""
    return yaml.load(text, Loader=_Yaml12Loader)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides.

    Raises `UserError` for a missing file, broken YAML, an unknown key (with the nearest known one), a value of
    the wrong type, and values that contradict each other.
    """
    path = Path(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        hint = nearest(str(path), known) if known else "; there is no recipes/ here: run from the root of the checkout"
        raise UserError(f"recipe {path} does not exist{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}; give a YAML file of recipes/") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} is not a mapping of sections; its top level must be {', '.join(Recipe.model_fields)}")
    for override in overrides or []:
        _apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"recipe {path}: " + "; ".join(explain(e, Recipe) for e in error.errors())) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value; write it as section.key=value, e.g. training.max_steps=2000")
    for group in _EXCLUSIVE:
        for other in group if key in group else ():
            tree.get(other.split(".")[0], {}).pop(other.split(".")[1], None)
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {section} is a value, not a section")
    try:
        tree[leaf] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: {text!r} is not a YAML value: {' '.join(str(error).split())}") from None


def explain(error: Any, document: type[BaseModel]) -> str:
    """One pydantic error of a document as `key = value: rule; remedy`."""
    names = [name for name, _ in _walk(error["loc"], document) if name]
    key = ".".join(names)
    if error["type"] == "extra_forbidden":
        *_, (_, section) = _walk(error["loc"][:-1], document)
        return f"{key}: unknown key{nearest(names[-1], list(section['properties']))}"
    if error["type"] == "missing":
        return f"{key} is missing; add it"
    message = str(error["msg"]).removeprefix("Value error, ")
    if isinstance(error["input"], dict):
        return f"{key}: {message}" if key else message
    return f"{key} = {error['input']!r}: {message}"


def _walk(location: tuple[str | int, ...], document: type[BaseModel]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The steps of a pydantic location, each with the JSON schema found there; the tag of a union has no name in the file."""
    schema = document.model_json_schema()
    node: dict[str, Any] = schema
    yield "", schema
    for step in location:
        if "discriminator" in node:
            name, node = "", {"$ref": node["discriminator"]["mapping"].get(step, "#")}
        else:
            below = [node.get("properties", {}).get(step), *node.get("patternProperties", {}).values()]
            below += [node.get("additionalProperties"), node.get("items")]
            name, node = str(step), next((schema for schema in below if isinstance(schema, dict)), {})
        node = next((option for option in node.get("anyOf", []) if "$ref" in option), node)  # the one beside null
        yield name, (node := schema["$defs"].get(node["$ref"].rsplit("/", 1)[-1], {}) if "$ref" in node else node)


def json_schema() -> str:
    """JSON schema of a recipe, for editors (`recipes/schema.json`)."""
    return json.dumps(Recipe.model_json_schema(), indent=1) + "\n"


def to_yaml(recipe: Recipe, exclude_none: bool = False) -> str:
    """The resolved recipe as YAML, defaults written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=exclude_none), sort_keys=False, allow_unicode=True)


if __name__ == "__main__":
    print(json_schema(), end="")
