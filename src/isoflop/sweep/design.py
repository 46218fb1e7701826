"""Recipes of a sweep: the shape nearest to each size, steps from the budget by exact FLOPs, learning rate and batch by rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from isoflop.config.loading import validate_recipe
from isoflop.config.recipe import LARGEST_TRIED, Model, Recipe
from isoflop.plan import cost
from isoflop.plan.families import Family, family_of
from isoflop.plan.shape import tuned_parameters
from isoflop.scaling.laws import Law
from isoflop.sweep.config import Rule, SweepConfig
from isoflop.utils.errors import UserError

FEWEST_STEPS = 50  # assumption: with fewer, warm-up and decay leave nothing to measure
WINDOWS = 8  # windows of a step by rule are a multiple of it, which the GPUs of a node divide


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str
    recipe: Recipe
    steps: int

    @property
    def parameters(self) -> int:
        """N, of all parameters."""
        return cost.parameters(self.recipe.model)

    @property
    def tokens(self) -> int:
        """D, tokens of the run."""
        return self.steps * self.recipe.training.tokens_per_step

    @property
    def flops(self) -> int:
        """C, exactly."""
        return self.tokens * cost.flops_per_token(self.recipe.model, self.recipe.training.sequence_length)

    @property
    def branch_step(self) -> int:
        """The last step at the constant learning rate of a wsd schedule: up to it runs of one size are the same."""
        return self.steps - max(1, round(self.recipe.schedule.decay_fraction * self.steps))


class Point(NamedTuple):
    """A place on the axes of learning rate and batch; None where there is no axis, and a rule or the recipe gives the value."""

    peak_learning_rate: float | None = None
    tokens_per_step: int | None = None

    @property
    def name(self) -> str:
        """Its part of a run's name."""
        rate, batch = self
        return (f"_lr{rate:g}" if rate else "") + (f"_b{batch}" if batch else "")


Group = list[Run]
"""Runs that are trained one after another: those of one size that branch from each other, or a single one."""


def groups_of(sweep: SweepConfig) -> list[Group]:
    """Return the runs of a sweep, cheapest first; where they branch, the longest run of each size is first in its group.

    Raises `UserError` where a budget is too small for its sizes, or two sizes fall on the same shape.
    """
    base = sweep.base()
    family = family_of(base, sweep.recipe)
    seeds = sweep.seeds or [base.seed]
    points = [Point(rate, batch) for rate in sweep.learning_rates for batch in sweep.batches]
    wanted = sweep.budgets or sweep.tokens_per_parameter or []
    cells = [(model, _flops(sweep, model, budget, base)) for budget in wanted for model in _models(sweep, family, budget)]
    cells.sort(key=lambda cell: (cell[1], cost.parameters(cell[0])))
    if not sweep.branch:
        alone = [
            [_run(sweep, base, model, flops, [flops], seed, point)]
            for model, flops in cells
            for point in points
            for seed in seeds
        ]
        return _require_distinct(alone, sweep)
    groups = []
    for model in dict.fromkeys(model for model, _ in cells):
        budgets = sorted((flops for shape, flops in cells if shape == model), reverse=True)
        groups += [
            [_run(sweep, base, model, flops, budgets, seed, point) for flops in budgets] for point in points for seed in seeds
        ]
    groups = [_with_branch_points(group) for group in groups]
    return _require_distinct(groups, sweep)


def target_of(sweep: SweepConfig, law: Law, flops: float) -> Run:
    """Return a run beyond the sweep, by its rules: the law's best N for a budget, in its own folder, predicted by the law.

    A learning rate or batch that was an axis is the best one by the law file. Raises `UserError` where the budget is too small,
    or the file has no law of them.
    """
    base = sweep.base()
    model = _nearest(sweep, family_of(base, sweep.recipe), law.optimum(flops)[0])
    point = _best_point(sweep, law, model, flops, base.training.sequence_length) if sweep.has_axes else Point()
    run = _run(sweep, base, model, flops, [flops], base.seed, point)
    name = f"{sweep.output_dir}_{run.name}"
    output = run.recipe.output.model_copy(update={"run_dir": name})
    return Run(name, run.recipe.model_copy(update={"output": output, "law": law.name}), run.steps)


def _best_point(sweep: SweepConfig, law: Law, model: Model, flops: float, sequence_length: int) -> Point:
    """Return the best learning rate and batch by a law file, on the axes of the sweep; the batch in multiples of 8 windows."""
    best = law.hyperparameters
    if best is None:
        raise UserError(
            f"law {law.name} has no law of learning rate and batch, which the sweep has as axes; add sizes and values until"
            " `isoflop fit` finds one, or give peak_learning_rate and tokens_per_step as rules"
        )
    n, d = tuned_parameters(model, sweep.base().parametrization), flops / cost.flops_per_token(model, sequence_length)
    rate, batch = best.peak_learning_rate.at(n, d).value, best.tokens_per_step.at(n, d).value
    if sweep.batches == [None]:
        return Point(rate, None)
    rounded = _by_windows(batch, sequence_length)
    follows = (rounded / batch) ** best.batch_exponent
    return Point(None if sweep.learning_rates == [None] else rate * follows, rounded)


def _by_windows(tokens: float, sequence_length: int) -> int:
    """Return the multiple of `WINDOWS` windows that is nearest to a batch."""
    unit = sequence_length * WINDOWS
    return unit * max(1, round(tokens / unit))


def _flops(sweep: SweepConfig, model: Model, budget: float, base: Recipe) -> float:
    if sweep.budgets:
        return budget
    return budget * cost.parameters(model) * cost.flops_per_token(model, base.training.sequence_length)


