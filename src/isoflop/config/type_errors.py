"""pydantic's rules in plain words: what a value must be, with an example made from the given value."""

from __future__ import annotations

import json
from typing import Any

_BOUNDS = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below", "less_than_equal": "at most"}
_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "finite_number": "a finite number",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "missing": "given",
}
_MOST_EXAMPLE = 60  # characters


def rule_of(error: Any) -> str:
    """Return the rule that a value breaks, from an entry of pydantic's `ValidationError.errors()`."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}{_example(kind, error['input'])}"
    if kind in _BOUNDS:
        (bound,) = context.values()
        return f"must be {_BOUNDS[kind]} {bound:{',' if isinstance(bound, int) else 'g'}}"
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        short = kind.endswith("short")
        unit = "character" if kind.startswith("string") else "entry"
        limit = context["min_length" if short else "max_length"]
        return f"must have {'at least' if short else 'at most'} {_count(limit, unit)}"
    if kind == "union_tag_invalid":
        return f"{context['discriminator']} = {context['tag']!r} must be one of {context['expected_tags']}".replace("'", "")
    if kind == "union_tag_not_found":
        return f"{context['discriminator']} is missing; add it".replace("'", "")
    if kind == "string_pattern_mismatch":
        return f"must be text of the form {context['pattern']}"
    return str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")


def _count(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit.removesuffix('y') + 'ies' if unit.endswith('y') else unit + 's'}"


def _example(kind: str, given: object) -> str:
    """Return what the value was likely meant to be, as YAML; empty where that is unclear."""
    example = None
    if kind == "string_type" and isinstance(given, int | float):
        example = json.dumps(json.dumps(given))
    elif kind in ("list_type", "tuple_type") and isinstance(given, str | int | float):
        example = json.dumps([given], ensure_ascii=False)
    elif _KINDS[kind] in ("a whole number", "a number") and isinstance(given, str | float):
        try:
            number = float(given)
            example = str(round(number)) if "int" in kind else repr(number)
        except (ValueError, OverflowError):
            pass
    elif kind == "bool_type" and str(given).lower() in ("0", "1", "yes", "no", "on", "off"):
        example = "true" if str(given).lower() in ("1", "yes", "on") else "false"
    return f", e.g. {example}" if example and len(example) <= _MOST_EXAMPLE else ""
