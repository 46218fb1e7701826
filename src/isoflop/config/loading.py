"""Read recipes: YAML and dotted overrides to a checked `Recipe`, and back.

Entered by `load_recipe`. `python -m isoflop.config.loading` prints the JSON schema that editors use.
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

from isoflop.config.paths import note_paths_elsewhere
from isoflop.config.recipe import Recipe
from isoflop.config.shipped import find
from isoflop.config.type_errors import rule_of
from isoflop.utils.errors import UserError, nearest
from isoflop.utils.untrusted import named, read_text, shown

_EXCLUSIVE = (  # one given on the command line replaces the recipe's other
    ("training.max_steps", "training.max_tokens", "training.tokens_per_parameter"),
    ("tokenizer.name", "tokenizer.train_vocab_size"),
)
_SAME_BY_FAMILY = (  # names of the same field in LLaMA and GPT-2
    ("hidden_size", "n_embd"),
    ("intermediate_size", "n_inner"),
    ("num_hidden_layers", "n_layer"),
    ("num_attention_heads", "n_head"),
    ("max_position_embeddings", "n_positions"),
    ("hidden_act", "activation_function"),
    ("rms_norm_eps", "layer_norm_epsilon"),
    ("attention_dropout", "attn_pdrop"),
)
MOST_YAML_BYTES = 4 * 2**20  # PyYAML parses 1 MB a second; a law with 1,000 draws has 0.07 MB
MOST_VALUES = 200_000  # with aliases expanded; that law has 8,000
TOO_MANY = f"it has more than {MOST_VALUES:,} values, with aliases expanded"
MOST_EXPLAINED = 8  # errors per file


class _Yaml12Loader(yaml.SafeLoader):
    """Loads YAML with the floats of YAML 1.2: PyYAML reads `3e-4` as a string. Refuses too many values."""

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
    """Parse YAML, with scientific notation read as numbers. Raises `yaml.YAMLError` for every error.

    Values are counted first: aliases share their value, so that a few lines can expand to billions of values.
    """
    loader = _Yaml12Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {}, set())
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError, ArithmeticError) as error:  # of an invalid date, number or key
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Count the values of a tree with aliases expanded. Raises `yaml.YAMLError` for too many, and for an alias inside itself."""
    if id(node) in above:
        raise yaml.YAMLError("an alias refers to a value that contains it")
    if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
        raise yaml.YAMLError("it holds a NUL character, which no path or name can have")
    if id(node) not in known:
        above.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _require_unique_keys(node)
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
        inside += node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = 1 + sum(_count_values(part, known, above) for part in inside)
        above.remove(id(node))
    if known[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(TOO_MANY)
    return known[id(node)]


def _require_unique_keys(mapping: yaml.MappingNode) -> None:
    """Refuse a duplicate key, of which PyYAML keeps the last value. Raises `yaml.YAMLError` naming both lines."""
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            place = f"in lines {lines[key.value]} and {line}" if lines[key.value] != line else f"twice in line {line}"
            raise yaml.YAMLError(f"the key {named(key.value)} is given {place}; join the two, or delete one")
        lines[key.value] = line


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides.

    `path` may also name a shipped recipe, from any folder: `recipes/llama3_1.5b.yaml` or `llama3_1.5b`.
    Raises `UserError` for a missing file, broken YAML, an unknown key (with the nearest known one), a value of
    the wrong type, and values that contradict each other.
    """
    path = find("recipes", str(path))
    try:
        tree = parse_yaml(read_text(path, MOST_YAML_BYTES, "give a YAML file of recipes/"))
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} is not a mapping of sections; its top level must be {', '.join(Recipe.model_fields)}")
    for override in overrides or []:
        _apply_override(tree, override)
    recipe = validate_recipe(tree, f"recipe {path}")
    note_paths_elsewhere(recipe, path)
    return recipe


def validate_recipe(tree: dict[str, Any], name: str) -> Recipe:
    """Return the recipe of a tree of sections. Raises `UserError` with `name` and every error."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{name}: {list_errors(error, Recipe)}") from None


def list_errors(error: ValidationError, document: type[BaseModel]) -> str:
    """Return pydantic's first errors of a user's file: a single one on the same line, several on a line each."""
    lines = _explain(error, document)
    return lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


def explain_errors(error: ValidationError, document: type[BaseModel]) -> str:
    """Return pydantic's first errors of a document on one line."""
    return "; ".join(_explain(error, document))


def _explain(error: ValidationError, document: type[BaseModel]) -> list[str]:
    errors, listed = error.errors(), set[str]()
    lines = [_explain_error(one, document, listed) for one in errors[:MOST_EXPLAINED]]
    return lines + ([f"and {len(errors) - MOST_EXPLAINED} more"] if len(errors) > MOST_EXPLAINED else [])


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


def _explain_error(error: Any, document: type[BaseModel], listed: set[str]) -> str:
    """Return one pydantic error of a document as `key = value: rule; remedy`.

    For an unknown key that resembles none, the known keys of its section are added once; `listed` collects such sections.
    """
    names = [named(name) for name, _ in _walk(error["loc"], document) if name is not None]
    key = ".".join(names)
    if error["type"] == "extra_forbidden":
        *_, (_, section) = _walk(error["loc"][:-1], document)
        known = list(section.get("properties", {}))
        other = next((other for pair in _SAME_BY_FAMILY for other in pair if names[-1] in pair and other in known), None)
        hint = f"; did you mean {other}?" if other else nearest(names[-1], known)
        if "did you mean" not in hint:
            where = ".".join(names[:-1])
            hint = "" if where in listed else hint
            listed.add(where)
        return f"{key}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{key} is missing; add it"
    message = rule_of(error)
    if isinstance(error["input"], dict) or not key:
        return message if not key or message.startswith(f"{key}.") else f"{key}: {message}"
    return f"{key} = {shown(error['input'])}: {message}"


@cache
def _schema(document: type[BaseModel]) -> dict[str, Any]:
    return document.model_json_schema()


def _walk(location: tuple[str | int, ...], document: type[BaseModel]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yield the steps of a pydantic location, each with its JSON schema; the tag of a union has no name in the file."""
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
        node = next((option for option in node.get("anyOf", []) if "$ref" in option), node)  # the alternative to null
        yield name, (node := schema["$defs"].get(node["$ref"].rsplit("/", 1)[-1], {}) if "$ref" in node else node)


def json_schema() -> str:
    """Return the JSON schema of a recipe, for editors (`recipes/schema.json`)."""
    return json.dumps(Recipe.model_json_schema(), indent=1) + "\n"


def to_yaml(recipe: Recipe, exclude_none: bool = False) -> str:
    """Return the resolved recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=exclude_none), sort_keys=False, allow_unicode=True)


if __name__ == "__main__":
    print(json_schema(), end="")
