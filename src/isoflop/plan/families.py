"""Families of model shapes, and the published models.

Entered by `family` (a name, a published model, or a recipe): a `Family` yields every shape of its grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Gpt2Model, HybridModel, LlamaModel, Model, Recipe
from isoflop.config.shipped import shipped
from isoflop.plan import cost
from isoflop.utils.errors import UserError, nearest

ASPECT_RATIO = (16, 256)  # width / layers. Kaplan et al. 2020, figure 5: within 2-3% of the best loss from about 10 to 300


@dataclass(frozen=True)
class PublishedModel:
    """A model as its authors describe it."""

    name: str
    model: Model
    sequence_length: int
    """Tokens of a pretraining window; the context of the finished model can be longer."""
    training_tokens: float | None
    source: str

    @property
    def parameters(self) -> int:
        """N, all of them."""
        return cost.parameters(self.model)

    @property
    def tokens_per_parameter(self) -> float | None:
        """D/N; None where the tokens are not published."""
        return self.training_tokens and self.training_tokens / self.parameters

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token."""
        return cost.flops_per_token(self.model, self.sequence_length)

    @property
    def flops(self) -> float | None:
        """Training FLOPs; None where the tokens are not published."""
        return self.training_tokens and self.training_tokens * self.flops_per_token

    def to_dict(self) -> dict[str, Any]:
        """Return the model as JSON."""
        return {"name": self.name} | cost.shape_dict(self.model) | {
            "context": self.model.max_positions,
            "sequence_length": self.sequence_length,
            "parameters": self.parameters,
            "tokens": self.training_tokens,
            "tokens_per_parameter": self.tokens_per_parameter,
            "flops_per_token": self.flops_per_token,
            "flops": self.flops,
            "flops_6nd": self.training_tokens and 6 * self.parameters * self.training_tokens,
            "source": self.source,
        }  # fmt: skip


def _gpt2(size: str, layers: int, width: int, heads: int) -> PublishedModel:
    model = Gpt2Model(model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=width, n_layer=layers, n_head=heads)
    source = "Radford et al. 2019, table 2; tokens not published"
    return PublishedModel(f"gpt2-{size}", model, 1024, None, source)


def _llama(
    name: str, layers: int, width: int, heads: int, ffn: int, tokens: float, key_value_heads: int | None = None
) -> PublishedModel:
    vocabulary, context, sequence, theta, source = {
        "": (32000, 2048, 2048, 1e4, "Touvron et al. 2023 (arXiv:2302.13971), table 2"),
        "2": (32000, 4096, 4096, 1e4, "Touvron et al. 2023 (arXiv:2307.09288), table 1"),
        "3": (128256, 8192, 8192, 5e5, "Meta-Llama-3 model card: over 15T tokens"),
        "3.1": (128256, 131072, 8192, 5e5, "Dubey et al. 2024 (arXiv:2407.21783), table 3 and section 3.4: 15.6T for the 405B"),
    }[name.removeprefix("llama-").rpartition("-")[0]]
    model = LlamaModel(
        model_type="llama", vocab_size=vocabulary, max_position_embeddings=context, hidden_size=width, intermediate_size=ffn,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_value_heads, rope_theta=theta,
    )  # fmt: skip
    return PublishedModel(name, model, sequence, tokens, source)


PUBLISHED_MODELS = {
    published.name: published
    for published in (
        _gpt2("small", 12, 768, 12),
        _gpt2("medium", 24, 1024, 16),
        _gpt2("large", 36, 1280, 20),
        _gpt2("xl", 48, 1600, 25),
        _llama("llama-7b", 32, 4096, 32, 11008, 1.0e12),
        _llama("llama-13b", 40, 5120, 40, 13824, 1.0e12),
        _llama("llama-33b", 60, 6656, 52, 17920, 1.4e12),
        _llama("llama-65b", 80, 8192, 64, 22016, 1.4e12),
        _llama("llama-2-7b", 32, 4096, 32, 11008, 2.0e12),
        _llama("llama-2-13b", 40, 5120, 40, 13824, 2.0e12),
        _llama("llama-2-70b", 80, 8192, 64, 28672, 2.0e12, key_value_heads=8),
        _llama("llama-3-8b", 32, 4096, 32, 14336, 15e12, key_value_heads=8),
        _llama("llama-3-70b", 80, 8192, 64, 28672, 15e12, key_value_heads=8),
        _llama("llama-3.1-8b", 32, 4096, 32, 14336, 15e12, key_value_heads=8),
        _llama("llama-3.1-70b", 80, 8192, 64, 28672, 15e12, key_value_heads=8),
        _llama("llama-3.1-405b", 126, 16384, 128, 53248, 15.6e12, key_value_heads=8),
    )
}


