"""Tables as text: columns for a terminal, Markdown for a page."""

from __future__ import annotations

from collections.abc import Iterable

SCALES = ((1e15, ""), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table of padded columns, the first aligned left, the others right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return the same as a Markdown table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def short(value: float, digits: int = 3) -> str:
    """Return a count in few digits, such as 91.9B."""
    value = float(f"{value:.{digits}g}")  # 999.6e6 is 1B
    scale, unit = next(((s, u) for s, u in SCALES if value >= s), (1.0, ""))
    return f"{value / scale:.{digits}g}{unit}" if unit else f"{value:.{digits}g}"
