"""Points with a known law, made here, and the reference data of the tests."""

import json

import numpy as np
import pytest
from conftest import ROOT

from isoflop.scaling.parametric import loss_of
from isoflop.scaling.points import points

HOFFMANN = np.array([1.69, 406.4, 0.34, 410.7, 0.28])
COURSE = np.array([2.69, 1606.4, 0.34, 3210.7, 0.36])
REFERENCE = ROOT / "../shared/data"


def grid(law=HOFFMANN, noise=0.0, seed=0, sizes=(1e7, 1e9), tokens=(1e9, 1e11), side=6):
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(*sizes, side), np.geomspace(*tokens, side)))
    return points(n, d, loss_of(law, n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, len(n))))


def isoflop(law=HOFFMANN, noise=0.0, seed=0, budgets=(1e18, 3e18, 1e19, 3e19), side=7, spread=4.0):
    """Sizes around each budget's best one."""
    generator, parts = np.random.default_rng(seed), []
    _, a, alpha, b, beta = law
    for flops in budgets:
        best = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
        n = best * np.geomspace(1 / spread, spread, side)
        d = flops / 6 / n
        parts.append((n, d, loss_of(law, n, d) * np.exp(generator.normal(0, noise, side))))
    return points(*map(np.concatenate, zip(*parts, strict=True)))


def many(noise=0.006, seed=0, count=240):
    """As the runs of Hoffmann et al. 2022: sizes and tokens over two and a half decades, and a few runs that went wrong."""
    generator = np.random.default_rng(seed)
    n = np.exp(generator.uniform(np.log(4e7), np.log(1.6e10), count))
    d = np.exp(generator.uniform(np.log(2e8), np.log(3e11), count))
    loss = loss_of(np.array([1.8172, 482.01, 0.3478, 2085.43, 0.3658]), n, d) * np.exp(generator.normal(0, noise, count))
    loss[:5] *= 1.05
    return points(n, d, loss)


def course():
    file = REFERENCE / "isoflops_curves.json"
    if not file.exists():
        pytest.skip(f"the course's data are not at {file}: they are not part of the project")
    rows = json.loads(file.read_text())
    n, c, loss = (np.array([row[key] for row in rows], dtype=float) for key in ("parameters", "compute_budget", "final_loss"))
    return points(n, c / 6 / n, loss, c)
