"""Regenerates docs/reproductions.md and docs/isoflop_profile.png: python benchmarks/pages/reproductions.py (from the checkout's root).

What the project's original report, Hoffmann et al. and Kaplan et al. published, computed again; and where figures that were
published side by side cannot all be true, the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe
from isoflop.plan import cost, hardware
from isoflop.plan.families import load_family
from isoflop.plan.search import NEAR_20N, Candidate, search
from isoflop.scaling.laws import PF_DAY, PUBLISHED, kaplan_optimum, load_law

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BUDGET = 1.36e21  # FLOPs of the original report's search
LLAMA3 = load_family("llama3")
ROUNDED = load_law("hoffmann-rounded")  # its coefficients
# Hoffmann et al. 2022, table 3: parameters, FLOPs, tokens.
CHINCHILLA_TABLE = (
    (400e6, 1.92e19, 8.0e9), (1e9, 1.21e20, 20.2e9), (10e9, 1.23e22, 205.1e9), (67e9, 5.76e23, 1.5e12), (175e9, 3.85e24, 3.7e12),
    (280e9, 9.90e24, 5.9e12), (520e9, 3.43e25, 11.0e12), (1e12, 1.27e26, 21.2e12), (10e12, 1.30e28, 216.2e12),
)  # fmt: skip
# Reported by users of these recipes on 2x A6000 under ZeRO-1: micro-batch and GB a GPU.
REPORTED_MEMORY = {"gpt2_1.36b": (4, 25, 28), "llama2_1.36b": (6, 28, 32), "llama3_1.5b": (8, 30, 35), "llama3_2.2b": (2, 40, 42)}


class Published(NamedTuple):
    """One of the original report's optima, and what its search would say."""

    layers: int
    width: int
    parameters: int
    tokens: float
    loss: float
    spent: float
    """Share of the budget by the right count."""


def reported_search(constraint: tuple[float, float] = (0.0, np.inf)) -> Published:
    """The original report's search: its cost function, its token grid, its tolerance.

    Forward FLOPs a token of a layer = 2 x matmul parameters + 2 a S H with a heads (right: 4 S H), no LM head; D from 100 values
    evenly from 1e9 to 1e12, those within 2% of the budget. The grid is not stated: it is the one with round ends that holds both
    published D, 101.909B and 61.545B.
    """
    found = []
    for model in LLAMA3.shapes():
        s, classes, n = cost.shape_of(model), cost.parameters_by_class(model), cost.parameters(model)
        attention = 2 * s.num_heads * LLAMA3.sequence_length * s.hidden_size * s.num_layers
        per_token = 3 * (2 * (classes["attention"] + classes["ffn"]) + attention)
        for tokens in np.linspace(1e9, 1e12, 100):
            if abs(per_token * tokens / BUDGET - 1) <= 0.02 and constraint[0] <= tokens / n <= constraint[1]:
                spent = cost.flops_per_token(model, LLAMA3.sequence_length) * tokens / BUDGET
                found.append(Published(s.num_layers, s.hidden_size, n, float(tokens), float(ROUNDED.loss(n, tokens)), spent))
    return min(found, key=lambda candidate: candidate.loss)


