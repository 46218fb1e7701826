"""Notes on a recipe and its data: a step larger than an epoch, and embedding rows that no token uses."""

from __future__ import annotations

from isoflop.config.recipe import Recipe
from isoflop.data.manifest import Manifest
from isoflop.plan import cost

# Padding to a multiple of 128, which is faster on GPUs, leaves fewer unused rows than that.
PADDED_TO = 128
MIN_UNUSED_SHARE = 0.05  # of the rows


def data_notes(recipe: Recipe, manifest: Manifest | None) -> list[str]:
    """Return the notes on a recipe, and on its prepared data where there is some."""
    num_ids = manifest.tokenizer.num_ids if manifest else recipe.tokenizer.train_vocab_size
    return (repeated_in_a_step(recipe, manifest) if manifest else []) + (unused_rows(recipe, num_ids) if num_ids else [])


def repeated_in_a_step(recipe: Recipe, manifest: Manifest) -> list[str]:
    """Return a note for each source that one optimizer step visits more than once."""
    found, shares, step = [], recipe.data.shares(), recipe.training.tokens_per_step
    for name, share in shares.items():
        tokens = manifest.sources[name].splits["train"].windows * manifest.sequence_length if name in manifest.sources else 0
        if tokens and (times := share * step / tokens) > 1:
            of = f" of {name}" if len(shares) > 1 else ""
            found.append(
                f"training.tokens_per_step = {step:,} visits every training window{of} {times:.1f} times in one step ({tokens:,}"
                " tokens in all): repeats within a step teach nothing new; lower it, or give more text"
            )
    return found


def unused_rows(recipe: Recipe, num_ids: int) -> list[str]:
    """Return a note where many embedding rows belong to no token, with their cost."""
    model = recipe.model
    unused = model.vocab_size - num_ids
    if unused < PADDED_TO or unused < MIN_UNUSED_SHARE * model.vocab_size:
        return []
    smaller, length = model.model_copy(update={"vocab_size": num_ids}), recipe.training.sequence_length
    parameters = cost.parameters(model) - cost.parameters(smaller)
    flops = 1 - cost.flops_per_token(smaller, length) / cost.flops_per_token(model, length)
    padded = -(-num_ids // PADDED_TO) * PADDED_TO
    return [
        f"model.vocab_size = {model.vocab_size:,} and the tokenizer has {num_ids:,} ids: {unused:,} rows are never used, which"
        f" are {parameters:,} parameters ({parameters / cost.parameters(model):.1%}) and {flops:.1%} of the FLOPs;"
        f" {padded:,} would do"
    ]
