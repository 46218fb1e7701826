"""A run goes to the Hub by the real client, over HTTP to the stand-in, and is read back by what users have."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, metrics_of, run_command
from hub import Hub

from isoflop.config.loading import to_yaml
from isoflop.publish.checkpoints import push_checkpoints
from isoflop.publish.publishing import Target
from isoflop.publish.redaction import published_recipe
from isoflop.publish.upload import HubSilent, hub_error
from isoflop.train.export import export_checkpoint
from isoflop.train.run_folder import RunFolder
from isoflop.utils.errors import UserError
from isoflop.utils.io import lock

pytestmark = pytest.mark.processes

TOKEN = "hf_abcdefghijklmnopqrst"
HOST = "a-planted-host-name"
TOKENIZER = "tokenizer_config.json"
OF_THE_PROCESS = {"local_files_only": True}  # transformers notes there whether the process that saved it was offline


def copy_run(recipe, folder, **hub):
    """A finished run at another place, on a host whose name is known, perhaps with keys in its recipe's hub section."""
    shutil.copytree(recipe.output.run_dir, folder)
    environment = json.loads((folder / "environment.json").read_text())
    environment["hardware"]["host"] = HOST
    (folder / "environment.json").write_text(json.dumps(environment))
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    tree["hub"] |= hub
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder


def on(hub, home, *command, token=TOKEN, **kwargs):
    """Run a command whose Hub is the stand-in; no token may be in what it says."""
    done = run_command(sys.executable, *command, env=hub.env(home, token), **kwargs)
    assert TOKEN not in done.stdout + done.stderr
    return done


def large_bytes(hub):
    """Bytes of large files that the Hub was sent so far, complete or cut."""
    return sum(count for path, count in hub.received.items() if path.startswith("/lfs/"))


@pytest.fixture(scope="module")
def published(uninterrupted, tmp_path_factory):
    """The toy run and its checkpoints, published once: (hub, home, the run's folder, the finished command)."""
    folder = copy_run(uninterrupted["llama"], tmp_path_factory.mktemp("published") / "toy")
    home = tmp_path_factory.mktemp("home")
    with Hub() as hub:
        hub.account(TOKEN, "user")
        command = ("scripts/publish.py", folder, "--repo-id", "user/toy", "--license", "mit", "--checkpoints")
        yield hub, home, folder, on(hub, home, *command)


def test_a_dry_run_shows_files_and_card_and_touches_nothing(uninterrupted, tmp_path):
    folder = copy_run(uninterrupted["llama"], tmp_path / "toy")
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}
    with Hub() as hub:
        command = ("scripts/publish.py", folder, "--repo-id", "user/toy", "--checkpoints", "--dry-run")
        done = on(hub, tmp_path / "home", *command, token=None)
        assert hub.requests == []
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()} == before
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["user/toy/model.safetensors", f"{folder}/model/model.safetensors", "117,368"] in lines
    assert ["user/toy,", "revision", "step-5", "model", "files"] in lines
    assert "# toy" in done.stdout.splitlines()
    assert "license: unknown; name one with --license, e.g. --license apache-2.0" in done.stdout.splitlines()
    assert done.stdout.endswith("dry run: nothing was sent, and nothing written\n")


def test_a_finished_run_lies_on_main_in_one_commit(published):
    hub, _, folder, done = published
    repository, files = hub.repositories["models", "user/toy"], hub.files("user/toy")
    assert repository.private
    made = {"README.md", "recipe.yaml", "training_environment.json", ".gitattributes"}
    own = {path.name: path for path in (*(folder / "model").iterdir(), *folder.glob("*.jsonl"), folder / "loss.png")}
    own["summary.json"] = folder / "summary.json"
    assert set(files) == made | set(own)
    assert {name: files[name] for name in own} == {name: path.read_bytes() for name, path in own.items()}
    commits = [path for method, path in hub.requests if method == "POST" and path.endswith("/commit/main")]
    assert commits == ["/api/models/user/toy/commit/main"]
    assert (
        f'{hub.url}/user/toy: commit {repository.branches["main"][:8]}\nopen it: AutoModelForCausalLM.from_pretrained("user/toy")'
        in (done.stdout)
    )


def test_nothing_of_the_machine_is_in_what_was_uploaded(published, uninterrupted):
    hub, _, folder, _ = published
    recipe = uninterrupted["llama"]
    private = [HOST, folder, recipe.output.run_dir, recipe.data.prepared_dir, recipe.data.source.files[0][:-5], ROOT, Path.home()]
    uploaded = list(Path(hub.folder.name).iterdir())
    assert len(uploaded) > 15
    for file in uploaded:
        content = file.read_bytes()
        assert not [text for text in private if str(text).encode() in content], content[:200]


