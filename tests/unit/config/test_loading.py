import json
import re

import jsonschema
import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from isoflop.config.loading import json_schema, load_recipe, parse_yaml, to_yaml
from isoflop.config.recipe import Recipe
from isoflop.utils.errors import UserError


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
    "unknown model type": ({"model": {"model_type": "mamba"}}, r"model: model_type = mamba must be one of gpt2, llama, hybrid"),
    "wrong type": ({"training": {"max_steps": "ten"}}, r"training.max_steps = 'ten': must be a whole number$"),
    "a fraction where whole": ({"training": {"max_steps": 2.5}}, r"training.max_steps = 2.5: must be a whole number, e.g. 2$"),
    "a number as a switch": ({"training": {"compile": 2}}, r"training.compile = 2: must be True, False or 'auto'"),
    "one file, not a list": (
        {"data": {"source": {"kind": "json", "files": "shards/*.jsonl"}}},
        r"data.source.files = 'shards/\*.jsonl': must be a list, e.g. \[\"shards/\*.jsonl\"\]$",
    ),
    "a list of no text": (
        {"data": {"source": {"kind": "json", "files": [1]}}},
        r"data.source.files.0 = 1: must be text, e.g. \"1\"$",
    ),
    "an empty list": ({"data": {"source": {"kind": "json", "files": []}}}, r"files = \[\]: must have at least 1 entry$"),
    "a number as text": ({"optimizer": {"peak_learning_rate": "0.0003"}}, r"= '0.0003': must be a number, e.g. 0.0003$"),
    "a switch as text": ({"data": {"filter": {"drop_duplicates": "yes"}}}, r"= 'yes': must be true or false, e.g. true$"),
    "a section as text": ({"data": {"filter": "all"}}, r"data.filter = 'all': must be a mapping of keys to values$"),
    "a source of no kind": ({"data": {"source": {"files": ["a"]}}}, r"data.source: kind is missing; add it$"),
    "below a bound": ({"tokenizer": {"train_vocab_size": 256}}, r"tokenizer.train_vocab_size = 256: must be at least 257$"),
    "negative": ({"optimizer": {"peak_learning_rate": -1.0}}, r"peak_learning_rate = -1.0: must be above 0"),
    "two durations": ({"training": {"max_tokens": 1}}, r"give exactly one of max_steps, max_tokens, tokens_per_parameter"),
    "no tokenizer": ({"tokenizer": {"train_vocab_size": None}}, r"give exactly one of name, train_vocab_size \(given: none\)"),
    "a revision of nothing": ({"tokenizer": {"revision": "v1"}}, r"revision belongs to a tokenizer on the Hub.*leave it out"),
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
        r"model.positions = 'alibi': must be 'learned', 'rope' or 'none'",
    ),
    "unknown key of a hybrid": (
        {"model": {"model_type": "hybrid", "nrom": "rmsnorm"}},
        r"model.nrom: unknown key; did you mean norm\?",
    ),
    "unknown preset": (
        {"model": {"model_type": "hybrid", "preset": ["gpt3"]}},
        r"model.preset = \['gpt3'\]: must be 'gpt2' or 'llama'",
    ),
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
        r"head_dim = 135 is odd, and rotary positions rotate pairs of dimensions; nearest: 134 or 136",
    ),
    "a soft cap of nothing": (
        {"model": {"model_type": "hybrid", "final_logit_softcapping": 0.0}},
        r"model.final_logit_softcapping = 0.0: must be above 0",
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
        r"evaluation.sample_prompts.0 = '': must have at least 1 character",
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


def test_an_error_between_two_fields_is_listed_with_the_file_and_all_other_errors(write_recipe):
    file = write_recipe()
    with pytest.raises(UserError) as error:
        load_recipe(file, ["training.tokens_per_step=250", "optimizer.beta1=2", "hub.licence=mit"])
    first, *lines = str(error.value).splitlines()
    assert first == f"recipe {file}: "
    assert [line.split()[0] for line in lines] == ["training.tokens_per_step", "optimizer.beta1", "hub.licence:"]


def test_a_credential_is_refused_with_the_files_name_and_never_shown(write_recipe):
    file, token = write_recipe(), "hf_" + "a" * 34
    with pytest.raises(UserError, match=re.escape(f"recipe {file}: evaluation.sample_prompts.0 holds a Hugging Face token")):
        load_recipe(file, [f"evaluation.sample_prompts=[{token}]"])
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate({"hub": {"repo_id": token}})
    assert token not in str(error.value)


def test_a_recipe_of_an_earlier_version_with_a_contamination_report_is_refused(write_recipe):
    saved_by_a_run = write_recipe(data__contamination=None)
    assert "contamination" not in to_yaml(load_recipe(saved_by_a_run))
    with pytest.raises(UserError, match=r"data: contamination is not reported any more.*delete the key.*datatrove"):
        load_recipe(write_recipe(data__contamination={"sets": {"exam": {"kind": "json", "files": ["exam.jsonl"]}}}))


def test_another_model_type_is_explained_in_a_line_a_problem(write_recipe):
    """Each key of the other family by the name that this one has for it, and the known keys once."""
    file = write_recipe()
    with pytest.raises(UserError) as error:
        load_recipe(file, ["model.model_type=gpt2", "model.colour=1", "model.zzz=2"])
    lines = str(error.value).splitlines()
    assert lines[0] == f"recipe {file}: "
    assert lines[1:5] == [f"  model.{key} is missing; add it" for key in ("n_positions", "n_embd", "n_layer", "n_head")]
    pairs = {"n_positions": "max_position_embeddings", "n_embd": "hidden_size", "n_inner": "intermediate_size"}
    pairs |= {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    assert len(set(lines[5:9])) == 4
    assert set(lines[5:9]) < {f"  model.{other}: unknown key; did you mean {name}?" for name, other in pairs.items()}
    assert lines[9:] == ["  and 4 more"]
    assert max(map(len, lines)) < 120


def test_known_keys_are_listed_once(write_recipe):
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(), ["hub.qqq=1", "hub.zzz=2", "hub.licence=mit"])
    first, *others = str(error.value).splitlines()[1:]
    assert first == "  hub.qqq: unknown key; known here: license, private, push_every, repo_id"
    assert others == ["  hub.zzz: unknown key", "  hub.licence: unknown key; did you mean license?"]


def test_the_18_heads_of_the_original_report_are_refused_with_the_nearest_that_divide():
    with pytest.raises(
        UserError, match=r"n_embd = 2432 is not a multiple of n_head = 18; nearest n_head that divide: \[16, 19\]"
    ):
        load_recipe(ROOT / "recipes/gpt2_1.36b.yaml", ["model.n_head=18"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "byte 0 is not UTF-8"), (b"a: [", "is not YAML"), (b"- 1", "is not a mapping of sections")],
)
def test_files_that_are_not_recipes(content, message, tmp_path):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "x.yaml")


