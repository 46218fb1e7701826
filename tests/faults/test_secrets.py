"""No secret reaches a file, the Hub or a line printed: one is planted in each place where users have them, each another one.

Real commands, and then every byte that they left and sent is searched.
"""

import gzip
import json
from pathlib import Path

import hub as stand_in
import pytest
import yaml
from conftest import run_command
from hub import Hub

NAME = "alice/toy"


def planted(place, prefix=""):
    """A secret that names its place; one of no published shape where it has no prefix."""
    return f"{prefix}Pl4nted{place}0123456789abcdefghij"


HELD = {
    "HF_TOKEN": planted("HubToken", "hf_"),
    "WANDB_API_KEY": planted("Wandb"),
    "AWS_SECRET_ACCESS_KEY": f"{planted('Aws')}/with+signs",
    "MY_PASSWORD": planted("Password"),
    "DATABASE_URL": f"postgresql://user:{planted('Database')}@host/db",  # a secret by its value alone
    # The remote of every repository that git is asked about.
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "remote.origin.url",
    "GIT_CONFIG_VALUE_0": f"https://user:{planted('GitRemote')}@host/x.git",
}
SAVED, STORED = planted("Saved", "hf_"), planted("Stored", "hf_")
MARK = b"Pl4nted"


class Tee:
    """A stream of requests that keeps what was read."""

    def __init__(self, stream, kept):
        self.stream, self.kept = stream, kept

    def readline(self, size=-1):
        line = self.stream.readline(size)
        if not line.lower().startswith(b"authorization:"):  # the one place where a token belongs
            self.kept.append(line)
        return line

    def read(self, size=-1):
        self.kept.append(self.stream.read(size))
        return self.kept[-1]

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Listening(stand_in._Handler):
    """The stand-in, which keeps every byte it is sent."""

    def setup(self):
        super().setup()
        self.rfile = Tee(self.rfile, self.server.heard)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the Hub's client has its saved tokens and its cache."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "token").write_text(SAVED)
    (folder / "stored_tokens").write_text(f"[mine]\nhf_token = {STORED}\n")
    return folder


@pytest.fixture(scope="module")
def hub():
    with Hub() as standin:
        standin.heard = []
        standin.RequestHandlerClass = Listening
        standin.account(HELD["HF_TOKEN"], "alice")
        yield standin


@pytest.fixture(scope="module")
def user(hub, home, tmp_path_factory):
    """Run a command with a secret wherever one can be; returns (exit code, all it printed)."""
    temporary = tmp_path_factory.mktemp("temporary")

    def run(*command, check=True, **more):
        env = hub.env(home) | HELD | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"} | more
        done = run_command(*command, env=env, check=check)
        assert MARK.decode() not in done.stdout + done.stderr, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.returncode, done.stdout + done.stderr

    run.temporary = temporary
    return run


def files(*folders):
    """Content of every file, those of gzip unpacked; the client's own files of tokens are left out."""
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.name not in ("token", "stored_tokens"):
                content = path.read_bytes()
                yield path, content
                if content.startswith(b"\x1f\x8b"):
                    yield path, gzip.decompress(content)


def leaks(*folders):
    """Files with a secret in them, or in their names."""
    return sorted({str(path) for path, content in files(*folders) if MARK in content or MARK.decode() in str(path)})


@pytest.fixture(scope="module")
def trained(user, corpus, toy_tree, tmp_path_factory):
    """A run by the commands, with everything on: (folder of all it has, the run, what was printed)."""
    folder = tmp_path_factory.mktemp("secrets")
    tree = json.loads(json.dumps(toy_tree))
    tree["data"]["prepared_dir"], tree["output"]["run_dir"] = f"{folder}/data", f"{folder}/run"
    tree["output"] |= {"trackers": ["tensorboard"]}
    tree["evaluation"] |= {"tasks": {"stdlib_continuation": 10}, "task_documents": 4}
    tree["hub"] = {"repo_id": NAME}
    recipe = folder / "toy.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    _, printed = user("python", "scripts/prepare.py", recipe)
    typed = ("--aws_secret_access_key", planted("LaunchOption"), "--aws_access_key_id", "AKIAPL4NTEDPL4NTED00")
    launch = ("accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", *typed)
    _, more = user(*launch, "scripts/pretrain.py", recipe, "--profile", "2", HF_HUB_OFFLINE="0")
    return folder, folder / "run", printed + more


