"""Plan a budget: the best shapes for FLOPs, for GPUs over some days, or for dollars.

Entered by `plan_budget`.
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from isoflop.config.loading import load_recipe
from isoflop.plan import cost, hardware
from isoflop.plan.families import ASPECT_RATIO, Family
from isoflop.plan.gpus import GpuOptions, GpuSpec, check_bounds
from isoflop.plan.models import family_at
from isoflop.plan.planned_recipe import NewRecipe, PlannedRecipe, Tuning, plan_new_recipe
from isoflop.plan.planner import get_law, gpu_cost
from isoflop.plan.results import GpuCost, dollars_dict, mfu_dict
from isoflop.plan.search import (
    COMPUTE_OPTIMAL,
    NEAR_20N,
    NEAR_OPTIMAL_NATS,
    Candidate,
    FlopsOf,
    by_rule_of_thumb,
    near_optimal,
    search,
)
from isoflop.scaling.hyperparameters import OptimizerName
from isoflop.scaling.laws import DEFAULT_LAW, PUBLISHED, Law, load_law, prediction_json
from isoflop.utils.errors import UserError

RULE_OF_THUMB = f"{COMPUTE_OPTIMAL} tokens a parameter, a rule of thumb"  # where no law predicts
Bounds = tuple[float, float]


class GpuHours(NamedTuple):
    """A budget in hours of one GPU model; its FLOPs depend on the MFU, and so on the model."""

    spec: GpuSpec
    num_gpus: int
    gpu_hours: float

    def flops(self, parameters: int) -> float:
        """Return FLOPs = hours x 3600 x peak x MFU at a model size. Raises `UserError` where the MFU is not known."""
        mfu, _ = self.spec.mfu_for(parameters)
        if mfu is None:
            raise UserError(
                f"--gpu {self.spec.name}: its MFU is not known, so its hours are no FLOPs; give --mfu, e.g. --mfu 0.4"
            )
        return self.gpu_hours * 3600 * self.spec.peak_flops_per_s * mfu


@dataclass(frozen=True)
class RankedShape:
    """A shape of a search, and a law's prediction of it."""

    candidate: Candidate
    flops_per_token: int
    predicted_loss: float | None
    predicted_loss_interval: tuple[float, float] | None
    outside: str | None
    """Why the law has no prediction."""

    def to_dict(self) -> dict[str, Any]:
        """Return the shape as JSON."""
        found = self.candidate
        return cost.shape_dict(found.model) | {
            "parameters": found.parameters,
            "tokens": found.tokens,
            "tokens_per_parameter": found.tokens_per_parameter,
            "flops_per_token": self.flops_per_token,
            "flops": found.flops,
            "predicted_loss": self.predicted_loss,
            "predicted_loss_interval": self.predicted_loss_interval,
            "outside": self.outside,
            "on_grid_edge": found.on_grid_edge,
        }


