"""DeepSpeed ZeRO stage 1: all that differs from the other engines, which go through torch alone.

DeepSpeed keeps fp32 weights and moments in flat partitions of its own, and updates the weights inside the last backward pass of
a step, so gradients are never seen. Every function here takes or returns full tensors under the names of the unwrapped model.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isoflop.config.recipe import Recipe
from isoflop.train.optimizers import fresh_moments
from isoflop.utils.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

Tensors = dict[str, Tensor]
# Full fp32 tensors that a rank holds on the host at once while it loads.
LOAD_BYTES = 2 * 2**30


def is_deepspeed(optimizer: Any) -> bool:
    """Return whether an optimizer is DeepSpeed's."""
    return type(optimizer).__module__.startswith("deepspeed.")


def require_supported(recipe: Recipe) -> None:
    """Refuse what needs entire matrices, or the gradients before the update. Raises `UserError`."""
    if recipe.optimizer.name == "muon":
        raise UserError(
            "optimizer.name = 'muon': not with DeepSpeed, whose flat partitions cut matrices apart; launch with a config of"
            " FSDP2, which shards optimizer state too (2gpu_fsdp2 instead of 2gpu_zero1), or of DDP, or set optimizer.name: adamw"
        )
    wanted = {
        "anomalies.policy = 'skip'": recipe.anomalies.policy == "skip",
        "output.layer_norms = true": recipe.output.layer_norms,
    }
    if asked := [key for key, value in wanted.items() if value]:
        raise UserError(
            f"{' and '.join(asked)}: not with DeepSpeed, which updates the weights before the gradients can be read; change it"
            " (anomalies.policy=rollback works), or launch with a config of DDP or FSDP2"
        )


def build_plugin(mixed_precision: str) -> DeepSpeedPlugin:
    """Return the plugin of the launch config. Under bf16 gradients are summed and reduced in fp32, with no bf16 copy kept.

    Raises `UserError` where DeepSpeed is not installed, and for other stages than 1.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "the launch config asks for DeepSpeed, which is not installed; run: pip install 'deepspeed>=0.19.8,<0.20', or use a"
            " config of FSDP2 or DDP"
        )
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.utils import logger

    logger.setLevel("WARNING")  # else dozens of lines about its own set-up
    # On CPUs DeepSpeed loads an extension for inference at every start. Torch guards that by a lock file, which stays where a
    # process is killed meanwhile: every later launch on that machine would wait for it forever. Training does not use it.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    plugin = DeepSpeedPlugin()
    offloaded = plugin.deepspeed_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    if plugin.zero_stage != 1 or offloaded:
        raise UserError(
            f"deepspeed_config of the launch config asks for ZeRO stage {plugin.zero_stage} or offloading; ZeRO stage 1 without"
            " offloading is trained here: set zero_stage: 1, or use a config of FSDP2, which shards weights and gradients too"
        )
    if mixed_precision == "bf16":
        plugin.deepspeed_config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}
        plugin.deepspeed_config["communication_data_type"] = "fp32"
    return plugin


def configure(accelerator: Accelerator, recipe: Recipe, accumulation: int) -> None:
    """Set micro-batch size, accumulation and gradient clipping. Stage 1 reduces gradients at the last micro-batch alone."""
    accelerator.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": recipe.training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.max_grad_norm,
    }


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> tuple[nn.Module, Any]:
    """Return model and optimizer wrapped by DeepSpeed, its fp32 master weights those of the model.

    On its own DeepSpeed widens the bf16 weights to get them.
    """
    weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}
    with contextlib.redirect_stdout(None):  # it prints its memory, group by group
        wrapped, wrapped_optimizer = accelerator.prepare(model, optimizer)
    set_weights(model, weights)
    return wrapped, wrapped_optimizer


def gather_tensors(model: nn.Module, optimizer: Any, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and full fp32 tensor, one after another, for the names that are `wanted` on this rank. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    steps = _flat_state(optimizer)
    for name, parameter in model.named_parameters():
        gathered = {f"model.{name}": safe_get_full_fp32_param(parameter)}
        for key in ("exp_avg", "exp_avg_sq"):
            gathered[f"optimizer.{name}.{key}"] = safe_get_full_optimizer_state(parameter, key)
        gathered[f"optimizer.{name}.step"] = steps[0]["step"]
        yield from ((key, value) for key, value in gathered.items() if wanted(key))


def tensor_sizes(model: nn.Module) -> dict[str, int]:
    """Return the number of elements of every tensor that `gather_tensors` yields."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        sizes |= dict.fromkeys((f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"), parameter.numel())
        sizes[f"optimizer.{name}.step"] = 1
    return sizes


def set_weights(model: nn.Module, weights: Tensors) -> None:
    """Set DeepSpeed's fp32 weights, and the model's bf16 ones, to full values by name."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in model.named_parameters():
        if name in weights:
            full = weights[name].to(parameter.device)
            safe_set_full_fp32_param(parameter, full)
            parameter.data.copy_(full)


def load_tensors(model: nn.Module, optimizer: Any, read: Callable[[Tensors], None]) -> None:
    """Load weights and moments in place. `read` fills full tensors on the host by their names, some at a time."""
    from deepspeed.utils import safe_set_full_optimizer_state

    states = _flat_state(optimizer)
    batch: list[tuple[str, nn.Parameter]] = []
    parameters = list(model.named_parameters())
    for place, (name, parameter) in enumerate(parameters):
        batch.append((name, parameter))
        if place + 1 < len(parameters) and sum(12 * p.numel() for _, p in batch) < LOAD_BYTES:
            continue
        tensors = {f"optimizer.{n}.step": torch.zeros(()) for n, _ in batch}
        for n, p in batch:
            for key in (f"model.{n}", f"optimizer.{n}.exp_avg", f"optimizer.{n}.exp_avg_sq"):
                tensors[key] = torch.empty(p.shape, dtype=torch.float32)
        read(tensors)
        set_weights(model, {n: tensors[f"model.{n}"] for n, _ in batch})
        for n, p in batch:
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(p, tensors[f"optimizer.{n}.{key}"].to(p.device), key)
        for state in states:
            state["step"].copy_(tensors[f"optimizer.{name}.step"])
        batch = []


def _flat_state(zero_optimizer: Any) -> list[Tensors]:
    """Return the inner AdamW's state of each flat partition, made where no step was done yet."""
    inner = zero_optimizer.optimizer
    flat = [parameter for group in inner.param_groups for parameter in group["params"]]
    for parameter in flat:
        if not inner.state[parameter]:
            inner.state[parameter] = fresh_moments(parameter, inner)
    # Link every parameter to its view of the moments. DeepSpeed does so after the first group's first step, when the second
    # group has none yet.
    zero_optimizer._hp_optimizer_states_linked = False
    zero_optimizer._lazy_init_hp_params_optimizer_state()
    return [inner.state[parameter] for parameter in flat]
