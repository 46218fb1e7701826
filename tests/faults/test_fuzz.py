"""Thousands of damaged and hand-made files of every kind that somebody else may hand over: read, or refused by a `UserError`.

Nothing else happens: no other exception, nothing written elsewhere, no process, no connection, no code, little memory.
"""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import EVERY_CASE, TOY_MODELS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import damaged, memory_below, retyped, watched

from isoflop.checkpoint.folder import read_trainer_state, verify
from isoflop.checkpoint.state import live_tensors, read
from isoflop.compare.comparison import compare
from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe
from isoflop.config.recipe_data import Filter, TableSource
from isoflop.data.documents import read_documents
from isoflop.data.sources import open_source
from isoflop.data.tokenizers import open_tokenizer
from isoflop.data.windows import Windows
from isoflop.evaluate.scores import read_scores, score_markdown
from isoflop.prepare.corpus import CorpusSpec, read_document
from isoflop.prepare.run import merge, partial_folder, prepare
from isoflop.prepare.setup import set_up_corpus
from isoflop.publish.card import model_card
from isoflop.publish.files import run_files
from isoflop.scaling.laws import load_law
from isoflop.scaling.runs import measured_runs
from isoflop.sweep.config import load_sweep_config
from isoflop.sweep.design import Run, groups_of
from isoflop.sweep.state import report, state_of
from isoflop.train.run_folder import RunFolder
from isoflop.train.setup import Job, check_data
from isoflop.train.state import parse_state
from isoflop.train.training_model import build_training_model
from isoflop.utils.errors import UserError

MOST_BYTES = 600 * 2**20
LONGEST_MESSAGE = 10_000


def yaml_of(tree):
    return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")


def json_of(tree):
    return json.dumps(tree).encode()


def message_of(call):
    """What a call that is refused says; None where it is not."""
    try:
        call()
    except UserError as error:
        return str(error)
    return None


@pytest.fixture
def fuzz(tmp_path, tried):
    """Replace a file by variants of itself, and make the call that reads it with each."""

    def run(file, call, examples, what, load=None, dump=json_of, reseal=lambda: None, is_read=True):
        original = file.read_bytes()
        examples = examples if EVERY_CASE else examples // 6
        variants = damaged(original)
        if load:
            variants = st.one_of(variants, retyped(load(original)).map(dump))
        done = []

        @settings(
            max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False, phases=[Phase.generate],
        )  # fmt: skip
        @given(variants)
        def one(content):
            file.write_bytes(content)
            reseal()
            done.append(len(content))
            with watched(tmp_path):
                printed = message_of(call)
            assert printed is None or 0 < len(printed) < LONGEST_MESSAGE, f"{len(printed):,} characters"

        assert (message_of(call) is None) == is_read  # what is imported late is here from now on
        with memory_below(MOST_BYTES):
            one()
        assert len(done) >= examples
        file.write_bytes(original)
        reseal()
        tried(f"a damaged or hand-made {what}", len(done), "read, or refused by name; nothing written, run or connected")

    return run


@pytest.fixture
def data(toy_tree, tmp_path):
    """A recipe over a copy of the prepared folder."""
    folder = shutil.copytree(toy_tree["data"]["prepared_dir"], tmp_path / "data")
    return folder, Recipe.model_validate({**toy_tree, "data": {**toy_tree["data"], "prepared_dir": str(folder)}})


def open_data(recipe):
    """What a run does with prepared data before its first step, and a batch."""
    manifest = check_data(recipe, every_byte=True)
    open_tokenizer(recipe.data.prepared_dir)("The end")
    ids = manifest.tokenizer.num_ids
    windows = Windows(recipe.data.prepared_dir, manifest.shards("train"), manifest.sequence_length, ids)
    windows.take(manifest.order(recipe.data.shares(), recipe.seed).of_step(3, 8))
    job = SimpleNamespace(recipe=recipe, manifest=manifest)
    held_out = Windows(recipe.data.prepared_dir, manifest.shards("validation"), manifest.sequence_length, ids)
    held_out.take(Job.validation_order(job))
    assert all(map(np.isfinite, Job.validation_statistics.fget(job)))


