"""Launch configs: the shipped ones, the user's own, and those that cannot be planned."""

import pytest
import yaml

from isoflop.cli.plan import main
from isoflop.plan.launches import known_launches, read_launch
from isoflop.plan.planner import plan
from isoflop.utils.errors import UserError


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """The user's own folder of launch configs."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "accelerate_configs"
    folder.mkdir()
    return folder


def write(path, **config):
    path.write_text(yaml.safe_dump({"num_processes": 2, "mixed_precision": "bf16"} | config))
    return path


def test_a_launch_config_of_each_engine_is_read(tmp_path):
    configs = {
        "2gpu_zero1": (
            {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"zero_stage": 1}}, ("zero1", 2, 2),
        ),
        "8gpu_fsdp2": ({"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_version": 2}}, ("fsdp2", 8, 8)),
        "8gpu_hsdp": (
            {
                "distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_version": 2},
                "parallelism_config": {"parallelism_config_dp_replicate_size": 2},
            },
            ("fsdp2", 8, 4),
        ),
        "1gpu": ({"distributed_type": "NO", "num_processes": 1}, ("single", 1, 1)),
        "4gpu_ddp": ({"distributed_type": "MULTI_GPU", "num_processes": 4}, ("ddp", 4, 1)),
    }  # fmt: skip
    for name, (config, expected) in configs.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config | {"mixed_precision": "bf16"}))
        launch = read_launch(path)
        assert (launch.name, launch.engine, launch.num_processes, launch.shards) == (name, *expected)
        assert launch.bf16


UNPLANNED = {
    "megatron": ({"distributed_type": "MEGATRON_LM"}, "distributed_type = 'MEGATRON_LM'"),
    "zero3": ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}, "deepspeed_config.zero_stage = 3"),
    "offload": (
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1, "offload_optimizer_device": "cpu"}},
        "offload_optimizer_device = 'cpu'",
    ),
    "fsdp1": ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, "fsdp_config.fsdp_version = 1"),
    "fp16": ({"distributed_type": "MULTI_GPU", "mixed_precision": "fp16"}, "mixed_precision = 'fp16'"),
    "none": ({"distributed_type": "MULTI_GPU", "num_processes": 0}, "num_processes = 0"),
    "words": ({"distributed_type": "MULTI_GPU", "num_processes": "two"}, "num_processes = 'two'"),
    "section": ({"distributed_type": "FSDP", "fsdp_config": 3}, "fsdp_config = 3"),
    "replicas": (
        {
            "distributed_type": "FSDP",
            "fsdp_config": {"fsdp_version": 2},
            "parallelism_config": {"parallelism_config_dp_replicate_size": 3},
        },
        "dp_replicate_size = 3 does not divide num_processes = 2",
    ),
}


@pytest.mark.parametrize("name", UNPLANNED)
def test_a_config_that_cannot_be_planned_is_refused(own, name):
    config, message = UNPLANNED[name]
    with pytest.raises(UserError, match=f"{name}.yaml: .*{message}"):
        read_launch(write(own / f"{name}.yaml", **config))


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- a", "is not a mapping"), ("", "is not a mapping")])
def test_a_broken_config_is_refused(own, text, message):
    (own / "broken.yaml").write_text(text)
    with pytest.raises(UserError, match=f"broken.yaml {message}"):
        read_launch(own / "broken.yaml")


def test_one_such_config_is_left_out_of_the_table_and_named(own, capsys):
    write(own / "zero3.yaml", distributed_type="DEEPSPEED", deepspeed_config={"zero_stage": 3})
    (own / "2gpu_ddp.yaml").write_text("a: [")
    found = plan("llama2_1.36b")
    names = [row.launch.name for row in found.memory_and_time.launches]
    assert "zero3" not in names
    assert {"1gpu", "2gpu_zero1", "2gpu_ddp"} <= set(names)  # DDP on 2 GPUs is predicted without a config
    assert found.memory_and_time.of("2gpu_ddp").config is None
    for arguments in (
        ["recipe", "llama2_1.36b", "--full"],
        ["compare", "llama2_1.36b", "gpt2_1.36b"],
        ["budget", "--flops", "1e21"],
    ):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert shown.count("warning: launch config left out: accelerate_configs/zero3.yaml: deepspeed_config.zero_stage = 3") == 1
        assert shown.count("warning: launch config left out: accelerate_configs/2gpu_ddp.yaml is not YAML") == 1


@pytest.mark.parametrize(
    ("config", "gpu"),
    [
        ({"distributed_type": "NO"}, True),
        ({"distributed_type": "NO", "use_cpu": False}, True),
        ({"distributed_type": "NO", "use_cpu": True}, False),
        ({"distributed_type": "MULTI_GPU", "use_cpu": True}, False),
        ({"distributed_type": "MULTI_CPU"}, False),
    ],
)
def test_whether_a_config_is_for_gpus_follows_from_its_content(own, config, gpu):
    for name in ("cpu_box", "mine"):
        assert read_launch(write(own / f"{name}.yaml", **config)).gpu is gpu


def test_a_users_own_config_comes_first_and_the_shipped_ones_stay(own):
    write(own / "8gpu_hsdp.yaml", distributed_type="MULTI_GPU", num_processes=8)
    write(own / "mine.yaml", distributed_type="MULTI_GPU", num_processes=16, num_machines=2)
    known = known_launches(2)
    launches = {launch.name: launch for launch in known.launches}
    assert (launches["8gpu_hsdp"].engine, launches["mine"].num_machines) == ("ddp", 2)
    assert str(known.configs["mine"]) == "accelerate_configs/mine.yaml"
    assert known.configs["2gpu_zero1"].is_absolute()
    assert known.for_gpus(2).name == "2gpu_fsdp2"
    assert known.for_gpus(3).engine == "ddp"
