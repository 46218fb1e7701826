"""`UserError`, the one exception that means "the user can fix this", and what is behind an operating system's error."""

from __future__ import annotations

import errno
from difflib import get_close_matches

from isoflop.utils.credentials import hide_credentials


class UserError(Exception):
    """Invalid input. The message names the key, its value, the rule and the remedy, and shows no credential."""

    def __init__(self, message: str) -> None:
        super().__init__(hide_credentials(message))


def nearest(name: str, known: list[str]) -> str:
    """Return `; did you mean X?`, or the list of `known` names where none resembles `name`."""
    match = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else f"; known here: {', '.join(sorted(known))}"


def os_errors(error: BaseException) -> list[OSError]:
    """Return the system errors behind an error; torch.distributed.checkpoint wraps one per rank."""
    causes = [error, error.__cause__, error.__context__]
    causes += [wrapped[0] for wrapped in getattr(error, "failures", {}).values()]
    return [cause for cause in causes if isinstance(cause, OSError)]


def is_disk_full(error: BaseException) -> bool:
    """Return whether a full disk, a quota or a file-size limit caused an error.

    torch's zip writer only detects that its file is too short; tokenizers and Arrow give the system's message as text.
    """
    numbers = {cause.errno for cause in os_errors(error)}
    signs = ("No space left", "File too large", "Disk quota exceeded", "inline_container")
    return bool(numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}) or any(sign in str(error) for sign in signs)
