"""Regenerates docs/performance.md and docs/performance.png from the rows of benchmarks/results: python benchmarks/pages/performance.py.

Measures nothing itself: each row comes from a command of benchmarks/, which it names.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
import performance_gpu
from measured import Row, by_case, median_and_range, sources

from isoflop.config.loading import load_recipe
from isoflop.plan import cost, hardware
from isoflop.utils.tables import markdown

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks/results"
COLORS = {"isoflop": "#1f4e8c", "bare": "#7aa6d6", "transformers": "#d1a14b", "trainer": "#d1495b", "nanogpt": "#8a8a8a",
          "litgpt": "#2e8b57"}  # fmt: skip
# DGX H100 user guide: a 400 Gb/s InfiniBand card for each GPU. H100 datasheet: NVLink 900 GB/s, half of it each way.
CARD_BYTES_PER_S, NVLINK_BYTES_PER_S = 400e9 / 8, 450e9
REACHED = 0.7  # assumption: the share of these that collectives of hundreds of MB reach
NODES, GPUS_A_NODE, PLAN_TOKENS_PER_STEP = 64, 8, 2**22


PAGE = """# Performance: beside the peers, and how cost grows

Made by `python benchmarks/pages/performance.py` from the rows in `benchmarks/results`; [benchmarks/README.md](../benchmarks/README.md)
has the commands. Medians, with least and most in brackets; ratios are of neighbours in time, since the speed of a shared
machine wanders.