def test_a_run_with_everything_on_holds_no_secret(trained, user, hub, home, tried):
    folder, run, printed = trained
    kinds = ["environment.json", "recipe.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "push.log"]
    kinds += ["checkpoints/step-10/*", "profile/*.json.gz", "**/events.out.tfevents*", "evaluations/*/results.json"]
    for kind in [*kinds, "model/*.safetensors", "../data/manifest.json"]:
        assert list(run.glob(kind)), (kind, printed)
    assert {"README.md", "model.safetensors", "training_environment.json"} <= set(hub.files(NAME))
    assert leaks(folder, home, user.temporary, hub.folder.name) == []
    heard = b"".join(hub.heard)
    assert b"POST /api/models/alice/toy/commit/main" in heard
    assert MARK not in heard
    what = "a secret in an environment variable, a saved token, git's remote, an option of the launcher"
    tried(what, 10, "in no file, in no request, in no line printed")


def test_what_is_typed_for_an_evaluation_is_hidden_and_published_so(trained, user, hub):
    folder, run, _ = trained
    option, url = planted("ModelArgs"), f"https://u:{planted('ModelUrl')}@h/x"
    arguments = f"token={option},dtype=float32,cache_dir={folder}/cache"
    metadata = json.dumps({"file": url, "password": planted("Metadata")})
    user("python", "scripts/run_eval.py", run, "--suite", "stdlib_continuation", "--limit", "4", "--model-args", arguments,
         "--metadata", metadata, "--batch-size", "4")  # fmt: skip
    results = json.loads((run / "evaluations/stdlib_continuation/results.json").read_text())
    assert results["config"]["model_args"] | {"cache_dir": ""} == {
        "pretrained": str(run), "token": "***", "dtype": "float32", "cache_dir": "",
    }  # fmt: skip
    user("python", "scripts/publish.py", run, "--checkpoints", "--license", "mit")
    assert b'"token": "***"' in hub.files(NAME)["evaluations/stdlib_continuation/results.json"]
    assert leaks(folder, user.temporary, hub.folder.name) == []
    assert MARK not in b"".join(hub.heard)


def test_what_older_files_hold_is_not_published(trained, user, hub):
    """A command line, or arguments of lm-eval, that were written down before they were searched."""
    _, run, _ = trained
    environment, results = run / "environment.json", next(run.glob("evaluations/*/results.json"))
    before = {file: file.read_text() for file in (environment, results)}
    tree = json.loads(before[environment])
    tree["command"] += ["--token", planted("OldOption"), f"--password={planted('OldPassword')}", f"hf_{planted('Old')}"]
    environment.write_text(json.dumps(tree))
    tree = json.loads(before[results])
    tree["config"] = {"model_args": f"pretrained=x,token={planted('OldArgs')}"}
    results.write_text(json.dumps(tree))
    try:
        user("python", "scripts/publish.py", run)
        _, shown = user("python", "scripts/publish.py", run, "--dry-run")
    finally:
        for file, text in before.items():
            file.write_text(text)
    assert "--token '***' '--password=***'" in shown
    assert leaks(hub.folder.name) == []
    assert MARK not in b"".join(hub.heard)


def test_a_plan_a_fit_and_a_sweep_write_no_secret(user, write_recipe, tmp_path):
    table = [{"parameters": n, "tokens": d, "loss": 1.7 + 400 / n**0.34 + 2000 / d**0.36}
             for n in (1e7, 3e7, 1e8, 3e8) for d in (1e9, 3e9, 1e10, 3e10)]  # fmt: skip
    (tmp_path / "table.json").write_text(json.dumps(table))
    user("python", "scripts/fit.py", tmp_path / "table.json", "--out", tmp_path / "law.json", "--resamples", "20")
    plan = ("--flops", "1e19", "--family", "gpt2", "--law", tmp_path / "law.json", "--write", tmp_path / "plan.yaml")
    user("python", "scripts/plan.py", *plan)
    sweep = {"recipe": str(write_recipe()), "tokens_per_parameter": [1.0], "parameters": [2e4], "aspect_ratio": 32,
             "output_dir": str(tmp_path / "sweep"), "validations": 2}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    user("python", "scripts/sweep.py", tmp_path / "sweep.yaml", check=False)  # one run is trained, and is too few for a law
    assert (tmp_path / "law.json").is_file()
    assert (tmp_path / "plan.yaml").is_file()
    assert list((tmp_path / "sweep").glob("*/summary.json"))
    assert list((tmp_path / "sweep/logs").glob("*.log"))
    assert leaks(tmp_path, user.temporary) == []


REFUSED = {
    "a token as an override": "training.max_steps=hf_{}",
    "a password in a URL": "data.source.files=[https://u:{}@h/x]",
    "a signed URL": "data.source.files=[https://h/x?X-Amz-Expires=9&X-Amz-Signature={}]",
    "a key in a URL": "data.source.files=[s3://key:{}@bucket/x]",
    "a token in a URL": "output.run_dir=https://h/x?token={}",
    "a named token": "evaluation.sample_prompts=[api_key={}]",
    "no section": "token={}",
    "no override": "hf_{}",
    "an option": "--hf-token={}",
    "an unknown key": "output.password={}",
    "a secret as a key": "hf_{}.x=1",
    "broken YAML": "output.run_dir=[hf_{}",
    "what the environment holds": f"output.run_dir={HELD['MY_PASSWORD']}",
}


@pytest.mark.parametrize("script", ["pretrain", "prepare"])
def test_what_is_typed_is_refused_and_not_repeated(script, user, write_recipe, tmp_path, tried):
    file, refusal = write_recipe(), tmp_path / "refused.txt"
    before = set(tmp_path.rglob("*"))
    for what, template in REFUSED.items():
        typed = template.format(planted("Typed"))
        code, printed = user("python", f"scripts/{script}.py", file, typed, check=False, ISOFLOP_REFUSED=str(refusal))
        assert code == 2, (what, printed)
        assert "error: " in printed, what
        assert leaks(tmp_path) == [], what
    assert set(tmp_path.rglob("*")) - before <= {refusal}
    tried("a secret typed as an override, in a URL, as an option", len(REFUSED), "refused, and the refusal does not repeat it")


def test_a_recipe_and_a_sweep_with_a_secret_are_refused(user, write_recipe, tmp_path, tmp_path_factory):
    here = tmp_path_factory.mktemp("inputs")
    recipe = yaml.safe_load(write_recipe().read_text())
    recipe["tokenizer"] = {"name": f"https://h/x?token={planted('Recipe')}"}
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, printed = user("python", "scripts/pretrain.py", here / "recipe.yaml", check=False)
    assert (code, "tokenizer.name holds a credential in a URL" in printed) == (2, True), printed
    sweep = {"recipe": str(tmp_path / "toy.yaml"), "tokens_per_parameter": [1.0], "parameters": [2e4], "aspect_ratio": 32,
             "output_dir": str(tmp_path / "sweep"), "overrides": {"law": planted("Sweep", "hf_")}}  # fmt: skip
    (here / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    code, printed = user("python", "scripts/sweep.py", here / "sweep.yaml", check=False)
    assert (code, "overrides.law holds a Hugging Face token" in printed) == (2, True), printed
    plan = ("--flops", "1e19", "--family", "gpt2", "--law", f"https://h/l?token={planted('Law')}", "--write", tmp_path / "p.yaml")
    assert user("python", "scripts/plan.py", *plan, check=False)[0] == 2
    assert leaks(tmp_path) == []
    assert not (tmp_path / "sweep").exists()


def test_a_traceback_and_a_launchers_word_hold_no_secret(user, write_recipe, tmp_path):
    """A traceback has a message, too; the launcher of a single process repeats the command unless it is quiet."""
    code = (
        "import os\nfrom isoflop.utils.command import run_command\n"
        "def main():\n raise RuntimeError('no login with ' + os.environ['MY_PASSWORD'])\nrun_command(main)"
    )
    status, printed = user("python", "-c", code, check=False)
    assert status == 1
    assert "RuntimeError: no login with ***" in printed
    launch = ("accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu.yaml", "scripts/pretrain.py")
    status, printed = user(*launch, write_recipe(), f"seed=hf_{planted('Launched')}", check=False)
    assert status != 0
    assert "seed holds a Hugging Face token" in printed


def test_the_search_finds_what_is_there(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(f"x{planted('Packed')}".encode()))
    (tmp_path / "b.bin").write_bytes(b"\0\1" + planted("Plain").encode())
    (tmp_path / planted("Name")).touch()
    assert len(leaks(tmp_path)) == 3
