"""The GPU section of docs/performance.md, from the rows that benchmarks/gpu.py wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from measured import Row, by_case, median_and_range, sources

from isoflop.utils.tables import markdown

AIMS = "The aims for one H200 are 65k tokens/s for `llama2_1.36b` in bf16 with fp32 masters, and 700k for the 124M"
NO_GPU = f"""No GPU has been measured yet: no row of one is in `benchmarks/results`. On a machine with a GPU
`python benchmarks/gpu.py` makes them in 14 minutes: checks against the CPU, memory, tokens/s and MFU of four recipes, what each
lever is worth (compiling, attention kernels, the loss, Liger's kernels, float8, micro-batches), and loss by wall time. {AIMS}."""

RECIPES = ("modern_124m", "gpt2_124m", "llama2_1.36b", "llama3_1.5b")
PEERS = (
    ("gpt2_124m nanoGPT compiled", "gpt2_124m", "nanoGPT's model, compiled as a whole, in a plain loop"),
    ("modern_124m transformers", "modern_124m eager", "transformers' model and loss in a plain loop, not compiled"),
    ("modern_124m transformers", "modern_124m", "transformers' model and loss in a plain loop, not compiled"),
    ("modern_124m Trainer", "modern_124m eager", "transformers' Trainer, not compiled"),
    ("modern_124m Trainer", "modern_124m", "transformers' Trainer, not compiled"),
)


def rows_of(folder: Path) -> list[Row]:
    """What benchmarks/gpu.py measured on GPUs; nothing where it was not run yet. Rehearsals on a CPU do not count."""
    file = folder / "gpu.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [row for row in map(json.loads, lines) if not row["rehearsal"]]


def section(rows: list[Row]) -> str:
    """What benchmarks/gpu.py measured, machine by machine."""
    if not rows:
        return NO_GPU
    parts = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        own = [row for row in rows if row["machine"] == machine]
        parts += [f"**{machine}**", summary(own), checks(own), steps(own), operations(own), trace(own), rate(own),
                  left_out(own), sources(own)]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def summary(rows: list[Row]) -> str:
    """Rates of the recipes and of other trainers of the same models, in words."""
    rates = {row["case"]: row["tokens_per_s"][0] for row in rows if "tokens_per_s" in row}
    shares = {row["case"]: row["mfu"] for row in rows if row.get("mfu")}
    lines = [f"- `{name}`: {rates[name]:,.0f} tokens/s, MFU {shares[name]:.1%}" for name in RECIPES if name in shares]
    peers = [
        f"- {peer}, the same model and micro-batch: {rates[case]:,.0f} tokens/s; `{name}` is {rates[name] / rates[case]:.2f} times as"
        " fast"
        for case, name, peer in PEERS if case in rates and name in rates
    ]  # fmt: skip
    return "\n".join([*lines, *peers]) + f"\n\n{AIMS}." if lines else ""


def checks(rows: list[Row]) -> str:
    """Checks against fp32 on the CPU, by case."""
    lines = []
    for case, own in by_case([row for row in rows if "tolerance" in row]).items():
        worst = max(own, key=lambda row: row["difference"] / row["tolerance"])
        lines.append([case, f"{sum(row['passed'] for row in own)} of {len(own)}", f"{worst['way']}: {worst['metric']}",
                      f"{worst['difference']:.2g}", f"{worst['tolerance']:.2g}"])  # fmt: skip
    return markdown(["check", "passed", "nearest to its tolerance", "difference", "tolerance"], lines) if lines else ""


def steps(rows: list[Row]) -> str:
    """Training steps. Those of few micro-batches, in which clipping and update weigh more than in a whole step."""
    lines = [
        [row["case"], row["way"], f"{row['micro_batch_size']} x {row['accumulation']}", median_and_range(row["tokens_per_s"]),
         f"{row['mfu']:.1%}" if row["mfu"] else "", f"{row['share_of_matmul']:.0%}" if row["share_of_matmul"] else "",
         f"{row['first_step_s']:.0f}", f"{row['peak_memory_bytes'] / 2**30:.1f}" if row["peak_memory_bytes"] else ""]
        for row in rows if "tokens_per_s" in row
    ]  # fmt: skip
    header = ["case", "way", "micro-batch x accumulation", "tokens/s", "MFU", "of the matmul rate", "first step, s", "GiB"]
    return markdown(header, lines) if lines else ""


def operations(rows: list[Row]) -> str:
    """What the machine reaches, and single operations."""
    lines = [
        [row["case"], row["way"], f"{row['figure']:,.4g} {row['unit']}",
         f"{row['extra_bytes'] / 2**20:,.0f}" if row.get("extra_bytes") is not None else ""]
        for row in rows if row["part"] == "speed" and "figure" in row
    ]  # fmt: skip
    return markdown(["operation", "way", "figure", "MiB beyond its inputs"], lines) if lines else ""


def trace(rows: list[Row]) -> str:
    """Kernels of traced steps by time."""
    kernels = [row for row in rows if "ms_per_step" in row]
    steps = [row for row in rows if row.get("idle_share") is not None]
    lines = [[f"`{row['kernel'][:70]}`", f"{row['ms_per_step']:.2f}", f"{row['share']:.1%}"] for row in kernels]
    table = markdown(["kernel", "ms a step", "share"], lines) if lines else ""
    if not steps:
        return table
    shares = ", ".join(f"{each['name']} {each['share']:.0%}" for each in steps[0]["categories"])
    traced = f"{steps[0]['tokens_per_step'] / steps[0]['figure'] * 1e3:,.0f} tokens/s while traced"
    return (
        f"`{steps[0]['case']}`: the GPU idles {steps[0]['idle_share']:.1%} of the time ({traced}); busy with {shares}.\n\n{table}"
    )


def rate(rows: list[Row]) -> str:
    """Loss by wall time: some points of each curve, and AdamW compared with Muon where both were trained."""
    curves = {row.get("optimizer", "adamw"): row for row in rows if row.get("curve")}
    parts = []
    for row in curves.values():
        points = row["curve"][:: max(1, len(row["curve"]) // 8)]
        lines = [[f"{point['elapsed_s']:.0f}", f"{point['tokens']:,}", f"{point['loss']:.3f}"] for point in points]
        parts.append(f"`{row['case']}` on {row['text']}:\n\n" + markdown(["s", "tokens", "loss"], lines))
    return "\n\n".join([*parts, *optimizers(curves)])


def optimizers(curves: dict[str, Row]) -> list[str]:
    """Validation losses of AdamW and Muon at equal time and at equal tokens, both counted from the end of the first step."""
    both = [curves.get("adamw"), curves.get("muon")]
    if not all(row and row.get("validation") for row in both):
        return []
    losses, ends = [], {}
    for key, unit in (("elapsed_s", "s"), ("tokens", "tokens")):
        points = [[(point[key] - row["curve"][0][key], point["val_loss"]) for point in row["validation"]] for row in both if row]
        ends[key] = min(own[-1][0] for own in points)
        adamw, muon = (float(np.interp(ends[key], *zip(*own, strict=True))) for own in points)
        losses.append(f"after {ends[key]:,.0f} {unit} {adamw:.3f} and {muon:.3f}")
    speeds = []
    for row in both:
        first, last = (row["curve"][0], row["curve"][-1]) if row else ({}, {})
        speeds.append(f"{(last['tokens'] - first['tokens']) / (last['elapsed_s'] - first['elapsed_s']):,.0f}")
    return [f"Validation loss of AdamW and Muon at one learning rate: {', '.join(losses)};"
            f" {' and '.join(speeds)} tokens/s, validation included."]  # fmt: skip


def left_out(rows: list[Row]) -> str:
    """What failed, or was not reached."""
    lines = [
        f"- {row['case']}{': ' + row['way'] if 'way' in row else ''}: {(row.get('error') or row['skipped']).splitlines()[-1]}"
        for row in rows if "error" in row or "skipped" in row
    ]  # fmt: skip
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""
