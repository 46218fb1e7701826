"""Engines: one process, DDP, FSDP2 (also hybrid-sharded) and DeepSpeed ZeRO-1, each as Accelerate runs it.

Entered by `build_accelerator`. What is special about DeepSpeed is in `deepspeed.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    AORecipeKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from isoflop.config.recipe import Output, Recipe
from isoflop.modeling.loss import LossHead, TrainingModel
from isoflop.plan.cost import Engine, Launch, with_reduction
from isoflop.train import deepspeed
from isoflop.train.distributed import asked_engine, asked_for_cpu, check_launch, mixed_precision, require_devices
from isoflop.train.evaluation import untouched_random_state
from isoflop.utils.errors import UserError, nearest

logger = logging.getLogger(__name__)


def build_accelerator(output: Output) -> Accelerator:
    """Return the Accelerator of this process. Raises `UserError` where it is not what the launch asked for."""
    trackers = usable_trackers(output)
    asked = asked_engine()
    require_devices()
    on_cpu = asked_for_cpu() or not torch.accelerator.is_available()
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # FSDP2 makes a mesh of GPUs wherever torch sees one, whatever accelerate asks for
        )
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which transformers imports too where it is installed
    settings: dict[str, Any] = {"log_with": trackers or None, "project_dir": output.run_dir}
    # Gradients are views of DDP's buckets: 4 bytes per parameter less.
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if asked == DistributedType.DEEPSPEED:
        settings["deepspeed_plugin"] = deepspeed.build_plugin(mixed_precision())
        if on_cpu:
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
            os.environ["ACCELERATE_USE_CPU"] = "false"  # else accelerate makes it DDP, without a word
    else:
        settings["cpu"] = on_cpu  # else accelerate starts unconnected processes on a machine without GPUs
    if mixed_precision() == "fp8":
        handlers.append(_float8(on_cpu))
    if asked == DistributedType.FSDP:
        settings["fsdp_plugin"] = _fsdp_plugin()
        if on_cpu and PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
            # On its own accelerate falls back to DDP here, without a word. Set to MULTI_GPU it shards over gloo processes.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(kwargs_handlers=handlers, **settings)
    check_launch(accelerator)
    return accelerator


def _fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """Return the plugin of the launch config, with gradients reduced in fp32; under bf16 accelerate would reduce in bf16."""
    narrow = mixed_precision() in ("bf16", "fp8")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if narrow else None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("fsdp_config.fsdp_version: 1 of the launch config is not trained here; set fsdp_version: 2")
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def _float8(on_cpu: bool) -> AORecipeKwargs:
    """Return the recipe of float8 matrix products in the decoder layers by torchao, with a scale per row.

    The rest is bf16, the head and its loss too. A CPU emulates float8 by fp32 products of rounded operands.
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
    """Return whether a module is linear, not the head, and of a size that float8 kernels take."""
    if not isinstance(module, torch.nn.Linear) or isinstance(module, LossHead):
        return False
    return module.in_features % 16 == 0 and module.out_features % 16 == 0


def prepare(
    model: TrainingModel, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return model and optimizer wrapped by the engine."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return deepspeed.prepare(model, optimizer, accelerator)
    wrapped, wrapped_optimizer = accelerator.prepare(model, optimizer)
    return wrapped, wrapped_optimizer


def require_supported(recipe: Recipe, engine: Engine, precision: str) -> None:
    """Refuse what an engine cannot do, and float8 where it would change nothing. Raises `UserError`."""
    if precision == "fp8" and (engine == "zero1" or recipe.model.model_type == "gpt2"):
        which = "DeepSpeed" if engine == "zero1" else "GPT2LMHeadModel, whose projections are not nn.Linear"
        raise UserError(
            f"mixed_precision: fp8 of the launch config: not with {which}; use a config of bf16, or another engine, or"
            " model_type hybrid with preset gpt2"
        )
    if engine == "zero1":
        deepspeed.require_supported(recipe)


def warm_up(model: torch.nn.Module, optimizer: Any, accelerator: Accelerator, micro_batch: dict[str, torch.Tensor]) -> None:
    """Run forward and backward passes that change nothing, where an engine arranges itself in its first ones.

    DDP arranges its gradient buckets after the first backward pass. With three ranks or more the last bits of the sums depend on
    the arrangement, so a resumed run would differ from an uninterrupted one. The second pass fills the new buckets; the old ones
    are freed before. FSDP2 takes the module of the first forward pass as its root, and a resumed run may begin with samples,
    whose forward passes are those of the inner model.
    """
    if isinstance(model, DistributedDataParallel):
        for set_to_none in (True, False):
            accelerator.backward(model(**micro_batch))
            optimizer.zero_grad(set_to_none=set_to_none)
    elif isinstance(model, FSDPModule):
        with torch.no_grad(), untouched_random_state(accelerator.device):
            model(**micro_batch)


def zero_gradients(model: torch.nn.Module, optimizer: Any) -> None:
    """Clear the gradients, in place under DDP, whose buckets they are."""
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def configure_accumulation(accelerator: Accelerator, recipe: Recipe, accumulation: int, launch: Launch) -> None:
    """Set the micro-batches per optimizer step, and when gradients are reduced."""
    accelerator.gradient_accumulation_steps = accumulation
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = launch.reduction == "micro_batch"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        deepspeed.configure(accelerator, recipe, accumulation)


def launch_of(accelerator: Accelerator, recipe: Recipe) -> Launch:
    """Return this launch as predictions of memory and time take it, with the gradient reduction that fits the device."""
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
    """Return the memory of a GPU, or this rank's share of the machine's. Free memory would differ when a run resumes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_trackers(output: Output) -> list[str]:
    """Return the recipe's trackers that are installed. Raises `UserError` for an unknown or a missing required one."""
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    installed = [str(name) for name in get_available_trackers()]
    for name in output.trackers:
        if name not in known:
            raise UserError(f"output.trackers: {name!r} is not a tracker of Accelerate{nearest(name, known)}")
        if name not in installed and output.trackers_required:
            raise UserError(
                f"output.trackers: {name!r} is not installed; run: pip install {name}, or set output.trackers_required=false"
                " to train without it"
            )
        if name not in installed:
            logger.warning("tracker %s is not installed: training without it", name)
    return [name for name in output.trackers if name in installed]
