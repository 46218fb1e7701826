"""The optimizer and the learning rate, a pure function of the step: no scheduler object is kept or saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isoflop.config.recipe import Optimizer, Schedule


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


def build_optimizer(model: nn.Module, optimizer: Optimizer, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW over fp32 weights, with weight decay on matrices and embeddings (2 dimensions), none on norms and biases."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
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
    """Return the state that AdamW makes at a parameter's first step. torch's fused AdamW counts steps on the device."""
    device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
    dtype = getattr(optimizer, "moments_dtype", parameter.dtype)
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
