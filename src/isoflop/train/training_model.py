"""The model that a recipe trains: initial weights, kernels, compiled layers, and a forward that is the loss."""

from __future__ import annotations

import importlib.util

import torch

from isoflop.config.recipe import Recipe
from isoflop.modeling.build import build_config, build_model, decoder_layers, final_norms, use_liger
from isoflop.modeling.loss import TrainingModel
from isoflop.plan import cost
from isoflop.train.parametrization import parameter_scales, scale_initial_values
from isoflop.utils.errors import UserError


def build_training_model(
    recipe: Recipe, eos_token_id: int, bos_token_id: int | None, device: torch.device | None = None
) -> TrainingModel:
    """Build the recipe's model with its initial weights on a device, wrapped for training, its layers compiled where chosen.

    Weights are initialized on the CPU, so that they are the same everywhere; without a device they stay there.
    """
    training, device = recipe.training, device or torch.device("cpu")
    config = build_config(recipe.model.model_dump(exclude={"depth_scaled_init"}), eos_token_id, bos_token_id)
    try:
        causal_lm = build_model(config, recipe.model.depth_scaled_init, recipe.seed)
    except (ImportError, ValueError) as error:  # not installed; not known to this version of transformers
        raise UserError(f"model.attn_implementation = {recipe.model.attn_implementation!r}: {error}") from None
    scale_initial_values(causal_lm, parameter_scales(causal_lm, recipe))
    if training.activation_checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    if training.kernels == "liger":
        require_liger(device)
        use_liger(causal_lm)
    if cost.Launch("this", "single", gpu=device.type == "cuda").compiles(training):
        # The last norm too: eager it would move as many bytes as a compiled layer's two norms.
        for module in (*decoder_layers(causal_lm), *final_norms(causal_lm)):
            module.compile()
    separator = eos_token_id if training.document_masking else None
    model = TrainingModel(causal_lm, separator, training.kernels).train()
    return model if device.type == "cpu" else model.to(device)


def require_liger(device: torch.device) -> None:
    """Refuse Liger's kernels where they cannot run. Raises `UserError`."""
    missing = importlib.util.find_spec("liger_kernel") is None
    if missing or device.type != "cuda":
        why = (
            "liger-kernel is not installed; run: pip install liger-kernel"
            if missing
            else f"they run on GPUs, this is {device.type}"
        )
        raise UserError(f"training.kernels = 'liger': {why}, or set training.kernels=torch")
