"""The stand-in takes what the real client sends, and refuses as the Hub does."""

import hashlib
import http.client
import json
import subprocess
import sys
from pathlib import Path

import pytest
from httpx2 import TransportError
from hub import Hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

NAME = "alice/model"
LARGE, OTHER = b"weights " * 50_000, b"others' " * 40_000


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
    api.create_repo(NAME, private=True)
    return api


def push(api, **options):
    """Commit files, given by name, with '__' for the dot."""
    names = [name for name in options if "__" in name]
    operations = [CommitOperationAdd(name.replace("__", "."), options.pop(name)) for name in names]
    return api.create_commit(NAME, operations, commit_message=f"push {', '.join(names)}", **options).oid


def large_bytes(hub):
    return {path: count for path, count in hub.received.items() if path.startswith("/lfs/")}


def place(content):
    return f"/lfs/{hashlib.sha256(content).hexdigest()}"


def test_what_is_pushed_is_there(hub, alice, tmp_path):
    contents = {
        "config.json": b"{}",
        "model.safetensors": LARGE,
        "logs/events.out.tfevents.0": b"events",
        "loss.png": b"\x89PNG\0",
    }
    assert alice.repo_info(NAME).private
    (tmp_path / "pushed/logs").mkdir(parents=True)
    for name, content in contents.items():
        (tmp_path / "pushed" / name).write_bytes(content)
    pushed = alice.upload_folder(repo_id=NAME, folder_path=tmp_path / "pushed")
    assert pushed.commit_url == f"{hub.url}/{NAME}/commit/{pushed.oid}"
    assert alice.repo_info(NAME).sha == pushed.oid
    folder = Path(alice.snapshot_download(NAME, cache_dir=tmp_path / "cache"))
    attributes = (folder / ".gitattributes").read_bytes()
    assert b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n" in attributes
    read = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert read == hub.files(NAME) == hub.files(NAME, pushed.oid) == contents | {".gitattributes": attributes}
    listed = {file.path: file for file in alice.list_repo_tree(NAME, recursive=True) if file.path in contents}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items() if name != "config.json"}
    assert {name: file.lfs.sha256 for name, file in listed.items() if file.lfs} == hashes
    assert {name: file.size for name, file in listed.items()} == {name: len(content) for name, content in contents.items()}
    meta = alice.get_hf_file_metadata(url=f"{hub.url}/{NAME}/resolve/main/model.safetensors")
    assert (meta.etag, meta.size, meta.commit_hash) == (hashes["model.safetensors"], len(LARGE), pushed.oid)


def test_a_second_push_sends_only_what_is_new(hub, alice):
    first = push(alice, config__json=b"{}", model__safetensors=LARGE)
    assert large_bytes(hub) == {place(LARGE): len(LARGE)}
    assert push(alice, config__json=b"{}", model__safetensors=LARGE) == first
    assert hub.requests.count(("POST", f"/api/models/{NAME}/commit/main")) == 1
    second = push(alice, config__json=b"{ }", copy__safetensors=LARGE)
    assert second != first
    assert large_bytes(hub) == {place(LARGE): len(LARGE)}
    alice.create_commit(NAME, [CommitOperationDelete("config.json")], commit_message="out")
    assert set(hub.files(NAME)) == {".gitattributes", "model.safetensors", "copy.safetensors"}
    assert set(hub.files(NAME, first)) == {".gitattributes", "model.safetensors", "config.json"}


def test_a_push_cut_in_a_large_file_leaves_the_branch_as_it_was_and_the_next_sends_what_is_missing(hub, alice):
    hub.break_file(place(OTHER), after=1000, method="PUT")
    hub.break_file(place(OTHER), status=501, method="PUT")  # which the client does not try again after
    with pytest.raises(RuntimeError, match=r"Error while uploading 'b\.safetensors'"):
        push(alice, config__json=b"{}", a__safetensors=LARGE, b__safetensors=OTHER)
    assert set(hub.files(NAME)) == {".gitattributes"}
    assert large_bytes(hub) == {place(LARGE): len(LARGE), place(OTHER): 1000 + len(OTHER)}
    hub.received.clear()
    push(alice, config__json=b"{}", a__safetensors=LARGE, b__safetensors=OTHER)
    assert large_bytes(hub) == {place(OTHER): len(OTHER)}
    assert hub.files(NAME)["b.safetensors"] == OTHER