def test_a_checkpoint_opens_by_its_revision_as_it_was_exported(published, uninterrupted, tmp_path):
    hub, _, folder, _ = published
    assert sorted(hub.repositories["models", "user/toy"].tags) == ["step-10", "step-5"]
    row = {row["step"]: row for row in metrics_of(uninterrupted["llama"])}[5]
    export_checkpoint(uninterrupted["llama"], folder / "checkpoints" / "step-5", tmp_path / "step-5")
    exported = {file.name: file.read_bytes() for file in (tmp_path / "step-5").iterdir()}
    files = hub.files("user/toy", "step-5")
    assert {name: files[name] for name in exported if name != TOKENIZER} == {k: v for k, v in exported.items() if k != TOKENIZER}
    assert json.loads(files[TOKENIZER]) | OF_THE_PROCESS == json.loads(exported[TOKENIZER]) | OF_THE_PROCESS
    assert set(files) == set(exported) | {"README.md", "recipe.yaml", ".gitattributes"}
    assert (
        f"training loss {row['loss']:.4f}, validation loss {row['val_loss']:.4f} (nats per token)" in files["README.md"].decode()
    )
    assert "license: mit\n" in files["README.md"].decode()
    assert hub.files("user/toy", "step-10")["model.safetensors"] == hub.files("user/toy")["model.safetensors"]
    assert "| step-5 | 1,280 |" in hub.files("user/toy")["README.md"].decode()


def test_a_second_push_sends_no_large_file_and_makes_no_commit(published):
    hub, home, folder, _ = published
    repository, before = hub.repositories["models", "user/toy"], large_bytes(hub)
    state = dict(repository.branches), dict(repository.tags), len(repository.commits)
    command = ("scripts/publish.py", folder, "--repo-id", "user/toy", "--license", "mit", "--checkpoints", "--public")
    done = on(hub, home, *command)
    assert (dict(repository.branches), dict(repository.tags), len(repository.commits)) == state
    assert large_bytes(hub) == before
    assert f"{hub.url}/user/toy: is up to date" in done.stdout
    assert "user/toy stays private" in done.stdout


READ_BACK = """
import sys, torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
local, ids = sys.argv[1], torch.arange(20)[None]
logits = {name: AutoModelForCausalLM.from_pretrained(name)(ids).logits for name in ("user/toy", local)}
assert torch.equal(logits["user/toy"], logits[local])
assert AutoTokenizer.from_pretrained("user/toy")("one two").input_ids == AutoTokenizer.from_pretrained(local)("one two").input_ids
step = AutoModelForCausalLM.from_pretrained("user/toy", revision="step-10")
assert torch.equal(step(ids).logits, logits[local])
options = {"max_new_tokens": 8, "do_sample": False}
printed = [pipeline("text-generation", model=name)("The", **options)[0]["generated_text"] for name in ("user/toy", local)]
assert printed[0] == printed[1] and printed[0].startswith("The")
card = ModelCard.load("user/toy")
card.validate()
assert card.data.license == "mit" and card.data.eval_results[0].metric_type == "loss"
print(snapshot_download("user/toy"))
"""


def test_what_was_published_opens_as_a_user_would(published):
    hub, home, folder, _ = published
    snapshot = Path(on(hub, home, "-c", READ_BACK, folder / "model").stdout.splitlines()[-1])
    read = {path.relative_to(snapshot).as_posix(): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()}
    assert read == hub.files("user/toy")


LM_EVAL = """
import sys
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[2], include_defaults=False)
values = []
for name in ("user/toy", sys.argv[1]):
    options = {"model": "hf", "model_args": f"pretrained={name}", "device": "cpu", "limit": 2, "bootstrap_iters": 0}
    results = simple_evaluate(tasks=["stdlib_perplexity"], task_manager=manager, **options)
    values.append(results["results"]["stdlib_perplexity"]["bits_per_byte,none"])
assert values[0] == values[1] > 0, values
"""


def test_lm_eval_gives_the_numbers_of_the_local_model(published):
    hub, home, folder, _ = published
    on(hub, home, "-c", LM_EVAL, folder / "model", ROOT / "eval")


