"""When FSDP2 reduces gradients over the ranks: it changes what is sent and held, never what is learnt."""

import re

import pytest
from conftest import curve_of

from isoflop.config.loading import load_recipe

COUNT = """
import torch.distributed.fsdp._fully_shard._fsdp_param_group as group
from isoflop.train import trainer as pretrain
calls, own, train = [0], group.foreach_reduce, pretrain.train
def counted(*given, **named):
    calls[0] += 1
    return own(*given, **named)
group.foreach_reduce = counted
def reporting(*given):
    calls[0] = 0
    done = train(*given)
    print("reduce-scatters:", calls[0], flush=True)
    return done
pretrain.train = reporting
"""


@pytest.fixture
def losses_and_reductions(write_recipe, ranks):
    def run(config, reduction, **settings):
        file = write_recipe(f"{config}_{reduction}", training__micro_batch_size=2, training__max_steps=4)
        printed = ranks.run(config, file, f"training.gradient_reduction={reduction}", code=COUNT, **settings)
        reductions = {int(number) for number in re.findall(r"reduce-scatters: (\d+)", printed)}
        assert len(reductions) == 1  # the same on every rank
        (line,) = re.findall(r"gradients: reduced (once a step|after every micro-batch) \(", printed)
        return [row[1] for row in curve_of(load_recipe(file))], reductions.pop(), line

    return run


@pytest.mark.distributed
def test_once_a_step_sends_fewer_gradients_and_learns_the_same(losses_and_reductions):
    """8 windows a step in micro-batches of 2 on two ranks: two micro-batches each."""
    once, sent_once, said_once = losses_and_reductions("2gpu_fsdp2", "step")
    every, sent_every, said_every = losses_and_reductions("2gpu_fsdp2", "micro_batch")
    auto, sent_auto, said_auto = losses_and_reductions("2gpu_fsdp2", "auto")
    assert once == pytest.approx(every, abs=1e-5)
    assert sent_every == 2 * sent_once > 0
    assert (said_once, said_every) == ("once a step", "after every micro-batch")
    assert (auto, sent_auto, said_auto) == (once, sent_once, "once a step")  # it fits this machine


@pytest.mark.distributed
def test_replicas_of_shards_too(losses_and_reductions):
    settings = {"processes": 4, "parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 2}
    once, *_ = losses_and_reductions("8gpu_hsdp", "step", **settings)
    single, *_ = losses_and_reductions("2gpu_fsdp2", "micro_batch")
    assert once == pytest.approx(single, abs=1e-5)