@dataclass(frozen=True)
class BudgetPlan:
    """The best shapes for a budget, and the recipe of the best one. `print(plan)` shows it as text."""

    family: Family
    budget: float | GpuHours
    law: str
    outside: str | None
    """Why the law has no prediction at this budget."""
    chosen_by: str
    constraint: Bounds | None
    """Lowest and highest tokens per parameter."""
    num_shapes: int
    near_optimal: tuple[RankedShape, ...]
    """The best shape, then those that no law can tell from it."""
    near_20_tokens_per_parameter: tuple[RankedShape, ...]
    best_by_law: dict[str, RankedShape]
    gpus: tuple[GpuCost, ...]
    price_per_gpu_hour: float | None
    search_warnings: tuple[str, ...]
    planned: PlannedRecipe
    """The recipe of the best shape."""

    @property
    def best(self) -> RankedShape:
        """The best shape."""
        return self.near_optimal[0]

    @property
    def flops(self) -> float:
        """Training FLOPs of the best shape."""
        return self.best.candidate.flops

    @property
    def warnings(self) -> list[str]:
        """What to know before the run starts: of the search, then of the recipe."""
        return [*self.search_warnings, *self.planned.plan.warnings]

    def spent(self) -> dict[str, Any]:
        """Return the budget as it was given, and its FLOPs for the best shape."""
        if not isinstance(self.budget, GpuHours):
            return {"flops": self.budget}
        mfu, source = self.budget.spec.mfu_for(self.best.candidate.parameters)
        return {
            "gpu": self.budget.spec.name,
            "num_gpus": self.budget.num_gpus,
            "gpu_hours": self.budget.gpu_hours,
            "hours": self.budget.gpu_hours / self.budget.num_gpus,
            "peak_flops_per_s": self.budget.spec.peak_flops_per_s,
            "mfu": mfu,
            "mfu_source": source,
            "flops": self.flops,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the keys and values of `--json`."""
        plan, training = self.planned.plan, self.planned.recipe.training
        return {
            "family": self.family.name,
            "sequence_length": self.family.sequence_length,
            "flops": self.flops,
            "budget": self.spent(),
            "law": self.law,
            "outside": self.outside,
            "chosen_by": self.chosen_by,
            "tokens_per_parameter_constraint": self.constraint,
            "num_shapes": self.num_shapes,
            "best": self.best.to_dict(),
            "near_optimal": [shape.to_dict() for shape in self.near_optimal],
            "near_20_tokens_per_parameter": [shape.to_dict() for shape in self.near_20_tokens_per_parameter],
            "best_by_law": {name: shape.to_dict() for name, shape in self.best_by_law.items()},
            "mfu": mfu_dict(self.gpus),
            "gpu_hours": {row.spec.name: row.gpu_hours for row in self.gpus},
            "dollars": dollars_dict(self.gpus, self.price_per_gpu_hour),
            "warnings": self.warnings,
            "recipe": {
                "steps": plan.stats.steps,
                "tokens_per_step": training.tokens_per_step,
                "tokens": plan.stats.tokens,
                "micro_batch_size": training.micro_batch_size,
                "predicted_loss": plan.prediction.predicted_loss,
                "repeated_data": plan.repeated_data and asdict(plan.repeated_data),
                "hyperparameters": self.planned.hyperparameters and self.planned.hyperparameters.to_dict(),
                "notes": list(self.planned.notes),
                "path": self.planned.path and str(self.planned.path),
            },
        }

    def __str__(self) -> str:
        from isoflop.plan.report import budget_text  # which builds on this module

        return budget_text(self, full=False)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def plan_budget(
    flops: float | None = None,
    *,
    days: float | None = None,
    dollars: float | None = None,
    gpu: str | None = None,
    num_gpus: int | None = None,
    mfu: float | None = None,
    peak_tflops: float | None = None,
    price_per_gpu_hour: float | None = None,
    family: str = "llama3",
    sequence_length: int | None = None,
    law: Law | str | Path | None = None,
    tokens_per_parameter: Bounds | None = None,
    optimizer: OptimizerName | None = None,
    hyperparameter_law: str | None = None,
    write: str | Path | None = None,
) -> BudgetPlan:
    """Return the best shapes of a family for a budget: training FLOPs, days of GPUs, or dollars.

    family: a name, a published model or a recipe. tokens_per_parameter: lowest and highest D/N. optimizer: adamw or muon;
    default: the family's. hyperparameter_law: a law of learning rate and batch. write: a file for the best shape's recipe.
    The other arguments are those of `isoflop.plan.planner.plan`.

    Raises `UserError` for no budget or two, for a budget that is too small, and for an unknown family, law or GPU.
    """
    options = GpuOptions(gpu, num_gpus, mfu, peak_tflops, price_per_gpu_hour)
    check_bounds(flops=flops, days=days, dollars=dollars, sequence_length=sequence_length)
    if tokens_per_parameter is not None and not 0 <= tokens_per_parameter[0] < tokens_per_parameter[1] < float("inf"):
        low, high = tokens_per_parameter
        raise UserError(f"--constrain-tokens-per-parameter {low:g} {high:g} is not 0 <= LOW < HIGH; give e.g. 10 30")
    own_law, path = get_law(law), Path(write) if write is not None else None
    budget = _budget({"flops": flops, "days": days, "dollars": dollars}, options)
    of_family, tuning = family_at(family, sequence_length), Tuning(optimizer, hyperparameter_law)
    return _search_and_plan(
        of_family, budget, own_law, tokens_per_parameter, options, path, named_law=law is not None, tuning=tuning
    )


def _budget(given: dict[str, float | None], options: GpuOptions) -> float | GpuHours:
    """Return the one budget that was given, as FLOPs or GPU-hours."""
    amounts = {name: amount for name, amount in given.items() if amount is not None}
    if len(amounts) != 1:
        raise UserError(
            f"give one budget: --flops 1.36e21, or --gpus 2 --gpu a6000 --days 16, or --dollars 500 --gpu h100 --price 2.5"
            f" (given: {', '.join(f'--{name}' for name in amounts) or 'none'})"
        )
    ((name, amount),) = amounts.items()
    if name == "flops":
        return float(amount)
    if options.gpu is None and options.peak_tflops is None:
        raise UserError(f"--{name} needs --gpu, one of {', '.join(hardware.GPUS)}, or --peak-tflops")
    spec, num_gpus = options.specs()[0], options.num_gpus or 1
    if name == "days":
        return GpuHours(spec, num_gpus, 24 * amount * num_gpus)
    if options.price_per_gpu_hour is None:
        raise UserError("--dollars needs --price, dollars of one GPU for an hour, e.g. --price 2.5")
    return GpuHours(spec, num_gpus, amount / options.price_per_gpu_hour)


def _search_and_plan(
    family: Family,
    budget: float | GpuHours,
    law: Law,
    constraint: Bounds | None,
    options: GpuOptions,
    path: Path | None,
    *,
    named_law: bool,
    tuning: Tuning,
) -> BudgetPlan:
    flops: float | FlopsOf = budget.flops if isinstance(budget, GpuHours) else budget
    ranked = search(family, flops, law, constraint)
    optimizer = tuning.optimizer or load_recipe(family.recipe).optimizer.name
    outside = law.outside(law.model_size(ranked[0].model), ranked[0].tokens, ranked[0].model.vocab_size, optimizer)
    if outside:
        ranked = by_rule_of_thumb(search(family, flops, load_law(DEFAULT_LAW), constraint))  # of any depth
    best, ties = ranked[0], ranked[:1] if outside else near_optimal(ranked)
    near_20n = [] if constraint or outside else near_optimal(_search_if_any(family, flops, law, NEAR_20N))
    by_law = {known: _search_if_any(family, flops, load_law(known), constraint)[:1] for known in PUBLISHED}
    price, source = options.price_per_gpu_hour, f"{best.flops:.6g} FLOPs"
    new = NewRecipe(best.model, best.tokens, best.predicted_loss, family, law, named_law, options, source, path, tuning)
    return BudgetPlan(
        family=family,
        budget=budget,
        law=law.name,
        outside=outside,
        chosen_by=RULE_OF_THUMB if outside else f"the loss that law {law.name} predicts",
        constraint=constraint,
        num_shapes=len(ranked),
        near_optimal=tuple(_ranked(candidate, family, law, optimizer) for candidate in ties),
        near_20_tokens_per_parameter=tuple(_ranked(candidate, family, law, optimizer) for candidate in near_20n),
        best_by_law={name: _ranked(found[0], family, load_law(name), optimizer) for name, found in by_law.items() if found},
        gpus=tuple(gpu_cost(spec, spec.hours(best.flops, best.parameters), best.parameters, price) for spec in options.specs()),
        price_per_gpu_hour=price,
        search_warnings=tuple(_warnings(best, ties, family)),
        planned=plan_new_recipe(new, family.recipe),
    )


def _search_if_any(family: Family, flops: float | FlopsOf, law: Law, constraint: Bounds | None) -> list[Candidate]:
    """Search beside the one that was asked for; it may find nothing."""
    try:
        return search(family, flops, law, constraint)
    except UserError:
        return []


def _ranked(candidate: Candidate, family: Family, law: Law, optimizer: str) -> RankedShape:
    flops_per_token = cost.flops_per_token(candidate.model, family.sequence_length)
    return RankedShape(candidate, flops_per_token, **prediction_json(law.predict(candidate.model, candidate.tokens, optimizer)))


def _warnings(best: Candidate, ties: list[Candidate], family: Family) -> list[str]:
    """Return the warnings of a search; the others are of the recipe that is made of it."""
    found = []
    if best.on_grid_edge:
        layers, widths, (low, high) = family.layers, family.widths, ASPECT_RATIO
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
