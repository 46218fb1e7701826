"""Files that somebody else may have made: bounded in size, never outside their folder, every failure a `UserError` by name."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

from isoflop.errors import UserError

# Read whole: the manifest of 400,000 source files has so many; parsed, they take 2 GB at most.
MOST_JSON_BYTES = 64 * 2**20
MOST_SHOWN = 200  # characters of a value in a message


def read_bytes(file: Path, most_bytes: int, remedy: str) -> bytes:
    """A file of bounded size. Raises `UserError` where it cannot be read; `FileNotFoundError` is the caller's."""
    try:
        with file.open("rb") as stream:
            content = stream.read(most_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        name = str(file) if error.errno != errno.ENAMETOOLONG else shown(str(file))
        raise UserError(f"{name} cannot be read: {error.strerror}; {remedy}") from None
    except ValueError as error:  # of a path with a NUL character
        raise UserError(f"{shown(str(file))} cannot be read: {error}; {remedy}") from None
    if len(content) > most_bytes:
        raise UserError(f"{file} is larger than {most_bytes:,} bytes, which no such file is; {remedy}")
    return content


def read_text(file: Path, most_bytes: int, remedy: str) -> str:
    """UTF-8 text of a file of bounded size. Raises `UserError` and `FileNotFoundError` as `read_bytes` does."""
    try:
        return read_bytes(file, most_bytes, remedy).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8 text; {remedy}") from None


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON object. Raises `UserError` where the file is not there or holds something else."""
    try:
        text = read_text(file, MOST_JSON_BYTES, remedy)
        tree = json.loads(text)
        if "\\ud" in text.lower():  # half of a pair of escapes is no character, and cannot be written again
            json.dumps(tree, ensure_ascii=False).encode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {remedy}") from None
    except RecursionError:
        raise UserError(f"{file} is nested too deep to be read; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}; {remedy}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds a {type(tree).__name__} where a JSON object belongs; {remedy}")
    return tree


def leaves_folder(file: Path, folder: Path) -> str | None:
    """What to say of a file that is a link to somewhere outside its folder; None of every other one."""
    if not file.resolve().is_relative_to(folder.resolve()):
        return f"{file} is a link to {file.resolve()}, outside its folder; copy what it points to in its place (cp -rL)"
    return None


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(text):,} characters)"


def named(name: str) -> str:
    """A key or a file's name for a message: as it is where it can be read as one."""
    return name if name.isprintable() and 0 < len(name) <= MOST_SHOWN else shown(name)