@dataclass(frozen=True)
class Family:
    """Rules that a family's shapes share, and the grid of their sizes."""

    name: str
    template: Model
    """Source of vocabulary, tied embeddings, positions and constants; its sizes are replaced."""
    sequence_length: int
    recipe: str
    """The recipe from which a planned recipe takes data and optimizer."""
    layers: range
    widths: range
    head_dims: tuple[int, ...]
    key_value_heads: int | None
    """Key-value heads at every width, which divide the heads. None: as many as heads."""
    ffn_ratio: Fraction
    ffn_multiple: int
    """The feed-forward width is ffn_ratio x width, rounded down to a multiple of this."""

    def shape(self, num_layers: int, width: int, head_dim: int) -> Model:
        """Return one shape. Raises `UserError` where its heads do not divide."""
        heads, rest = divmod(width, head_dim)
        group = self.key_value_heads or 1
        if head_dim % 2 and _is_rotary(self.template):
            raise UserError(
                f"heads of {head_dim}: rotary positions need an even size; nearest: {head_dim - 1 or 2} or {head_dim + 1}"
            )
        if rest or heads % group or not heads:
            unit = head_dim * group
            below = width // unit * unit
            near = f"{below} or {below + unit}" if below else str(unit)
            raise UserError(
                f"width {width}: family {self.name} has heads of {head_dim}"
                + (f" in multiples of {group} (its key-value heads)" if group > 1 else "")
                + f", so its widths are multiples of {unit}; nearest: {near}"
            )
        ffn = int(self.ffn_ratio * width) // self.ffn_multiple * self.ffn_multiple or self.ffn_multiple
        if isinstance(self.template, Gpt2Model):
            sizes = {"n_layer": num_layers, "n_embd": width, "n_head": heads, "n_inner": None if ffn == 4 * width else ffn}
        else:
            sizes = {
                "num_hidden_layers": num_layers, "hidden_size": width, "num_attention_heads": heads, "head_dim": None,
                "num_key_value_heads": self.key_value_heads, "intermediate_size": ffn,
            }  # fmt: skip
        return self.template.model_copy(update=sizes)

    def shapes(self) -> Iterator[Model]:
        """Yield every shape of the grid whose heads divide and whose aspect ratio is within `ASPECT_RATIO`."""
        low, high = ASPECT_RATIO
        for head_dim in self.head_dims:
            for width in self._widths(head_dim):
                for layers in self.layers:
                    if low * layers <= width <= high * layers:
                        yield self.shape(layers, width, head_dim)

    def shapes_of_depth(self, num_layers: int) -> Iterator[Model]:
        """Yield every shape of one depth, at any aspect ratio: for sweeps of one depth, and the laws fitted to them."""
        for head_dim in self.head_dims:
            for width in self._widths(head_dim):
                yield self.shape(num_layers, width, head_dim)

    def _widths(self, head_dim: int) -> list[int]:
        return [width for width in self.widths if width % (head_dim * (self.key_value_heads or 1)) == 0]

    def on_edge(self, model: Model, any_aspect_ratio: bool = False) -> bool:
        """Return whether a wider, narrower, deeper or shallower neighbour lies outside the grid or its aspect ratios.

        With `any_aspect_ratio` only wider and narrower neighbours count.
        """
        s, (low, high) = cost.shape_of(model), ASPECT_RATIO
        widths = self._widths(s.head_dim)
        if any_aspect_ratio:
            return s.hidden_size in (widths[0], widths[-1])
        width, layer = widths.index(s.hidden_size), self.layers.index(s.num_layers)
        if width in (0, len(widths) - 1) or layer in (0, len(self.layers) - 1):
            return True
        deeper, shallower = self.layers[layer + 1], self.layers[layer - 1]
        return not (low * deeper <= s.hidden_size <= high * shallower) or not (
            low * s.num_layers <= widths[width - 1] and widths[width + 1] <= high * s.num_layers
        )


def _llama_template(vocab_size: int, rope_theta: float = 1e4, tied: bool = False, context: int = 2048) -> LlamaModel:
    """Return a template; its sizes are placeholders."""
    return LlamaModel(
        model_type="llama", vocab_size=vocab_size, max_position_embeddings=context, hidden_size=64, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=1, rope_theta=rope_theta, tie_word_embeddings=tied,
    )  # fmt: skip


