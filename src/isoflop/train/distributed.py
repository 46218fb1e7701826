"""What a launch asked for, and the check that it came up so.

Launch configs (`accelerate_configs/`) say how a run is launched. Accelerate does less than asked in several cases without a word:
a MULTI_CPU config runs one process; a GPU config on a machine without GPUs runs unconnected copies that all write as rank 0; FSDP
and DeepSpeed are ignored on CPU. So what came up is compared with what was asked before any work.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from isoflop.train.devices import lacks_bf16, why_no_gpu
from isoflop.utils.errors import UserError

logger = logging.getLogger(__name__)
_DDP = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # one process, or DDP
_ASKED = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}


def asked_engine() -> DistributedType:
    """Return FSDP or DEEPSPEED where the launch config names one, else NO; `accelerate launch` passes it in the environment."""
    return next((e for variable, e in _ASKED.items() if os.environ.get(variable, "").lower() == "true"), DistributedType.NO)


def mixed_precision() -> str:
    """Return the precision of the launch config, which `accelerate launch` passes in the environment."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def asked_for_cpu() -> bool:
    """Return whether the launch asks for the CPU: `use_cpu: true` of its config, or ACCELERATE_USE_CPU=true in the environment.

    Accelerate passes the first on as the second only with one process.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return True
    arguments = _parsed_launch()
    return bool(arguments and arguments.config_file and load_config_from_file(arguments.config_file).use_cpu)


def require_devices() -> None:
    """Refuse a launch for a GPU where there is none, which would train on the CPU, and bf16 on a GPU without it."""
    if asked_for_cpu():
        return
    if not torch.accelerator.is_available():
        if _asks_for_gpu():
            raise UserError(
                f"{_launcher()} asks for a GPU, and torch sees none: {why_no_gpu()}; to train on the CPU use"
                " accelerate_configs/cpu.yaml, or set ACCELERATE_USE_CPU=true in the environment of a launch of several processes"
            )
        if torch.cuda.device_count():  # counted through NVML, also with a driver too old for torch
            logger.warning("training on the CPU: %s", why_no_gpu())
        return
    if mixed_precision() in ("bf16", "fp8") and (name := lacks_bf16()):
        raise UserError(
            f"mixed_precision: {mixed_precision()} of {_launcher()}: {name} has no bf16 arithmetic (compute capability 8.0 and"
            " newer have); use accelerate_configs/1gpu_fp32.yaml, or set mixed_precision: 'no'"
        )


def _asks_for_gpu() -> bool:
    """Return whether a launch that does not ask for the CPU has several processes, or one by a config.

    Accelerate sets the variable to False also for one process without a config, which asks for nothing.
    """
    if "WORLD_SIZE" in os.environ:
        return True
    arguments = _parsed_launch()
    return "ACCELERATE_USE_CPU" in os.environ and (arguments is None or arguments.config_file is not None)


def _launcher() -> str:
    """Name the launch by its config file, where it has one."""
    arguments = _parsed_launch()
    return f"accelerate launch --config_file {arguments.config_file}" if arguments and arguments.config_file else "this launch"


def check_launch(accelerator: Accelerator) -> None:
    """Refuse when the process count or the engine is not the one asked for."""
    asked, asker = _asked_processes()
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asker} asked for {asked} processes, but this one runs alone with {accelerator.num_processes}: they would each"
            " train everything and write the same files. On CPU use accelerate_configs/2cpu_ddp.yaml (distributed_type"
            " MULTI_GPU starts processes, MULTI_CPU does not); on GPU check that torch sees the devices"
        )
    engine, came_up = asked_engine(), accelerator.distributed_type
    if (engine != DistributedType.NO and came_up != engine) or (engine == DistributedType.NO and came_up not in _DDP):
        raise UserError(
            f"the launch asked for {'one process or DDP' if engine == DistributedType.NO else engine.value}, but accelerate came"
            f" up as {came_up.value} on {accelerator.device.type}; trained here are one process, DDP, DeepSpeed ZeRO stage 1 and"
            " FSDP2, each by a file of accelerate_configs/"
        )
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "--max_restarts of this launch keeps torchrun's store, which hands restarted processes the addresses of dead ones"
            " (torch 2.13): add --rdzv_backend c10d, and set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"
        )
    if accelerator.mixed_precision not in ("no", "bf16", "fp8"):
        raise UserError(
            f"mixed_precision: {accelerator.mixed_precision} of the launch config is not trained here: fp16 needs loss"
            " scaling, which skips steps; set bf16, fp8, or 'no' for fp32"
        )


def _asked_processes() -> tuple[int, str]:
    """Return how many processes the launch asked for, and who asked. accelerate's simple launcher does not set WORLD_SIZE."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]), "the launcher (WORLD_SIZE)"
    if arguments := _parsed_launch():
        config: Any = load_config_from_file(arguments.config_file) if arguments.config_file else None
        return arguments.num_processes or getattr(config, "num_processes", 1), f"accelerate launch ({arguments.config_file})"
    return 1, "this launch"


def _parsed_launch() -> argparse.Namespace | None:
    """Return the arguments of `accelerate launch`, with its default config file if none is given; None under another parent."""
    launched_with = _launch_arguments(_parent_command())
    if launched_with is None:
        return None
    arguments: argparse.Namespace = launch_command_parser().parse_args(launched_with)
    if arguments.config_file is None and not arguments.cpu and Path(default_config_file).is_file():
        arguments.config_file = default_config_file
    return arguments


def launched_by_accelerate() -> bool:
    """Return whether the parent process is `accelerate launch`."""
    return _launch_arguments(_parent_command()) is not None


def command_typed() -> list[str]:
    """Return the command of this run: its launcher's where that is `accelerate launch`, else this process's."""
    launched_with = _launch_arguments(_parent_command())
    if launched_with is not None:
        return ["accelerate", "launch", *launched_with]
    program = Path(sys.argv[0])
    installed = program.name == "isoflop" or (program.parent.name, program.name) == ("isoflop", "__main__.py")
    return ["isoflop", *sys.argv[1:]] if installed else ["python", *sys.argv]


def _launch_arguments(command: list[str]) -> list[str] | None:
    """Return what follows `accelerate launch` in a command line, in any of its spellings; None for another command."""
    for place, argument in enumerate(command):
        name = argument.replace("\\", "/").rsplit("/", 1)[-1]
        if name == "accelerate" and command[place + 1 : place + 2] == ["launch"]:
            return command[place + 2 :]
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[place + 1 :]
    return None


def _parent_command() -> list[str]:
    parent = psutil.Process().parent()
    try:
        return parent.cmdline() if parent else []
    except psutil.Error:  # the parent is another user's, or has ended
        return []


def reduce_sum(accelerator: Accelerator, value: float | torch.Tensor) -> float:
    """Sum over all ranks in fp32; waits for the device."""
    own = torch.as_tensor(value, dtype=torch.float32, device=accelerator.device)
    return float(accelerator.reduce(own, "sum"))