![time of a step over the bare loop's, and how a micro-batch grows](performance.png)

## A training step

The same model, tokens, order, precision, threads, allocator (memory kept), no dropout; each way is a process of its own that
does a step at its turn. `isoflop` is the real loop: batches from disk, Accelerate, signals, anomalies, metrics to file and
screen. `bare` is the same model and loss with nothing around; `transformers` has the stock loss, `trainer` is transformers'
Trainer; `nanogpt` and `litgpt` are their models in the bare loop. Equal last losses show equal work, but for three: `nanogpt` and
`litgpt` start from weights of their own, and the Trainer divides GPT-2's loss by 256 labels a window where 255 are predicted
(its LLaMA's by 255). MiB: what the process grew by from before the model. Where no peak is known the share is of what a
2,048-wide matrix product reaches there, by the FLOP count of `isoflop.plan.cost`.

{steps}

What the loop adds to the bare one: {overhead}. Counted rather than timed, a step waits for the device once and dispatches a
handful of operations more than the bare loop: `tests/unit/train/test_speed.py`.

{step_sources}

## Out of the box

Each by its own command with its own defaults on a CPU, the same shape and tokens a step. What differs: `pretrain` has glibc
keep freed memory, so that the kernel does not hand out and zero the pages of each buffer again; fused AdamW; no full logits;
and with `cpu_bf16.yaml` bf16 products, which the first lines of a run recommend where the processor has them: changing the
arithmetic is left to the user.

{boxes}

{out_of_the_box_sources}

## The loss

From hidden states to both gradients, under autocast. Memory is what a process grows by beyond the gradients that both return.
Rows go through in chunks of 128 MiB of logits, which for a small vocabulary is all of them at once; the gradient is taken
while the logits are there, and written over them. Of what is left at vocabulary 128,256, two thirds are the head in bf16.

{losses}

{loss_sources}

## A checkpoint

{megabytes} MB of weights and moments. `isoflop` copies them to host memory, and writes, syncs and hashes them in the background; the
first save also makes the room for the copy. Steps lost counts the wait, and how much slower the steps beside the write were.

{checkpoints}

{checkpoint_sources}

## Start-up

Wall time of whole processes, files in the page cache. A run's first step is done when its row of the metrics is written.

{starts}

{startup_sources}

## How cost grows

A LLaMA of 4 layers of width 256, 2 windows of 256 tokens, vocabulary 8,192, fp32, one size grown at a time. The exponent is
that of time by the size, from the row before. Memory is that of model, gradients and two micro-batches, and what libraries
load for them.

{grown}

`prepare`, the whole command with its start, memory of all its processes together. The tokenizer learns from the first 256 MiB,
which is most of the time of the smaller ones; each GiB of files is given a process, of which there are two here.
The text is numbered copies of 32 MB, which encode faster than text that does not repeat ([data.md](data.md)):

{prepared}

Loading windows of 2,048, a step of 512. The order of a step is computed from its number, so coming back in the middle of a
run costs what its beginning does. The files have no blocks on the disk: opening, finding and copying are measured, not a
disk.

{loaded}

{growth_sources}

## {num_nodes} nodes, by arithmetic

Nothing of this is measured. {num_nodes} nodes of {gpus_a_node} H100, HSDP: weights, gradients and moments sharded inside a
node, gradients summed between nodes; {plan_tokens_per_step:,} tokens a step, so that each GPU has one micro-batch.
Assumptions: MFU is one node's, as llm-foundry reports it; a GPU gathers 2 bytes a parameter twice and scatters 4 over NVLink
({nvlink_gb_per_s:.0f} GB/s each way), and sends 2 x 4 bytes of its eighth between nodes ({card_gb_per_s:.0f} GB/s);
collectives reach {reached:.0%} of that; no stragglers, no failures. Hours: from all overlapped to nothing overlapped. A step
of this size is past the critical batch for most of such a run: `plan` says what that costs.

{nodes}

## On a GPU

{gpu}"""


def main() -> None:
    """Write page and figure."""
    (DOCS / "performance.md").write_text(page(), encoding="utf-8")
    draw(DOCS / "performance.png")


def rows_of(benchmark: str) -> list[Row]:
    """What a benchmark wrote."""
    lines = (RESULTS / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def page() -> str:
    """The whole page."""
    rows = {name: rows_of(name) for name in ("step", "out_of_the_box", "loss", "checkpoint", "startup", "growth")}
    tables = {"steps": steps(rows["step"]), "boxes": boxes(rows["out_of_the_box"]), "losses": losses(rows["loss"])}
    tables |= {"checkpoints": checkpoints(rows["checkpoint"]), "starts": starts(rows["startup"]), "nodes": many_nodes()}
    tables |= dict(zip(("grown", "prepared", "loaded"), growth(by_case(rows["growth"])), strict=True))
    overhead = [
        f"{row['time_of_bare'][0] - 1:+.1%} ({case})"
        for case, ways in by_case(rows["step"]).items()
        for row in ways
        if row["way"] == "isoflop"
    ]
    facts = {f"{name}_sources": sources(own) for name, own in rows.items()}
    megabytes = f"{rows['checkpoint'][0]['checkpoint_bytes'] / 1e6:,.0f}"
    assumed = {"num_nodes": NODES, "gpus_a_node": GPUS_A_NODE, "plan_tokens_per_step": PLAN_TOKENS_PER_STEP, "reached": REACHED}
    assumed |= {"card_gb_per_s": CARD_BYTES_PER_S / 1e9, "nvlink_gb_per_s": NVLINK_BYTES_PER_S / 1e9}
    tables["gpu"] = performance_gpu.section(performance_gpu.rows_of(RESULTS))
    return PAGE.format(**tables, **facts, **assumed, overhead=", ".join(overhead), megabytes=megabytes) + "\n"


def steps(rows: list[Row]) -> str:
    """The training step beside the peers."""
    tables = []
    for case, ways in by_case(rows).items():
        first = ways[0]
        lines = [
            [row["way"], median_and_range(row["tokens_per_s"]), median_and_range(row["time_of_bare"]),
             f"{row['mfu']:.1%}" if row["mfu"] else f"{row['share_of_matmul']:.0%}", f"{row['peak_memory_bytes'] / 2**20:,.0f}",
             f"{row['loss']:.4f}"]
            for row in ways
        ]  # fmt: skip
        share = "MFU" if first["mfu"] else "of the matmul rate"
        header = ["way", "tokens/s", "time / bare loop's", share, "MiB", "last loss"]
        sizes = f"{first['parameters'] / 1e6:.1f}M parameters, {first['tokens_per_step']:,} tokens a step"
        rounds = f"micro-batch {first['micro_batch_size']}, {first['rounds']} rounds"
        tables += [f"**{case}**: {sizes}, {rounds}", markdown(header, lines)]
    return "\n\n".join(tables)


def boxes(rows: list[Row]) -> str:
    """Each project's own command."""
    lines = [[row["way"], median_and_range(row["tokens_per_s"]), median_and_range(row["speed_of_nanogpt"])] for row in rows]
    return markdown(["way", "tokens/s", "times nanoGPT's speed as shipped"], lines)


def losses(rows: list[Row]) -> str:
    """The loss beside transformers'."""
    lines = [
        [case, *map(median_and_range, (ours["seconds"], stock["seconds"], ours["time_of_transformers"])),
         f"{ours['extra_bytes'] / 2**20:,.0f}", f"{stock['extra_bytes'] / 2**20:,.0f}", f"{ours['memory_of_transformers']:.2f}"]
        for case, (ours, stock) in by_case(rows).items()
    ]  # fmt: skip
    header = ["vocabulary x width x tokens", "s", "transformers, s", "time ratio", "MiB", "transformers, MiB", "memory ratio"]
    return markdown(header, lines)


def checkpoints(rows: list[Row]) -> str:
    """What a save costs."""
    lines = [[row["way"], median_and_range(row["seconds"]), f"{row['first_s']:.3g}", f"{row['steps_lost']:.2f}"] for row in rows]
    return markdown(["way", "training waits, s", "the first time, s", "steps lost a save"], lines)


def starts(rows: list[Row]) -> str:
    """Seconds until something is there."""
    return markdown(["what", "s"], [[row["way"], median_and_range(row["seconds"])] for row in rows])


def growth(cases: dict[str, list[Row]]) -> tuple[str, str, str]:
    """Time and memory of a micro-batch, of prepare and of loading against each size."""
    lines = []
    for case in AXES:
        for before, row in zip([None, *cases[case]], cases[case], strict=False):
            lines.append(
                [case, row["way"], median_and_range(row["seconds"]), f"{slope(before, row):.2f}" if before else "",
                 f"{row['flops'] / row['seconds'][0] / 1e9:,.0f}", f"{row['peak_bytes'] / 2**20:,.0f}",
                 f"{row['predicted_bytes'] / row['peak_bytes'] - 1:+.0%}"]
            )  # fmt: skip
    header = ["grown", "to", "s a micro-batch", "exponent", "GFLOP/s", "MiB", "predicted / held - 1"]
    text = [
        [
            row["way"],
            f"{row['seconds'][0]:.1f}",
            f"{row['size'] / row['seconds'][0] / 1e6:.1f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
        ]
        for row in cases["prepare"]
    ]
    loading = [[row["way"], *(median_and_range(row[name], 1e-3) for name in LOADING)] for row in cases["loading"]]
    columns = ["", "open, ms", "order, ms", "read, ms", "order in mid-run, ms", "read in mid-run, ms"]
    return markdown(header, lines), markdown(["text", "s", "MB/s", "MiB"], text), markdown(columns, loading)


AXES = ("sequence length", "micro-batch", "vocabulary", "depth")
LOADING = ("open_s", "order_s", "read_s", "resumed_order_s", "resumed_read_s")


def slope(before: Row, row: Row) -> float:
    """d log time / d log size between two rows."""
    return math.log(row["seconds"][0] / before["seconds"][0]) / math.log(row["size"] / before["size"])


def many_nodes() -> str:
    """64 nodes by arithmetic."""
    gpus, lines = NODES * GPUS_A_NODE, []
    for name in ("llama2_1.36b", "llama3_2.2b"):
        recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
        length, n = recipe.training.sequence_length, cost.parameters(recipe.model)
        row = hardware.mfu_row("h100", n)
        windows = PLAN_TOKENS_PER_STEP // length // gpus
        training = recipe.training.model_copy(update={"tokens_per_step": PLAN_TOKENS_PER_STEP, "micro_batch_size": windows})
        launch = cost.Launch("hsdp", "fsdp2", gpus, True, GPUS_A_NODE)
        held = cost.predicted_memory(recipe.model, training, recipe.optimizer, launch).total
        compute = PLAN_TOKENS_PER_STEP * cost.flops_per_token(recipe.model, length) / (gpus * row.mfu * 989e12)
        inside = (2 * 2 + 4) * n * (GPUS_A_NODE - 1) / GPUS_A_NODE / (REACHED * NVLINK_BYTES_PER_S)
        between = 2 * 4 * n / GPUS_A_NODE * (NODES - 1) / NODES / (REACHED * CARD_BYTES_PER_S)
        hours = [20 * n / PLAN_TOKENS_PER_STEP * step / 3600 for step in (compute, compute + inside + between)]
        lines.append(
            [f"`{name}`", f"{windows}", f"{held / 2**30:.0f}", f"{row.mfu:.1%}", f"{compute:.3f}", f"{inside:.3f}",
             f"{between:.3f}", f"{compute / (compute + inside + between):.0%}", f"{hours[0]:.1f} to {hours[1]:.1f}"]
        )  # fmt: skip
    header = ["recipe", "windows a GPU", "GiB a GPU", "MFU in a node", "compute, s", "NVLink, s", "between nodes, s",
              "kept if nothing overlaps", "hours for 20 N tokens"]  # fmt: skip
    return markdown(header, lines)


def draw(file: Path) -> None:
    """Time over the bare loop's of each way and case; seconds of a micro-batch against each size, relative."""
    figure = matplotlib.figure.Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    cases = by_case(rows_of("step"))
    for place, (_case, ways) in enumerate(cases.items()):
        for number, row in enumerate(ways):
            median, low, high = row["time_of_bare"]
            where, error = place + 0.12 * (number - (len(ways) - 1) / 2), [[median - low], [high - median]]
            left.errorbar(median, where, xerr=error, fmt="o", color=COLORS[row["way"]], capsize=2)
    left.axvline(1, color="#777777", linewidth=1)
    left.set_yticks(range(len(cases)), cases)
    left.invert_yaxis()
    left.set(xlabel="time of a step / the bare loop's (median, least, most)", title="A training step")
    there = dict.fromkeys(row["way"] for ways in cases.values() for row in ways)
    left.legend([matplotlib.lines.Line2D([], [], color=COLORS[way], marker="o", linestyle="") for way in there], there)
    grown = by_case(rows_of("growth"))
    for axis in AXES:
        rows = grown[axis]
        first = rows[0]
        seconds = [row["seconds"][0] / first["seconds"][0] for row in rows]
        right.plot([row["size"] / first["size"] for row in rows], seconds, "o-", label=axis)
    limits = [1, max(row["size"] / grown[axis][0]["size"] for axis in AXES for row in grown[axis])]
    right.plot(limits, limits, "--", color="#777777", linewidth=1, label="linear")
    right.set(xscale="log", yscale="log", xlabel="size / the smallest", ylabel="time / the smallest's",
              title="How a micro-batch grows")  # fmt: skip
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(matplotlib.ticker.LogLocator(base=2))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
