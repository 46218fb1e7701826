"""Text of the laws of learning rate and batch: their exponents, and what they cost at each grid of runs."""

from __future__ import annotations

import math
from collections.abc import Callable

from isoflop.scaling.hyperparameters import NORMAL_90, PowerOfSize
from isoflop.scaling.report import HyperparameterReport, TunedGrid
from isoflop.utils.tables import short

MakeTable = Callable[[list[str], list[list[str]]], str]


def hyperparameters_text(report: HyperparameterReport, make_table: MakeTable) -> str:
    """Return the laws, the grids and what to know of them, with tables made by `make_table`."""
    law = report.law
    rows = [["learning rate", *_law(law.peak_learning_rate)], ["tokens per step", *_law(law.tokens_per_step)]]
    header = [
        "at the grid",
        "runs",
        "best learning rate",
        "tokens/step",
        "loss",
        "law: learning rate",
        "tokens/step",
        "cost",
        "held out",
    ]
    costs = [f"Cost: loss of the run nearest to the law's values, less the best; in nats. {_summary(report.grids)}"]
    if law.curvature:
        costs.append(
            f"Around the best the loss rises by {law.curvature.rate:.3g} r^2 + {law.curvature.batch:.3g} b^2"
            f" {law.curvature.cross:+.3g} r b nats, r and b the natural logs of the ratios of learning rate and batch to"
            " the best."
        )
    lines = [*(f"* note: {note}" for note in report.notes), *(f"* warning: {warning}" for warning in report.warnings)]
    parts = [
        f"Learning rate and batch of {law.optimizer} from {len(report.grids)} grids of runs; N without embeddings and head",
        make_table(["best", "formula", "exponent of N", "exponent of D"], rows),
        make_table(header, [_grid(grid) for grid in report.grids]),
        "\n".join(costs),
        "\n".join(lines),
    ]
    return "\n\n".join(part for part in parts if part)


def _law(power: PowerOfSize) -> list[str]:
    return [power.formula(), *(_exponent(power, index) for index in (1, 2))]


def _exponent(power: PowerOfSize, index: int) -> str:
    """Return an exponent with its 90% interval."""
    value = (power.log_coefficient, power.parameters_exponent, power.tokens_exponent)[index]
    if power.covariance is None or not value:
        return f"{value:.3g}"
    reach = NORMAL_90 * math.sqrt(power.covariance[index][index])
    return f"{value:.3f} [{value - reach:.3f}, {value + reach:.3f}]"


def _grid(grid: TunedGrid) -> list[str]:
    edge = dict.fromkeys(grid.at_edge, "*")
    return [
        f"N {short(grid.parameters)}, D {short(grid.tokens)}",
        str(grid.runs),
        f"{grid.best_learning_rate:.3g}{edge.get('learning rate', '')}",
        f"{grid.best_tokens_per_step:,.0f}{edge.get('batch', '')}",
        f"{grid.best_loss:.4f}",
        f"{grid.learning_rate:.3g}",
        f"{grid.tokens_per_step:,.0f}",
        f"{grid.cost:.4f}",
        "-" if grid.held_out_cost is None else f"{grid.held_out_cost:.4f}",
    ]


def _summary(grids: list[TunedGrid]) -> str:
    """Return mean and worst cost, and those of grids that the laws were not fitted to."""
    text = _mean_and_worst([grid.cost for grid in grids])
    held_out = [grid.held_out_cost for grid in grids if grid.held_out_cost is not None]
    if held_out:
        text += f"; held out, by laws fitted without the grid: {_mean_and_worst(held_out)}"
    return f"{text}.{' *: the largest or smallest value tried.' if any(grid.at_edge for grid in grids) else ''}"


def _mean_and_worst(costs: list[float]) -> str:
    return f"{sum(costs) / len(costs):.4f} on average, {max(costs):.4f} at worst"