def test_a_section_given_twice_is_refused_with_both_lines(write_recipe):
    file = write_recipe()
    text = "# first\n" + file.read_text()
    lines = text.splitlines()
    first = lines.index("training:") + 1
    file.write_text(text + "training: {micro_batch_size: 1}\n")
    message = f"the key training is given in lines {first} and {len(lines) + 1}; join the two, or delete one"
    with pytest.raises(UserError) as error:
        load_recipe(file)
    assert str(error.value) == f"recipe {file} is not YAML: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "the key b is given in lines 2 and 4"),
        ("x:\n- {k: 1}\n- {k: 1, 'k': 2}\n", "the key k is given twice in line 3"),
        ('{"seed": 1,\n "seed": 2}', "the key seed is given in lines 1 and 2"),
        ("a: {b: 1}\nc: {b: 1}\n", None),
        ("base: &b {x: 1}\nmine:\n  <<: *b\n  x: 2\n", None),
    ],
)
def test_keys_are_unique_in_their_mapping_alone(text, message):
    if message is None:
        assert parse_yaml(text) == yaml.safe_load(text)
        return
    with pytest.raises(yaml.YAMLError, match=message):
        parse_yaml(text)


@given(st.lists(st.sampled_from("abcdefgh"), max_size=8))
def test_a_mapping_is_read_exactly_where_its_keys_differ(keys):
    text = "".join(f"{key}: {number}\n" for number, key in enumerate(keys))
    if len(set(keys)) == len(keys):
        assert (parse_yaml(text) or {}) == {key: number for number, key in enumerate(keys)}
    else:
        with pytest.raises(yaml.YAMLError, match="is given in lines"):
            parse_yaml(text)


def test_an_override_that_gives_a_key_twice_is_refused(write_recipe):
    with pytest.raises(UserError, match=r"is not a YAML value: the key kind is given twice in line 1"):
        load_recipe(write_recipe(), ["data.source={kind: python_stdlib, kind: text}"])


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
def test_invalid_overrides_are_refused(override, message, write_recipe):
    file = write_recipe()
    file.write_text(file.read_text() + "seed: 3\n")
    with pytest.raises(UserError, match=message):
        load_recipe(file, [override])
