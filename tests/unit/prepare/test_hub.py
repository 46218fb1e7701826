"""Datasets and tokenizers from the Hub, by the real clients over HTTP, with the layouts of the ones that recipes name."""

import json
import random

import hub as standin
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_command

from isoflop.config.loading import load_recipe
from isoflop.data.manifest import read_manifest
from isoflop.data.tokenizers import train_tokenizer

pytestmark = pytest.mark.processes

hub = standin.hub  # the fixture


def texts(seed, count):
    rng = random.Random(seed)
    return [" ".join(rng.choice(["a", "bear", "saw", "the", "fox", str(i)]) for _ in range(40)) for i in range(count)]


@pytest.fixture
def repositories(hub, tmp_path):
    """What recipes name, in small: SlimPajama-6B and -627B, FineWeb-Edu, and the gated tokenizer of Llama."""
    slim, edu, six, llama = (tmp_path / name for name in ("slim", "edu", "six", "llama"))
    for split, chunks in {"train": 3, "validation": 1, "test": 1}.items():
        for chunk in range(chunks):
            folder = slim / split / f"chunk{chunk + 1}"
            folder.mkdir(parents=True)
            for number in range(2):
                rows = [{"text": t, "meta": {"redpajama_set_name": "C4"}} for t in texts(hash((split, chunk, number)) % 99, 30)]
                name = "example_train" if split == "train" else "example_holdout"
                with pa.output_stream(folder / f"{name}_{number}.jsonl.zst", compression="zstd") as stream:
                    stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    (edu / "sample/10BT").mkdir(parents=True)
    (edu / "data/CC-MAIN-2013-20").mkdir(parents=True)
    for file in ("sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet", "data/CC-MAIN-2013-20/train-00000.parquet"):
        rows = texts(len(file), 60)
        table = pa.table({"text": rows, "id": [str(i) for i in range(60)], "score": [3.0 + i / 60 for i in range(60)]})
        pq.write_table(table, edu / file, row_group_size=20)
    configs = "- config_name: default\n  data_files: [{split: train, path: data/*/*}]\n"
    configs += "- config_name: sample-10BT\n  data_files: [{split: train, path: sample/10BT/*}]\n"
    (edu / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    (six / "data").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        pq.write_table(
            pa.table({"text": texts(len(split), 60), "__index_level_0__": range(60)}),
            six / f"data/{split}-00000-of-00001.parquet",
        )
    train_tokenizer([texts(0, 60)], 270).save_pretrained(llama)
    commits = {
        "slim": hub.add("dataset", "cerebras/SlimPajama-627B", slim),
        "edu": hub.add("dataset", "HuggingFaceFW/fineweb-edu", edu),
        "six": hub.add("dataset", "DKYoon/SlimPajama-6B", six),
        "llama": hub.add("model", "meta-llama/Llama-2-7b-hf", llama, gated=True),
    }
    hub.add("dataset", "org/closed", six, gated=True)
    return commits


@pytest.fixture
def prepared(hub, repositories, write_recipe, tmp_path):
    """`scripts/prepare.py` against the stand-in, with access to what is gated by default."""

    def run(source, *overrides, token=standin.GRANTED, name="prepared", tokenizer="meta-llama/Llama-2-7b-hf", check=True):
        file = write_recipe(name, data__prepared_dir=str(tmp_path / name), data__source={"kind": "hub", **source})
        file.write_text(file.read_text().replace("train_vocab_size: 300", f"name: {tokenizer}"))
        env = hub.env(tmp_path / "hf_home", token)
        done = run_command("python", "scripts/prepare.py", file, *overrides, env=env, check=check)
        return done, load_recipe(file, list(overrides))

    return run


SLIM = {"name": "cerebras/SlimPajama-627B", "streaming": True}


def test_slimpajama_627b_is_streamed(prepared, repositories, hub, tmp_path):
    hub.break_file("example_train_0.jsonl.zst", times=1)  # a server error on the way is tried again
    _, recipe = prepared(SLIM)
    manifest = read_manifest(recipe.data.prepared_dir)
    source = manifest.sources["hub"]
    assert (source.revision, manifest.tokenizer.revision) == (repositories["slim"], repositories["llama"])
    assert (source.splits["train"].documents, source.splits["validation"].documents) == (180, 60)
    assert len([s for s in source.splits["train"].shards if "tails" not in s.name]) == 6  # a part for each file
    assert manifest.engine == "gigatoken"
    assert not list((tmp_path / "hf_home/hub").rglob("*.zst"))  # the text is never on this disk
    assert not any("holdout" in path and "test" in path for path in hub.sent)  # the test split is left alone
    requests = len(hub.requests)
    again, _ = prepared(SLIM)
    assert "already prepared and nothing changed" in again.stdout
    assert len(hub.requests) == requests  # and the Hub was not asked


def test_fineweb_edu_by_config_and_the_best_by_score(prepared, repositories, hub, tmp_path):
    source = {"name": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT"}
    _, recipe = prepared(source, "data.source.score_column=score", "data.source.keep_fraction=0.25", name="edu_best")
    held = read_manifest(recipe.data.prepared_dir).sources["hub"]
    assert held.revision == repositories["edu"]
    assert held.left_out == {"low score": 90}
    assert sum(split.documents for split in held.splits.values()) == 30  # of 120, and the other config's 60 were not read
    assert not any("CC-MAIN" in path for path in hub.sent)
    _, other = prepared(source | {"streaming": True}, name="edu_streamed")
    assert read_manifest(other.data.prepared_dir).windows("train") > read_manifest(recipe.data.prepared_dir).windows("train")


def test_slimpajama_6b_brings_its_own_validation(prepared):
    _, recipe = prepared({"name": "DKYoon/SlimPajama-6B"}, name="six_prepared")
    splits = read_manifest(recipe.data.prepared_dir).sources["hub"].splits
    assert (splits["train"].documents, splits["validation"].documents) == (60, 60)


def test_errors_of_the_hub_name_the_remedy(prepared, hub):
    def refusal(*arguments, **options):
        done, _ = prepared(*arguments, check=False, name="refused", **options)
        assert done.returncode == 2, done.stderr
        return next(line for line in done.stderr.splitlines() if line.startswith("error: "))

    six = {"name": "DKYoon/SlimPajama-6B"}
    page = f"{hub.url}/meta-llama/Llama-2-7b-hf with your account, then make that account known here with hf auth login"
    assert refusal(six, token=None).endswith(f"cannot be loaded: it is gated: accept its terms on {page} (or HF_TOKEN)")
    assert f"it is gated: accept its terms on {hub.url}/datasets/org/closed with" in refusal({"name": "org/closed"}, token=None)
    assert (
        f"data.source.name = 'DKYoon/SlimPajama-6B' at revision 'v9' cannot be reached: there is no such branch, tag or commit;"
        f" {hub.url}/datasets/DKYoon/SlimPajama-6B/tree/main lists them"
    ) in refusal(six | {"revision": "v9"})
    assert f"{hub.url}/datasets/DKYoon/SlimPajama-7B is not there, or private: check the name" in refusal(
        {"name": "DKYoon/SlimPajama-7B"}
    )
    assert "text_column = 'body' is not in the data; known here: __index_level_0__, text" in refusal(
        six | {"text_column": "body"}
    )


def test_another_commit_in_the_cache_is_not_used(prepared, hub, repositories, tmp_path):
    """`datasets` would fall back on it, with a warning alone."""
    slim = {"name": "org/csv", "streaming": False}
    for commit in range(2):
        (tmp_path / "csv").mkdir(exist_ok=True)
        (tmp_path / "csv/train.csv").write_text("text\n" + "\n".join(texts(commit, 200)) + "\n")
        hub.add("dataset", "org/csv", tmp_path / "csv")
        if commit == 0:
            prepared(slim, "data.validation_fraction=0.1", name="first")  # another format: datasets keeps a copy of its own
    hub.break_file(f"tree/{hub.repositories['datasets', 'org/csv'].branches['main']}", times=99)
    hub.break_file("README.md", times=99)
    done, _ = prepared(slim, "data.validation_fraction=0.1", name="second", check=False)
    assert done.returncode == 2, done.stderr
    assert "error: data.source.name = 'org/csv'" in done.stderr