def _models(sweep: SweepConfig, family: Family, budget: float) -> list[Model]:
    if sweep.parameters:
        return [_nearest(sweep, family, size) for size in sweep.parameters]
    assert sweep.sizes is not None
    around = sweep.sizes
    center = _center(sweep, family, budget, around.tokens_per_parameter)
    exponents = [i - (around.count - 1) / 2 for i in range(around.count)]
    return [_nearest(sweep, family, center * around.ratio**exponent) for exponent in exponents]


def _shapes(sweep: SweepConfig, family: Family) -> list[Model]:
    """Return the shapes of a family, or those of one depth with any aspect ratio."""
    if sweep.num_layers is None:
        return list(family.shapes())
    return list(family.shapes_of_depth(sweep.num_layers))


def _center(sweep: SweepConfig, family: Family, flops: float, tokens_per_parameter: float) -> float:
    """Return the N at which C = D/N x N x FLOPs per token, interpolated between the family's shapes in logs."""
    shapes = sorted(_shapes(sweep, family), key=cost.parameters)
    needed = [
        tokens_per_parameter * cost.parameters(shape) * cost.flops_per_token(shape, family.sequence_length) for shape in shapes
    ]
    closest = min(range(len(shapes)), key=lambda i: abs(math.log(needed[i] / flops)))
    return cost.parameters(shapes[closest]) * math.sqrt(flops / needed[closest])  # C is nearly proportional to N^2


def _nearest(sweep: SweepConfig, family: Family, parameters: float) -> Model:
    """Return the shape nearest in size and aspect ratio, in logs; a different ratio changes the law as much as a size does."""

    def distance(model: Model) -> float:
        shape, size = cost.shape_of(model), abs(math.log(cost.parameters(model) / parameters))
        if sweep.aspect_ratio is None:
            return size
        return size + abs(math.log(shape.hidden_size / shape.num_layers / sweep.aspect_ratio))

    return min(_shapes(sweep, family), key=distance)


def _rate_and_batch(sweep: SweepConfig, base: Recipe, flops: float, point: Point) -> tuple[float, int]:
    """Return peak learning rate and tokens per step: those of the point, else by the rules at a budget, else the recipe's."""
    rate, batch = point
    sequence_length = base.training.sequence_length
    if rate is None:
        rule = sweep.peak_learning_rate
        rate = rule.at(flops) if isinstance(rule, Rule) else base.optimizer.peak_learning_rate
    if batch is None:
        by = sweep.tokens_per_step
        batch = _by_windows(by.at(flops), sequence_length) if isinstance(by, Rule) else base.training.tokens_per_step
    if batch % sequence_length:
        below = batch // sequence_length * sequence_length
        near = [str(tokens) for tokens in (below, below + sequence_length) if tokens]
        raise UserError(
            f"tokens_per_step = {batch} is not a multiple of the sequence length {sequence_length}; nearest: {' and '.join(near)}"
        )
    return rate, batch


def _run(sweep: SweepConfig, base: Recipe, model: Model, flops: float, group: list[float], seed: int, point: Point) -> Run:
    """Return one run. Learning rate and batch follow from its group's largest budget by the rules, warm-up from the smallest."""
    sequence_length = base.training.sequence_length
    peak, tokens_per_step = _rate_and_batch(sweep, base, max(group), point)
    windows = tokens_per_step // sequence_length
    largest = min(base.training.micro_batch_size, windows, LARGEST_TRIED)
    micro_batch_size = max(m for m in range(1, largest + 1) if windows % m == 0)
    steps = round(flops / cost.flops_per_token(model, sequence_length) / tokens_per_step)
    parameters = cost.parameters(model)
    if steps < FEWEST_STEPS:
        raise UserError(
            f"{flops:.3g} FLOPs are {steps} steps of {tokens_per_step:,} tokens for {parameters:,} parameters, and under"
            f" {FEWEST_STEPS} nothing can be measured; raise the budget, or lower sizes or tokens_per_step"
        )
    in_axes = point.name if sweep.has_axes else ""
    name = f"c{flops:.2e}_n{parameters}{in_axes}" + (f"_s{seed}" if sweep.seeds else "")
    tree: dict[str, Any] = base.model_dump(mode="json", exclude_none=True)
    tree["model"] = model.model_dump(mode="json", exclude_none=True)
    tree["training"] = {
        key: value for key, value in tree["training"].items() if key not in ("max_tokens", "tokens_per_parameter")
    } | {"tokens_per_step": tokens_per_step, "micro_batch_size": micro_batch_size, "max_steps": steps}
    tree["optimizer"]["peak_learning_rate"] = float(f"{peak:.6g}")
    tree["schedule"] |= {
        "warmup_steps": round(sweep.warmup_fraction * steps * min(group) / flops),
        "final_learning_rate": float(f"{sweep.final_learning_rate_fraction * peak:.6g}"),
    }
    tree["evaluation"]["validate_every"] = max(1, steps // sweep.validations)
    tree["output"]["run_dir"] = f"{sweep.output_dir}/{name}"
    tree["seed"] = seed
    return Run(name, validate_recipe(tree, f"run {name}"), steps)


def _with_branch_points(group: Group) -> Group:
    """Return the group with its first run keeping the checkpoints from which the others start."""
    first, *others = group
    output = first.recipe.output.model_copy(update={"checkpoint_at": sorted(run.branch_step for run in others)})
    return [Run(first.name, first.recipe.model_copy(update={"output": output}), first.steps), *others]


def _require_distinct(groups: list[Group], sweep: SweepConfig) -> list[Group]:
    names = [run.name for group in groups for run in group]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{len(names)} runs fall on {len(set(names))} shapes ({duplicates[0]} twice): sizes are closer than the shapes of"
            f" {sweep.recipe}'s family; raise sizes.ratio, or leave out a size or budget"
        )
    return groups
