import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from isoflop.config.loading import load_recipe
from isoflop.plan import cost
from isoflop.plan.families import ASPECT_RATIO, FAMILIES, PUBLISHED_MODELS, at_sequence_length, load_family
from isoflop.utils.errors import UserError

# The sizes their authors give (parameters, relative tolerance of the rounding).
STATED = {
    "gpt2-small": (124e6, 0.01), "gpt2-medium": (355e6, 0.01), "gpt2-large": (774e6, 0.01), "gpt2-xl": (1558e6, 0.01),
    "llama-7b": (6.7e9, 0.01), "llama-13b": (13.0e9, 0.01), "llama-33b": (32.5e9, 0.01), "llama-65b": (65.2e9, 0.01),
    "llama-2-7b": (6.7e9, 0.01), "llama-2-13b": (13.0e9, 0.01), "llama-2-70b": (69e9, 0.01),
    "llama-3-8b": (8.03e9, 0.01), "llama-3-70b": (70.6e9, 0.01),
    "llama-3.1-8b": (8.03e9, 0.01), "llama-3.1-70b": (70.6e9, 0.01), "llama-3.1-405b": (405.85e9, 0.01),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_published_shapes_have_the_published_sizes(name):
    stated, tolerance = STATED[name]
    assert cost.parameters(PUBLISHED_MODELS[name].model) == pytest.approx(stated, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "tokens", "context", "vocabulary"),
    [
        ("llama-65b", 1.4e12, 2048, 32000), ("llama-2-7b", 2e12, 4096, 32000), ("llama-3-8b", 15e12, 8192, 128256),
        ("llama-3.1-405b", 15.6e12, 131072, 128256), ("gpt2-xl", None, 1024, 50257),
    ],
)  # fmt: skip
def test_published_facts(name, tokens, context, vocabulary):
    facts = PUBLISHED_MODELS[name]
    assert (facts.training_tokens, facts.model.max_positions, facts.model.vocab_size) == (tokens, context, vocabulary)


def test_llama_3_1_405b_took_the_published_flops():
    facts = PUBLISHED_MODELS["llama-3.1-405b"]
    assert 6 * cost.parameters(facts.model) * facts.training_tokens == pytest.approx(3.8e25, rel=0.01)


@pytest.mark.parametrize("name", [*FAMILIES, *PUBLISHED_MODELS])
def test_every_shape_of_a_family_is_within_its_rules(name):
    family = load_family(name)
    shapes = list(family.shapes())
    assert shapes
    for model in shapes:
        s = cost.shape_of(model)
        assert type(model).model_validate(model.model_dump()) == model  # heads divide
        assert s.head_dim in family.head_dims
        assert s.num_heads * s.head_dim == s.hidden_size
        assert family.key_value_heads in (None, s.num_key_value_heads)
        assert s.intermediate_size % family.ffn_multiple == 0
        assert ASPECT_RATIO[0] <= s.hidden_size / s.num_layers <= ASPECT_RATIO[1]
        assert (s.vocab_size, s.tied) == (family.template.vocab_size, family.template.tie_word_embeddings)
    assert len({cost.shape_of(model) for model in shapes}) == len(shapes)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("llama3", (18, 2048, 128)), ("llama2", (18, 2304, 128)), ("gpt2", (18, 2432, 128)), ("modern", (12, 768, 64))],
)
def test_the_recipes_are_family_of_their_families(name, shape):
    family = load_family(name)
    model = family.shape(*shape)
    recipe = load_recipe(ROOT / family.recipe)
    assert cost.parameters(model) == cost.parameters(recipe.model)
    assert cost.shape_of(model) == cost.shape_of(recipe.model)


@pytest.mark.parametrize("name", [name for name in PUBLISHED_MODELS if not name.startswith("llama-3.1-405b")])
def test_a_published_model_is_a_member_of_its_own_family(name):
    s = cost.shape_of(PUBLISHED_MODELS[name].model)
    assert s in map(cost.shape_of, load_family(name).shapes())


