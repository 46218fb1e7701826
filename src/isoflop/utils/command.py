"""How a process around a command ends: exit codes, and errors as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from isoflop.utils.errors import UserError, is_disk_full
from isoflop.utils.output import guard_output


def run_command(command: Callable[[], int]) -> None:
    """Run a command and exit with the code it returns; a `UserError` or a full disk prints one line on stderr and exits with 2.

    Launchers hide exit codes: where ISOFLOP_REFUSED names a file, the line is written there too. A closed pipe or a full disk
    under standard output does not end the command.
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
        sys.exit(130)
