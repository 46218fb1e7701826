import json

import jsonschema
import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from isoflop.errors import UserError
from isoflop.recipe_file import json_schema, load_recipe, parse_yaml, to_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), ("1_0e2", 1000.0), (".5e1", 5.0), ("524_288", 524288), ("e4", "e4")],
)
def test_scientific_notation_is_a_number(text, value):
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_prints_is_read_back(number):
    assert parse_yaml(repr(number)) == number


def test_overrides_come_last_and_are_typed(write_recipe):
    recipe = load_recipe(write_recipe(), ["optimizer.peak_learning_rate=6e-4", "seed=7", "evaluation.sample_prompts=[a, b]"])
    assert recipe.optimizer.peak_learning_rate == 6e-4
    assert recipe.seed == 7
    assert recipe.evaluation.sample_prompts == ["a", "b"]


def test_a_duration_on_the_command_line_replaces_the_recipes_own(write_recipe):
    recipe = load_recipe(write_recipe(), ["training.max_tokens=1024"])
    assert (recipe.training.max_steps, recipe.training.max_tokens, recipe.training.num_steps(0)) == (None, 1024, 4)


def test_a_resolved_recipe_reads_back_equal(write_recipe, tmp_path):
    recipe = load_recipe(write_recipe())
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_the_schema_in_the_tree_is_current_and_accepts_every_recipe():
    assert (ROOT / "recipes/schema.json").read_text() == json_schema()
    schema = json.loads(json_schema())
    for file in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes/ablations").glob("*.yaml")]:
        jsonschema.validate(parse_yaml(file.read_text()), schema)


