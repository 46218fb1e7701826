import numpy as np
import pytest
from designs import HOFFMANN, grid

from isoflop.scaling.laws import effective_tokens
from isoflop.scaling.parametric import Objective, loss_of
from isoflop.scaling.repeated import fit_repeated


def test_the_worth_of_repeats_is_found_with_the_law():
    here = grid()
    unique = np.minimum(here.tokens, 4e9)
    loss = loss_of(HOFFMANN, here.parameters, effective_tokens(here.tokens, unique, 15.39))
    found = fit_repeated(here._replace(loss=loss, unique_tokens=unique), Objective())
    assert found.status == "converged"
    assert found.r_star == pytest.approx(15.39, rel=1e-3)
    assert found.alpha == pytest.approx(0.34, rel=1e-3)


def test_tokens_are_worth_what_the_plan_says():
    assert effective_tokens(np.array([1e9, 5e9]), np.array([1e9, 1e9]), 15.39) == pytest.approx([1e9, effective_tokens(5e9, 1e9)])


def test_without_repeats_there_is_nothing_to_fit():
    assert fit_repeated(grid(), Objective()).status == "not fitted"
    assert fit_repeated(grid()._replace(unique_tokens=grid().tokens), Objective()).reason.startswith("0 runs see their data")
