"""How far a fit is to be trusted, in sentences that each rest on a number."""

from __future__ import annotations

from typing import Any

CLOSE = 0.01  # of the loss. Assumption: an error that a plan bears; losses of neighbouring sizes at a budget differ by less
AGREE = 1.25  # ratio of N between two methods. Assumption: at such a factor from the optimum the loss is within 0.1% of it
FAR = 10.0  # times the largest budget. Assumption: the leave-largest-out test speaks for a step like the design's own, not more
APPROACHES = ("parametric", "isoflop", "envelope")  # the three of Hoffmann et al. 2022


def verdict(numbers: dict[str, Any]) -> str:
    """What follows, and a line for each ground of it."""
    fit = numbers["parametric"]
    if fit["status"] != "converged":
        return f"Verdict: do not use this law. The parametric fit is {fit['status'].replace('_', ' ')}: {fit['detail']}"
    grounds = [*_held_out(numbers["leave_largest_out"]), *_agreement(numbers), *_reach(numbers)]
    failed = sum(not holds for holds, _ in grounds)
    told = (
        f"take this law with caution: of {len(grounds)} grounds for trust {failed} fail"
        if failed
        else "this law can be trusted as far as these budgets: all grounds for trust hold"
    )
    return "\n".join([f"Verdict: {told}.", "", *(f"* {'holds' if holds else 'fails'}: {text}" for holds, text in grounds)])


def _held_out(found: dict[str, Any]) -> list[tuple[bool, str]]:
    if "runs" not in found:
        return [(False, f"not tested on a larger budget than it has seen: {found['reason']}")]
    worst, inside = max(abs(run["error"]) for run in found["runs"]), round(found["inside"] * len(found["runs"]))
    text = (
        f"fitted without the largest budget, it predicts its runs within {worst:.2%} of their loss, {inside} of"
        f" {len(found['runs'])} inside their 90% intervals"
    )
    return [(found["status"] == "converged" and worst <= CLOSE, text)]


def _agreement(numbers: dict[str, Any]) -> list[tuple[bool, str]]:
    there = {name: numbers[name] for name in APPROACHES if "n_opt" in numbers[name]}
    if len(there) < 2 or not numbers["predict"]:
        return [(False, "no second method stands beside the parametric law")]
    flops = max(numbers["predict"])
    sizes = [found["n_opt"][numbers["predict"].index(flops)] for found in there.values()]
    ratio = max(sizes) / min(sizes)
    return [(ratio <= AGREE, f"at {flops:.3g} FLOPs the N of {', '.join(there)} differ by a factor of {ratio:.3g}")]


def _reach(numbers: dict[str, Any]) -> list[tuple[bool, str]]:
    if not numbers["predict"]:
        return []
    far = max(numbers["predict"]) / numbers["points"]["flops"][1]
    return [
        (far <= FAR * (1 + 1e-9), f"{max(numbers['predict']):.3g} FLOPs are {far:.3g} times the largest budget it was fitted to")
    ]
