"""From a budget to the best shapes: FLOPs, GPUs for some days, or dollars."""

from __future__ import annotations

from typing import Any, NamedTuple

from isoflop import cost
from isoflop.errors import UserError
from isoflop.families import ASPECT_RATIO, Family
from isoflop.plan.recipes import Machine, dollars_of, mfu_of, shape
from isoflop.scaling.laws import PUBLISHED, Law, load_law
from isoflop.search import NEAR_20N, NEAR_OPTIMAL_NATS, Candidate, FlopsOf, near_optimal, search


class GpuTime(NamedTuple):
    """Hours of one kind of GPU; how many FLOPs they are depends on the MFU, and so on the model."""

    machine: Machine
    num_gpus: int
    gpu_hours: float

    def flops(self, parameters: int) -> float:
        """FLOPs = hours x 3600 x peak x MFU of a model of so many parameters."""
        mfu, _ = self.machine.mfu_for(parameters)
        if mfu is None:
            raise UserError(
                f"--gpu {self.machine.name}: its MFU is not known, so its hours are no FLOPs; give --mfu, e.g. --mfu 0.4"
            )
        return self.gpu_hours * 3600 * self.machine.peak_flops_per_s * mfu


def plan_budget(
    members: Family,
    budget: float | GpuTime,
    law: Law,
    constraint: tuple[float, float] | None,
    kinds: list[Machine],
    price_per_gpu_hour: float | None,
) -> tuple[dict[str, Any], Candidate]:
    """All numbers of a search, at full precision, and the best shape under the constraint (free where there is none)."""
    flops: float | FlopsOf = budget.flops if isinstance(budget, GpuTime) else budget
    ranked = search(members, flops, law, constraint)
    best, ties = ranked[0], near_optimal(ranked)
    held = [] if constraint else near_optimal(_search_if_any(members, flops, law, NEAR_20N))
    by_law = {known: _search_if_any(members, flops, load_law(known), constraint)[:1] for known in PUBLISHED}
    gpu_hours = {kind.name: kind.hours(best.flops, best.parameters) for kind in kinds}
    plan = {
        "family": members.name,
        "sequence_length": members.sequence_length,
        "flops": best.flops,
        "budget": _spent(budget, best),
        "law": law.name,
        "tokens_per_parameter_constraint": constraint,
        "num_shapes": len(ranked),
        "best": described(best, members, law),
        "near_optimal": [described(candidate, members, law) for candidate in ties],
        "near_20_tokens_per_parameter": [described(candidate, members, law) for candidate in held],
        "best_by_law": {known: described(found[0], members, load_law(known)) for known, found in by_law.items() if found},
        "mfu": mfu_of(kinds, best.parameters),
        "gpu_hours": gpu_hours,
        "dollars": dollars_of(gpu_hours, price_per_gpu_hour),
        "warnings": _warnings(best, ties, members),
    }
    return plan, best


def _spent(budget: float | GpuTime, best: Candidate) -> dict[str, Any]:
    """The budget as it was given, and what it comes to for the best shape."""
    if not isinstance(budget, GpuTime):
        return {"flops": budget}
    mfu, source = budget.machine.mfu_for(best.parameters)
    return {
        "gpu": budget.machine.name,
        "num_gpus": budget.num_gpus,
        "gpu_hours": budget.gpu_hours,
        "hours": budget.gpu_hours / budget.num_gpus,
        "peak_flops_per_s": budget.machine.peak_flops_per_s,
        "mfu": mfu,
        "mfu_source": source,
        "flops": best.flops,
    }


def _search_if_any(members: Family, flops: float | FlopsOf, law: Law, constraint: tuple[float, float] | None) -> list[Candidate]:
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
        "predicted_loss_interval": law.promise(candidate.model, candidate.tokens).interval,
        "on_grid_edge": candidate.on_grid_edge,
    }


def _warnings(best: Candidate, ties: list[Candidate], members: Family) -> list[str]:
    """What only a search knows; the rest is said of the recipe that would be written."""
    found = []
    if best.on_grid_edge:
        layers, widths, (low, high) = members.layers, members.widths, ASPECT_RATIO
        found.append(
            f"the best shape lies on the edge of the grid (layers {layers[0]} to {layers[-1]}, widths {widths[0]} to"
            f" {widths[-1]}, width / layers {low} to {high}): a still better one may lie outside it"
        )
    if len(ties) > 1:
        sizes = sorted({candidate.parameters for candidate in ties})
        span = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
        found.append(
            f"{len(ties)} shapes of {span} parameters lie within {NEAR_OPTIMAL_NATS} nats: no law tells them apart; choose by"
            " speed, memory or what comes after training"
        )
    return found