def test_a_push_cut_in_a_large_file_leaves_main_unchanged_and_resumes(uninterrupted, tmp_path):
    folder = copy_run(uninterrupted["llama"], tmp_path / "toy")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    command = ("scripts/publish.py", folder, "--repo-id", "user/toy", "--license", "mit")
    with Hub() as hub:
        hub.account(TOKEN, "user")
        place = f"/lfs/{hashlib.sha256(weights).hexdigest()}"
        hub.break_file(place, after=50_000, method="PUT")
        hub.break_file(place, status=501, method="PUT")  # the client's one more try: an error that it does not try again after
        done = on(hub, tmp_path / "home", *command, check=False)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == (
            f"error: --repo-id = 'user/toy': {hub.url} does not answer (Internal Error - We're working hard to fix this as soon"
            " as possible!); nothing was published; the same command resumes, and sends what is missing"
        )
        assert list(hub.files("user/toy")) == [".gitattributes"]
        assert hub.received[place] == 50_000 + len(weights)
        before = large_bytes(hub)
        on(hub, tmp_path / "home", *command)
        assert hub.files("user/toy")["model.safetensors"] == weights
        assert large_bytes(hub) - before == len(weights)
        on(hub, tmp_path / "home", *command, "--checkpoints")
        assert set(hub.files("user/toy", "step-10")) == {  # the branch began as main was, with all of the run
            *(path.name for path in (folder / "model").iterdir()), "README.md", "recipe.yaml", ".gitattributes",
        }  # fmt: skip


def test_while_a_run_trains_its_new_checkpoints_are_pushed_and_main_waits(uninterrupted, tmp_path):
    folder = copy_run(uninterrupted["gpt2"], tmp_path / "toy", repo_id="user/toy", push_every=5)
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "step-10").rename(tmp_path / "step-10")
    push = ("-m", "isoflop.publish.checkpoints", folder)
    with Hub() as hub:
        hub.account(TOKEN, "user")
        refused = on(hub, tmp_path / "home", "scripts/publish.py", folder, check=False)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: {folder} is not finished: it has no summary.json;")
        assert "--checkpoints" in refused.stderr
        assert on(hub, tmp_path / "home", *push).stdout.splitlines()[-1] == "pushed user/toy, revision step-5"
        repository = hub.repositories["models", "user/toy"]
        assert list(repository.tags) == ["step-5"]
        (tmp_path / "step-10").rename(folder / "checkpoints" / "step-10")
        shutil.copytree(folder / "checkpoints" / "step-5", folder / "checkpoints" / "step-15")
        next((folder / "checkpoints" / "step-15").glob("*.distcp")).write_bytes(b"torn")
        shutil.copytree(folder / "checkpoints" / "step-5", folder / "checkpoints" / "step-7")  # whole, but not a fifth
        hub.break_file("/commit/checkpoints", status=500, method="POST")
        cut = on(hub, tmp_path / "home", *push, check=False)
        assert (cut.returncode, list(repository.tags)) == (2, ["step-5"])
        assert "nothing was published; the same command resumes" in cut.stderr.splitlines()[-1]
        before = large_bytes(hub)
        done = on(hub, tmp_path / "home", *push)
        assert list(repository.tags) == ["step-5", "step-10"]
        assert large_bytes(hub) == before  # the weights had come before the commit that failed
        assert "step-15 is damaged (__0_0.distcp does not match its checksum): not pushed" in done.stderr
        assert list(hub.files("user/toy", "main")) == [".gitattributes"]
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


REFUSALS = """
import json, os, sys
from isoflop.utils.errors import UserError
from isoflop.publish import publishing
from isoflop.publish.redaction import published_recipe
from isoflop.publish.upload import check_hub
from isoflop.config.loading import load_recipe
from isoflop.utils.output import log_to_console
log_to_console()
for token, run, repo_id in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {"HF_TOKEN": token} if token else {}
    for ask in (lambda: check_hub(repo_id, load_recipe(run + "/recipe.yaml")), lambda: publishing.publish(run, repo_id=repo_id)):
        try:
            ask()
            print("no error")
        except UserError as error:
            print("error:", error)
"""


