"""A checkpoint as a model folder that `from_pretrained`, `pipeline`, lm-eval and vLLM open."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from isoflop.checkpoint.folder import held
from isoflop.checkpoint.state import read
from isoflop.data.manifest import read_manifest
from isoflop.modeling.build import build_config, load_model
from isoflop.recipe import Recipe


def export_checkpoint(recipe: Recipe, checkpoint: Path, target: Path) -> None:
    """Write config, safetensors, generation config and tokenizer of a whole checkpoint into the folder `target`.

    In fp32 whatever engine and precision trained it; needs the weights once in the host's memory (4 bytes a parameter) and the
    tokenizer of `data.prepared_dir`.
    """
    facts = read_manifest(recipe.data.prepared_dir).tokenizer
    config = build_config(recipe.model.model_dump(exclude={"depth_scaled_init"}), facts.eos_token_id, facts.bos_token_id)
    with held(checkpoint):
        model = load_model(
            config, lambda weights: read(checkpoint, {f"model.causal_lm.{name}": tensor for name, tensor in weights.items()})
        )
    model.generation_config.pad_token_id = facts.eos_token_id
    disable_progress_bar()
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(Path(recipe.data.prepared_dir) / "tokenizer")
    tokenizer.model_max_length = recipe.model.max_positions
    tokenizer.save_pretrained(target)
