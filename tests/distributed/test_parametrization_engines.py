"""CompleteP's learning rates, epsilons and decays for each parameter are kept by every engine."""

from pathlib import Path

import pytest
from conftest import metrics_of, weights_of

from isoflop.config.loading import load_recipe

# The toy models have width 32, 2 layers and heads of 8 (llama, gpt2).
BASE = {
    "parametrization__name": "completep", "parametrization__base_hidden_size": 16, "parametrization__base_num_layers": 1,
    "optimizer__peak_learning_rate": 1e-2,
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "family", "name"),
    [("2gpu_fsdp2", "llama", "adamw"), ("2gpu_zero1", "gpt2", "adamw"), ("2gpu_fsdp2", "gpt2", "muon")],
)
def test_every_engine_trains_as_one_process_and_resumes_bit_for_bit(config, family, name, write_recipe, ranks):
    alone, sharded = (write_recipe(run, family=family, optimizer__name=name, **BASE) for run in ("alone", "sharded"))
    ranks.run("cpu", alone)
    ranks.run(config, sharded)
    ours, theirs = metrics_of(load_recipe(sharded)), metrics_of(load_recipe(alone))
    for row, other in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
    standard = write_recipe("standard", family=family, optimizer__name=name, optimizer__peak_learning_rate=1e-2)
    ranks.run("cpu", standard)
    assert abs(metrics_of(load_recipe(standard))[-1]["loss"] - theirs[-1]["loss"]) > 1e-3  # it makes a difference
    complete = weights_of(load_recipe(sharded))
    (Path(load_recipe(sharded).output.run_dir) / "summary.json").unlink()
    ranks.run(config, sharded, "--resume-from", "5")
    assert weights_of(load_recipe(sharded)) == complete