def test_a_commit_takes_effect_whole_or_not_at_all(hub, alice):
    before = hub.files(NAME)
    hub.break_file("/commit/main", after=10, method="POST")
    with pytest.raises(TransportError):
        push(alice, config__json=b"{}")
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        alice.create_commit(
            NAME, [CommitOperationAdd("a.txt", b"a"), CommitOperationDelete("b.txt")], commit_message="one is not there"
        )
    lines = [
        {"key": "header", "value": {"summary": "by hand"}},
        {"key": "file", "value": {"path": "a.txt", "content": "YQ=="}},
        {"key": "lfsFile", "value": {"path": "b.bin", "oid": "0" * 64, "size": 1}},
    ]
    assert post(hub, "commit/main", lines) == 400  # a large file that was not sent
    assert post(hub, "commit/main", [*lines[:2], {"key": "movedFile", "value": {}}]) == 400
    with pytest.raises(http.client.RemoteDisconnected):
        post(hub, "commit/main", lines[:2], hang_up_after=1)
    assert hub.files(NAME) == before
    assert post(hub, "commit/main", lines[:2]) == 200
    assert hub.files(NAME) == before | {"a.txt": b"a"}


def post(hub, path, lines, hang_up_after=None):
    """The status of a request made by hand, of which only some lines may be sent."""
    body = [json.dumps(line).encode() + b"\n" for line in lines]
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    headers = {"Authorization": "Bearer hf_alice", "Content-Length": str(len(b"".join(body)))}
    connection.request("POST", f"/api/models/{NAME}/{path}", b"".join(body[:hang_up_after]), headers)
    if hang_up_after:
        connection.sock.shutdown(1)  # of its sending half
    return connection.getresponse().status


def test_branches_and_tags_stand_for_commits(hub, alice, tmp_path):
    first = push(alice, config__json=b"1")
    alice.create_branch(NAME, branch="checkpoints")
    alice.create_tag(NAME, tag="step-5", revision=first)
    for create in (alice.create_branch, alice.create_tag):
        name = {"branch": "checkpoints"} if create == alice.create_branch else {"tag": "step-5"}
        with pytest.raises(HfHubHTTPError, match="409"):
            create(NAME, **name)
        create(NAME, **name, exist_ok=True)
        with pytest.raises(RevisionNotFoundError):
            create(NAME, revision="nowhere", **name)
    second = push(alice, config__json=b"2", revision="checkpoints")
    third = push(alice, config__json=b"3")
    names = {"main": b"3", "checkpoints": b"2", "step-5": b"1", second: b"2"}
    for name, content in names.items():
        file = alice.hf_hub_download(NAME, "config.json", revision=name, cache_dir=tmp_path)
        assert Path(file).read_bytes() == hub.files(NAME, name)["config.json"] == content
    refs = alice.list_repo_refs(NAME)
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": third, "checkpoints": second}
    assert {tag.name: (tag.ref, tag.target_commit) for tag in refs.tags} == {"step-5": ("refs/tags/step-5", first)}
    with pytest.raises(RevisionNotFoundError):
        push(alice, config__json=b"4", revision="nowhere")
    alice.delete_branch(NAME, branch="checkpoints")
    alice.delete_tag(NAME, tag="step-5")
    assert [(ref.name, ref.target_commit) for ref in alice.list_repo_refs(NAME).branches] == [("main", third)]
    with pytest.raises(RevisionNotFoundError):
        alice.delete_tag(NAME, tag="step-5")


def test_commits_are_listed_from_the_newest_in_pages(hub, alice, monkeypatch):
    monkeypatch.setattr("hub.PAGE", 2)
    oids = [push(alice, config__json=content) for content in (b"1", b"2", b"1", b"3")]
    assert len(set(oids)) == 4
    listed = alice.list_repo_commits(NAME)
    assert [commit.commit_id for commit in listed[:-1]] == oids[::-1]
    assert [(commit.title, commit.authors) for commit in listed[-2:]] == [
        ("push config__json", ["alice"]),
        ("initial commit", ["alice"]),
    ]
    assert hub.requests.count(("GET", f"/api/models/{NAME}/commits/main")) == 3


