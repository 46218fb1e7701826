"""Checks of a table: cells that are not numbers, repeated rows, and implausible units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isoflop.scaling.columns import Columns
from isoflop.scaling.points import Points
from isoflop.utils.errors import UserError

Array = NDArray[np.float64]
COUNTS = {1e3: "thousands", 1e6: "millions", 1e9: "billions", 1e12: "trillions"}
FLOPS = {1e9: "GFLOPs", 1e12: "TFLOPs", 1e15: "PFLOPs", 1e18: "EFLOPs", 8.64e19: "PF-days", 1e21: "ZFLOPs"}
FEWEST_PARAMETERS = 1e3  # a median N below it is a count in millions or billions
TOKENS_PER_PARAMETER = (0.01, 1e5)  # published sweeps lie within 0.1 to 1e4
USUAL = 20.0  # D/N from which a missing factor is estimated
FACTOR = 3.0  # between C and 6 N D: attention and vocabulary of small models stay within it
SHOWN = 8  # rows that a message lists


def listed(numbers: list[int]) -> str:
    """Return `row 3`, or `rows 3, 5 and 7 more`."""
    rest = len(numbers) - SHOWN
    shown = ", ".join(map(str, numbers[:SHOWN])) + (f" and {rest} more" if rest > 0 else "")
    return f"row{'s' if len(numbers) > 1 else ''} {shown}"


def positive(cells: list[Any], numbers: list[int], column: str, file: str) -> Array:
    """Return a column as numbers. Raises `UserError` that names every row whose cell is not a positive, finite number."""
    faults: dict[str, list[int]] = {}
    for cell, number in zip(cells, numbers, strict=True):
        if fault := _fault(cell):
            faults.setdefault(fault, []).append(number)
    if faults:
        described = "; ".join(f"{listed(rows)}: {column} {fault}" for fault, rows in faults.items())
        raise UserError(f"{file}: {described}; correct or remove {'it' if sum(map(len, faults.values())) == 1 else 'them'}")
    return np.array([float(cell) for cell in cells])


def _fault(cell: Any) -> str | None:
    if cell is None or cell == "":
        return "is empty"
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return f"= {cell!r} is not a number"
    if not math.isfinite(value):
        return f"= {value} is not finite"
    return None if value > 0 else f"= {value:g} is not positive"


def drop_repeated(
    points: Points, settings: Sequence[tuple[Any, ...]], numbers: list[int], file: str
) -> tuple[NDArray[np.int64], list[str]]:
    """Return the indices of points with distinct N, D, loss and settings, and a warning that names the repeated rows."""
    first: dict[tuple[Any, ...], int] = {}
    twice = []
    for index, key in enumerate(zip(points.parameters, points.tokens, points.loss, settings, strict=True)):
        if first.setdefault(key, index) != index:
            twice.append(numbers[index])
    warning = (
        f"{file}: {listed(twice)} repeat{'' if len(twice) > 1 else 's'} an earlier row's N, D and loss; each is counted once"
    )
    return np.array(list(first.values())), [warning] if twice else []


def check_units(given: dict[str, Array], columns: Columns, numbers: list[int], file: str) -> None:
    """Raise `UserError` that names column and factor if sizes, tokens and FLOPs cannot all be in units of one."""
    n, d, c = given["parameters"], given.get("tokens"), given.get("flops")
    implied = d if d is not None else given["flops"] / (6 * n)
    ratio = float(np.median(implied / n))
    usual_n = np.median(np.sqrt(c / (6 * USUAL))) if c is not None else np.median(implied) / USUAL  # C = 6 N D at D = 20 N
    if np.median(n) < FEWEST_PARAMETERS or (d is not None and ratio > TOKENS_PER_PARAMETER[1]):
        factor, unit = _nearest_unit(float(usual_n / np.median(n)), COUNTS)
        _refuse_unit(file, columns.parameters, n, unit, factor)
    if d is not None and columns.tokens and (ratio < TOKENS_PER_PARAMETER[0] or (np.median(d) < 1e6 < np.median(n))):
        factor, unit = _nearest_unit(USUAL / ratio, COUNTS)
        _refuse_unit(file, columns.tokens, d, unit, factor)
    if d is None and columns.flops and not TOKENS_PER_PARAMETER[0] <= ratio <= TOKENS_PER_PARAMETER[1]:
        factor, unit = _nearest_unit(USUAL / ratio, FLOPS)
        _refuse_unit(file, columns.flops, given["flops"], unit, factor)
    if c is not None and d is not None and columns.flops:
        _check_flops(c, n * d * 6, columns.flops, numbers, file)
    _check_rows(implied / n, numbers, file)


def _check_flops(c: Array, expected: Array, column: str, numbers: list[int], file: str) -> None:
    odd = np.abs(np.log(c / expected)) > math.log(FACTOR) - 1e-6
    if odd.mean() > 0.5:
        missing = float(np.median(expected / c))
        factor, unit = _nearest_unit(missing, FLOPS)
        if abs(math.log(missing / factor)) < math.log(FACTOR):
            _refuse_unit(file, column, c, unit, factor)
        raise UserError(
            f"{file}: {column} is {1 / missing:.3g} of 6 N D in most rows, and training costs about 6 N D; multiply it by"
            f" {missing:.3g} if it misses the backward pass or is per token, or remove the column: FLOPs are then 6 N D"
        )
    if odd.any():
        worst = int(np.argmax(odd))
        raise UserError(
            f"{file}: {listed([number for number, is_odd in zip(numbers, odd, strict=True) if is_odd])}: {column} ="
            f" {c[worst]:.4g}, but 6 N D = {expected[worst]:.4g}; the other rows agree within a factor of {FACTOR:g}: correct"
            " N, D or C there"
        )


def _check_rows(ratios: Array, numbers: list[int], file: str) -> None:
    low, high = TOKENS_PER_PARAMETER
    odd = [i for i, ratio in enumerate(ratios) if not low <= ratio <= high]
    if odd:
        raise UserError(
            f"{file}: {listed([numbers[i] for i in odd])}: D/N = {ratios[odd[0]]:.3g}, and the other rows have"
            f" {np.median(ratios):.3g} in the middle; correct N, D or C there, or remove the row"
        )


def _nearest_unit(missing: float, units: dict[float, str]) -> tuple[float, str]:
    factor = min(units, key=lambda unit: abs(math.log(unit / missing)))
    return factor, units[factor]


def _refuse_unit(file: str, column: str, values: Array, unit: str, factor: float) -> None:
    low, high = values.min(), values.max()
    raise UserError(
        f"{file}: {column} ({low:.4g} to {high:.4g}) looks like {unit}, and parameters, tokens and FLOPs are counted in ones:"
        f" multiply it by {factor:.3g}"
    )
