import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.plan import cost
from isoflop.plan.families import load_family
from isoflop.plan.search import NEAR_20N, near_optimal, search, shape_for_target
from isoflop.scaling.laws import PUBLISHED, load_law
from isoflop.utils.errors import UserError

ROUNDED = load_law("hoffmann-rounded")


@pytest.mark.parametrize(
    ("bounds", "layers", "width", "head_dim", "parameters", "tokens", "loss", "edge"),
    [
        (None, 16, 2560, 64, 2_009_418_240, 122.60e9, 2.2919, True),
        ((10, 30), 18, 3072, 64, 2_968_108_032, 80.94e9, 2.2970, False),
    ],
)
def test_the_reported_budget_by_the_right_count(bounds, layers, width, head_dim, parameters, tokens, loss, edge):
    best = search(load_family("llama3"), 1.36e21, ROUNDED, bounds)[0]
    s = cost.shape_of(best.model)
    assert (s.num_layers, s.hidden_size, s.head_dim, best.parameters, best.on_grid_edge) == (
        layers, width, head_dim, parameters, edge,
    )  # fmt: skip
    assert best.tokens == pytest.approx(tokens, rel=5e-5)
    assert best.predicted_loss == pytest.approx(loss, abs=5e-5)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["llama3", "gpt2", "modern", "quickstart"]), st.sampled_from(PUBLISHED), st.floats(19, 23))
def test_every_candidate_spends_the_budget_and_they_come_in_order(name, law_name, exponent):
    members, law, flops = load_family(name), load_law(law_name), 10**exponent
    found = search(members, flops, law)
    for candidate in found:
        per_token = cost.flops_per_token(candidate.model, members.sequence_length)
        assert candidate.tokens * per_token == pytest.approx(flops, rel=1e-12)
        assert candidate.parameters == cost.parameters(candidate.model)
        assert candidate.predicted_loss == pytest.approx(
            float(law.loss(law.model_size(candidate.model), candidate.tokens)), rel=1e-12
        )
        assert candidate.tokens_per_parameter >= 1
    losses = [candidate.predicted_loss for candidate in found]
    assert losses == sorted(losses)
    ties = near_optimal(found)
    assert ties[0] is found[0]
    assert all(candidate.predicted_loss <= losses[0] + 0.001 for candidate in ties)
    assert len(ties) == len(found) or found[len(ties)].predicted_loss > losses[0] + 0.001


def test_a_constraint_holds():
    free, held = (search(load_family("llama3"), 1.36e21, ROUNDED, bounds) for bounds in (None, NEAR_20N))
    assert all(10 <= candidate.tokens_per_parameter <= 30 for candidate in held)
    assert [candidate for candidate in free if 10 <= candidate.tokens_per_parameter <= 30] == held


def test_a_budget_too_small_for_the_smallest_shape_is_refused_with_the_least_that_is_not():
    with pytest.raises(
        UserError, match=r"1e\+15 FLOPs are too few for family llama3.*16 layers x 1024.*least budget is"
    ) as error:
        search(load_family("llama3"), 1e15, ROUNDED)
    least = float(str(error.value).split("least budget is ")[1].split()[0])
    with pytest.raises(UserError):
        search(load_family("llama3"), 0.99 * least, ROUNDED)
    assert search(load_family("llama3"), 1.01 * least, ROUNDED)


@pytest.mark.parametrize(("low", "high", "nearest"), [(1e5, 2e5, r"801\.8"), (1.0001, 1.0002, r"[\d.]+")])
def test_a_constraint_that_no_shape_meets_is_refused_with_the_nearest(low, high, nearest):
    with pytest.raises(UserError, match=rf"no shape of family llama3 has D/N between .* the nearest has {nearest}"):
        search(load_family("llama3"), 1e21, ROUNDED, (low, high))


@pytest.mark.parametrize(
    ("parameters", "width", "aspect", "shape"),
    [
        (182.4e6, None, 32, (24, 768, 24)),  # course practice: d_model 768, 24 layers, 24 heads
        (None, 768, 32, (24, 768, 24)),
        (182.4e6, 768, None, (26, 768, 12)),
        (12 * 64 * 4096**2, None, 64, (64, 4096, 64)),  # exactly at a shape: not the one below
    ],
)
def test_a_shape_for_a_target(parameters, width, aspect, shape):
    s = cost.shape_of(shape_for_target(load_family("gpt2"), parameters, width, aspect))
    assert (s.num_layers, s.hidden_size, s.num_heads) == shape


@given(st.floats(1e5, 1e11), st.sampled_from([16, 32, 64, 128]))
def test_a_target_is_never_exceeded_and_the_next_shape_would(parameters, aspect):
    if parameters < 12 * aspect**2:
        return
    s = cost.shape_of(shape_for_target(load_family("gpt2"), parameters, None, aspect))
    assert s.num_layers * aspect == s.num_heads * aspect == s.hidden_size
    assert 12 * s.num_layers * s.hidden_size**2 <= parameters * (1 + 1e-9)
    assert 12 * (s.num_layers + 1) * (s.hidden_size + aspect) ** 2 > parameters


@pytest.mark.parametrize(
    ("parameters", "width", "aspect", "message"),
    [
        (None, 1000, 32, r"--width 1000 is not a multiple of --aspect 32, .*nearest: 992 or 1024"),
        (100, None, 32, r"--parameters 100 at --aspect 32: no layer fits; the smallest shape has width 32 and 12,288 parameters"),
        (None, 768, None, r"give two of --parameters, --width and --aspect"),
        (1e6, 768, 32, r"give two of --parameters, --width and --aspect"),
        (1e6, None, None, r"give two of --parameters, --width and --aspect"),
    ],
)
def test_targets_that_are_none_are_refused(parameters, width, aspect, message):
    with pytest.raises(UserError, match=message):
        shape_for_target(load_family("gpt2"), parameters, width, aspect)
