"""The one exception that means "the user can mend this", and how a command ends on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from difflib import get_close_matches


class UserError(Exception):
    """Bad input. The message names the key, its value, the rule it breaks and the remedy."""


def nearest(name: str, known: list[str]) -> str:
    """Return `; did you mean X?`, or the list of `known` names where none is close to `name`."""
    match = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else f"; known here: {', '.join(sorted(known))}"


def run_command(command: Callable[[], int]) -> None:
    """Run a script's `main`; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        sys.exit(command())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
