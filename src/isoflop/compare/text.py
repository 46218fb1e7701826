"""Text of a comparison."""

from __future__ import annotations

from collections.abc import Callable

from isoflop.compare.comparison import Comparison, EqualCost, RunNumbers, TaskScores
from isoflop.compare.figure import AXIS_LABELS
from isoflop.compare.runs import NATS

HEADER = [
    "run", "model", "N", "D", "D/N", "FLOPs", "loss", "val. loss", "bits/byte", "hours", "tokens/s", "MFU", "peak GiB", "steps",
]  # fmt: skip


def page_of(found: Comparison, make_table: Callable[[list[str], list[list[str]]], str]) -> str:
    """Return the comparison as text, with tables made by `make_table`."""
    names = [run.name for run in found.runs]
    parts = [make_table(HEADER, [_run_row(run) for run in found.runs]), _unit_note(found)]
    if found.at_equal_cost:
        header = ["at equal cost", "cost", "loss", f"{names[0]} ({found.unit})", "this run", "ahead by"]
        parts.append(make_table(header, [_equal_row(row) for row in found.at_equal_cost]))
        parts += _equal_notes(found.at_equal_cost)
    if found.scores:
        parts.append(make_table(["task", "metric", *names], [_score_row(row, names) for row in found.scores]))
        parts.append("* further from the first run's than 1.96 standard errors of their difference")
    return "\n\n".join(parts)


def _unit_note(found: Comparison) -> str:
    if found.unit == NATS:
        return "Same tokenizer and data: losses compare in nats per token."
    alike = "".join(f"\nSame tokenizer and data: {', '.join(names)}." for names in found.same_data if len(names) > 1)
    return (
        "Tokenizers or data differ: losses in nats per token do not compare, bits per byte do (of the same validation text)."
        + alike
    )


def _run_row(run: RunNumbers) -> list[str]:
    done = run.steps == run.planned_steps
    return [
        run.name,
        run.model_type,
        f"{run.parameters / 1e6:,.1f}M" if run.parameters >= 1e6 else f"{run.parameters:,}",
        f"{run.tokens / 1e9:,.3f}B" if run.tokens >= 1e8 else f"{run.tokens:,}",
        f"{run.tokens_per_parameter:.2f}",
        f"{run.flops:.3g}",
        _or_na(run.loss, ".4f"),
        _or_na(run.val_loss, ".4f"),
        _or_na(run.bits_per_byte, ".4f"),
        f"{run.hours:.3g}",
        f"{run.tokens_per_s:,.0f}",
        _or_na(run.mfu, ".1%"),
        f"{run.peak_memory_bytes / 2**30:.2f}",
        f"{run.steps:,}" if done else f"{run.steps:,} of {run.planned_steps:,}",
    ]


def _equal_row(row: EqualCost) -> list[str]:
    ahead = None if row.first_loss is None or row.other_loss is None else row.first_loss - row.other_loss
    at = "n/a" if row.at is None else f"{row.at:.4g} {AXIS_LABELS[row.axis]}"
    losses = [_or_na(row.first_loss, ".4f"), _or_na(row.other_loss, ".4f"), _or_na(ahead, "+.4f")]
    return [row.other, at, row.loss or "n/a", *losses]


def _equal_notes(rows: list[EqualCost]) -> list[str]:
    """Explain training losses in the table, and rows without a comparison."""
    training = "training: smoothed, of runs without validation losses in a common range of that cost"
    empty = [f"{row.other}: not compared at equal {AXIS_LABELS[row.axis]}: {row.reason}" for row in rows if row.reason]
    notes = [training, *empty] if any(row.loss == "training" for row in rows) else empty
    return ["\n".join(notes)] if notes else []


def _score_row(row: TaskScores, names: list[str]) -> list[str]:
    cells = []
    for name in names:
        if score := row.runs.get(name):
            stderr = "" if score.stderr is None else f" ± {score.stderr:.4f}"
            cells.append(f"{score.value:.4f}{stderr}{' *' if score.differs else ''}")
        else:
            cells.append("-")
    return [row.task, row.metric, *cells]


def _or_na(value: float | None, form: str) -> str:
    return "n/a" if value is None else f"{value:{form}}"
