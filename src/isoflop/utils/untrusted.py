"""Read files of unknown origin: limited in size, never outside their folder, every failure a `UserError` with the name."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

from isoflop.utils.errors import UserError

# The manifest of 400,000 source files has this size; parsed, it takes at most 2 GB of memory.
MOST_JSON_BYTES = 64 * 2**20
MOST_SHOWN = 200  # characters of a value in a message


def read_bytes(file: Path, most_bytes: int, remedy: str) -> bytes:
    """Read a file of limited size. Raises `UserError` where it cannot be read, `FileNotFoundError` where it does not exist."""
    try:
        with file.open("rb") as stream:
            content = stream.read(most_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        name = str(file) if error.errno != errno.ENAMETOOLONG else shown(str(file))
        raise UserError(f"{name} cannot be read: {error.strerror}; {remedy}") from None
    except ValueError as error:  # a path with a NUL character
        raise UserError(f"{shown(str(file))} cannot be read: {error}; {remedy}") from None
    if len(content) > most_bytes:
        raise UserError(f"{file} is larger than {most_bytes:,} bytes, the limit for this kind of file; {remedy}")
    return content


def read_text(file: Path, most_bytes: int, remedy: str) -> str:
    """Read UTF-8 text of limited size. Raises `UserError` and `FileNotFoundError` as `read_bytes` does."""
    try:
        return read_bytes(file, most_bytes, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8 text; {remedy}") from None


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object. Raises `UserError` where the file is missing or is something else."""
    try:
        text = read_text(file, MOST_JSON_BYTES, remedy)
        tree = json.loads(text, object_pairs_hook=unique_keys)
        if "\\ud" in text.lower():  # a lone surrogate escape is not a character, and cannot be written again
            json.dumps(tree, ensure_ascii=False).encode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {remedy}") from None
    except RecursionError:
        raise UserError(f"{file} is nested too deeply to be read; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}; {remedy}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds a {type(tree).__name__} where a JSON object belongs; {remedy}")
    return tree


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object from its pairs, as `object_pairs_hook` of `json.loads`. Raises `ValueError` for a duplicate key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in made if keys.count(key) > 1)
        raise ValueError(f"the key {named(twice)} is given twice; delete one of the two")
    return made


def leaves_folder(file: Path, folder: Path) -> str | None:
    """Return the error for a file that is a link to outside its folder; None for every other file."""
    if not file.resolve().is_relative_to(folder.resolve()):
        return f"{file} is a link to {file.resolve()}, outside its folder; copy what it points to in its place (cp -rL)"
    return None


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """Format a value for a message, cut to `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def named(name: str) -> str:
    """Format a key or a file's name for a message: unquoted where it is short and printable."""
    return name if name.isprintable() and 0 < len(name) <= MOST_SHOWN else shown(name)