BAD = {
    "unknown key": (
        {"training": {"micro_bach_size": 4}},
        r"training.micro_bach_size: unknown key; did you mean micro_batch_size\?",
    ),
    "unknown section": ({"trainning": {}}, r"trainning: unknown key; did you mean training\?"),
    "unknown key of a model": ({"model": {"hidden_sise": 4}}, r"model.hidden_sise: unknown key; did you mean hidden_size\?"),
    "unknown key of a source": (
        {"data": {"source": {"kind": "text", "files": ["a"], "fils": 1}}},
        r"data.source.fils: unknown key",
    ),
    "unknown model type": ({"model": {"model_type": "mamba"}}, r"model: Input tag 'mamba'.*'gpt2', 'llama', 'hybrid'"),
    "wrong type": ({"training": {"max_steps": "ten"}}, r"training.max_steps = 'ten': Input should be a valid integer"),
    "a fraction where whole": ({"training": {"max_steps": 2.5}}, r"training.max_steps = 2.5: "),
    "a number as a switch": ({"training": {"compile": 2}}, r"training.compile = 2: Input should be True, False or 'auto'"),
    "negative": ({"optimizer": {"peak_learning_rate": -1.0}}, r"peak_learning_rate = -1.0: Input should be greater than 0"),
    "two durations": ({"training": {"max_tokens": 1}}, r"give exactly one of max_steps, max_tokens, tokens_per_parameter"),
    "no tokenizer": ({"tokenizer": {"train_vocab_size": None}}, r"give exactly one of name, train_vocab_size \(given: none\)"),
    "a revision of nothing": ({"tokenizer": {"revision": "v1"}}, r"revision is of a tokenizer on the Hub.*leave it out"),
    "does not divide": ({"training": {"tokens_per_step": 250}}, r"tokens_per_step = 250 is not a multiple of 128.*128 and 256"),
    "heads": (
        {"model": {"num_attention_heads": 5}},
        r"hidden_size = 32 is not a multiple of num_attention_heads = 5; .*\[2, 4\]",
    ),
    "key-value heads": (
        {"model": {"num_key_value_heads": 3}},
        r"num_attention_heads = 4 is not a multiple of num_key_value_heads = 3",
    ),
    "unknown choice of a hybrid": (
        {"model": {"model_type": "hybrid", "positions": "alibi"}},
        r"model.positions = 'alibi': Input should be 'learned', 'rope' or 'none'",
    ),
    "unknown key of a hybrid": (
        {"model": {"model_type": "hybrid", "nrom": "rmsnorm"}},
        r"model.nrom: unknown key; did you mean norm\?",
    ),
    "unknown preset": ({"model": {"model_type": "hybrid", "preset": ["gpt3"]}}, r"model.preset = \['gpt3'\]: Input should be"),
    "heads of a hybrid without a size": (
        {"model": {"model_type": "hybrid", "num_attention_heads": 5, "num_key_value_heads": 5}},
        r"hidden_size = 32 is not a multiple of num_attention_heads = 5; set head_dim, which is free here \(6 is nearest\)",
    ),
    "key-value heads of a hybrid": (
        {"model": {"model_type": "hybrid", "num_key_value_heads": 3}},
        r"num_attention_heads = 4 is not a multiple of num_key_value_heads = 3; .*\[2, 4\]",
    ),
    "odd heads that turn": (
        {"model": {"model_type": "hybrid", "positions": "rope", "head_dim": 135}},
        r"head_dim = 135 is odd, and rotary positions turn pairs of dimensions; nearest: 134 or 136",
    ),
    "a soft cap of nothing": (
        {"model": {"model_type": "hybrid", "final_logit_softcapping": 0.0}},
        r"model.final_logit_softcapping = 0.0: Input should be greater than 0",
    ),
    "too long": (
        {"training": {"sequence_length": 128, "tokens_per_step": 512}},
        r"sequence_length = 128 is beyond the model's 64 positions",
    ),
    "sample too long": (
        {"evaluation": {"sample_tokens": 64}},
        r"sample_tokens = 64 leaves no room .* 64 positions; sample fewer",
    ),
    "empty prompt": (
        {"evaluation": {"sample_prompts": [""]}},
        r"evaluation.sample_prompts.0 = '': String should have at least 1",
    ),
    "small vocabulary": ({"model": {"vocab_size": 299}}, r"train_vocab_size = 300 is beyond model.vocab_size = 299"),
    "missing": ({"optimizer": {"peak_learning_rate": ...}}, r"optimizer.peak_learning_rate is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes_name_key_value_rule_and_remedy(case, write_recipe):
    changes, message = BAD[case]
    file = write_recipe()
    tree = yaml.safe_load(file.read_text())
    for section, values in changes.items():
        tree.setdefault(section, {}).update(values)
    tree = {s: {k: v for k, v in values.items() if v is not ...} for s, values in tree.items()}
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=message):
        load_recipe(file)


def test_the_18_heads_of_the_founding_table_are_refused_with_the_nearest_that_divide():
    with pytest.raises(
        UserError, match=r"n_embd = 2432 is not a multiple of n_head = 18; nearest n_head that divide: \[16, 19\]"
    ):
        load_recipe(ROOT / "recipes/gpt2_1.36b.yaml", ["model.n_head=18"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "byte 0 is not UTF-8"), (b"a: [", "is not YAML"), (b"- 1", "is not a mapping of sections")],
)
def test_files_that_are_no_recipe(content, message, tmp_path):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "x.yaml")


def test_a_missing_recipe_names_the_nearest(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"recipes/quickstrat.yaml does not exist; did you mean recipes/quickstart.yaml\?"):
        load_recipe("recipes/quickstrat.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps", "'training.max_steps' is not key=value; write it as section.key=value"),
        ("=3", "'=3' is not key=value"),
        ("training.max_steps=[", r"'\[' is not a YAML value"),
        ("training.max_steps=!!python/object:x", "is not a YAML value"),
        ("seed.x=1", "seed is a value, not a section"),
    ],
)
def test_overrides_that_are_none(override, message, write_recipe):
    file = write_recipe()
    file.write_text(file.read_text() + "seed: 3\n")
    with pytest.raises(UserError, match=message):
        load_recipe(file, [override])


def test_outside_the_checkout_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no recipes/ here: run from the root of the checkout"):
        load_recipe("recipes/quickstart.yaml")
