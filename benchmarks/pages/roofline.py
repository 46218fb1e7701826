"""Regenerates docs/roofline.md and docs/roofline.png: python benchmarks/pages/roofline.py (from the checkout's root; seconds, no GPU).

What a training step computes, moves and launches, counted from the shapes, and the time that takes at the rates GPUs reach. The
counting is in benchmarks/pages/roofline_model.py, what follows from it in benchmarks/pages/roofline_findings.py.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.figure
import roofline_model as roofline
from roofline_findings import (
    A6000_PAIR,
    BRIDGE_BYTES_PER_S,
    H100,
    H100_PAIR,
    NVLINK_BYTES_PER_S,
    PCIE_BYTES_PER_S,
    RECIPES,
    VARIANTS,
    case_of,
    cases,
    computing_s,
    findings,
    times,
)
from roofline_model import Case, Time, Variant

from isoflop.plan import hardware
from isoflop.utils.tables import markdown

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
COLORS = dict(
    zip(roofline.COMPONENTS, ("#1f4e8c", "#7aa6d6", "#d1495b", "#d1a14b", "#2e8b57", "#8a8a8a", "#6b4c9a"), strict=True)
)

PAGE = """# Roofline: where a step's time goes on a GPU

Made by `python benchmarks/pages/roofline.py` from the recipes' shapes; measured rates are in [performance](performance.md#on-a-gpu). Every kernel is given the longer of its
arithmetic and its memory traffic, and every component at least the time of launching its kernels. Real steps are slower: see
[what only a measurement can tell](#what-only-a-measurement-can-tell). Predicted numbers are upper bounds of speed, useful for
their proportions.

![seconds of a step by component](roofline.png)

{summary}

*Before*: eager layers, and the loss in chunks of 128 MiB of logits with a softmax in blocks of 16 MiB. *Eager*: eager layers, and
the loss in chunks of up to 1 GiB with one compiled softmax. *Compiled*: the same loss, and each layer and the last norm compiled,
which is the default on a GPU (`training.compile: auto`). Where there are two GPUs, the range is from communication after
everything else to communication wholly behind it; FSDP2 reduces gradients after every micro-batch here.

## Assumptions

| what | H100 SXM | A6000 | from |
| --- | ---: | ---: | --- |
| bf16 matrix products, TFLOP/s | {h100_matrix:.0f} of {h100_peak:.0f} | {a6000_matrix:.0f} of {a6000_peak:.0f} | \
H100: measured on large products of random numbers; A6000: assumption, the same share |
| device memory, GB/s | {h100_memory:,.0f} of {h100_memory_peak:,.0f} | {a6000_memory:.0f} of {a6000_memory_peak:.0f} | \
H100: a measured copy; A6000: assumption, the same share |
| attention, executed TFLOP/s | {h100_attention:.0f} | {a6000_attention:.0f} | FlashAttention-2: 35% of an H100 (Shah et al. \
2024), 50% to 73% of an A100 (Dao 2023), whose lower end is assumed for the A6000 |
| GPU to GPU, one direction, GB/s | {nvlink:.0f} of {nvlink_peak:.0f} (NVLink 4) | {pcie:.0f} of {pcie_peak:.0f} (PCIe 4 x16) | \
assumption: {link_share:.1%} of the datasheet |
| a kernel launch, us of host time | {launch_us:.0f} | {launch_us:.0f} | assumption, of the usual 5 to 10 |

- Matrix products run in bf16, read both operands and write the result once. Backward takes twice the forward's.
- Attention never writes its scores. A causal kernel skips half of them; backward computes five products where the FLOP count has
  four.
- Eager element-wise kernels read and write every operand in device memory. Compiled ones read each input of a fused group once
  and write each output once; the groups end where a matrix product or the layer does.
- One H100 and DDP compute under autocast: weights and residual stream in fp32, products in bf16. FSDP2 computes on bf16 weights,
  and its residual stream is bf16.
- Weights are cast, and gradients added to those of earlier micro-batches, once per micro-batch. The first micro-batch of a step,
  which has nothing to add to, is counted like the others.
- The old loss: {old_kernels} kernels a block of softmax and {old_softmax} bytes a logit; the compiled one {new_softmax} bytes.
- AdamW is fused: it reads weights, gradients and both moments and writes all but the gradients, 28 bytes a parameter. Clipping
  reads gradients for the norm, then reads and writes them.

The element-wise traffic of one layer, in bytes per token for each dimension of the hidden size, of queries and keys together, and
of the feed-forward layer. A test dispatches a real layer of transformers and finds the eager rows' sums.

{passes}

## Each recipe on each machine

Of one GPU, for one optimizer step of {tokens_per_step:,} tokens. TFLOP: executed on matrix units. GB: through device memory, or
over the link. Bound: what the seconds follow from.

{tables}

## Communication

Bytes that each of two GPUs sends in a step, and seconds where nothing of it overlaps. Reduced after every micro-batch or once a
step; *weights kept*: FSDP2's layers stay gathered from one micro-batch to the next. More memory: what holding whole gradients
(fp32) or weights (bf16) takes beyond FSDP2's shards. For comparison, computing a step of compiled layers takes

{compute}

{communication}

## Findings

{findings}

## What only a measurement can tell

- What matrix products of width 768 reach, whose tiles and waves do not fill the device evenly: less than large ones, so
  `modern_124m` will be further below its row than the others.
- Which attention kernel torch chooses (FlashAttention-2, cuDNN's), and what it reaches at head dimensions of 64 and 128 and
  {lengths} tokens.
- What inductor fuses: the compiled rows are the least a layer can move.
- Whether the host keeps ahead: {launch_us:.0f} us is an assumption, and autograd, compiled layers and FSDP2's hooks add host time
  of their own for each layer.
- How much communication hides: collectives take multiprocessors and memory bandwidth from the kernels they overlap with, and PCIe
  traffic of two cards depends on the board.
- Clock speed under load: an H100 at its power limit, or an A6000 without good air, runs matrix products below the rate of a short
  test.
"""


def spread(low: float, high: float, form: str) -> str:
    """One number, or two where they differ as printed."""
    texts = [format(value, form) for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def speed(case: Case, variant: Variant) -> str:
    """Tokens/s and MFU."""
    both = [roofline.step_s(times(case, variant), overlapped) for overlapped in (False, True)]
    tokens_per_s = [case.recipe.training.tokens_per_step / seconds for seconds in both]
    shares = [roofline.mfu(case, seconds) for seconds in both]
    return f"{spread(*tokens_per_s, ',.0f')} ({spread(*shares, '.1%')})"


def summary() -> str:
    """Tokens/s and MFU of every case."""
    rows = [[f"`{case.name}`", case.machine.title, case.launch.name, *(speed(case, v) for v in VARIANTS)] for case in cases()]
    return markdown(["recipe", "hardware", "launch", "before: tokens/s (MFU)", "eager", "compiled"], rows)


def passes() -> str:
    """The element-wise kernels of one layer."""
    rows = []
    for title, table in (("eager", roofline.EAGER), ("compiled", roofline.COMPILED)):
        for arithmetic, each in table.items():
            where = f"{title}, {arithmetic}"
            rows += [[where, p.name, *(str(n or "") for n in (p.hidden, p.heads, p.inner)), str(p.kernels)] for p in each]
            sums = [sum(getattr(p, name) for p in each) for name in ("hidden", "heads", "inner", "kernels")]
            rows.append([f"**{where}**", "**sum**", *(f"**{total}**" for total in sums)])
    return markdown(["layers", "kernels of", "hidden", "queries and keys", "feed-forward", "kernels"], rows)


def tables() -> str:
    """A table for each case."""
    parts = []
    for case in cases():
        before, eager, compiled = (times(case, variant) for variant in VARIANTS)
        rows = [[name, f"{eager[name].flops / 1e12:,.0f}", *cells(eager, name), *cells(compiled, name)] for name in eager]
        rows.append(["**sum**", f"**{sum(t.flops for t in eager.values()) / 1e12:,.0f}**", *sums(eager), *sums(compiled)])
        old = before[roofline.LOSS]
        rows.append(["*loss, before*", f"{old.flops / 1e12:,.0f}", *cells(before, roofline.LOSS), *[""] * 5])
        shape = f"micro-batch {case.recipe.training.micro_batch_size} x {case.recipe.training.sequence_length}"
        title = f"{case.machine.title}, `{case.launch.name}`, {case.micro_batches} micro-batches"
        parts.append(f"**`{case.name}`** on {title} of {shape.removeprefix('micro-batch ')} tokens")
        header = ["component", "TFLOP", "eager: GB", "kernels", "s", "share", "bound"]
        header += ["compiled: GB", "kernels", "s", "share", "bound"]
        parts.append(markdown(header, rows))
        speeds = (f"{title} {speed(case, v)}" for title, v in zip(("before", "eager", "compiled"), VARIANTS, strict=True))
        parts.append(f"Tokens/s and MFU: {'; '.join(speeds)}.")
    return "\n\n".join(parts)


def cells(by_component: dict[str, Time], name: str) -> list[str]:
    """GB, kernels, seconds, share and bound of one component."""
    time = by_component[name]
    share = time.seconds / roofline.step_s(by_component)
    return [f"{time.bytes / 1e9:,.1f}", f"{time.kernels:,.0f}", f"{time.seconds:.3f}", f"{share:.1%}", time.bound]


def sums(by_component: dict[str, Time]) -> list[str]:
    """The last row."""
    moved = sum(time.bytes for name, time in by_component.items() if name != roofline.COMMUNICATION) / 1e9
    kernels = sum(time.kernels for time in by_component.values())
    return [f"**{moved:,.1f}**", f"**{kernels:,.0f}**", f"**{roofline.step_s(by_component):.3f}**", "**100%**", ""]


def communication() -> str:
    """What two GPUs exchange, by engine and by when gradients are reduced."""
    rows = []
    for name in RECIPES:
        case = case_of(name, A6000_PAIR)
        fsdp2, zero1, ddp = (roofline.traffic(case, engine, 2, case.micro_batches) for engine in ("fsdp2", "zero1", "ddp"))
        n = case.parameters
        for engine, when, sent, more in (
            ("FSDP2", "every micro-batch", fsdp2.each_micro_batch, 0),
            ("FSDP2", "once", fsdp2.once, 4 * n),
            ("FSDP2", "once, weights kept", fsdp2.kept, (4 + 2) * n),
            ("ZeRO-1", "once", zero1.once, None),
            ("DDP", "every micro-batch", ddp.each_micro_batch, None),
            ("DDP", "once", ddp.once, None),
        ):
            links = (PCIE_BYTES_PER_S, BRIDGE_BYTES_PER_S, NVLINK_BYTES_PER_S)
            memory = "" if more is None else f"{more / 1e9:.1f}" if more else "0"
            rows.append([f"`{name}`", engine, when, f"{sent / 1e9:.1f}", *(f"{sent / link:.3f}" for link in links), memory])
    header = ["recipe", "engine", "gradients reduced", "GB sent", f"s over PCIe 4 ({PCIE_BYTES_PER_S / 1e9:.0f} GB/s)"]
    header += [f"s over A6000's NVLink bridge ({BRIDGE_BYTES_PER_S / 1e9:.0f} GB/s)"]
    return markdown([*header, f"s over NVLink 4 ({NVLINK_BYTES_PER_S / 1e9:.0f} GB/s)", "GB of memory more"], rows)


def compute_seconds() -> str:
    """Computing of a step on two GPUs, without communication."""
    machines = (A6000_PAIR, H100_PAIR)
    rows = [[f"`{name}`", *(f"{computing_s(case_of(name, machine)):.2f}" for machine in machines)] for name in RECIPES]
    return markdown(["recipe", *(f"s on {machine.title}" for machine in machines)], rows)


def page() -> str:
    """The whole page."""
    h100, a6000 = hardware.GPUS["h100"], hardware.GPUS["a6000"]
    lengths = {case.recipe.training.sequence_length for case in cases()}
    return PAGE.format(
        summary=summary(), passes=passes(), tables=tables(), communication=communication(), compute=compute_seconds(),
        findings=findings(), tokens_per_step=524_288, launch_us=roofline.LAUNCH_S * 1e6, link_share=roofline.LINK_SHARE,
        h100_matrix=H100.flops_per_s(roofline.PRODUCTS) / 1e12, h100_peak=h100.peak_bf16_flops / 1e12,
        a6000_matrix=A6000_PAIR.flops_per_s(roofline.PRODUCTS) / 1e12, a6000_peak=a6000.peak_bf16_flops / 1e12,
        h100_memory=H100.memory_bytes_per_s / 1e9, h100_memory_peak=h100.memory_bytes_per_s / 1e9,
        a6000_memory=A6000_PAIR.memory_bytes_per_s / 1e9, a6000_memory_peak=a6000.memory_bytes_per_s / 1e9,
        h100_attention=H100.flops_per_s(roofline.ATTENTION) / 1e12,
        a6000_attention=A6000_PAIR.flops_per_s(roofline.ATTENTION) / 1e12, nvlink=NVLINK_BYTES_PER_S / 1e9,
        nvlink_peak=h100.link_bytes_per_s / 1e9, pcie=PCIE_BYTES_PER_S / 1e9, pcie_peak=a6000.link_bytes_per_s / 1e9,
        old_kernels=roofline.OLD_KERNELS_PER_BLOCK, old_softmax=roofline.OLD_SOFTMAX_BYTES_PER_LOGIT,
        new_softmax=roofline.SOFTMAX_BYTES_PER_LOGIT, lengths=" and ".join(f"{length:,}" for length in sorted(lengths)),
    )  # fmt: skip


def draw(file: Path) -> None:
    """Seconds of a step by component, a panel for each case."""
    figure = matplotlib.figure.Figure(figsize=(12, 7.5), layout="constrained")
    panels = figure.subplots(2, len(RECIPES))
    for case, axes in zip(sorted(cases(), key=lambda case: case.machine.title), panels.flat, strict=True):
        bottoms = [0.0] * len(VARIANTS)
        found = [times(case, variant) for variant in VARIANTS]
        for component in roofline.COMPONENTS:
            heights = [by_component[component].seconds if component in by_component else 0.0 for by_component in found]
            axes.bar(VARIANTS, heights, 0.65, bottom=bottoms, color=COLORS[component], label=component)
            bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
        for place, (total, by_component) in enumerate(zip(bottoms, found, strict=True)):
            axes.text(place, total, f"MFU {roofline.mfu(case, roofline.step_s(by_component)):.0%}", ha="center", va="bottom")
        axes.set(title=f"{case.name}, {case.machine.title}", ylim=(0, 1.12 * max(bottoms)))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    for axes in panels[:, 0]:
        axes.set_ylabel("s per step of 524,288 tokens")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    (DOCS / "roofline.md").write_text(page(), encoding="utf-8")
    draw(DOCS / "roofline.png")
