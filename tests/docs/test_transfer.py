"""The page on transfer: its program trains, finds optima, and says what the rows say."""

import json
import math

import numpy as np
import pytest
import torch
import transfer
from conftest import ROOT


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


class FewWindows:
    """Windows of a few ids that repeat."""

    def __len__(self):
        return 50

    def take(self, places):
        return np.tile(np.arange(16), (len(places), 16)) + np.asarray(places)[:, None] % 3


def made_up(best_of):
    """Rows of every curve, whose loss is a parabola around `best_of(curve)` with its minimum at 5."""
    where = {"machine": "m", "commit": "c", "command": "python benchmarks/pages/transfer.py"}
    where["versions"] = {"torch": "2", "transformers": "5"}
    rows = []
    for curve in transfer.curves(1):
        best = best_of(curve)
        for rate, loss in transfer.train_curve(lambda rate, best=best: 5 + 0.2 * math.log(rate / best) ** 2).items():
            rows.append({**curve._asdict(), "learning_rate": rate, "loss": loss, "seconds": 60.0, **where})
    return rows


def test_the_optimum_of_a_parabola_is_its_vertex():
    curve = {rate: 5 + 0.2 * math.log(rate / 6e-3) ** 2 for rate in transfer.LEARNING_RATES}
    best = transfer.optimum(curve)
    assert (best.learning_rate, best.loss, best.inside) == (pytest.approx(6e-3), pytest.approx(5), True)
    assert transfer.excess(curve, curve) == pytest.approx(0, abs=1e-9)
    base = {rate: 5 + 0.2 * math.log(rate / 3e-3) ** 2 for rate in transfer.LEARNING_RATES}
    assert transfer.excess(curve, base) == pytest.approx(0.2 * math.log(2) ** 2)


def test_learning_rates_are_added_until_the_lowest_loss_lies_inside():
    def around(best):
        return lambda rate: math.log(rate / best) ** 2

    assert sorted(transfer.train_curve(around(4e-3))) == list(transfer.LEARNING_RATES)
    assert max(transfer.train_curve(around(30e-3))) == 64e-3
    assert min(transfer.train_curve(around(0.6e-3))) == 0.25e-3
    endless = transfer.train_curve(lambda rate: -rate)
    assert len(endless) == len(transfer.LEARNING_RATES) + transfer.FARTHEST
    assert not transfer.optimum(endless).inside


def test_learning_rates_that_only_some_seeds_have_are_left_out():
    rows = [row for row in made_up(lambda _: 4e-3) if row["width"] == 64]
    more = [{**row, "seed": 1, "loss": row["loss"] + 1} for row in rows if row["learning_rate"] != 1e-3]
    curve = transfer.losses_of(rows + more)["standard", 64, transfer.BASE_LAYERS]
    assert list(curve) == [2e-3, 4e-3, 8e-3, 16e-3]
    assert curve[4e-3] == pytest.approx(5.5)


def test_a_seed_that_is_still_being_trained_is_left_out():
    rows = made_up(lambda _: 4e-3)
    assert transfer.of_complete_seeds(rows + [{**row, "seed": 1} for row in rows[:-1]]) == rows
    assert len(transfer.of_complete_seeds(rows + [{**row, "seed": 1} for row in rows])) == 2 * len(rows)
    assert transfer.of_complete_seeds(rows[1:]) == []


def test_the_page_says_what_the_rows_say(tmp_path):
    """Made-up optima: standard's falls as 1 / width, completep's stays."""
    rows = made_up(lambda curve: 8e-3 * (32 / curve.width if curve.parametrization == "standard" else 1))
    page = transfer.page(rows)
    assert (
        "under `standard` the optimum is 0.008 for the base and 0.001 for the largest, the farthest two a factor of 8.0 apart"
        in page
    )
    assert (
        "under `completep` the optimum is 0.008 for the base and 0.008 for the largest, the farthest two a factor of 1.0" in page
    )
    assert "So this page shows that `completep` transfers learning rates over width better" in page
    assert "So this page does not show that `completep` transfers learning rates over depth better" in page
    assert "There is one random seed" in page
    assert "standard deviation of 0.071 nats" in transfer.page(
        rows + [{**row, "seed": 1, "loss": row["loss"] + 0.1} for row in rows]
    )
    assert "| standard, width 128 | 0.002 | 5.000 | 0.384 |" in page
    assert "| completep, width 128 | 0.008 | 5.000 | 0.000 |" in page
    transfer.draw(transfer.losses_of(rows), tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_learns_and_a_run_with_a_row_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "STEPS", 8)
    monkeypatch.setattr(transfer, "FARTHEST", 0)
    monkeypatch.setattr(transfer, "WARMUP_STEPS", 1)
    monkeypatch.setattr(transfer, "WIDTHS", (32,))
    monkeypatch.setattr(transfer, "DEPTHS", (2, 4))
    monkeypatch.setattr(transfer, "LEARNING_RATES", (4e-3, 8e-3))
    monkeypatch.setattr(transfer, "windows_of", lambda recipe, split: FewWindows())
    monkeypatch.setattr(transfer, "held_out", lambda recipe: torch.from_numpy(FewWindows().take(range(16))))
    file = tmp_path / "transfer.jsonl"
    transfer.train_missing(1, file)
    first = file.read_text()
    losses = {transfer.setting_of(json.loads(line)): json.loads(line)["loss"] for line in first.splitlines()}
    assert {(one.layers, one.parametrization) for one in losses} == {(2, "standard"), (4, "standard"), (4, "completep")}
    assert all(loss < math.log(4096) - 0.5 for loss in losses.values())
    transfer.train_missing(1, file)
    assert file.read_text() == first


def test_the_page_is_that_of_its_rows():
    rows = transfer.of_complete_seeds(transfer.read_rows(transfer.RESULTS))
    assert rows
    assert (transfer.DOCS / "transfer.md").read_text(encoding="utf-8") == transfer.page(rows)
