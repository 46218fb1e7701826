"""HTML that results show in a notebook: tables, and images inside the page."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable


def html_table(header: list[str], rows: Iterable[list[str]], caption: str = "") -> str:
    """Return a table as HTML, its cells escaped."""
    lines = ["<table>", f"<caption>{html.escape(caption)}</caption>" if caption else ""]
    lines.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>" if header else "")
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "".join([*lines, "</table>"])


def html_image(png: bytes, alternative: str) -> str:
    """Return a PNG as an image inside the page."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{html.escape(alternative)}"/>'