def test_strangers_are_refused_as_the_hub_does(hub, alice):
    push(alice, config__json=b"{}")
    alice.create_repo("alice/open")
    hub.account("hf_bob", "bob")
    hub.account("hf_reads", "alice", role="read")
    bob, reader, nobody = (HfApi(endpoint=hub.url, token=token) for token in ("hf_bob", "hf_reads", "hf_wrong"))
    assert (alice.whoami()["name"], bob.whoami()["name"]) == ("alice", "bob")
    assert [api.whoami()["auth"]["accessToken"]["role"] for api in (alice, reader)] == ["write", "read"]
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as caught:
        nobody.whoami()
    assert (caught.value.response.status_code, caught.value.response.json()) == (401, {"error": "Invalid username or password."})
    for stranger, status in ((bob, 404), (nobody, 401)):
        for ask in (stranger.repo_info, stranger.list_repo_refs, stranger.list_repo_files, push_to):
            with pytest.raises(RepositoryNotFoundError, match=str(status)):
                ask(NAME) if ask != push_to else push_to(stranger, NAME)
    for api in (bob, reader):
        with pytest.raises(HfHubHTTPError, match='You don\'t have the rights to create a model under the namespace "alice"'):
            api.create_repo("alice/other")
        with pytest.raises(HfHubHTTPError, match="403 Forbidden: Forbidden: pass `create_pr=1`"):
            push_to(api, "alice/open")
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            api.create_tag("alice/open", tag="v1")
    with pytest.raises(HfHubHTTPError, match="401"):
        nobody.create_repo("nobody/other")
    assert bob.list_repo_files("alice/open") == [".gitattributes"]
    assert reader.list_repo_files(NAME) == [".gitattributes", "config.json"]


def push_to(api, name):
    return api.create_commit(name, [CommitOperationAdd("a.txt", b"a")], commit_message="push")


def test_repositories_are_created_once_and_deleted(hub, alice):
    with pytest.raises(HfHubHTTPError, match="You already created this model repo"):
        alice.create_repo(NAME)
    assert alice.create_repo(NAME, exist_ok=True).repo_id == NAME
    assert alice.create_repo("short").repo_id == "alice/short"
    assert not alice.repo_info("alice/short").private
    requests = len(hub.requests)
    for invalid in ("alice/mo--del", "alice/modèle", "alice/model.git", "alice/models/model", "alice/" + "a" * 97):
        with pytest.raises(HFValidationError):  # of the client
            alice.create_repo(invalid)
    assert len(hub.requests) == requests
    alice.delete_repo(NAME)
    with pytest.raises(RepositoryNotFoundError):
        alice.repo_info(NAME)
    with pytest.raises(RepositoryNotFoundError):
        alice.delete_repo(NAME)


def card(**changes):
    result = EvalResult(
        task_type="text-generation", dataset_type="org/web", dataset_name="web", metric_type="loss", metric_value=2.5
    )
    fields = {
        "language": "en", "license": "apache-2.0", "library_name": "transformers", "tags": ["pretraining"],
        "datasets": ["org/web"], "model_name": "model", "eval_results": [result],
    }  # fmt: skip
    return ModelCard(f"---\n{ModelCardData(**fields | changes).to_yaml()}\n---\n# A model\n")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (str(card(license="apache")), '"license" must be one of'),
        (str(card(tags=[1])), '"tags" with value 1 is not valid'),
        (str(card(language=[False])), '"language" with value False is not valid'),
        (str(card(datasets=["/data/web"])), "\"datasets\" with value '/data/web' is not valid"),
        (str(card()).replace("type: text-generation", "name: text"), '"model-index.results.task.type" is required'),
        (str(card()).replace("      name: web\n", ""), '"model-index.results.dataset.name" is required'),
        (str(card()).replace("value: 2.5", "name: loss"), '"model-index.results.metrics.value" is required'),
        ("---\ntags: [\n---\n", "bad YAML"),
    ],
)
def test_a_card_that_breaks_a_rule_of_the_hub_is_refused_before_anything_is_sent(hub, alice, content, reason):
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md") as caught:
        push(alice, README__md=content.encode(), model__safetensors=LARGE)
    assert reason in str(caught.value)
    assert large_bytes(hub) == {}


def test_a_card_asks_the_hub_whether_it_is_valid(hub, alice, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    card().validate()
    assert hub.requests[-1] == ("POST", "/api/validate-yaml")
    with pytest.raises(ValueError, match=r'^"license" must be one of \[apache-2\.0, mit, '):
        card(license="apache").validate()
    push(alice, README__md=str(card()).encode())
    assert hub.files(NAME)["README.md"] == str(card()).encode()


PUBLISH = """
import sys, torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
model.save_pretrained(sys.argv[1])
HfApi().create_repo("alice/model")
HfApi().upload_folder(repo_id="alice/model", folder_path=sys.argv[1])
ids = torch.arange(32)[None]
assert torch.equal(AutoModelForCausalLM.from_pretrained("alice/model")(ids).logits, model(ids).logits)
"""


def test_a_model_saved_by_transformers_is_pushed_and_opens_by_its_name(hub, tmp_path):
    command = [sys.executable, "-c", PUBLISH, str(tmp_path / "model")]
    done = subprocess.run(command, env=hub.env(tmp_path / "home", "hf_alice"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    saved = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    assert {name: content for name, content in hub.files(NAME).items() if name != ".gitattributes"} == saved
    assert sum(large_bytes(hub).values()) == len(saved["model.safetensors"])
