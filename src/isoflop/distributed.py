"""Processes: the Accelerator, its engine, and the proof that the launch is the one asked for.

How a run is launched is said in `accelerate_configs/`; accelerate silently does less than asked in several cases (a
MULTI_CPU config runs one process; a GPU config on a machine without GPUs runs unconnected copies that all write as rank 0;
FSDP and DeepSpeed are ignored on CPU), so what came up is held against what was asked before any work.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from isoflop.cost import Launch
from isoflop.errors import UserError, nearest
from isoflop.recipe import Output, Recipe

_DDP = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # one process, or DDP
_ASKED = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}


def build_accelerator(output: Output) -> Accelerator:
    """The Accelerator of this process. Raises `UserError` where it is not what the launch asked for."""
    trackers = usable_trackers(output)
    asked = asked_engine()
    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which transformers imports too where it is installed
    settings: dict[str, Any] = {"log_with": trackers or None, "project_dir": output.run_dir}
    # Gradients live in DDP's buckets instead of beside them: 4 bytes a parameter less.
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if asked == DistributedType.DEEPSPEED:
        settings["deepspeed_plugin"] = _deepspeed_plugin(on_cpu)
        if on_cpu:
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
    else:
        settings["cpu"] = on_cpu  # else accelerate starts unconnected processes on a machine without GPUs
    if asked == DistributedType.FSDP:
        settings["fsdp_plugin"] = _fsdp_plugin()
        # Reduced after every micro-batch: gradients are held in shards alone, 4 bytes a parameter over all ranks.
        settings["gradient_accumulation_plugin"] = GradientAccumulationPlugin(num_steps=1, sync_each_batch=True)
        if on_cpu and PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
            # On its own accelerate falls back to DDP here, silently; told of GPUs, it shards over gloo processes as over them.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(kwargs_handlers=handlers, **settings)
    check_launch(accelerator)
    return accelerator


def asked_engine() -> DistributedType:
    """FSDP or DEEPSPEED where the launch config names one, else NO; `accelerate launch` says so in the environment."""
    return next((e for variable, e in _ASKED.items() if os.environ.get(variable, "").lower() == "true"), DistributedType.NO)


def _fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """FSDP2 as the launch config has it, with gradients reduced in fp32: under bf16 accelerate would reduce and return bf16."""
    bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("fsdp_config.fsdp_version: 1 of the launch config is not trained here; set fsdp_version: 2")
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def _deepspeed_plugin(on_cpu: bool) -> DeepSpeedPlugin:
    """DeepSpeed as the launch config has it; under bf16 gradients are summed and reduced in fp32, no bf16 ones kept beside."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "the launch config asks for DeepSpeed, which is not installed; run: pip install 'deepspeed>=0.19.8,<0.20', or use a"
            " config of FSDP2 or DDP"
        )
    from deepspeed.utils import logger

    logger.setLevel("WARNING")  # else dozens of lines about its own set-up
    plugin = DeepSpeedPlugin()
    if (
        plugin.zero_stage != 1
        or plugin.deepspeed_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    ):
        raise UserError(
            f"deepspeed_config of the launch config asks for ZeRO stage {plugin.zero_stage} or offloading; ZeRO stage 1 without"
            " offloading is trained here: set zero_stage: 1, or use a config of FSDP2, which shards weights and gradients too"
        )
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        plugin.deepspeed_config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}
        plugin.deepspeed_config["communication_data_type"] = "fp32"
    return plugin


def set_step(accelerator: Accelerator, recipe: Recipe, accumulation: int) -> None:
    """Tell the engine what an optimizer step is."""
    accelerator.gradient_accumulation_steps = accumulation
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": recipe.training.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": recipe.optimizer.max_grad_norm,
        }


def launch_of(accelerator: Accelerator) -> Launch:
    """This launch, as the memory prediction has it."""
    processes, bf16 = accelerator.num_processes, accelerator.mixed_precision == "bf16"
    if accelerator.distributed_type == DistributedType.FSDP:
        replicas = accelerator.parallelism_config.dp_replicate_size if accelerator.parallelism_config else 1
        return Launch("this", "fsdp2", processes, bf16, processes // replicas)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return Launch("this", "zero1", processes, bf16, processes)
    return Launch("this", "ddp" if processes > 1 else "single", processes, bf16)


def usable_trackers(output: Output) -> list[str]:
    """The recipe's trackers that are installed. Raises `UserError` for an unknown name, or a required one that is not there."""
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    installed = [str(name) for name in get_available_trackers()]
    for name in output.trackers:
        if name not in known:
            raise UserError(f"output.trackers: {name!r} is not a tracker of Accelerate's{nearest(name, known)}")
        if name not in installed and output.trackers_required:
            raise UserError(
                f"output.trackers: {name!r} is not installed; run: pip install {name}, or set output.trackers_required=false"
                " to go on without it"
            )
        if name not in installed:
            print(f"tracker {name} is not installed: going on without it", file=sys.stderr, flush=True)
    return [name for name in output.trackers if name in installed]


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
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"mixed_precision: {accelerator.mixed_precision} of the launch config is not trained here: fp16 needs loss"
            " scaling, which skips steps; set bf16, or 'no' for fp32"
        )


def _asked_processes() -> tuple[int, str]:
    """How many processes the launch asked for: torchrun says so in WORLD_SIZE, accelerate's simple launcher nowhere."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]), "the launcher (WORLD_SIZE)"
    launched_with = _launch_arguments(_parent_command())
    if launched_with is not None:
        arguments = launch_command_parser().parse_args(launched_with)
        if arguments.config_file is None and not arguments.cpu and Path(default_config_file).is_file():
            arguments.config_file = default_config_file
        config: Any = load_config_from_file(arguments.config_file) if arguments.config_file else None
        return arguments.num_processes or getattr(config, "num_processes", 1), f"accelerate launch ({arguments.config_file})"
    return 1, "this launch"


def launched_by_accelerate() -> bool:
    """Whether the parent process is `accelerate launch`."""
    return _launch_arguments(_parent_command()) is not None


def command_typed() -> list[str]:
    """The command behind this process: its launcher's where it is `accelerate launch`, else its own."""
    launched_with = _launch_arguments(_parent_command())
    return ["python", *sys.argv] if launched_with is None else ["accelerate", "launch", *launched_with]


def _launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line, in any of its spellings; None where it is another command."""
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
    except psutil.Error:  # a parent that is another user's, or gone
        return []


def reduce_sum(accelerator: Accelerator, value: float | torch.Tensor) -> float:
    """Sum over all processes in fp32; waits for the device."""
    own = torch.as_tensor(value, dtype=torch.float32, device=accelerator.device)
    return float(accelerator.reduce(own, "sum"))
