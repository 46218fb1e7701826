"""Recipes of a sweep: the shape nearest to each size, steps solved from the budget by exact FLOPs, rate and batch by rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from isoflop import cost
from isoflop.errors import UserError
from isoflop.families import Family, family_of
from isoflop.recipe import LARGEST_TRIED, Model, Recipe
from isoflop.scaling.laws import Law
from isoflop.sweep.suite import Suite

FEWEST_STEPS = 50  # assumption: with fewer, warm-up and decay leave nothing to measure
WINDOWS = 8  # a step by rule has a multiple of so many, which the GPUs of a node divide


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str
    recipe: Recipe
    steps: int

    @property
    def parameters(self) -> int:
        """N, all of them."""
        return cost.parameters(self.recipe.model)

    @property
    def tokens(self) -> int:
        """D."""
        return self.steps * self.recipe.training.tokens_per_step

    @property
    def flops(self) -> int:
        """C, exactly."""
        return self.tokens * cost.flops_per_token(self.recipe.model, self.recipe.training.sequence_length)

    @property
    def branch_step(self) -> int:
        """The last step at the constant rate of a wsd schedule: up to here runs of one size are the same."""
        return self.steps - max(1, round(self.recipe.schedule.decay_fraction * self.steps))


Group = list[Run]
"""Runs that are trained one after another: of one size, where they branch off one another; else a single one."""


def groups_of(suite: Suite) -> list[Group]:
    """The runs of a sweep, cheapest first; where they branch, the longest run of each size stands first in its group.

    Raises `UserError` where a budget is too small for its sizes, or two sizes fall on the same shape.
    """
    base = suite.base()
    members = family_of(base, suite.recipe)
    seeds = suite.seeds or [base.seed]
    wanted = suite.budgets or suite.tokens_per_parameter or []
    cells = [(model, _flops(suite, model, budget, base)) for budget in wanted for model in _models(suite, members, budget)]
    cells.sort(key=lambda cell: (cell[1], cost.parameters(cell[0])))
    if not suite.branch:
        return _without_twins(
            [[_run(suite, base, model, flops, [flops], seed)] for model, flops in cells for seed in seeds], suite
        )
    groups = []
    for model in dict.fromkeys(model for model, _ in cells):
        budgets = sorted((flops for shape, flops in cells if shape == model), reverse=True)
        groups += [[_run(suite, base, model, flops, budgets, seed) for flops in budgets] for seed in seeds]
    groups = [_with_branch_points(group) for group in groups]
    return _without_twins(groups, suite)


def target_of(suite: Suite, law: Law, flops: float) -> Run:
    """A run beyond the sweep, by its rules: the law's best N for a budget, in a folder of its own, and scored by the law.

    Raises `UserError` where the budget is too small.
    """
    base = suite.base()
    model = _nearest(suite, family_of(base, suite.recipe), law.optimum(flops)[0])
    run = _run(suite, base, model, flops, [flops], base.seed)
    name = f"{suite.output_dir}_{run.name}"
    output = run.recipe.output.model_copy(update={"run_dir": name})
    return Run(name, run.recipe.model_copy(update={"output": output, "law": law.name}), run.steps)


def _flops(suite: Suite, model: Model, budget: float, base: Recipe) -> float:
    if suite.budgets:
        return budget
    return budget * cost.parameters(model) * cost.flops_per_token(model, base.training.sequence_length)


def _models(suite: Suite, members: Family, budget: float) -> list[Model]:
    if suite.parameters:
        return [_nearest(suite, members, size) for size in suite.parameters]
    assert suite.sizes is not None
    around = suite.sizes
    center = _center(suite, members, budget, around.tokens_per_parameter)
    exponents = [i - (around.count - 1) / 2 for i in range(around.count)]
    return [_nearest(suite, members, center * around.ratio**exponent) for exponent in exponents]


def _shapes(suite: Suite, members: Family) -> list[Model]:
    """The members of a family, or those of one depth whatever their aspect ratio."""
    if suite.num_layers is None:
        return list(members.shapes())
    pairs = [(width, head_dim) for head_dim in members.head_dims for width in members.widths]
    divided = [(width, head_dim) for width, head_dim in pairs if width % (head_dim * (members.key_value_heads or 1)) == 0]
    return [members.shape(suite.num_layers, width, head_dim) for width, head_dim in divided]


def _center(suite: Suite, members: Family, flops: float, tokens_per_parameter: float) -> float:
    """The N at which C = D/N x N x FLOPs per token, between the members of a family by a straight line in logs."""
    shapes = sorted(_shapes(suite, members), key=cost.parameters)
    needed = [
        tokens_per_parameter * cost.parameters(shape) * cost.flops_per_token(shape, members.sequence_length) for shape in shapes
    ]
    closest = min(range(len(shapes)), key=lambda i: abs(math.log(needed[i] / flops)))
    return cost.parameters(shapes[closest]) * math.sqrt(flops / needed[closest])  # C is nearly proportional to N^2


def _nearest(suite: Suite, members: Family, parameters: float) -> Model:
    """The shape nearest in size and aspect ratio, in logs: another ratio is another law, so it counts as much as a size."""

    def distance(model: Model) -> float:
        shape, size = cost.shape_of(model), abs(math.log(cost.parameters(model) / parameters))
        if suite.aspect_ratio is None:
            return size
        return size + abs(math.log(shape.hidden_size / shape.num_layers / suite.aspect_ratio))

    return min(_shapes(suite, members), key=distance)


def _run(suite: Suite, base: Recipe, model: Model, flops: float, group: list[float], seed: int) -> Run:
    """One run. What it shares with the others of its group follows from their budgets: rate and batch from the largest by the
    rules, warm-up from the smallest."""
    rule_flops = max(group)
    sequence_length, tokens_per_step = base.training.sequence_length, base.training.tokens_per_step
    if suite.tokens_per_step:
        unit = sequence_length * WINDOWS
        tokens_per_step = unit * max(1, round(suite.tokens_per_step.at(rule_flops) / unit))
    windows = tokens_per_step // sequence_length
    largest = min(base.training.micro_batch_size, windows, LARGEST_TRIED)
    micro_batch_size = max(m for m in range(1, largest + 1) if windows % m == 0)
    steps = round(flops / cost.flops_per_token(model, sequence_length) / tokens_per_step)
    parameters = cost.parameters(model)
    if steps < FEWEST_STEPS:
        raise UserError(
            f"{flops:.3g} FLOPs are {steps} steps of {tokens_per_step:,} tokens for {parameters:,} parameters, and under"
            f" {FEWEST_STEPS} there is nothing to learn of; raise the budget, or lower sizes or tokens_per_step"
        )
    rate = suite.peak_learning_rate.at(rule_flops) if suite.peak_learning_rate else base.optimizer.peak_learning_rate
    name = f"c{flops:.2e}_n{parameters}" + (f"_s{seed}" if suite.seeds else "")
    tree: dict[str, Any] = base.model_dump(mode="json", exclude_none=True)
    tree["model"] = model.model_dump(mode="json", exclude_none=True)
    tree["training"] = {
        key: value for key, value in tree["training"].items() if key not in ("max_tokens", "tokens_per_parameter")
    } | {"tokens_per_step": tokens_per_step, "micro_batch_size": micro_batch_size, "max_steps": steps}
    tree["optimizer"]["peak_learning_rate"] = float(f"{rate:.6g}")
    tree["schedule"] |= {
        "warmup_steps": round(suite.warmup_fraction * steps * min(group) / flops),
        "final_learning_rate": float(f"{suite.final_learning_rate_fraction * rate:.6g}"),
    }
    tree["evaluation"]["validate_every"] = max(1, steps // suite.validations)
    tree["output"]["run_dir"] = f"{suite.output_dir}/{name}"
    tree["seed"] = seed
    return Run(name, Recipe.model_validate(tree), steps)


def _with_branch_points(group: Group) -> Group:
    """The group with the checkpoints in its first run's recipe from which the others go on."""
    first, *others = group
    output = first.recipe.output.model_copy(update={"checkpoint_at": sorted(run.branch_step for run in others)})
    return [Run(first.name, first.recipe.model_copy(update={"output": output}), first.steps), *others]


def _without_twins(groups: list[Group], suite: Suite) -> list[Group]:
    names = [run.name for group in groups for run in group]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{len(names)} runs fall on {len(set(names))} shapes ({twins[0]} twice): sizes lie closer than the shapes of"
            f" {suite.recipe}'s family; raise sizes.ratio, or leave out a size or budget"
        )
    return groups
