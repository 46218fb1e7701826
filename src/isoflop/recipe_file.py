"""Recipes as files: YAML and dotted overrides in, a checked `Recipe` out; and back.

Entered by `load_recipe`. `python -m isoflop.recipe_file` prints the JSON schema that editors use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from isoflop.errors import UserError, nearest
from isoflop.recipe import Recipe
from isoflop.untrusted import named, read_text, shown

_EXCLUSIVE = (  # naming one on the command line drops the recipe's other
    ("training.max_steps", "training.max_tokens", "training.tokens_per_parameter"),
    ("tokenizer.name", "tokenizer.train_vocab_size"),
)
MOST_YAML_BYTES = 4 * 2**20  # PyYAML reads 1 MB a second; a law with 1,000 draws has 0.07 MB
MOST_VALUES = 200_000  # with aliases written out; that law has 8,000
TOO_MANY = f"it holds more than {MOST_VALUES:,} values, aliases written out"
MOST_EXPLAINED = 8  # errors of one file


class _Yaml12Loader(yaml.SafeLoader):
    """YAML whose floats are those of YAML 1.2: PyYAML reads `3e-4` as a string. It stops at too many values."""

    values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.values += 1
        if self.values > MOST_VALUES:
            raise yaml.YAMLError(TOO_MANY)
        return super().compose_node(parent, index)


_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML with scientific notation read as numbers. Raises `yaml.YAMLError`, whatever is wrong with it.

    Aliases share what they stand for, and code that goes through the values meets it once for each alias: a few lines can stand
    for billions of values. So they are counted first.
    """
    loader = _Yaml12Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {}, set())
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    except (ValueError, TypeError, ArithmeticError) as error:  # of a date, a number, a key
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Values in a tree with every alias written out. Raises `yaml.YAMLError` for too many, and for one that holds itself."""
    if id(node) in above:
        raise yaml.YAMLError("an alias stands for a value that it is part of")
    if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
        raise yaml.YAMLError("it holds a NUL character, which no path and no name has")
    if id(node) not in known:
        above.add(id(node))
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
        inside += node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = 1 + sum(_count_values(part, known, above) for part in inside)
        above.remove(id(node))
    if known[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(TOO_MANY)
    return known[id(node)]


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides.

    Raises `UserError` for a missing file, broken YAML, an unknown key (with the nearest known one), a value of
    the wrong type, and values that contradict each other.
    """
    path = Path(path)
    try:
        tree = parse_yaml(read_text(path, MOST_YAML_BYTES, "give a YAML file of recipes/"))
    except FileNotFoundError:
        known = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        hint = nearest(str(path), known) if known else "; there is no recipes/ here: run from the root of the checkout"
        raise UserError(f"recipe {path} does not exist{hint}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} is not a mapping of sections; its top level must be {', '.join(Recipe.model_fields)}")
    for override in overrides or []:
        _apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"recipe {path}: {explain_errors(error, Recipe)}") from None


def explain_errors(error: ValidationError, document: type[BaseModel]) -> str:
    """The first of pydantic's errors of a document."""
    errors = error.errors()
    more = f"; and {len(errors) - MOST_EXPLAINED} more" if len(errors) > MOST_EXPLAINED else ""
    return "; ".join(explain(one, document) for one in errors[:MOST_EXPLAINED]) + more


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value; write it as section.key=value, e.g. training.max_steps=2000")
    for group in _EXCLUSIVE:
        for other in group if key in group else ():
            section, name = other.split(".")
            if isinstance(tree.get(section), dict):
                tree[section].pop(name, None)
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {shown(override)}: {section} is a value, not a section")
    try:
        tree[leaf] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"override {shown(override)}: {shown(text)} is not a YAML value: {' '.join(str(error).split())}"
        ) from None


def explain(error: Any, document: type[BaseModel]) -> str:
    """One pydantic error of a document as `key = value: rule; remedy`."""
    names = [named(name) for name, _ in _walk(error["loc"], document) if name is not None]
    key = ".".join(names)
    if error["type"] == "extra_forbidden":
        *_, (_, section) = _walk(error["loc"][:-1], document)
        return f"{key}: unknown key{nearest(names[-1], list(section.get('properties', {})))}"
    if error["type"] == "missing":
        return f"{key} is missing; add it"
    message = str(error["msg"]).removeprefix("Value error, ")
    if isinstance(error["input"], dict) or not key:
        return f"{key}: {message}" if key else message
    return f"{key} = {shown(error['input'])}: {message}"


@cache
def _schema(document: type[BaseModel]) -> dict[str, Any]:
    return document.model_json_schema()


def _walk(location: tuple[str | int, ...], document: type[BaseModel]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """The steps of a pydantic location, each with the JSON schema found there; the tag of a union has no name in the file."""
    schema = node = _schema(document)
    name: str | None
    yield None, schema
    for step in location:
        if "discriminator" in node:
            name, node = None, {"$ref": node["discriminator"]["mapping"].get(step, "#")}
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
