"""A checkpoint as a model folder that `from_pretrained`, `pipeline`, lm-eval and vLLM open.

A hybrid whose choices amount to GPT-2 or LLaMA becomes that; any other one takes its code along. The files open in transformers
4.57 and 5, and in what bundles either: each key that one of them renamed is written under both names.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from isoflop.checkpoint.folder import TRAINER_STATE, newest_intact, read_locked, verify
from isoflop.checkpoint.state import read
from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe
from isoflop.data.manifest import read_manifest
from isoflop.data.tokenizers import open_tokenizer, set_pad_token
from isoflop.modeling.build import build_config, load_model
from isoflop.modeling.configuration_hybrid import HybridConfig
from isoflop.modeling.conversion_hybrid import stock_preset
from isoflop.train.run_folder import RunFolder
from isoflop.utils.errors import UserError

OPENED_WITH = ("4.57.6", "5.23.0")
"""Versions of transformers in which tests open exported models of each class and compare logits and ids."""


def export_checkpoint(recipe: Recipe, checkpoint: Path, target: Path) -> None:
    """Write config, safetensors, generation config and tokenizer of an intact checkpoint into the folder `target`.

    Weights are fp32, whatever engine and precision trained them. It needs the tokenizer of `data.prepared_dir`, and memory on the
    host for the weights once (4 bytes per parameter), twice for a hybrid that becomes a stock model.
    """
    facts = read_manifest(recipe.data.prepared_dir).tokenizer
    config = build_config(recipe.model.model_dump(exclude={"depth_scaled_init"}), facts.eos_token_id, facts.bos_token_id)
    with read_locked(checkpoint):
        model = load_model(
            config, lambda weights: read(checkpoint, {f"model.causal_lm.{name}": tensor for name, tensor in weights.items()})
        )
    if isinstance(config, HybridConfig) and stock_preset(config):
        model = model.to_stock()
    tokenizer = open_tokenizer(recipe.data.prepared_dir)
    tokenizer.model_max_length = recipe.model.max_positions
    set_pad_token(tokenizer, recipe.model.vocab_size)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token_id != tokenizer.eos_token_id:  # an embedding's padding row gets no gradient
        model.config.pad_token_id = tokenizer.pad_token_id
    disable_progress_bar()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _add_names_of_version_4(target)


def _add_names_of_version_4(folder: Path) -> None:
    """Write the names that transformers 4 reads beside those of 5. Without `rope_theta` version 4 takes 10,000."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["torch_dtype"] = config["dtype"]
    if rope := config.get("rope_parameters"):
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in version 4, which version 5 knows too
    config["model_input_names"] = ["input_ids", "attention_mask"]  # version 4 adds token_type_ids, which these models refuse
    if isinstance(others := config.pop("extra_special_tokens", None), list):  # in version 4 a dictionary of named ones
        config["additional_special_tokens"] = others
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def model_folder(model: str) -> Iterator[tuple[str, Path]]:
    """Yield what opens as a model for a run, a checkpoint, a folder or a Hub name, and the folder of its results.

    A checkpoint, or the newest of a run that has no model yet, is exported to a temporary folder.
    """
    path = Path(model)
    if (path / TRAINER_STATE).is_file():
        run_folder, checkpoint = RunFolder(str(path.parent.parent)), path
    elif (path / "recipe.yaml").is_file():
        run_folder = RunFolder(model)
        if run_folder.model.is_dir():
            yield str(run_folder.model), run_folder.evaluations
            return
        newest = newest_intact(run_folder.checkpoints)
        if newest is None:
            raise UserError(f"{model} has neither a model nor an intact checkpoint yet; wait for its first checkpoint")
        checkpoint = newest
    else:
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(f"{model} is a folder without config.json or recipe.yaml; give a run's folder or a saved model's")
        yield model, Path("evaluations") / model.strip("/").replace("/", "__")
        return
    if faults := verify(checkpoint):
        raise UserError(f"{checkpoint} is not intact ({'; '.join(faults)}); take another one")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=run_folder.path) as target:
        export_checkpoint(load_recipe(run_folder.path / "recipe.yaml"), checkpoint, Path(target))
        yield target, run_folder.evaluations / checkpoint.name


def is_stock(recipe: Recipe) -> bool:
    """Return whether the exported model opens without remote code."""
    if recipe.model.model_type != "hybrid":
        return True
    config = build_config(recipe.model.model_dump(exclude={"depth_scaled_init"}), eos_token_id=0, bos_token_id=None)
    return stock_preset(config) is not None
