"""Processes: the Accelerator, its engine, and the proof that the launch is the one asked for.

How a run is launched is said in `accelerate_configs/`; accelerate silently does less than asked in several cases (a
MULTI_CPU config runs one process; a GPU config on a machine without GPUs runs unconnected copies that all write as rank 0;
FSDP and DeepSpeed are ignored on CPU), so what came up is held against what was asked before any work.
"""

from __future__ import annotations

import argparse
import dataclasses
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
    AORecipeKwargs,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from isoflop.cost import Engine, Launch, with_reduction
from isoflop.devices import lacks_bf16, why_no_gpu
from isoflop.errors import UserError, nearest
from isoflop.modeling.loss import LossHead
from isoflop.recipe import Output, Recipe

_DDP = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # one process, or DDP
_ASKED = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}


def build_accelerator(output: Output) -> Accelerator:
    """The Accelerator of this process. Raises `UserError` where it is not what the launch asked for."""
    trackers = usable_trackers(output)
    asked = asked_engine()
    require_devices()
    on_cpu = asked_for_cpu() or not torch.accelerator.is_available()
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # FSDP2 makes a mesh of GPUs wherever torch sees one, whatever accelerate says
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which transformers imports too where it is installed
    settings: dict[str, Any] = {"log_with": trackers or None, "project_dir": output.run_dir}
    # Gradients live in DDP's buckets instead of beside them: 4 bytes a parameter less.
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if asked == DistributedType.DEEPSPEED:
        settings["deepspeed_plugin"] = _deepspeed_plugin(on_cpu)
        if on_cpu:
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
            os.environ["ACCELERATE_USE_CPU"] = "false"  # which would make it DDP, silently
    else:
        settings["cpu"] = on_cpu  # else accelerate starts unconnected processes on a machine without GPUs
    if _mixed_precision() == "fp8":
        handlers.append(_float8(on_cpu))
    if asked == DistributedType.FSDP:
        settings["fsdp_plugin"] = _fsdp_plugin()
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
    narrow = _mixed_precision() in ("bf16", "fp8")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if narrow else None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("fsdp_config.fsdp_version: 1 of the launch config is not trained here; set fsdp_version: 2")
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def _mixed_precision() -> str:
    """As the launch config has it; `accelerate launch` hands it over in the environment."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _float8(on_cpu: bool) -> AORecipeKwargs:
    """Matrix products of the decoder layers in float8 by torchao, one scale a row: input, weight and output gradient.

    bf16 for the rest, the head and its loss too. A CPU emulates it, in fp32 products of rounded operands.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            "mixed_precision: fp8 of the launch config needs torchao, which is not installed; run: pip install torchao, or use a"
            " config of bf16"
        )
    if not on_cpu and torch.cuda.get_device_capability() < (8, 9):
        raise UserError(
            f"mixed_precision: fp8 of the launch config needs compute capability 8.9 (Ada, Hopper, Blackwell), this is"
            f" {torch.cuda.get_device_name()}; use a config of bf16"
        )
    from torchao.float8 import Float8LinearConfig

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=on_cpu)
    return AORecipeKwargs(config=config, module_filter_func=_multiplies_in_float8)


def _multiplies_in_float8(module: torch.nn.Module, name: str) -> bool:
    """Linear modules but the head, of sizes that float8 kernels take."""
    if not isinstance(module, torch.nn.Linear) or isinstance(module, LossHead):
        return False
    return module.in_features % 16 == 0 and module.out_features % 16 == 0


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
    if _mixed_precision() == "bf16":
        plugin.deepspeed_config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}
        plugin.deepspeed_config["communication_data_type"] = "fp32"
    return plugin


def set_step(accelerator: Accelerator, recipe: Recipe, accumulation: int, launch: Launch) -> None:
    """Tell the engine what an optimizer step is, and when gradients are reduced."""
    accelerator.gradient_accumulation_steps = accumulation
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = launch.reduction == "micro_batch"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # stage 1 reduces at the last micro-batch alone
        accelerator.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": recipe.training.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": recipe.optimizer.max_grad_norm,
        }


