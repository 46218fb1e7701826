import numpy as np
import pytest
from designs import HOFFMANN

from isoflop.scaling.envelope import fit_envelope
from isoflop.scaling.parametric import loss_of
from isoflop.scaling.points import Curve


def curves(sizes=12, law=HOFFMANN):
    """Runs whose loss at each step is the final loss of a run that ends there: the envelope is the law's own."""
    found = []
    for n in np.geomspace(1e7, 1e9, sizes):
        d = np.geomspace(0.2 * n, 150 * n, 200)
        found.append(Curve(f"{n:.0f}", n, d, 6 * n * d, loss_of(law, n, d)))
    return found


def test_the_envelope_of_many_curves_has_the_laws_exponent():
    found = fit_envelope(curves(24), 20, 0)
    alpha, beta = HOFFMANN[2], HOFFMANN[4]
    assert found.laws.exponent[0] == pytest.approx(beta / (alpha + beta), abs=0.02)
    for minimum in found.minima[::100]:
        n = np.geomspace(1e7, 1e9, 2000)
        assert minimum.loss == pytest.approx(loss_of(HOFFMANN, n, minimum.flops / 6 / n).min(), rel=5e-3)


def test_budgets_are_those_a_smaller_and_a_larger_run_reach():
    minima = fit_envelope(curves(), 20, 0).minima
    assert 1e7 < min(m.parameters for m in minima) < max(m.parameters for m in minima) < 1e9


def test_warm_up_is_left_out():
    early = [c._replace(loss=np.where(c.tokens < 0.1 * c.tokens[-1], 0.1, c.loss)) for c in curves()]  # no run was ever that good
    assert min(m.loss for m in fit_envelope(early, 20, 0).minima) > 2


def test_two_sizes_are_no_envelope():
    assert fit_envelope(curves(2), 20, 0).startswith("2 sizes have losses after the first 10% of their tokens")
