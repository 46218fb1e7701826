import os
import signal

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import run_command

from isoflop.config.recipe import Output
from isoflop.train.distributed import _launch_arguments, check_launch, reduce_sum
from isoflop.train.engines import build_accelerator
from isoflop.train.signals import EXIT_RESUME, StopRequest
from isoflop.utils.errors import UserError


def test_sums_of_one_process_are_its_values():
    accelerator = Accelerator(cpu=True)
    assert [reduce_sum(accelerator, value) for value in (1.5, torch.tensor(2.0))] == [1.5, 2.0]


def test_a_signal_before_training_leaves_at_once():
    with StopRequest(), pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == EXIT_RESUME


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_training_waits_for_the_loop(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.start_deferring_signals()
        assert not stop.should_stop()
        os.kill(os.getpid(), number)
        assert stop.signal == signal.Signals(number).name
        assert stop.should_stop()
    assert signal.getsignal(number) is before


def test_a_lone_process_of_several_is_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"\(WORLD_SIZE\) asked for 2 processes, but this one runs alone with 1"):
        check_launch(accelerator)


@pytest.mark.parametrize(("variable", "engine"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")])
def test_an_engine_that_did_not_come_up_is_refused(variable, engine, monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"asked for {engine}, but accelerate came up as NO on cpu"):
        check_launch(accelerator)


@pytest.mark.parametrize(
    ("asked", "came_up", "printed"),
    [
        (None, "MEGATRON_LM", "one process or DDP, but accelerate came up as MEGATRON_LM"),
        ("ACCELERATE_USE_FSDP", "MULTI_CPU", "FSDP, but accelerate came up as MULTI_CPU"),
        ("ACCELERATE_USE_DEEPSPEED", "MULTI_CPU", "DEEPSPEED, but accelerate came up as MULTI_CPU"),
        (None, "FSDP", "one process or DDP, but accelerate came up as FSDP"),
    ],
)
def test_an_engine_that_is_not_the_one_asked_for_is_refused(asked, came_up, printed, monkeypatch):
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType(came_up)
    if asked:
        monkeypatch.setenv(asked, "true")
    with pytest.raises(UserError, match=f"the launch asked for {printed} on cpu"):
        check_launch(accelerator)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("python /env/bin/accelerate launch --cpu x.py a=1", ["--cpu", "x.py", "a=1"]),
        ("/env/bin/accelerate-launch x.py", ["x.py"]),
        ("python -m accelerate.commands.launch x.py", ["x.py"]),
        ("bash -c run", None),
        ("accelerate config", None),
        ("", None),
    ],
)
def test_every_spelling_of_the_launcher_is_known(command, arguments):
    assert _launch_arguments(command.split()) == arguments


def test_restarts_with_a_store_that_remembers_the_dead_are_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    check_launch(accelerator)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match=r"add --rdzv_backend c10d, and set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_launch(accelerator)


def test_half_precision_with_loss_scaling_is_refused():
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    with pytest.raises(UserError, match=r"mixed_precision: fp16 .* set bf16"):
        check_launch(accelerator)


@pytest.mark.new_process  # the command line of the parent process is read
@pytest.mark.distributed
def test_a_config_that_silently_starts_one_process_is_refused(write_recipe, tmp_path):
    config = tmp_path / "multi_cpu.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 1\nnum_processes: 2\n"
        "mixed_precision: 'no'\n"
    )
    done = run_command(
        "accelerate", "launch", "--config_file", config, "scripts/pretrain.py", write_recipe(), check=False
    )  # fmt: skip
    assert done.returncode != 0
    assert "asked for 2 processes, but this one runs alone with 1" in done.stderr
    assert "2cpu_ddp.yaml" in done.stderr


@pytest.mark.distributed
def test_what_does_not_divide_by_the_ranks_is_refused(write_recipe, ranks):
    launched = ranks.start("2cpu_ddp", write_recipe(), "training.tokens_per_step=128")
    assert launched.wait() == [2, 2]
    assert "tokens_per_step = 128 is not a multiple of 256" in launched.text()
    assert "set training.micro_batch_size to 1 or 2" in launched.text()


def test_trackers(caplog):
    with pytest.raises(UserError, match=r"'tensorbord' is not a tracker of Accelerate; did you mean tensorboard\?"):
        build_accelerator(Output(run_dir="x", trackers=["tensorbord"]))
    with pytest.raises(UserError, match=r"'comet_ml' is not installed; run: pip install comet_ml"):
        build_accelerator(Output(run_dir="x", trackers=["comet_ml"]))
    build_accelerator(Output(run_dir="x", trackers=["comet_ml"], trackers_required=False))
    assert "comet_ml is not installed: training without it" in caplog.text


@pytest.mark.distributed
def test_gradients_live_in_ddps_buckets_and_nowhere_else(toy_recipe, tmp_path, ranks):
    """All gradients of a process share the storage of a bucket, in accumulation and between steps: 4 bytes a parameter, not 8."""
    script = tmp_path / "steps.py"
    script.write_text(f"""
from isoflop.train.engines import build_accelerator
from isoflop.train.state import TrainState
from isoflop.train.signals import StopRequest
from isoflop.train.setup import build_job, check_data
from isoflop.train.trainer import warm_up, train_step
from isoflop.config.loading import load_recipe

recipe = load_recipe({str(tmp_path / "toy.yaml")!r}, ["training.micro_batch_size=2"])
accelerator = build_accelerator(recipe.output)
with StopRequest() as stop:
    job = build_job(recipe, check_data(recipe, False), accelerator, stop)
    stop.start_deferring_signals()
    warm_up(job.model, job.optimizer, job.accelerator, job.batch(step=0)[0])
    for step in range(2):
        assert job.accumulation == 2 and train_step(job, TrainState(step=step))
        parameters = list(job.causal_lm.parameters())
        storages = {{p.grad.untyped_storage().data_ptr() for p in parameters}}
        assert len(storages) == 1 < len(parameters), len(storages)
print(f"rank {{accelerator.process_index}}: one bucket")
del job
accelerator.end_training()
""")
    toy_recipe()
    printed = ranks.run("2cpu_ddp", script=script)
    assert "rank 0: one bucket" in printed
    assert "rank 1: one bucket" in printed
