"""The one exception that means "the user can fix this", and how a command ends on it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from isoflop.credentials import hide_credentials
from isoflop.output import guard_output


class UserError(Exception):
    """Bad input. The message names the key, its value, the rule it breaks and the remedy, and shows no credential."""

    def __init__(self, message: str) -> None:
        super().__init__(hide_credentials(message))


def nearest(name: str, known: list[str]) -> str:
    """Return `; did you mean X?`, or the list of `known` names where none is close to `name`."""
    match = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else f"; known here: {', '.join(sorted(known))}"


def run_command(command: Callable[[], int]) -> None:
    """Run a script's `main`; a `UserError`, or a full disk, becomes one line on stderr and exit code 2.

    Launchers hide exit codes: where ISOFLOP_REFUSED names a file, the line is written there too. Output that cannot be written
    ends no command.
    """
    guard_output()
    try:
        sys.exit(command())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if refused := os.environ.get("ISOFLOP_REFUSED"):
            Path(refused).write_text(f"{error}\n", encoding="utf-8")
        sys.exit(2)
    except OSError as error:
        if not is_disk_full(error):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; free some space, then give the same command", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # what it left, and what goes on from there, the command has said


def os_errors(error: BaseException) -> list[OSError]:
    """The system's errors behind an error; torch.distributed.checkpoint wraps what happened on each rank."""
    causes = [error, error.__cause__, error.__context__]
    causes += [wrapped[0] for wrapped in getattr(error, "failures", {}).values()]
    return [cause for cause in causes if isinstance(cause, OSError)]


def is_disk_full(error: BaseException) -> bool:
    """Whether ENOSPC, a quota or a file-size limit is behind an error.

    torch's zip writer notices only that its file is shorter than what it wrote; tokenizers and Arrow give the system's message as
    text.
    """
    numbers = {cause.errno for cause in os_errors(error)}
    signs = ("No space left", "File too large", "Disk quota exceeded", "inline_container")
    return bool(numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}) or any(sign in str(error) for sign in signs)