def reseal_data(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = lambda file: hashlib.sha256(file.read_bytes()).hexdigest()  # noqa: E731
    manifest["tokenizer"]["sha256"] = digest(folder / "tokenizer/tokenizer.json")
    for source in manifest["sources"].values():
        for split in source["splits"].values():
            for shard in split["shards"]:
                file = folder / shard["name"]
                shard |= {"bytes": file.stat().st_size, "sha256": digest(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_manifests(fuzz, data):
    folder, recipe = data
    fuzz(folder / "manifest.json", lambda: open_data(recipe), 500, "prepared folder", json.loads)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(fuzz, data, name):
    folder, recipe = data
    fuzz(
        folder / "tokenizer" / name, lambda: open_data(recipe), 150, "prepared folder", json.loads,
        reseal=lambda: reseal_data(folder),
    )  # fmt: skip


def test_shards(fuzz, data):
    folder, recipe = data
    shard = sorted(folder.glob("*train*.arrow"))[0]
    fuzz(shard, lambda: open_data(recipe), 120, "prepared folder", reseal=lambda: reseal_data(folder))


@pytest.fixture
def run(uninterrupted, toy_tree, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(uninterrupted["llama"].output.run_dir, tmp_path / "runs/run"))


def reseal_checkpoint(path):
    names = [file.name for file in path.iterdir() if file.name != "checksums.json"]
    sums = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / "checksums.json").write_text(json.dumps(sums))


@pytest.fixture
def load(run, toy_tree):
    """Load a checkpoint as a run that resumes does."""
    path = run / "checkpoints/step-10"
    recipe = Recipe.model_validate({**toy_tree, "model": TOY_MODELS["llama"]})
    model = build_training_model(recipe, 0, 0, torch.device("cpu"))
    tensors = live_tensors(model, torch.optim.AdamW(model.parameters()))

    def call():
        if verify(path):
            return
        state = read_trainer_state(path)
        state.pop("data", None)
        parse_state(path, state)
        read(path, tensors)

    return call


@pytest.mark.parametrize(
    ("name", "examples", "tree"),
    [
        ("checksums.json", 150, json.loads),
        ("trainer_state.json", 150, json.loads),
        (".metadata", 500, None),
        ("__0_0.distcp", 250, None),
    ],
)
def test_checkpoints(fuzz, run, load, name, examples, tree):
    path = run / "checkpoints/step-10"
    reseal = (lambda: None) if name == "checksums.json" else lambda: reseal_checkpoint(path)
    fuzz(path / name, load, examples, "checkpoint", tree, reseal=reseal)


def test_recipes(fuzz, write_recipe):
    file = write_recipe()

    def call():
        load_recipe(file)
        load_recipe(file, ["training.max_tokens=4096", "tokenizer.name=x", "output.trackers=[]"])

    fuzz(file, call, 600, "recipe, law or sweep", yaml.safe_load, yaml_of)


def test_laws(fuzz, tmp_path, toy_tree):
    file, model = tmp_path / "law.yaml", Recipe.model_validate(toy_tree).model
    tree = {
        "form": "chinchilla",
        "coefficients": {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 410.0, "beta": 0.28},
        "counts": "total",
        "source": "made up",
        "fitted_on": {"parameters": [1e5, 1e7], "tokens": [1e6, 1e9]},
        "draws": [[1.7, 400.0, 0.34, 410.0, 0.28], [1.6, 410.0, 0.33, 400.0, 0.29]],
        "residuals": [0.01, -0.01],
        "progress": {
            "schedule": "cosine", "center": [12.0, 15.0], "covariance": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
            "gaps": [[0.5, -3.0, 0.1, 0.1, 0.01], [0.9, -5.0, 0.1, 0.1, 0.01]],
        },
    }  # fmt: skip
    file.write_bytes(yaml_of(tree))

    def call():
        law = load_law(str(file))
        with np.errstate(all="ignore"):
            law.predict(model, 1e9)
            law.optimum(1e18)
            law.extrapolates(law.model_size(model), 1e9)
            law.forecast(3.0, 0.7, "cosine", model, 1e9)

    fuzz(file, call, 600, "recipe, law or sweep", yaml.safe_load, yaml_of)


def test_sweeps(fuzz, tmp_path, write_recipe):
    file = tmp_path / "sweep.yaml"
    tree = {
        "recipe": str(write_recipe()), "budgets": [1e11, 1e12], "sizes": {"count": 3, "ratio": 3.0}, "aspect_ratio": 16.0,
        "overrides": {"training.sequence_length": 32}, "output_dir": str(tmp_path / "sweep"),
        "peak_learning_rate": {"coefficient": 4.0, "exponent": -0.2}, "seeds": [1, 2],
    }  # fmt: skip
    file.write_bytes(yaml_of(tree))
    fuzz(file, lambda: groups_of(load_sweep_config(file)), 300, "recipe, law or sweep", yaml.safe_load, yaml_of)


RESULTS = {
    "results": {"hellaswag": {"alias": "hellaswag", "acc,none": 0.28, "acc_stderr,none": 0.0045}},
    "higher_is_better": {"hellaswag": {"acc": True}},
    "n-samples": {"hellaswag": {"original": 10042, "effective": 10042}},
}


def read_run(run, other, name):
    """What reads one of the files of a run's folder."""
    folder, recipe = RunFolder(str(run)), load_recipe(run / "recipe.yaml")
    recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"run_dir": str(run)})})
    return {
        "recipe.yaml": [lambda: compare([str(run), other])],
        "metrics.jsonl": [
            lambda: compare([str(run), other]),
            lambda: measured_runs([str(run.parent)]),
            lambda: run_files(folder, recipe),
        ],
        "summary.json": [
            lambda: compare([str(run), other]),
            lambda: report([state_of(Run("r", recipe, 10))]),
            lambda: model_card(folder, "me/toy", None),
        ],
        "environment.json": [lambda: run_files(folder, recipe), lambda: model_card(folder, "me/toy", None)],
        "evaluations/quick/results.json": [
            lambda: score_markdown(read_scores(folder.evaluations), 10**8),
            lambda: run_files(folder, recipe),
        ],
    }[name]


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("recipe.yaml", 70), ("metrics.jsonl", 200), ("summary.json", 100), ("environment.json", 80),
        ("evaluations/quick/results.json", 250),
    ],
)  # fmt: skip
def test_run_folders(fuzz, run, uninterrupted, name, examples):
    (run / "evaluations/quick").mkdir(parents=True, exist_ok=True)
    (run / "evaluations/quick/results.json").write_text(json.dumps(RESULTS))
    readers = read_run(run, uninterrupted["gpt2"].output.run_dir, name)

    def call():
        if refused := [printed for printed in map(message_of, readers) if printed]:
            raise UserError("".join(refused))

    tree, dump = {
        "recipe.yaml": (yaml.safe_load, yaml_of),
        "metrics.jsonl": (
            lambda content: [json.loads(line) for line in content.splitlines()],
            lambda rows: b"".join(json_of(row) + b"\n" for row in rows),
        ),
    }.get(name, (json.loads, json_of))
    fuzz(run / name, call, examples, "run's folder", tree, dump, is_read=name != "metrics.jsonl")


