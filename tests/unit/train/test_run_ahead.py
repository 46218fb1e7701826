"""Gradients enqueued ahead of their step change no number, whatever happens between the two steps."""

import pytest
import torch
from conftest import curve_of, metrics_of, weights_of

from isoflop.config.loading import load_recipe
from isoflop.train import run_ahead
from isoflop.train.run_ahead import Readback, Throttle, update_unless, updates_unless_flagged

pytestmark = pytest.mark.processes

# A CPU computes at once and does not run ahead by itself; the order of what is done is that of a GPU.
AHEAD = "from isoflop.train.setup import Job\nJob.runs_ahead = True\n"
NAN_IN_STEP = """
import isoflop.train.trainer as pretrain
own = pretrain.sum_gradients
def bad(job, step, batch):
    summed = own(job, step, batch)
    return summed * float("nan") if batch == {batch} and summed is not None else summed
pretrain.sum_gradients = bad
"""


@pytest.mark.parametrize("config", ["cpu", pytest.param("2gpu_fsdp2", marks=pytest.mark.distributed)])
def test_a_run_ahead_is_the_same_run(config, write_recipe, ranks):
    ahead, plain = write_recipe("ahead"), write_recipe("plain")
    ranks.run(config, ahead, code=AHEAD)
    ranks.run(config, plain)
    assert curve_of(load_recipe(ahead)) == curve_of(load_recipe(plain))
    assert weights_of(load_recipe(ahead)) == weights_of(load_recipe(plain))


@pytest.mark.parametrize("batch", [6, 7, 9])  # steps 7 and 8 have gradients behind them; step 10 is the last
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_an_anomaly_is_treated_as_without_running_ahead(policy, batch, write_recipe, ranks):
    files = [write_recipe(name) for name in ("ahead", "plain")]
    code = NAN_IN_STEP.format(batch=batch)
    for file, first in zip(files, (AHEAD, ""), strict=True):
        printed = ranks.run("cpu", file, f"anomalies.policy={policy}", code=first + code)
        assert printed.count(f"step {batch + 1}: loss nan: ") == 1
    ahead, plain = map(load_recipe, files)
    assert metrics_of(ahead)[-1]["anomalies"] == 1
    assert curve_of(ahead) == curve_of(plain)
    assert weights_of(ahead) == weights_of(plain)


@pytest.mark.parametrize("bad", [False, True])
def test_a_flag_keeps_an_update_from_happening(bad):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.ones(3)
    optimizer.step()
    before = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    weight.grad = torch.full((3,), float("nan") if bad else 2.0)
    update_unless(~weight.grad.isfinite().all(), optimizer, optimizer.step)
    assert torch.equal(weight, before[0]) == bad
    assert torch.equal(optimizer.state[weight]["exp_avg"], before[1]) == bad
    assert optimizer.state[weight]["step"].item() == (1 if bad else 2)
    assert not hasattr(optimizer, "found_inf")


def test_only_fused_adamw_takes_the_flag():
    weight = torch.nn.Parameter(torch.ones(1))
    assert updates_unless_flagged(torch.optim.AdamW([weight], fused=True))
    assert not updates_unless_flagged(torch.optim.AdamW([weight], fused=False))
    assert not updates_unless_flagged(torch.optim.SGD([weight], lr=0.1))


def test_numbers_come_back_in_order():
    assert Readback(torch.tensor([1.5, float("inf"), -2.0])).read() == [1.5, float("inf"), -2.0]


def test_the_host_waits_for_the_micro_batch_two_before(monkeypatch):
    waited = []

    class Event:
        count = 0

        def record(self):
            Event.count += 1
            self.number = Event.count

        def synchronize(self):
            waited.append(self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    throttle = Throttle()
    for _ in range(5):
        throttle.mark(torch.device("cuda"))
    assert waited == [1, 2, 3]
    assert run_ahead.MICRO_BATCHES_AHEAD == 2
    throttle.mark(torch.device("cpu"))
    assert Event.count == 5
