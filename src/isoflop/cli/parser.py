"""Command-line parsing that every verb shares: one-line errors, help with defaults, and hints for keys of a recipe."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from isoflop.utils.errors import UserError, nearest


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help at 80 columns or fewer, with the default behind each option that has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=min(79, argparse.HelpFormatter(prog)._width))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, True, argparse.SUPPRESS, "") or isinstance(action.default, list | tuple):
            return text
        return text if "default" in text else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UserError`, and which knows the keys of a recipe."""

    def __init__(self, *, prog: str, description: str | None = None, **kwargs: Any) -> None:
        super().__init__(prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self._arguments: list[str] = []
        self._negative_number_matcher = re.compile(r"-[\d.]+(e[-+]?\d+)?$")  # -1e21 is a number before Python 3.14, too

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Keep the arguments for the error that may follow."""
        self._arguments = list(args or self._arguments)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`, with the right form where an unknown option is a key of the recipe."""
        if message.startswith("unrecognized arguments: "):
            self._explain_unknown()
        raise UserError(f"{message}; `{self.prog} --help` lists every option")

    def _explain_unknown(self) -> None:
        known = {option for action in self._actions for option in action.option_strings}
        for argument, following in zip(self._arguments, [*self._arguments[1:], "-"], strict=True):
            option, equals, value = argument.partition("=")
            if not option.startswith("--") or option in known:
                continue
            name = option.removeprefix("--").replace("-", "_")
            if keys := [key for key in recipe_keys() if key == name or key.endswith(f".{name}")]:
                given = value if equals else "VALUE" if following.startswith("-") else following
                forms = " or ".join(f"{key}={given}" for key in keys[:3])
                raise UserError(f"{option} is not an option but a key of the recipe; give it as {forms}, without dashes")
            raise UserError(f"{option}: no such option{nearest(option, sorted(known))}; `{self.prog} --help` explains them")


def recipe_keys() -> list[str]:
    """Return every dotted key that a recipe may have, e.g. `training.max_steps`."""
    from isoflop.config.recipe import Recipe

    schema = Recipe.model_json_schema()
    return sorted(set(_keys_of(schema, schema["$defs"], "", ())))


def _keys_of(part: dict[str, Any], definitions: dict[str, Any], prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    if reference := part.get("$ref"):
        name = re.sub(r".*/", "", reference)
        if name not in above:
            yield from _keys_of(definitions[name], definitions, prefix, (*above, name))
    for choice in [*part.get("anyOf", []), *part.get("oneOf", []), *part.get("allOf", [])]:
        yield from _keys_of(choice, definitions, prefix, above)
    for name, value in part.get("properties", {}).items():
        yield f"{prefix}{name}"
        yield from _keys_of(value, definitions, f"{prefix}{name}.", above)
