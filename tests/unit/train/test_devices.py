"""Which GPUs there are, why there are none, and how a launch that asks for one is refused."""

import os

import pytest
import torch
from conftest import ROOT, run_command

from isoflop.config.recipe import Output
from isoflop.train import devices, distributed, engines
from isoflop.train.run_folder import environment
from isoflop.utils.errors import UserError

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by downloading ..."


@pytest.fixture
def gpu(monkeypatch):
    """torch as it is on a machine with one GPU, as far as it is asked here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


@pytest.fixture
def old_driver(monkeypatch):
    """torch as it is where the driver is too old: it counts the GPUs by another library, and cannot use them."""

    def fails(*_):
        raise RuntimeError(f"{TOO_OLD}\nmore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", fails)
    monkeypatch.setattr(torch.cuda, "init", fails)


def test_a_gpu_is_named_and_trained_on(gpu):
    assert devices.gpu_names() == ["NVIDIA H100 80GB HBM3"]
    assert devices.why_no_gpu() is None
    assert devices.launch_config() == (
        "1gpu", "training on NVIDIA H100 80GB HBM3; `make quickstart CONFIG=cpu` trains on the CPU",
    )  # fmt: skip


def test_a_driver_that_is_too_old_is_named_and_stops_nothing(old_driver):
    assert devices.gpu_names() == []
    assert environment()["hardware"]["gpus"] == []
    assert devices.why_no_gpu() == (
        "the NVIDIA driver is too old for torch's CUDA 13.0, which needs driver 580 or newer (nvidia-smi prints it)"
    )
    config, reason = devices.launch_config()
    assert config == "cpu"
    assert "driver 580 or newer" in reason


def test_plain_python_trains_on_the_cpu_and_names_the_driver(old_driver, monkeypatch, caplog):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert engines.build_accelerator(Output(run_dir="x")).device.type == "cpu"
    assert "training on the CPU: the NVIDIA driver is too old for torch's CUDA 13.0" in caplog.text


def test_a_driver_that_is_too_old_is_named_where_torch_asks_nvml(old_driver, monkeypatch):
    """PYTORCH_NVML_BASED_CUDA_CHECK=1: torch says that CUDA is available, and fails at the first use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.gpu_names() == []
    assert "driver 580 or newer" in devices.why_no_gpu()
    assert devices.launch_config()[0] == "cpu"


def test_other_reasons_are_torchs_own(monkeypatch):
    def fails():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", fails)
    assert devices.why_no_gpu().startswith("Found no NVIDIA driver on your system.")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert devices.why_no_gpu() == "no device is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert devices.why_no_gpu() == f"torch {torch.__version__} is built for the CPU alone; install one built for CUDA"


def test_a_gpu_without_bf16_gets_fp32(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Tesla T4")
    assert devices.launch_config()[0] == "1gpu_fp32"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for precision in ("bf16", "fp8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        with pytest.raises(UserError, match=rf"mixed_precision: {precision} of .*: Tesla T4 has no bf16.*1gpu_fp32.yaml"):
            distributed.require_devices()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    distributed.require_devices()
    assert (ROOT / "accelerate_configs/1gpu_fp32.yaml").is_file()


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({"ACCELERATE_USE_CPU": "False"}, True),  # accelerate launch of one process, use_cpu: false
        ({"WORLD_SIZE": "2"}, True),  # torchrun
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, False),
        ({"ACCELERATE_USE_CPU": "True"}, False),  # use_cpu: true
        ({}, False),  # plain python
    ],
)
def test_a_launch_for_gpus_without_one_is_refused(variables, refused, monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    if not refused:
        distributed.require_devices()
        return
    with pytest.raises(
        UserError, match=r"asks for a GPU, and torch sees none: .*; to train on the CPU use accelerate_configs/cpu"
    ):
        distributed.require_devices()


@pytest.mark.new_process  # the command line of the parent process is read
def test_accelerate_launch_of_1gpu_is_refused_by_name(write_recipe):
    file = write_recipe()
    command = ["accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/1gpu.yaml", "scripts/pretrain.py", file]
    done = run_command(*command, check=False)
    assert done.returncode != 0
    assert (
        "error: accelerate launch --config_file accelerate_configs/1gpu.yaml asks for a GPU, and torch sees none" in done.stderr
    )
    assert not (file.parent / "runs").exists()


@pytest.mark.new_process  # the command line of the parent process is read
@pytest.mark.distributed
def test_a_config_of_several_processes_says_cpu_by_use_cpu(write_recipe):
    """Accelerate hands `use_cpu` on to one process alone."""
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/2cpu_ddp.yaml", "--main_process_port", "0"]
    done = run_command(*command, "scripts/pretrain.py", write_recipe(), "--dry-run", env={"ACCELERATE_USE_CPU": "false"})
    assert "launch: 2 process(es) (MULTI_CPU) on cpu, fp32 matrix products" in done.stdout


def test_a_launch_on_the_cpu_hides_the_gpus(gpu, monkeypatch):
    """FSDP2's mesh is of GPUs wherever torch sees one, so torch must see none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert engines.build_accelerator(Output(run_dir="x")).device.type == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
