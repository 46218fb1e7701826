"""From a budget to the best shapes: FLOPs, GPUs for some days, or dollars."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from isoflop import cost
from isoflop.errors import UserError
from isoflop.families import ASPECT_RATIO, Family
from isoflop.plan.recipes import Machine, shape
from isoflop.scaling.laws import PUBLISHED, Law, load_law
from isoflop.search import NEAR_20N, NEAR_OPTIMAL_NATS, Candidate, near_optimal, search


class Budget(NamedTuple):
    """What may be spent: `flops` as given, or what `gpu_hours` of a machine give at an MFU."""

    flops: float | None
    gpu_hours: float | None = None
    num_gpus: int = 1
    machine: Machine | None = None
    price_per_gpu_hour: float | None = None


def require_positive(**values: float | None) -> None:
    """Refuse budgets that are zero, negative or not numbers, by the option's name."""
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} {value:g} is not a positive number; give one above 0")


def plan_budget(
    members: Family, budget: Budget, law: Law, constraint: tuple[float, float] | None, kinds: list[Machine]
) -> tuple[dict[str, Any], Candidate]:
    """All numbers of a search, at full precision, and the best shape under the constraint (free where there is none)."""
    flops, ranked, spending = _ranked(members, budget, law, constraint)
    held = near_optimal(_search_if_any(members, flops, law, NEAR_20N))
    by_law = {known: _search_if_any(members, flops, load_law(known), constraint)[:1] for known in PUBLISHED}
    best, ties = ranked[0], near_optimal(ranked)
    plan = {
        "family": members.name,
        "sequence_length": members.sequence_length,
        "flops": flops,
        "budget": spending,
        "law": law.name,
        "tokens_per_parameter_constraint": constraint,
        "num_shapes": len(ranked),
        "best": described(best, members, law),
        "near_optimal": [described(candidate, members, law) for candidate in ties],
        "near_20_tokens_per_parameter": [described(candidate, members, law) for candidate in held],
        "best_by_law": {known: described(found[0], members, load_law(known)) for known, found in by_law.items() if found},
        "gpu_hours": {kind.name: cost.train_hours(flops, kind.peak_flops, 1, kind.mfu_for(best.parameters)[0]) for kind in kinds},
        "warnings": _warnings(best, ties, members, law),
    }
    return plan, best


def _ranked(
    members: Family, budget: Budget, law: Law, constraint: tuple[float, float] | None
) -> tuple[float, list[Candidate], dict[str, Any]]:
    """FLOPs, the ranked shapes, and what is spent.

    The MFU depends on the size of the best shape, which depends on the FLOPs that the MFU buys: from a guess of 1B it settles in
    a round or two, since there are few rows; so the hours of the best shape are those of the budget.
    """
    if budget.flops is not None or budget.machine is None or budget.gpu_hours is None:
        flops = budget.flops or 0.0
        return flops, search(members, flops, law, constraint), {"flops": flops}
    parameters, tried = 1e9, set()
    while True:
        mfu, source = budget.machine.mfu_for(parameters)
        flops = budget.gpu_hours * 3600 * budget.machine.peak_flops * mfu
        ranked = search(members, flops, law, constraint)
        tried.add(mfu)
        parameters = ranked[0].parameters
        if budget.machine.mfu_for(parameters)[0] in tried:
            break
    price = budget.price_per_gpu_hour
    return flops, ranked, {
        "gpu": budget.machine.name,
        "num_gpus": budget.num_gpus,
        "gpu_hours": budget.gpu_hours,
        "hours": budget.gpu_hours / budget.num_gpus,
        "peak_flops_per_s": budget.machine.peak_flops,
        "mfu": mfu,
        "mfu_source": source,
        "dollars": price and price * budget.gpu_hours,
    }  # fmt: skip


def _search_if_any(members: Family, flops: float, law: Law, constraint: tuple[float, float] | None) -> list[Candidate]:
    """A search beside the one that was asked for: it may find nothing."""
    try:
        return search(members, flops, law, constraint)
    except UserError:
        return []


def described(candidate: Candidate, members: Family, law: Law) -> dict[str, Any]:
    """A candidate as JSON has it."""
    return shape(candidate.model) | {
        "parameters": candidate.parameters,
        "tokens": candidate.tokens,
        "tokens_per_parameter": candidate.tokens_per_parameter,
        "flops_per_token": cost.flops_per_token(candidate.model, members.sequence_length),
        "flops": candidate.flops,
        "predicted_loss": candidate.predicted_loss,
        "predicted_loss_interval": law.interval(law.size(candidate.model), candidate.tokens),
        "on_grid_edge": candidate.on_grid_edge,
    }


def _warnings(best: Candidate, ties: list[Candidate], members: Family, law: Law) -> list[str]:
    found = []
    if best.on_grid_edge:
        layers, widths, (low, high) = members.layers, members.widths, ASPECT_RATIO
        found.append(
            f"the best shape lies on the edge of the grid (layers {layers[0]} to {layers[-1]}, widths {widths[0]} to"
            f" {widths[-1]}, width / layers {low} to {high}): a still better one may lie outside it"
        )
    if len(ties) > 1:
        sizes = [candidate.parameters for candidate in ties]
        found.append(
            f"{len(ties)} shapes from {min(sizes):,} to {max(sizes):,} parameters lie within {NEAR_OPTIMAL_NATS} nats: no law"
            " tells them apart; choose by speed, memory or what comes after training"
        )
    if beyond := law.extrapolates(law.size(best.model), best.tokens):
        found.append(f"law {law.name} is extrapolated: {'; '.join(beyond)}")
    return found