_GPT2 = Gpt2Model(model_type="gpt2", vocab_size=50304, n_positions=2048, n_embd=64, n_layer=1, n_head=1)
_WIDE, _DEEP = range(256, 8193, 128), range(4, 65, 2)
# llama3 has the original report's grid: layers 16 to 62, widths 1024 to 7936, feed-forward 3.5 x width down to a multiple of 256,
# 8 key-value heads. llama2 and modern: 8/3 x width, which keeps the parameters of a 4 x GELU layer (Shazeer 2020).
FAMILIES = {
    "gpt2": Family("gpt2", _GPT2, 2048, "recipes/gpt2_1.36b.yaml", _DEEP, _WIDE, (64, 128), None, Fraction(4), 64),
    "llama2": Family(
        "llama2", _llama_template(32000), 2048, "recipes/llama2_1.36b.yaml", _DEEP, _WIDE, (64, 128), None, Fraction(8, 3), 256
    ),
    "llama3": Family(
        "llama3", _llama_template(128256, 5e5), 2048, "recipes/llama3_1.5b.yaml",
        range(16, 63, 2), range(1024, 7937, 256), (64, 128), 8, Fraction(7, 2), 256,
    ),
    "modern": Family(
        "modern", _llama_template(50304, tied=True, context=1024), 1024, "recipes/modern_124m.yaml",
        _DEEP, _WIDE, (64, 128), None, Fraction(8, 3), 256,
    ),
    "quickstart": Family(
        "quickstart", _llama_template(4096, tied=True, context=256), 256, "recipes/quickstart.yaml",
        range(2, 25), range(32, 1025, 32), (32,), None, Fraction(8, 3), 32,
    ),
}  # fmt: skip


def load_family(name: str) -> Family:
    """Return a family by its name, or the shapes around a published model or a recipe. Raises `UserError` for an unknown name."""
    if name in FAMILIES:
        return FAMILIES[name]
    if name in PUBLISHED_MODELS:
        published = PUBLISHED_MODELS[name]
        return _around(name, published.model, published.sequence_length, _training_recipe(published.model))
    if name.endswith((".yaml", ".yml")) or name in shipped("recipes"):
        return family_of(load_recipe(name), name)
    known = [*FAMILIES, *PUBLISHED_MODELS, *shipped("recipes")]
    raise UserError(f"--family {name}: not a family, a published model or a recipe{nearest(name, known)}")


def family_of(recipe: Recipe, path: str) -> Family:
    """Return smaller and larger models by a recipe's ratios."""
    return _around(path, recipe.model, recipe.training.sequence_length, path)


def _around(name: str, model: Model, sequence_length: int, recipe: str) -> Family:
    """Return shapes from a quarter to four times a model's layers and width, by its own ratios."""
    s = cost.shape_of(model)
    if s.num_heads * s.head_dim != s.hidden_size:
        raise UserError(
            f"--family {name}: its {s.num_heads} heads of {s.head_dim} are not its width {s.hidden_size}, and a family keeps"
            " the two equal; leave out model.head_dim, or name another family"
        )
    grouped = s.num_key_value_heads != s.num_heads
    unit = s.head_dim * (s.num_key_value_heads if grouped else 1)
    units = s.hidden_size // unit
    step = unit * max(d for d in range(1, max(1, units // 16) + 1) if units % d == 0)
    first = max(step, s.hidden_size // 4 // step * step)
    return Family(
        name, model, sequence_length, recipe,
        layers=range(max(1, s.num_layers // 4), 4 * s.num_layers + 1),
        widths=range(first, 4 * s.hidden_size + 1, step),
        head_dims=(s.head_dim,),
        key_value_heads=s.num_key_value_heads if grouped else None,
        ffn_ratio=Fraction(s.intermediate_size, s.hidden_size),
        ffn_multiple=64 if s.intermediate_size % 64 == 0 else 1,
    )  # fmt: skip


def _is_rotary(model: Model) -> bool:
    return model.positions == "rope" if isinstance(model, HybridModel) else isinstance(model, LlamaModel)


def _training_recipe(model: Model) -> str:
    if isinstance(model, Gpt2Model):
        return FAMILIES["gpt2"].recipe
    return FAMILIES["llama2" if model.vocab_size == 32000 else "llama3"].recipe


def at_sequence_length(family: Family, sequence_length: int) -> Family:
    """Return the family trained on windows of another length, with more positions where they are needed."""
    field = "n_positions" if isinstance(family.template, Gpt2Model) else "max_position_embeddings"
    positions = max(sequence_length, family.template.max_positions)
    return replace(family, sequence_length=sequence_length, template=family.template.model_copy(update={field: positions}))