def test_what_cannot_be_published_is_refused_before_anything_is_sent(uninterrupted, tmp_path):
    toy = copy_run(uninterrupted["llama"], tmp_path / "toy")
    other = copy_run(uninterrupted["gpt2"], tmp_path / "other")
    tree = yaml.safe_load((other / "recipe.yaml").read_text()) | {"seed": 7}
    (other / "recipe.yaml").write_text(yaml.safe_dump(tree))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "weights.bin").write_text("somebody's")
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "recipe.yaml").write_text(to_yaml(published_recipe(uninterrupted["gpt2"])))
    with Hub() as hub:
        hub.account(TOKEN, "user")
        hub.account("hf_reader", "user", "read")
        hub.add("model", "user/foreign", foreign)
        hub.add("model", "user/gpt2", gpt2)
        hub.break_file("/user/silent/refs", times=2, status=503)
        settings = f"{hub.url}/settings/tokens"
        expected = {
            (None, toy, "user/toy"): (
                "there is no token for the Hub here; run: hf auth login (or set HF_TOKEN), with a token that may write, from"
                f" {settings}"
            ),
            ("hf_revoked", toy, "user/toy"): (
                "the Hub refuses the token (Invalid user token. The token from HF_TOKEN environment variable is invalid. Note"
                f" that HF_TOKEN takes precedence over `hf auth login`.); make one that may write on {settings}, then hf auth"
                " login (or set HF_TOKEN, which comes first); nothing was published"
            ),
            ("hf_reader", toy, "user/toy"): (
                f"the token can only read; make one that may write on {settings}, then hf auth login (or set HF_TOKEN)"
            ),
            (TOKEN, toy, "nobody/toy"): (
                "the token is that of user, who is not nobody nor in an organization of that name; give user/toy, or log in with"
                " another token"
            ),
            (TOKEN, toy, "user/foreign"): (
                "holds weights.bin, which are not from a run; give another name, or delete that repository"
            ),
            (TOKEN, other, "user/gpt2"): "holds another run (seed: 1337 -> 7); give another name, or delete that repository",
            (TOKEN, toy, "toy"): (
                "is not a name on the Hub; give user/name, in at most 96 letters, digits, '-', '_' and '.', without '--' and"
                " '..', no part beginning or ending with '-' or '.'"
            ),
            (TOKEN, toy, "user/silent"): (
                f"{hub.url} does not answer (Internal Error - We're working hard to fix this as soon as possible!); nothing was"
                " published; the same command resumes, and sends what is missing"
            ),
        }  # fmt: skip
        cases = json.dumps([[token, str(run), repo_id] for token, run, repo_id in expected])
        done = on(hub, tmp_path / "home", "-c", REFUSALS, cases)
        reported = iter(done.stdout.splitlines())
        for (_, _, repo_id), reason in expected.items():
            colon = "" if reason.startswith(("holds", "is not")) else ":"
            if repo_id == "user/silent":  # a run can begin all the same
                assert next(reported) == f"hub.repo_id = 'user/silent' was not checked: hub.repo_id = 'user/silent': {reason}"
                assert next(reported) == "no error"
            else:
                assert next(reported) == f"error: hub.repo_id = {repo_id!r}{colon} {reason}"
            assert next(reported) == f"error: --repo-id = {repo_id!r}{colon} {reason}"
        assert {method for method, path in hub.requests} <= {"GET", "HEAD"}


def test_a_token_without_permission_is_refused_with_what_was_published(uninterrupted, tmp_path):
    folder = copy_run(uninterrupted["llama"], tmp_path / "toy")
    with Hub() as hub:
        hub.account(TOKEN, "user")
        hub.break_file("/commit/main", status=403, method="POST")
        command = ("scripts/publish.py", folder, "--repo-id", "user/toy", "--checkpoints")
        done = on(hub, tmp_path / "home", *command, check=False)
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: --repo-id = 'user/toy': the token has no permission for it (")
        assert last.endswith("; published so far: step-5, step-10")
        assert list(hub.repositories["models", "user/toy"].tags) == ["step-5", "step-10"]
        assert list(hub.files("user/toy")) == [".gitattributes"]


def test_no_error_of_the_client_shows_a_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-no-known-form")
    error = RuntimeError("Authorization: Bearer a-token-of-no-known-form, or hf_ABCDEFGHIJKLMNOPQRST\n")
    error.__cause__ = ConnectionError("refused")
    reported = hub_error(error, "hub.repo_id", "user/toy", ["step-5"])
    assert isinstance(reported, HubSilent)
    assert "(Authorization: Bearer ***, or hf_***: refused); published so far: step-5; the same command resumes" in str(reported)


def test_only_one_push_of_a_run_at_a_time(uninterrupted, tmp_path):
    recipe = uninterrupted["llama"]
    with (
        lock(tmp_path / "publish.lock", "", ""),
        pytest.raises(UserError, match=r"the push of .* is in use by host .*; wait for"),
    ):
        push_checkpoints(Target(RunFolder(str(tmp_path)), recipe, "user/toy", private=True))
