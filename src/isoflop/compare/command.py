"""The command `compare`: a table, a figure and the numbers behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isoflop.compare.figure import AXES, draw
from isoflop.compare.runs import NATS, compare
from isoflop.disk import require_own_files, write_aside
from isoflop.errors import UserError
from isoflop.tables import markdown, table

HEADER = [
    "run", "model", "N", "D", "D/N", "FLOPs", "loss", "val. loss", "bits/byte", "hours", "tokens/s", "MFU", "peak GiB", "steps",
]  # fmt: skip


def compare_command(paths: list[str], out: str, as_json: bool) -> int:
    """Print the comparison of some runs and write it to `out`; returns the exit code."""
    folder = Path(out)
    written = [folder / f"comparison.{kind}" for kind in ("json", "md", "png")]
    require_own_files(written, f"--out {out}", ["runs", "unit", "at_equal_cost"])
    runs, found = compare(paths)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a folder that can be written") from None
    text = json.dumps(found, indent=1) + "\n"
    write_aside(folder / "comparison.json", text)
    write_aside(folder / "comparison.md", page(found, markdown) + "\n\n![the curves](comparison.png)\n")
    draw(runs, found["unit"], folder / "comparison.png")
    print(text if as_json else f"{page(found, table)}\n\nfigure, table and numbers: {folder}/comparison.png, .md, .json")
    return 0


def page(found: dict[str, Any], make: Any) -> str:
    """The comparison as text, its tables made by `make`."""
    names = [run["name"] for run in found["runs"]]
    parts = [make(HEADER, [_run_row(run) for run in found["runs"]]), _note(found)]
    if found["at_equal_cost"]:
        header = ["at equal cost", "cost", f"{names[0]} ({found['unit']})", "this run", "ahead by"]
        parts.append(make(header, [_equal_row(row) for row in found["at_equal_cost"]]))
    if found["scores"]:
        parts.append(make(["task", "metric", *names], [_score_row(row, names) for row in found["scores"]]))
        parts.append("* further from the first run's than 1.96 standard errors of their difference")
    return "\n\n".join(parts)


def _note(found: dict[str, Any]) -> str:
    if found["unit"] == NATS:
        return "Same tokenizer and data: losses compare in nats per token."
    alike = "".join(f"\nSame tokenizer and data: {', '.join(names)}." for names in found["same_data"] if len(names) > 1)
    return (
        "Tokenizers or data differ: losses in nats per token do not compare, bits per byte do (of the same validation text)."
        + alike
    )


def _run_row(run: dict[str, Any]) -> list[str]:
    done = run["steps"] == run["planned_steps"]
    return [
        run["name"],
        run["model_type"],
        f"{run['parameters'] / 1e6:,.1f}M" if run["parameters"] >= 1e6 else f"{run['parameters']:,}",
        f"{run['tokens'] / 1e9:,.3f}B" if run["tokens"] >= 1e8 else f"{run['tokens']:,}",
        f"{run['tokens_per_parameter']:.2f}",
        f"{run['flops']:.3g}",
        _or_na(run["loss"], ".4f"),
        _or_na(run["val_loss"], ".4f"),
        _or_na(run["bits_per_byte"], ".4f"),
        f"{run['hours']:.3g}",
        f"{run['tokens_per_s']:,.0f}",
        _or_na(run["mfu"], ".1%"),
        f"{run['peak_memory_bytes'] / 2**30:.2f}",
        f"{run['steps']:,}" if done else f"{run['steps']:,} of {run['planned_steps']:,}",
    ]


def _equal_row(row: dict[str, Any]) -> list[str]:
    first, other = row["first_loss"], row["other_loss"]
    ahead = None if first is None or other is None else first - other
    at = "n/a" if row["at"] is None else f"{row['at']:.4g} {AXES[row['axis']]}"
    return [row["other"], at, _or_na(first, ".4f"), _or_na(other, ".4f"), _or_na(ahead, "+.4f")]


def _score_row(row: dict[str, Any], names: list[str]) -> list[str]:
    cells = []
    for name in names:
        score = row["runs"].get(name)
        stderr = "" if not score or score["stderr"] is None else f" ± {score['stderr']:.4f}"
        cells.append("-" if not score else f"{score['value']:.4f}{stderr}{' *' if score['differs'] else ''}")
    return [row["task"], row["metric"], *cells]


def _or_na(value: float | None, form: str) -> str:
    return "n/a" if value is None else f"{value:{form}}"
