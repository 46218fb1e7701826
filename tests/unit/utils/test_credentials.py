"""What looks like a credential is found and hidden; hashes, paths, names and numbers are left as they are."""

import json
import string

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.config.loading import load_recipe, parse_yaml, to_yaml
from isoflop.config.recipe import Recipe
from isoflop.plan.recipe_writer import write_recipe as write_planned
from isoflop.sweep.config import load_sweep_config
from isoflop.utils.credentials import (
    find_credential,
    find_in_tree,
    hide_credentials,
    hide_in_command,
    hide_in_tree,
    names_credential,
)
from isoflop.utils.errors import UserError

# Joined here, so that nothing that scans sources for secrets takes this file for a leak.
BODY = "Pl4nted" * 6
SHAPES = {
    "a Hugging Face token": ["hf_" + BODY, "api_org_" + BODY],
    "an API key of the kind sk-": ["sk-" + BODY, "sk-proj-a_b-" + BODY, "sk-ant-api03-" + BODY],
    "a GitHub token": ["ghp_" + BODY, "gho_" + BODY, "ghs_" + BODY, "github_pat_11A_" + BODY],
    "a GitLab token": ["glpat-" + BODY],
    "an AWS access key": ["AKIA" + "PLANTED7" * 2, "ASIA" + "PLANTED7" * 2],
    "a Google API key": ["AIza" + BODY[:35]],
    "a Slack token": ["xoxb-12-" + BODY, "xoxp-" + BODY],
    "a JSON Web Token": ["eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiJwbGFudGVkIn0." + BODY],
    "an npm token": ["npm_" + BODY],
    "a PyPI token": ["pypi-AgE" + BODY],
    "a Weights & Biases API key": ["wandb_v1_" + BODY],
    "a private key": [f"-----BEGIN {kind}PRIVATE KEY-----\n{BODY}\n" for kind in ("", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED ")],
}


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch, tmp_path):
    """No token is saved, but where a test saves one."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("kind", "token"), [(kind, token) for kind, tokens in SHAPES.items() for token in tokens])
@pytest.mark.parametrize("around", ["{}", "before {} behind", "a={},b", "https://h/{}/x", "'{}'", "x_{}"])
def test_published_shapes_are_found_anywhere_and_hidden(kind, token, around):
    text = around.format(token)
    assert find_credential(text) == kind
    assert BODY[:7] not in hide_credentials(text)
    assert "***" in hide_credentials(text)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://alice:pw@host:80/x.git", "https://***@host:80/x.git"),
        ("git+https://a-token@host/x", "git+https://***@host/x"),
        ("postgresql://user:pw@[::1]/db", "postgresql://***@[::1]/db"),
        ("https://h/x?a=1&token=abc&b=2", "https://h/x?a=1&token=***&b=2"),
        ("https://h/x?sig=a%2Fb#top", "https://h/x?sig=***#top"),
        ("s3://h/x?X-Amz-Signature=ab&X-Amz-Date=1", "s3://h/x?X-Amz-Signature=***&X-Amz-Date=***"),
        ("https://h/x?api_key=abc", "https://h/x?api_key=***"),
        ("token=abc", "token=***"),
        ("pretrained=x,token=abc,dtype=float32", "pretrained=x,token=***,dtype=float32"),
        ("hub.hf_token='a b'", "hub.hf_token='***'"),
        ("WANDB_API_KEY=0123abc", "WANDB_API_KEY=***"),
        ("--auth-token=abc --lr 3", "--auth-token=*** --lr 3"),
        ("run --password hunter2 --lr 3", "run --password *** --lr 3"),
        ("secretKey=abc", "secretKey=***"),
        ("Authorization: Bearer abcdefgh12345678.x", "Authorization: Bearer ***"),
    ],
)
def test_urls_and_names_hide_what_belongs_to_them_alone(text, hidden):
    assert find_credential(text) is not None
    assert hide_credentials(text) == hidden
    assert find_credential(hidden) is None


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("password: hunter2", "password: ***"),
        ("{'token': 'abc', 'lr': 3}", "{'token': '***', 'lr': 3}"),
        ('{"api_key": "abc"}', '{"api_key": "***"}'),
        ("hub.token = 'abc': unknown", "hub.token = '***': unknown"),
    ],
)
def test_what_may_be_prose_is_hidden_but_never_refused(text, hidden):
    assert find_credential(text) is None
    assert hide_credentials(text) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "FLOPs per token: 8,178,892,800 = 3 x (2 x 100 + 4)", "bytes a token: 3.21", "log-probability a token: HellaSwag",
        "token = 3 x forward", "a secret: nobody knows",
    ],
)  # fmt: skip
def test_sentences_about_tokens_are_shown(text):
    assert hide_credentials(text) == text


@pytest.mark.parametrize("name", [
    "token", "hf_token", "HF_TOKEN", "--token", "access_token", "auth_token", "secret", "password", "passwd", "api_key", "apikey",
    "apiKey", "access_key", "secret_key", "private_key", "credentials", "AWS_SECRET_ACCESS_KEY", "X-Amz-Security-Token",
])  # fmt: skip
def test_names_of_credentials(name):
    assert names_credential(name)


@pytest.mark.parametrize("name", [
    "", "tokens", "tokens_per_step", "max_tokens", "tokenizer.name", "eos_token", "pad_token", "token_id", "keys", "keep_every",
    "key", "monkey", "secretary", "tokenizer", "max_token", "num_key_value_heads", "passwords_file", "hf_token_path",
])  # fmt: skip
def test_names_of_other_things(name):
    assert not names_credential(name)


HEX = st.text("0123456789abcdef", min_size=7, max_size=64)
NAME = st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=20)
ORDINARY = st.one_of(
    HEX,
    st.from_regex(r"[0-9a-f]{40}|[0-9a-f]{64}", fullmatch=True),
    st.lists(NAME, min_size=1, max_size=5).map("/".join),
    st.lists(NAME, min_size=1, max_size=5).map(lambda parts: "/" + "/".join(parts)),
    st.tuples(NAME, NAME).map("/".join).map("hf://datasets/{}@main/x.parquet".format),
    st.tuples(NAME, NAME, HEX).map(lambda parts: "https://huggingface.co/{}/{}/resolve/{}/model.safetensors".format(*parts)),
    st.tuples(st.sampled_from(["training.max_steps", "tokens_per_step", "max_tokens", "eos_token", "seed"]), NAME).map("=".join),
    st.integers().map(str),
    st.floats().map(str),
    st.text("abcdefghijklmnopqrstuvwxyz ,.:;'\"\n?!()", max_size=200),
)


@settings(deadline=None)
@given(ORDINARY)
def test_hashes_paths_names_numbers_and_sentences_hold_none(text):
    assert find_credential(text) is None


@settings(deadline=None)
@given(st.one_of(HEX, NAME, st.integers().map(str), st.floats().map(str)))
def test_other_values_are_not_changed(text):
    assert hide_credentials(text) == text


TOKENS = [token for tokens in SHAPES.values() for token in tokens]
SIGNS = ["token=", "--password ", "https://u:", "@h/?key=", "&", "'", '"', ", ", " = ", ": ", "***", "Bearer "]
PIECES = st.one_of(st.sampled_from(TOKENS), st.sampled_from(SIGNS), st.text(max_size=8))


@settings(deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_nothing_is_found_in_what_was_hidden_and_hiding_twice_changes_nothing(text):
    hidden = hide_credentials(text)
    assert find_credential(hidden) is None
    assert hide_credentials(hidden) == hidden


@pytest.mark.parametrize("name", ["HF_TOKEN", "MY_PASSWORD", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN_2", "SOME_CREDENTIALS"])
@pytest.mark.parametrize("value", ["plantedplanted", "a/b c+d=='\"é"])
def test_secrets_of_the_environment_are_found_in_every_form(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    forms = [value, json.dumps(value), "https://h/" + value.replace("/", "%2F").replace(" ", "%20").replace("+", "%2B")
             .replace("=", "%3D").replace("'", "%27").replace('"', "%22").replace("é", "%C3%A9")]  # fmt: skip
    for form in forms:
        assert find_credential(form) == f"the value of the environment variable {name}"
        assert hide_credentials(f"<{form}>") == f"<{form.replace(form.strip(chr(34)).removeprefix('https://h/'), '***')}>"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "plantedplanted"), ("HF_TOKEN_PATH", "plantedplanted"), ("MAX_TOKENS", "plantedplanted"),
        ("HF_TOKEN", "planted"), ("USE_TOKEN", "disabled"),
        ("SECRET_KEY_FILE", "plantedplanted"), ("EOS_TOKEN", "plantedplanted"),
        ("MONKEY", "plantedplanted"), ("MY_CREDENTIALS", str(ROOT)),
    ],
)  # fmt: skip
def test_variables_that_hold_no_secret_hide_nothing(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert find_credential(f"a {value} b") is None
    assert hide_credentials(f"a {value} b") == f"a {value} b"


def test_a_secret_is_hidden_before_the_shape_in_it(monkeypatch):
    """What remains of a longer one would show its end."""
    monkeypatch.setenv("MY_SECRET", f"hf_{BODY}+and-the-rest")
    monkeypatch.setenv("ANOTHER_SECRET", f"hf_{BODY}+and")
    assert hide_credentials(f"x hf_{BODY}+and-the-rest x") == "x *** x"


@pytest.mark.parametrize(
    ("variable", "file"), [("HF_TOKEN_PATH", "mine"), ("HF_HOME", "token"), ("XDG_CACHE_HOME", "huggingface/token")]
)
def test_the_saved_token_of_the_hub_is_found_where_the_hubs_client_reads_it(monkeypatch, tmp_path, variable, file):
    for name in ("HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("saved-and-planted\n")
    monkeypatch.setenv(variable, str(path if variable == "HF_TOKEN_PATH" else tmp_path))
    assert find_credential("a saved-and-planted b") == "the saved token of the Hub"
    assert hide_credentials("a saved-and-planted b") == "a *** b"


def test_words_of_a_command():
    words = [
        "run.py",
        "--token",
        "abc",
        "--max-tokens",
        "5",
        "a.password=x, y z",
        "--api-key",
        "--lr",
        "--secret=q",
        "m=1,token=t",
    ]
    assert hide_in_command(words) == [
        "run.py", "--token", "***", "--max-tokens", "5", "a.password=***", "--api-key", "--lr", "--secret=***", "m=1,token=***",
    ]  # fmt: skip
    assert hide_in_command([]) == []


def test_trees_are_searched_and_hidden_at_any_depth_keys_too(monkeypatch):
    tree = {"a": [{"b": f"x hf_{BODY}"}], f"npm_{BODY}": 1, "token": 12345678, "eos_token": "<end>", "trust": True, "n": None}
    assert hide_in_tree(tree) == {
        "a": [{"b": "x hf_***"}], "npm_***": 1, "token": "***", "eos_token": "<end>", "trust": True, "n": None,
    }  # fmt: skip
    assert find_in_tree(tree) == "a.0.b holds a Hugging Face token"
    assert find_in_tree({"a": {f"npm_{BODY}": 1}}) == "a.npm_*** holds an npm token"
    monkeypatch.setenv("MY_PASSWORD", "87654321")
    assert find_in_tree({"seed": 87654321}) == "seed holds the value of the environment variable MY_PASSWORD"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_passes_unchanged(path):
    text = path.read_text()
    assert find_in_tree(parse_yaml(text)) is None
    load = load_sweep_config if path.parent.name == "sweeps" else load_recipe
    assert load(path) is not None
    assert hide_credentials(text) == text


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/performance.md", "CHANGELOG.md"])
def test_pages_of_this_project_hold_none(page):
    assert find_credential((ROOT / page).read_text()) is None


PLANTED = ["hf_" + BODY, "https://u:" + BODY + "@h/x", "https://h/x?token=" + BODY, "token=" + BODY]


@pytest.mark.parametrize("value", PLANTED)
@pytest.mark.parametrize("key", [
    "output.run_dir", "training.max_steps", "evaluation.sample_prompts", "data.source.files", "nowhere", "hub.repo_id", "law",
])  # fmt: skip
def test_a_recipe_with_a_credential_is_refused_without_showing_it(write_recipe, key, value):
    given = f"[{value!r}]" if key in ("evaluation.sample_prompts", "data.source.files") else value
    with pytest.raises(UserError) as refused:
        load_recipe(write_recipe(), [f"{key}={given}"])
    assert f": {key}" in str(refused.value)
    assert " holds a" in str(refused.value)
    assert "HF_TOKEN or hf auth login" in str(refused.value)
    assert BODY not in str(refused.value)


def test_a_copy_of_a_recipe_is_checked_before_it_is_written(toy_recipe, tmp_path):
    recipe = toy_recipe().model_copy(update={"law": f"https://h/law.json?token={BODY}"})
    with pytest.raises(UserError, match=r"mine.yaml: law holds a credential in a URL"):
        write_planned(tmp_path / "mine.yaml", recipe, [])
    assert not (tmp_path / "mine.yaml").exists()
    write_planned(tmp_path / "mine.yaml", toy_recipe(), [f"Planned from hf_{BODY}"])
    assert (tmp_path / "mine.yaml").read_text().startswith("# Planned from hf_***\n")


def test_a_sweep_with_a_credential_is_refused_without_showing_it(write_recipe, tmp_path):
    tree = {"recipe": str(write_recipe()), "tokens_per_parameter": [1.0], "parameters": [2e4], "aspect_ratio": 32}
    for more, key in (
        ({"output_dir": f"runs/hf_{BODY}"}, "output_dir"),
        ({"output_dir": "runs/a", "overrides": {"output.run_dir": f"hf_{BODY}"}}, "overrides.output.run_dir"),
    ):
        (tmp_path / "sweep.yaml").write_text(json.dumps(tree | more))
        with pytest.raises(UserError, match=rf"sweep.yaml: {key} holds a Hugging Face token") as refused:
            load_sweep_config(tmp_path / "sweep.yaml")
        assert BODY not in str(refused.value)


def test_a_recipe_reads_back_as_it_was_written(toy_recipe, tmp_path):
    (tmp_path / "again.yaml").write_text(to_yaml(toy_recipe()))
    assert load_recipe(tmp_path / "again.yaml") == toy_recipe()
    assert isinstance(toy_recipe(), Recipe)
