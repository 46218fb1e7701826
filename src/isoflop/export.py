"""A checkpoint as a model folder that `from_pretrained`, `pipeline`, lm-eval and vLLM open.

A hybrid whose choices amount to GPT-2 or LLaMA becomes that; any other one takes its code along.
"""

from __future__ import annotations

from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from isoflop.checkpoint.folder import held
from isoflop.checkpoint.state import read
from isoflop.data.manifest import read_manifest
from isoflop.data.tokenizers import open_tokenizer
from isoflop.modeling.build import build_config, load_model
from isoflop.modeling.configuration_hybrid import HybridConfig
from isoflop.modeling.conversion_hybrid import stock_preset
from isoflop.recipe import Recipe


def export_checkpoint(recipe: Recipe, checkpoint: Path, target: Path) -> None:
    """Write config, safetensors, generation config and tokenizer of a whole checkpoint into the folder `target`.

    In fp32 whatever engine and precision trained it; needs the weights once in the host's memory (4 bytes a parameter) and the
    tokenizer of `data.prepared_dir`; a hybrid that becomes a stock model twice.
    """
    facts = read_manifest(recipe.data.prepared_dir).tokenizer
    config = build_config(recipe.model.model_dump(exclude={"depth_scaled_init"}), facts.eos_token_id, facts.bos_token_id)
    with held(checkpoint):
        model = load_model(
            config, lambda weights: read(checkpoint, {f"model.causal_lm.{name}": tensor for name, tensor in weights.items()})
        )
    if isinstance(config, HybridConfig) and stock_preset(config):
        model = model.to_stock()
    model.generation_config.pad_token_id = facts.eos_token_id
    disable_progress_bar()
    model.save_pretrained(target)
    tokenizer = open_tokenizer(recipe.data.prepared_dir)
    tokenizer.model_max_length = recipe.model.max_positions
    tokenizer.save_pretrained(target)


def is_stock(recipe: Recipe) -> bool:
    """Whether what is exported opens without remote code."""
    if recipe.model.model_type != "hybrid":
        return True
    config = build_config(recipe.model.model_dump(exclude={"depth_scaled_init"}), eos_token_id=0, bos_token_id=None)
    return stock_preset(config) is not None