def launch_of(accelerator: Accelerator, recipe: Recipe) -> Launch:
    """This launch, as predictions of memory and time have it, with the gradient reduction that fits the device."""
    processes, gpu = accelerator.num_processes, accelerator.device.type == "cuda"
    engine: Engine = "ddp" if processes > 1 else "single"
    shards = 1
    if accelerator.distributed_type == DistributedType.FSDP:
        replicas = accelerator.parallelism_config.dp_replicate_size if accelerator.parallelism_config else 1
        engine, shards = "fsdp2", processes // replicas
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine, shards = "zero1", processes
    launch = Launch("this", engine, processes, accelerator.mixed_precision in ("bf16", "fp8"), shards, gpu)
    return with_reduction(launch, recipe.model, recipe.training, recipe.optimizer, memory_bytes(accelerator.device))


def memory_bytes(device: torch.device) -> int:
    """All memory of a GPU, or this process's share of the machine's. Not what is free: a resumed run must choose as before."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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


def asked_for_cpu() -> bool:
    """Whether the launch says CPU: `use_cpu: true` of its config, or ACCELERATE_USE_CPU=true in the environment.

    Accelerate makes the second of the first for one process alone.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return True
    arguments = _parsed_launch()
    return bool(arguments and arguments.config_file and load_config_from_file(arguments.config_file).use_cpu)


def require_devices() -> None:
    """Refuse a launch that asks for a GPU where there is none, which would train on the CPU, and bf16 on one that has none."""
    if asked_for_cpu():
        return
    if not torch.accelerator.is_available():
        if _asks_for_gpu():
            raise UserError(
                f"{_launcher()} asks for a GPU, and torch sees none: {why_no_gpu()}; to train on the CPU use"
                " accelerate_configs/cpu.yaml, or set ACCELERATE_USE_CPU=true in the environment of a launch of several processes"
            )
        if torch.cuda.device_count():  # counted by NVML, which a driver too old for torch answers
            print(f"training on the CPU: {why_no_gpu()}", file=sys.stderr, flush=True)
        return
    if _mixed_precision() in ("bf16", "fp8") and (name := lacks_bf16()):
        raise UserError(
            f"mixed_precision: {_mixed_precision()} of {_launcher()}: {name} has no bf16 arithmetic (compute capability 8.0 and"
            " newer have); use accelerate_configs/1gpu_fp32.yaml, or set mixed_precision: 'no'"
        )


def _asks_for_gpu() -> bool:
    """Whether a launch that does not say CPU is one of several processes, or of one by a config. Accelerate sets the variable to
    False for one process without a config too, which asks for nothing."""
    if "WORLD_SIZE" in os.environ:
        return True
    arguments = _parsed_launch()
    return "ACCELERATE_USE_CPU" in os.environ and (arguments is None or arguments.config_file is not None)


def _launcher() -> str:
    """The launch by its config file, where it has one."""
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
    """How many processes the launch asked for: torchrun says so in WORLD_SIZE, accelerate's simple launcher nowhere."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]), "the launcher (WORLD_SIZE)"
    if arguments := _parsed_launch():
        config: Any = load_config_from_file(arguments.config_file) if arguments.config_file else None
        return arguments.num_processes or getattr(config, "num_processes", 1), f"accelerate launch ({arguments.config_file})"
    return 1, "this launch"


def _parsed_launch() -> argparse.Namespace | None:
    """Arguments of `accelerate launch`, with the config file that it reads where none is given; None under another parent."""
    launched_with = _launch_arguments(_parent_command())
    if launched_with is None:
        return None
    arguments: argparse.Namespace = launch_command_parser().parse_args(launched_with)
    if arguments.config_file is None and not arguments.cpu and Path(default_config_file).is_file():
        arguments.config_file = default_config_file
    return arguments


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