def table(header: str, rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    cells = [cell.strip() for cell in header.split("|")]
    return [f"| {' | '.join(row)} |" for row in [cells, ["---"] * len(cells), *rows]]


def shapes() -> Iterator[str]:
    """The published recipes' totals, ratios and steps."""
    yield from table(
        "recipe | N | tokens of 25,000 steps / N | 20N | steps to 20N",
        [
            [
                f"`{name}`", f"{cost.parameters(recipe.model):,}",
                f"{25_000 * 524_288 / cost.parameters(recipe.model):.2f}", f"{20 * cost.parameters(recipe.model):,}",
                f"{-(-20 * cost.parameters(recipe.model) // 524_288):,}",
            ]
            for name, recipe in recipes().items()
        ],
    )  # fmt: skip


def recipes() -> dict[str, Recipe]:
    """The four of the original report's comparison."""
    return {name: load_recipe(f"recipes/{name}.yaml") for name in REPORTED_MEMORY}


def searches() -> Iterator[str]:
    """The two optima as published, by their own arithmetic, and by the right count."""
    rows = []
    for title, constraint, bounds in (("any D/N", (0.0, np.inf), None), ("20N +- 50%", NEAR_20N, NEAR_20N)):
        theirs, best = reported_search(constraint), search(LLAMA3, BUDGET, ROUNDED, bounds)[0]
        rows.append([f"{title}, its arithmetic", *described(theirs), f"{theirs.spent:.1%}"])
        rows.append([f"{title}, right count", *described(right(best)), "100.0%"])
    yield from table("search | shape | N | D | loss | budget spent by the right count", rows)
    yield ""
    ranked = search(LLAMA3, BUDGET, ROUNDED)
    yield (
        f"The free optimum lies on the edge of the grid ({LLAMA3.layers[0]} layers is the fewest), and the valley is flat: the"
        f" next shapes are {', '.join(brief(c, ranked[0]) for c in ranked[1:5])}."
    )
    yield ""
    wide = LLAMA3.template.model_copy(
        update={
            "num_hidden_layers": 16, "hidden_size": 2816, "num_attention_heads": 22, "num_key_value_heads": 8,
            "intermediate_size": 9728,
        }
    )  # fmt: skip
    n = cost.parameters(wide)
    loss = float(ROUNDED.loss(n, BUDGET / cost.flops_per_token(wide, LLAMA3.sequence_length)))
    yield (
        f"16 layers x 2816 (head dim 128, {n / 1e9:.2f}B, {loss - ranked[0].predicted_loss:+.4f}) would be nearer still, but its"
        " 22 heads are not a multiple of the 8 key-value heads: no such model can be built."
    )


def described(p: Published) -> list[str]:
    """A table's cells."""
    return [f"{p.layers}L x {p.width}", f"{p.parameters / 1e9:.3f}B", f"{p.tokens / 1e9:.3f}B", f"{p.loss:.4f}"]


def right(candidate: Candidate) -> Published:
    """A candidate of the planner in the same words."""
    s = cost.shape_of(candidate.model)
    return Published(s.num_layers, s.hidden_size, candidate.parameters, candidate.tokens, candidate.predicted_loss, 1.0)


def brief(candidate: Candidate, best: Candidate) -> str:
    """A near-optimal shape in a few words."""
    s, more = cost.shape_of(candidate.model), candidate.predicted_loss - best.predicted_loss
    return f"{s.num_layers}L x {s.hidden_size} (head dim {s.head_dim}, {candidate.parameters / 1e9:.2f}B, {more:+.4f})"


def chinchilla() -> Iterator[str]:
    """Table 3 of Hoffmann et al., and what each law makes of its budgets."""
    rows = []
    for n, flops, tokens in CHINCHILLA_TABLE:
        optima = [load_law(name).optimum(flops) for name in ("hoffmann", "hoffmann-rounded", "besiroglu")]
        rows.append(
            [f"{n:.3g}", f"{flops:.3g}", f"{tokens:.4g}", f"{6 * n * tokens / flops:.3f}", f"{tokens / n:.1f}"]
            + [f"{best_n:.3g}, {best_d:.3g}" for best_n, best_d in optima]
        )
    yield from table("N | FLOPs | D | 6ND / FLOPs | D/N | N, D by hoffmann | by hoffmann-rounded | by besiroglu", rows)


def kaplan() -> Iterator[str]:
    """Kaplan et al.'s rules at some budgets, and how they hang together."""
    rows = []
    for pf_days in (1e-3, 1.0, BUDGET / PF_DAY, 1e3):
        k = kaplan_optimum(pf_days * PF_DAY)
        product = 6 * k.parameters * k.batch_tokens * k.steps / (pf_days * PF_DAY)
        rows.append(
            [
                f"{pf_days:.4g}",
                f"{k.parameters:.4g}",
                f"{k.batch_tokens:.4g}",
                f"{k.steps:.4g}",
                f"{k.tokens:.4g}",
                f"{k.loss:.4f}",
                f"{product:.3f}",
                f"{k.tokens / (k.batch_tokens * k.steps):.2f}",
            ]
        )
    yield from table("PF-days | N | B, tokens | S, steps | D, tokens | loss | 6NBS / C | D / (B S)", rows)
    surface = load_law("kaplan")
    best_n, best_d = surface.optimum(BUDGET)
    yield ""
    yield (
        "The law `kaplan` that plans are ranked by is the paper's surface of N and D (equation 1.5), for training stopped early."
        f" Its own least loss at {BUDGET:.3g} FLOPs is {float(surface.loss(best_n, best_d)):.4f} at N {best_n:.3g}, D"
        f" {best_d:.3g} (N grows as C^0.56): the rules above come from another fit, of loss"
        " against steps, and the two do not agree."
    )


def contradictions() -> Iterator[str]:
    """Figures that cannot all be true, each with its arithmetic."""
    r = recipes()
    a6000, h20, rtx5090 = (hardware.GPUS[name].peak_bf16_flops for name in ("a6000", "h20", "rtx5090"))
    n = {name: cost.parameters(recipe.model) for name, recipe in r.items()}
    layer = {k: v // 18 for k, v in cost.parameters_by_class(r["llama2_1.36b"].model).items()}
    llama2 = r["llama2_1.36b"]
    per_token = cost.flops_per_token(llama2.model, 2048)
    gpt2_per_token = cost.flops_per_token(r["gpt2_1.36b"].model, 2048)
    modern = load_recipe("recipes/modern_124m.yaml")
    modern_flops = cost.flops_per_token(modern.model, 1024) * 38_146 * 524_288
    yield "- GPT-2 1.36B with 18 heads of 135 at width 2432: 18 x 135 = 2,430, and 2432 / 18 is not whole. 19 heads of 128 are."
    yield (
        "- LLaMA 2 1.36B with 71.62M parameters a layer, 50.33M of them feed-forward: a layer has"
        f" {layer['attention'] / 1e6:.2f}M of attention and {layer['ffn'] / 1e6:.2f}M of feed-forward,"
        f" {(layer['attention'] + layer['ffn']) / 1e6:.2f}M; 18 of the 71.62M with embedding and"
        f" head would be {(18 * 71.62e6 + 2 * 32000 * 2304) / 1e9:.3f}B, not the 1.294B given beside it."
    )
    small = n["llama3_2.2b"] - 2 * 256 * 2048
    yield (
        f"- LLaMA 3 with a vocabulary of 128,000: the tokenizer has 128,256 ids. The 2.223B given is the count with 128,000"
        f" ({small:,}), the 1.545B beside it the one with 128,256 ({n['llama3_1.5b']:,})."
    )
    yield (
        "- A step of 524,288 tokens in 7 s, in 25 s, and at 10,000 to 13,000 tokens/s for LLaMA 2 1.36B on 2x A6000: the last is"
        f" {524288 / 13000:.0f} to {524288 / 10000:.0f} s a step. By its FLOPs per token the three are MFU"
        f" {mfu(per_token, 524288 / 7, 2 * a6000)}, {mfu(per_token, 524288 / 25, 2 * a6000)} and"
        f" {mfu(per_token, 10000, 2 * a6000)} to {mfu(per_token, 13000, 2 * a6000)}: the first is impossible, and no two agree."
        f" GPT-2 1.36B, given with 12,000 to 15,000 tokens/s, is at {mfu(gpt2_per_token, 12000, 2 * a6000)} to"
        f" {mfu(gpt2_per_token, 15000, 2 * a6000)}; by 6N at 13,500 it is {mfu(6 * n['gpt2_1.36b'], 13500, 2 * a6000)}, the 37%"
        " that is given."
    )
    yield (
        "- 50,000 to 60,000 tokens/s on 4x H20 at MFU 35-40%: at the H20's 148 TFLOP/s it would be"
        f" {mfu(per_token, 50000, 4 * h20)} to {mfu(per_token, 60000, 4 * h20)} for LLaMA 2 1.36B (6N:"
        f" {mfu(6 * n['llama2_1.36b'], 50000, 4 * h20)} to {mfu(6 * n['llama2_1.36b'], 60000, 4 * h20)})."
    )
    yield (
        f"- The modern 124M's 38,146 steps in 22 h on one RTX 5090: {modern_flops:.3g} FLOPs in 22 h are"
        f" {modern_flops / 22 / 3600 / 1e12:.1f} TFLOP/s, {modern_flops / 22 / 3600 / rtx5090:.0%} of the card's 209.5. Counting"
        f" causal attention by half it is still {causal_share(modern, 22 * 3600 * rtx5090):.0%}."
    )


def mfu(flops_per_token: float, tokens_per_s: float, peak: float) -> str:
    """Share of a peak, in words."""
    return f"{flops_per_token * tokens_per_s / peak:.0%}"


def causal_share(recipe: Recipe, available: float) -> float:
    """Share of `available` FLOPs that the modern 124M's run takes if only attention's lower triangle counts."""
    half_attention = 3 * 2 * 1024 * recipe.model.hidden_size * recipe.model.num_hidden_layers
    return (cost.flops_per_token(recipe.model, 1024) - half_attention) * 38_146 * 524_288 / available


def memory() -> Iterator[str]:
    """Reported memory on 2x A6000 against the prediction."""
    launch, rows = cost.Launch("2gpu_zero1", "zero1", 2, True, 2), []
    for name, recipe in recipes().items():
        micro, low, high = REPORTED_MEMORY[name]
        predicted = []
        for checkpointing in (False, True):
            training = recipe.training.model_copy(
                update={"micro_batch_size": micro, "activation_checkpointing": checkpointing, "tokens_per_step": 2**40}
            )
            predicted.append(cost.predicted_memory(recipe.model, training, recipe.optimizer, launch).total / 1e9)
        rows.append([f"`{name}`", str(micro), f"{low} to {high} GB", f"{predicted[0]:.1f} GB", f"{predicted[1]:.1f} GB"])
    yield from table("recipe | micro-batch | reported | predicted | predicted with activation checkpointing", rows)


def draw_profile(file: Path) -> None:
    """Predicted loss of every llama3 shape at the original report's budget, by law."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for name, color in zip(PUBLISHED, ("#1f4e8c", "#7aa6d6", "#d1495b", "#8a8a8a"), strict=True):
        ranked = search(LLAMA3, BUDGET, load_law(name))
        sizes, losses = [c.parameters for c in ranked], [c.predicted_loss for c in ranked]
        axes.plot(sizes, losses, ".", color=color, markersize=5, alpha=0.7, label=name)
        axes.plot(sizes[0], losses[0], "*", color=color, markersize=15, markeredgecolor="black")
    axes.set(
        xscale="log", xlabel="parameters N (D = budget / FLOPs per token)", ylabel="predicted loss (nats per token)",
        ylim=(2.17, 2.47), title=f"Every llama3 shape at {BUDGET:.3g} FLOPs; stars: the best by each law",
    )  # fmt: skip
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(file, dpi=110)


def page() -> str:
    """The whole page."""
    parts = [
        ("The original report's comparison", "Tokens per step 524,288; 25,000 steps are 13.11B tokens.", shapes()),
        (
            "The original report's search",
            "C = 1.36e21 FLOPs, LLaMA 3 rules, the rounded Hoffmann law. The document counted attention as 2 a S H a token and"
            " layer (a heads; right is 4 S H) and left out the LM head, so its plans spend less than the budget.",
            searches(),
        ),
        (
            "What the laws say at that budget",
            "![predicted loss against parameters](isoflop_profile.png)",
            iter(()),
        ),
        (
            "Chinchilla's table",
            "Table 3 of Hoffmann et al. 2022 (approach 1) beside the closed-form optimum of each parametric law at the same"
            " FLOPs: their own parametric law asks for smaller models on more tokens than their table, more so the larger the"
            " budget; Besiroglu's refit agrees with the table.",
            chinchilla(),
        ),
        (
            "Kaplan's rules",
            "N = 1.3e9 C^0.73, B = 2.0e6 C^0.24, S = 5.4e3 C^0.03, D = 2e10 C^0.27, C in PF-days. 6NBS gives C back to a few"
            " percent; D is about twice B S, since at the critical batch a run takes twice the least number of steps.",
            kaplan(),
        ),
        (
            "Reported memory",
            "2x A6000 under ZeRO-1, as users of these recipes reported it, with another trainer; the last row was measured"
            " (40.86 GB). The prediction is for this project's chunked loss. What was reported for the two in the middle lies"
            " between the prediction without and with activation checkpointing, and does not fit the last row.",
            memory(),
        ),
        ("Figures that contradict each other", "", contradictions()),
    ]
    lines = [
        "# Reproductions",
        "",
        "Regenerated by `python benchmarks/pages/reproductions.py`; a test holds this page to what it prints.",
        "",
    ]
    for title, intro, body in parts:
        lines += [f"## {title}", "", *([intro, ""] if intro else []), *body, ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


if __name__ == "__main__":
    (DOCS / "reproductions.md").write_text(page(), encoding="utf-8")
    draw_profile(DOCS / "isoflop_profile.png")
