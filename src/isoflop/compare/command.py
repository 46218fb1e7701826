"""The command `compare`: print a comparison, and write its table, figure and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isoflop.compare.comparison import compare, require_own_comparison


def compare_command(paths: Sequence[str], out: str, as_json: bool) -> int:
    """Compare runs, write the files to `out` and print; return the exit code."""
    require_own_comparison(out)
    found = compare(paths)
    found.save(out)
    text = f"{found.page()}\n\nfigure, table and numbers: {Path(out)}/comparison.png, .md, .json"
    print(found.to_json() + "\n" if as_json else text)
    return 0
