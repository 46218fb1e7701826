"""Paths that a recipe names: relative to the working directory, and noted where they are beside the recipe instead."""

import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from isoflop.config.loading import load_recipe
from isoflop.config.paths import recipe_paths
from isoflop.data.hub import require_exists
from isoflop.utils.errors import UserError

TEXT = {"kind": "text", "files": ["text/*.txt"]}
TABLE = {"kind": "json", "files": ["rows.jsonl"]}
HUB = {"kind": "hub", "name": "tables"}
MIXTURE = {"a": {"weight": 0.5, "source": TEXT}, "b": {"weight": 0.25, "source": TABLE}, "c": {"weight": 0.25, "source": HUB}}


@pytest.fixture
def project(toy_tree, tmp_path):
    """A checkout with a recipe in `recipes/` whose every path lies in the checkout's root; returns both."""
    from conftest import TOY_MODELS

    tree = {key: dict(section) for key, section in toy_tree.items() if isinstance(section, dict)} | {"model": TOY_MODELS["llama"]}
    tree["tokenizer"], tree["law"], tree["output"]["run_dir"] = {"name": "words"}, "law.json", "runs/toy"
    tree["data"] |= {"source": {"kind": "mixture", "sources": MIXTURE}, "prepared_dir": "data/toy"}
    root = tmp_path / "checkout"
    for folder in ("recipes", "text", "tables", "words", "runs/toy", "data/toy"):
        (root / folder).mkdir(parents=True)
    for file in ("text/a.txt", "rows.jsonl", "law.json", "exam.parquet"):
        (root / file).touch()
    (root / "recipes/toy.yaml").write_text(yaml.safe_dump(tree))
    return root, root / "recipes/toy.yaml"


EVERY = {
    "data.prepared_dir": ["data/toy"],
    "output.run_dir": ["runs/toy"],
    "data.source.sources.a.source.files": ["text/*.txt"],
    "data.source.sources.b.source.files": ["rows.jsonl"],
    "data.source.sources.c.source.name": ["tables"],
    "tokenizer.name": ["words"],
    "law": ["law.json"],
}


def test_every_path_is_noted_where_it_is_beside_the_recipe(project, tmp_path, monkeypatch, capsys):
    root, file = project
    monkeypatch.chdir(root)
    assert recipe_paths(load_recipe(file)) == EVERY
    assert capsys.readouterr().err == ""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    load_recipe(file)
    assert capsys.readouterr().err.splitlines() == [
        f"note: {key} = {path!r} is not in the working directory {elsewhere}, and is in {root}: paths in a recipe are relative"
        f" to the working directory; cd {root} first, or give the full path"
        for key, (path,) in EVERY.items()
    ]
    (elsewhere / "words").mkdir()
    load_recipe(file, ["law=hoffmann"])
    assert [line.split(" = ")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"note: {key}" for key in EVERY if key not in ("tokenizer.name", "law")
    ]


def test_what_would_be_written_below_the_checkout_is_noted(project, monkeypatch, capsys):
    """As `cd scripts; python prepare.py ../recipes/toy.yaml` would make a second copy of the data in scripts/data."""
    root, _ = project
    for folder in ("runs/toy", "data/toy"):
        (root / folder).rmdir()
    (root / "scripts").mkdir()
    monkeypatch.chdir(root / "scripts")
    load_recipe("../recipes/toy.yaml", ["law=hoffmann", f"tokenizer.name={root}/words"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        f"note: {key} = {path!r} is not in the working directory {root}/scripts: paths in a recipe are relative to the working"
        f" directory; cd {root} first, or give the full path"
        for key, path in (("data.prepared_dir", "data/toy"), ("output.run_dir", "runs/toy"))
    ]
    assert [line.split(" = ")[0] for line in lines[2:]] == [f"note: {key}" for key in list(EVERY)[2:5]]
    absolute = [f"data.prepared_dir={root}/data/new", f"output.run_dir={root}/runs/new"]
    load_recipe("../recipes/toy.yaml", ["law=hoffmann", f"tokenizer.name={root}/words", *absolute])
    assert capsys.readouterr().err.splitlines() == lines[2:]


@pytest.mark.parametrize("name", ["runs/nope", "./nope", "/nope/nowhere", "~/nope", "a/b/c", "mine/nope", "checked/nope"])
def test_the_hub_is_never_asked_for_a_name_that_looks_like_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("mine/first/recipe.yaml", "checked/first/manifest.json", "org/model/config.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    with pytest.raises(UserError) as error:
        require_exists("model", name)
    assert str(error.value).startswith(f"model = {name!r} is not there (working directory {tmp_path})")
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    with pytest.raises(UserError, match=r"did you mean runs/quickstart\?"):
        require_exists("model", "runs/quickstrat")


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "org/other", "hf://datasets/a/b", "https://host/a/b"])
def test_the_hub_is_asked_for_its_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/model").mkdir(parents=True)
    (tmp_path / "org/model/config.json").touch()
    require_exists("model", name)


@pytest.mark.new_process
def test_a_missing_run_is_reported_before_anything_is_imported():
    """lm-eval and torch take seconds, and the Hub's retries many more."""
    code = (
        "import runpy, sys; sys.argv = ['run_eval.py', 'runs/nope']\n"
        "try: runpy.run_path('scripts/run_eval.py', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'lm_eval', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith(f"error: model = 'runs/nope' is not there (working directory {ROOT})")


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_a_python_without_the_package_names_the_remedy(script):
    done = subprocess.run(
        [sys.executable, "-S", "-E", f"scripts/{script}", "x"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    remedy = "run `make setup` once in the checkout, then `source .venv/bin/activate`"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: No module named 'isoflop'; {remedy}\n"