def test_a_recipe_is_a_family(monkeypatch):
    monkeypatch.chdir(ROOT)
    family = load_family("recipes/quickstart.yaml")
    assert (family.template.vocab_size, family.sequence_length, family.key_value_heads) == (4096, 256, 3)
    assert all(cost.shape_of(model).num_key_value_heads == 3 for model in family.shapes())


def test_another_sequence_length_moves_the_positions_where_it_must():
    assert at_sequence_length(load_family("llama3"), 8192).template.max_position_embeddings == 8192
    assert at_sequence_length(load_family("llama-3.1-8b"), 4096).template.max_position_embeddings == 131072
    assert at_sequence_length(load_family("gpt2"), 4096).shape(4, 256, 64).n_positions == 4096


@pytest.mark.parametrize(
    ("name", "width", "head_dim", "message"),
    [
        ("llama3", 2304, 128, r"width 2304: family llama3 has heads of 128 in multiples of 8 \(its key-value heads\), so its"
         r" widths are multiples of 1024; nearest: 2048 or 3072"),
        ("gpt2", 100, 64, r"heads of 64, so its widths are multiples of 64; nearest: 64 or 128"),
        ("gpt2", 30, 64, r"nearest: 64$"),
    ],
)  # fmt: skip
def test_heads_that_do_not_divide_are_refused(name, width, head_dim, message):
    with pytest.raises(UserError, match=message):
        load_family(name).shape(4, width, head_dim)


def test_heads_of_an_odd_size_are_refused_where_positions_turn_pairs():
    with pytest.raises(UserError, match=r"heads of 7: rotary positions need an even size; nearest: 6 or 8"):
        load_family("llama2").shape(4, 70, 7)
    assert load_family("gpt2").shape(4, 70, 7).n_head == 10


def test_a_hybrid_is_a_family_of_its_own_choices(write_recipe):
    path = write_recipe(model__model_type="hybrid", model__preset="gpt2", model__norm="rmsnorm", model__tie_word_embeddings=False)
    family = load_family(str(path))
    model = family.shape(4, 80, 8)
    assert (model.num_attention_heads, model.hidden_size, model.norm, model.mlp) == (10, 80, "rmsnorm", "gelu_tanh")
    assert type(model).model_validate(model.model_dump()) == model
    assert at_sequence_length(family, 128).template.max_position_embeddings == 128


def test_a_recipe_whose_heads_are_not_its_width_is_no_family(write_recipe):
    path = write_recipe()
    path.write_text(path.read_text().replace("  num_attention_heads:", "  head_dim: 64\n  num_attention_heads:"))
    with pytest.raises(UserError, match=r"heads of 64 are not its width"):
        load_family(str(path))


def test_an_unknown_family_is_refused():
    with pytest.raises(UserError, match=r"--family lama3: not a family, a published model or a recipe; did you mean llama3\?"):
        load_family("lama3")


@given(st.sampled_from(sorted(FAMILIES)), st.data())
def test_the_edge_of_the_grid_is_where_a_neighbour_is_missing(name, data):
    family = load_family(name)
    known = {(s.num_layers, s.hidden_size, s.head_dim) for s in map(cost.shape_of, family.shapes())}
    model = data.draw(st.sampled_from(list(family.shapes())))
    s = cost.shape_of(model)
    widths = sorted({w for w in family.widths if w % (s.head_dim * (family.key_value_heads or 1)) == 0})
    i, j = widths.index(s.hidden_size), family.layers.index(s.num_layers)
    missing = i in (0, len(widths) - 1) or j in (0, len(family.layers) - 1)
    missing = missing or any(
        neighbour not in known
        for neighbour in (
            (s.num_layers, widths[i - 1], s.head_dim), (s.num_layers, widths[i + 1], s.head_dim),
            (family.layers[j - 1], s.hidden_size, s.head_dim), (family.layers[j + 1], s.hidden_size, s.head_dim),
        )
    )  # fmt: skip
    assert family.on_edge(model) == missing