@pytest.fixture
def parts(write_recipe, tmp_path, toy_tree):
    """A recipe, and a folder of parts as another machine wrote it."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(60)))
    recipe = load_recipe(
        write_recipe(
            data__source={"kind": "json", "files": [str(tmp_path / "rows.jsonl")]}, data__prepared_dir=str(tmp_path / "made"),

        )
    )  # fmt: skip
    prepare(recipe, num_workers=1, shard=(0, 1))
    return partial_folder(recipe), recipe


@pytest.mark.parametrize(("name", "examples"), [("corpus.json", 150), ("json-00000.json", 150), ("engine.json", 30)])
def test_folders_of_parts(fuzz, parts, tmp_path, name, examples):
    folder, recipe = parts
    kept = shutil.copytree(folder, tmp_path / "kept")

    def call():
        content = (kept / name).read_bytes()
        with contextlib.suppress(UserError):  # the record is sealed with what decides it
            facts = read_document(kept / "corpus.json", CorpusSpec)
            record = json.loads((kept / "json-00000.json").read_text()) if name == "corpus.json" else {}
            if record:
                (kept / "json-00000.json").write_text(json.dumps(record | {"corpus": facts.digest()}))
        for there in (folder, Path(recipe.data.prepared_dir)):
            shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(kept, folder)
        (folder / name).write_bytes(content)
        if name == "engine.json":
            set_up_corpus(recipe, folder, 1)
        else:
            merge(recipe)

    fuzz(kept / name, call, examples, "folder of parts", json.loads)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_json_lines(fuzz, fifty_documents, name):
    source = TableSource(kind="json", files=[str(fifty_documents / name)], score_column="score", keep_fraction=0.5)

    def call():
        for table in open_source(source, "data.source").tables:
            for number in range(table.num_parts):
                for _ in read_documents(table, number, Filter()):
                    pass

    fuzz(fifty_documents / name, call, 250, "file of JSON lines")
