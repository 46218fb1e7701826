"""Refuse text that a tokenizer turns into its unknown token, from which a model learns nothing."""

from __future__ import annotations

import pyarrow as pa

from isoflop.config.recipe import Recipe
from isoflop.data.encoding import Encoder
from isoflop.utils.errors import UserError
from isoflop.utils.untrusted import shown


def require_known_text(recipe: Recipe, encoder: Encoder, source: str, texts: list[str]) -> None:
    """Refuse a tokenizer that does not know a source's first documents. Raises `UserError`."""
    if encoder.unknown_id is None:
        return
    ids, _ = encoder(pa.array(texts, pa.large_string()))
    require_known_tokens(recipe, f"the first documents of {source}", int((ids == encoder.unknown_id).sum()), len(ids))


def require_known_tokens(recipe: Recipe, where: str, unknown: int, tokens: int) -> None:
    """Refuse more unknown tokens than the recipe allows. Raises `UserError`."""
    most = recipe.tokenizer.max_unknown_fraction
    if unknown > most * tokens:
        raise UserError(
            f"tokenizer.name = {shown(recipe.tokenizer.name)}: {unknown / tokens:.1%} of the tokens of {where} are its unknown"
            f" token, and tokenizer.max_unknown_fraction = {most:g}: a model learns nothing from them; choose a tokenizer that"
            " knows this text, or raise the limit"
        )
