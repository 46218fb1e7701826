"""The file of rows, which a crash at any moment leaves whole, and lines about rows. Imports the standard library alone."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FILE = "gpu.jsonl"
# The modules of each part, each a worker; those of one part run at the same time.
PARTS = {"correct": ("correct", "runs"), "memory": ("memory",), "speed": ("speed",), "rate": ("rate",)}


def read(folder: Path) -> list[Row]:
    """All rows of a folder; none where there is no file."""
    file = folder / FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def put(folder: Path, rows: list[Row], about: Row) -> None:
    """Add rows of a run, in the place of an earlier run's rows of the same part and case on the same machine."""
    cases = {(row["part"], row["case"]) for row in rows}
    folder.mkdir(parents=True, exist_ok=True)
    partial, lock = folder / f".{FILE}.partial", os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers of a part may write at once
        kept = [
            row
            for row in read(folder)
            if (row["part"], row["case"]) not in cases or row["machine"] != about["machine"] or row["run"] == about["run"]
        ]
        partial.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *(row | about for row in rows)]), encoding="utf-8")
        partial.replace(folder / FILE)
    finally:
        os.close(lock)


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of each (part, case)."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["part"], row["case"]), []).append(row)
    return cases


def measured_cases(rows: Iterable[Row]) -> list[str]:
    """Cases of a part that have a result: neither an error nor skipped rows alone."""
    cases = by_case(rows)
    return [case for (_, case), own in cases.items() if any("skipped" not in row for row in own) and not any(map(failed, own))]


def failed(row: Row) -> bool:
    """Whether a row is of a crash, or of a check outside its tolerance."""
    return "error" in row or row.get("passed") is False


def line_of(rows: list[Row]) -> str:
    """What came out of a case, in one line."""
    if errors := [row["error"] for row in rows if "error" in row]:
        lines = [line for line in errors[0].splitlines() if line.strip()]
        return f"FAILED: {lines[-1].strip()[:150]}" if lines else "FAILED"
    if all("skipped" in row for row in rows):
        return f"skipped: {rows[0]['skipped'].splitlines()[0][:150]}"
    measured = [row for row in rows if "skipped" not in row]
    left = len(rows) - len(measured)
    texts = [text for text in (_checks(measured), *map(_figures, measured)) if text]
    return "; ".join(texts) + (f"; {left} skipped" if left else "")


def _checks(rows: list[Row]) -> str:
    checks = [row for row in rows if "tolerance" in row]
    if not checks:
        return ""
    worst = max(checks, key=lambda row: row["difference"] / row["tolerance"])
    passed = sum(row["passed"] for row in checks)
    return (
        f"{passed} of {len(checks)} checks passed; nearest to its tolerance: {worst['way']}, {worst['metric']}"
        f" {worst['difference']:.2g} (tolerance {worst['tolerance']:.2g})"
    )


def _figures(row: Row) -> str:
    if row["part"] == "memory" and "predicted_bytes" in row:
        return f"{row['way']} {row['predicted_bytes'] / row['allocated_bytes'] - 1:+.1%}"
    if "tokens_per_s" in row:
        mfu = f", MFU {row['mfu']:.1%}" if row.get("mfu") else ""
        peak = f", {row['peak_memory_bytes'] / 2**30:.1f} GiB" if row.get("peak_memory_bytes") else ""
        return f"{row['tokens_per_s'][0]:,.0f} tokens/s{mfu}{peak}, first step {row['first_step_s']:.1f} s"
    if row.get("curve"):
        first, last = row["curve"][0], row["curve"][-1]
        return f"loss {first['loss']:.3f} to {last['loss']:.3f} in {last['elapsed_s']:.0f} s, {last['tokens']:,} tokens"
    if "figure" in row:
        return f"{row['way']} {row['figure']:,.4g} {row['unit']}"
    return row.get("text", "")


def table(rows: list[Row], most: int = 90) -> list[str]:
    """A line for each case, and one for each check that did not pass; at most so many."""
    lines = [f"{'part':8} {'case':34} result"]
    for (part, case), own in by_case(rows).items():
        lines.append(f"{part:8} {case:34} {line_of(own)}"[:200])
        lines += [f"{'':8} {'':34} NOT PASSED: {row['way']}: {row['metric']} {row['difference']:.3g} > {row['tolerance']:.3g}"
                  for row in own if row.get("passed") is False and "tolerance" in row]  # fmt: skip
    return lines if len(lines) <= most else [*lines[: most - 1], f"... {len(lines) - most + 1} more in {FILE}"]
