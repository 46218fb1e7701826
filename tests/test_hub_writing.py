"""The stand-in takes what the real client sends, and refuses as the Hub does."""

import hashlib
from pathlib import Path

import pytest
from hub import Hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

LARGE = b"weights " * 50_000


@pytest.fixture(scope="module", autouse=True)
def basic_transfers():
    """Without xet, a protocol of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield


@pytest.fixture
def hub():
    with Hub() as standin:
        standin.account("hf_alice", "alice")
        yield standin


@pytest.fixture
def alice(hub):
    api = HfApi(endpoint=hub.url, token="hf_alice")
    api.create_repo("alice/model", private=True)
    return api


def push(api, **files):
    operations = [CommitOperationAdd(name.replace("__", "."), content) for name, content in files.items()]
    return api.create_commit("alice/model", operations, commit_message="push").oid


def test_what_is_pushed_is_there(hub, alice, tmp_path):
    oid = push(alice, config__json=b"{}", model__safetensors=LARGE)
    assert hub.files("alice/model") == hub.files("alice/model", oid)
    assert set(hub.files("alice/model")) == {".gitattributes", "config.json", "model.safetensors"}
    file = alice.hf_hub_download("alice/model", "model.safetensors", cache_dir=tmp_path)
    assert Path(file).read_bytes() == LARGE
    info = alice.model_info("alice/model", files_metadata=False)
    assert (info.sha, info.private) == (oid, True)
    large = alice.get_paths_info("alice/model", "model.safetensors")[0]
    assert (large.size, large.lfs.sha256) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())


def test_a_second_push_sends_only_what_is_new(hub, alice):
    first = push(alice, config__json=b"{}", model__safetensors=LARGE)
    sent = {path: count for path, count in hub.received.items() if path.startswith("/lfs/")}
    assert sum(sent.values()) == len(LARGE)
    assert push(alice, config__json=b"{}", model__safetensors=LARGE) == first
    second = push(alice, config__json=b"{ }", model__safetensors=LARGE)
    assert second != first
    assert {path: count for path, count in hub.received.items() if path.startswith("/lfs/")} == sent
    alice.create_commit("alice/model", [CommitOperationDelete("config.json")], commit_message="out")
    assert "config.json" not in hub.files("alice/model")
    assert hub.files("alice/model", first)["config.json"] == b"{}"


def test_branches_and_tags_stand_for_commits(hub, alice):
    first = push(alice, config__json=b"1")
    alice.create_branch("alice/model", branch="checkpoints")
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_branch("alice/model", branch="checkpoints")
    alice.create_tag("alice/model", tag="step-5", revision=first)
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_tag("alice/model", tag="step-5", revision=first)
    push(alice, config__json=b"2")
    assert [hub.files("alice/model", name)["config.json"] for name in ("main", "checkpoints", "step-5")] == [b"2", b"1", b"1"]
    refs = alice.list_repo_refs("alice/model")
    assert [branch.name for branch in refs.branches] == ["main", "checkpoints"]
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("step-5", first)]


def test_strangers_are_refused_as_the_hub_does(hub, alice):
    hub.account("hf_bob", "bob")
    hub.account("hf_reads", "alice", role="read")
    bob, reader, nobody = (HfApi(endpoint=hub.url, token=token) for token in ("hf_bob", "hf_reads", "hf_wrong"))
    assert (alice.whoami()["name"], bob.whoami()["name"]) == ("alice", "bob")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        nobody.whoami()
    for stranger in (bob, nobody):
        with pytest.raises(RepositoryNotFoundError):
            stranger.list_repo_refs("alice/model")
    for api in (bob, reader):
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_repo("alice/other")
    with pytest.raises(HfHubHTTPError, match="403"):
        push(reader, config__json=b"{}")
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_repo("alice/model")
    alice.create_repo("alice/model", exist_ok=True)
