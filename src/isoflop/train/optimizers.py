"""The optimizer and the learning rate, a pure function of the step: no scheduler object is kept or saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.config.recipe_optimizer import Optimizer, Schedule
from isoflop.modeling.build import hidden_matrices
from isoflop.train.muon import Muon
from isoflop.train.parametrization import Scale


def learning_rate(step: int, num_steps: int, peak: float, schedule: Schedule) -> float:
    """Return the learning rate of optimizer step `step` (0-based) of `num_steps`.

    It rises linearly to the peak over the warm-up, whose first step has peak / warmup_steps. The last step has exactly the
    final learning rate (for `constant`, the peak).
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    final = schedule.final_learning_rate
    decaying = num_steps - schedule.warmup_steps
    if schedule.name == "wsd":
        decaying = min(decaying, max(1, round(schedule.decay_fraction * num_steps)))
    progress = max(0.0, 1 - (num_steps - 1 - step) / max(1, decaying))  # 1 at the last step
    match schedule.name:
        case "constant":
            return peak
        case "cosine":
            return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))
        case "linear" | "wsd":
            return peak + (final - peak) * progress


def build_optimizer(
    model: nn.Module, optimizer: Optimizer, device: torch.device, scales: dict[str, Scale] | None = None, fp32: bool = False
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over fp32 weights, with weight decay on matrices and embeddings, none on norms and biases.

    `scales` are the parametrization's factors, by the names of `model.named_parameters()`. Muon's iteration tolerates bf16, and
    takes it on a GPU; `fp32` is for launches in fp32, where engines' sums differ in the last bits alone: with an iteration in
    bf16 their losses were up to 7e-5 apart after 20 steps.
    """
    groups = parameter_groups(model, optimizer, scales or {})
    if optimizer.name == "adamw":
        return _adamw(groups, optimizer, device)
    moments_dtype = getattr(torch, optimizer.moments_dtype)
    iteration_dtype = torch.bfloat16 if device.type == "cuda" and not fp32 else torch.float32
    return Muon(groups, lambda rest: _adamw(rest, optimizer, device), moments_dtype, iteration_dtype)


def parameter_groups(model: nn.Module, optimizer: Optimizer, scales: dict[str, Scale]) -> list[dict[str, Any]]:
    """Return the groups of parameters that share algorithm, learning rate, epsilon and weight decay."""
    matrices = {id(p) for p in hidden_matrices(model)} if optimizer.name == "muon" else set()
    rest = (optimizer.adamw_learning_rate or optimizer.peak_learning_rate) / optimizer.peak_learning_rate
    groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in sorted(trained, key=lambda pair: pair[1].dim() < 2):  # matrices first
        by_muon, scale = id(parameter) in matrices, scales.get(name, Scale())
        ratio = scale.learning_rate * (1.0 if by_muon else rest)
        decay = optimizer.weight_decay * scale.weight_decay if parameter.dim() >= 2 else 0.0
        key = ("muon" if by_muon else "adamw", ratio, optimizer.epsilon * scale.epsilon, decay, parameter.dim() >= 2)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "algorithm": algorithm, "lr_ratio": ratio, "eps": epsilon, "weight_decay": decay}
        | {"lr": optimizer.peak_learning_rate * ratio}
        | ({"momentum": optimizer.momentum} if algorithm == "muon" else {})
        for (algorithm, ratio, epsilon, decay, _), parameters in groups.items()
    ]


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the learning rate of a step, each group's in its ratio to the recipe's peak_learning_rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_ratio"]


def _adamw(groups: list[dict[str, Any]], optimizer: Optimizer, device: torch.device) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": optimizer.peak_learning_rate,
        "betas": (optimizer.beta1, optimizer.beta2),
        "eps": optimizer.epsilon,
    }
    if optimizer.moments_dtype == "bfloat16":
        return AdamWBf16Moments(groups, **settings)
    # One fused kernel: 2.8 times faster than the loop and 4.7 times faster than foreach on CPU (40 x 512 x 512).
    return torch.optim.AdamW(groups, **settings, fused=device.type in ("cuda", "cpu"))


def fresh_moments(parameter: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state that AdamW or Muon makes at a parameter's first step. torch's fused AdamW counts steps on the device."""
    dtype = getattr(optimizer, "moments_dtype", parameter.dtype)
    by_muon = [group for group in optimizer.param_groups if group.get("algorithm") == "muon"]
    if any(parameter is p for group in by_muon for p in group["params"]):
        return {"momentum_buffer": torch.zeros_like(parameter, dtype=dtype, requires_grad=False)}
    device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
    moments = {key: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32, device=device), **moments}


class AdamWBf16Moments(torch.optim.Optimizer):
    """AdamW that keeps its moments in bfloat16, 4 bytes per parameter instead of 8; all arithmetic is in fp32."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments_dtype = torch.bfloat16

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one update (Loshchilov and Hutter 2019, algorithm 2)."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.moments_dtype)
        state["step"] += 1
        step = state["step"].item()
        gradient = parameter.grad.float() if parameter.grad is not None else torch.zeros_like(parameter)
        mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().lerp_(gradient.square(), 1 - beta2)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
