"""The stand-in of the Hub, read by the real clients; other tests take what it answers for the Hub's own."""

import gzip
import json
import subprocess
import sys
import urllib.error
import urllib.request

import hub as standin
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

hub = standin.hub  # the fixture

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: validation, path: data/validation-*}
- config_name: sample-10BT
  data_files: sample/10BT/*
---
"""
OUTCOME = """
import json, sys
from datasets import load_dataset
from huggingface_hub import HfApi, hf_hub_download
from isoflop.data import compression
compression.register()

def texts(name, *config, **options):
    return {split: [row["text"] for row in rows] for split, rows in load_dataset(name, *config, **options).items()}

def outcome(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except Exception as error:
        return type(error).__name__
"""
READ = """
web = HfApi().repo_info("org/web", repo_type="dataset")
both = {"streamed": True, "downloaded": False}
answers = {
    "commits": [web.sha, HfApi().repo_info("org/web", revision="old", repo_type="dataset").sha],
    "gated": [web.gated, HfApi().repo_info("org/closed", repo_type="dataset").gated],
    "paths": [entry.path for entry in HfApi().list_repo_tree("org/web", recursive=True, repo_type="dataset")],
    "old": texts("org/web", revision=HfApi().repo_info("org/web", revision="old", repo_type="dataset").sha, streaming=True),
    "errors": {
        "repository": outcome(HfApi().repo_info, "org/none", repo_type="dataset"),
        "other type": outcome(HfApi().repo_info, "org/web"),
        "revision": outcome(HfApi().repo_info, "org/web", revision="v9", repo_type="dataset"),
        "entry": outcome(hf_hub_download, "org/web", "none.txt", repo_type="dataset"),
        "gated": outcome(hf_hub_download, "org/closed", "data.jsonl", repo_type="dataset"),
        "gated dataset": outcome(load_dataset, "org/closed", revision="main", streaming=True),
        "gated card": outcome(hf_hub_download, "org/closed", "README.md", repo_type="dataset")[-9:],
    },
}
for how, streaming in both.items():
    answers[how] = {
        "parquet": texts("org/web", revision=web.sha, streaming=streaming),
        "sample": texts("org/web", "sample-10BT", revision=web.sha, streaming=streaming),
        "zstd": texts("org/slim", revision=HfApi().repo_info("org/slim", repo_type="dataset").sha, streaming=streaming),
        "gzip": texts("org/zipped", revision="main", streaming=streaming),
    }
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("org/model", revision=HfApi().repo_info("org/model").sha)
answers["tokens"] = tokenizer("b a")["input_ids"]
print(json.dumps(answers))
"""


def rows(*texts):
    return "".join(json.dumps({"text": text, "meta": {"set": "web"}}) + "\n" for text in texts).encode()


def write_web(folder, name):
    """Parquet as FineWeb has it: splits in the names of files, and a configuration in the card."""
    for path in ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000-of-00001", "sample/10BT/000"):
        file = folder / f"{path}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [f"{name} {path} {i}" for i in range(6)]}), file, row_group_size=2)
    (folder / "README.md").write_text(CARD)
    return folder


def write_slim(folder):
    """Compressed JSON lines as SlimPajama has them: splits in the names of folders, many folders, no card."""
    for split in ("train", "validation", "test"):
        for chunk in ("chunk1", "chunk2"):
            file = folder / split / chunk / "example_0.jsonl.zst"
            file.parent.mkdir(parents=True)
            with pa.output_stream(file, compression="zstd") as stream:
                stream.write(rows(f"{split} {chunk} é"))
    return folder


def run(hub, home, script, **options):
    done = subprocess.run(
        [sys.executable, "-c", OUTCOME + script],
        env=hub.env(home, **options),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """What the clients made of the stand-in's answers, the stand-in, and the commits it gave out."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("zipped", "closed", "model"):
        (folder / name).mkdir()
    (folder / "zipped/c4-train.00000-of-00001.jsonl.gz").write_bytes(gzip.compress(rows("one", "two")))
    (folder / "closed/data.jsonl").write_bytes(rows("secret"))
    (folder / "closed/README.md").write_text("Ask first.")
    Tokenizer(WordLevel({"a": 0, "b": 1, "b a": 2}, unk_token="a")).save(str(folder / "model/tokenizer.json"))
    (folder / "model/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with standin.Hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(standin, "PAGE", 3)
        old = hub.add("dataset", "org/web", write_web(folder / "old", "old"), revision="old")
        new = hub.add("dataset", "org/web", write_web(folder / "new", "new"))
        hub.add("dataset", "org/slim", write_slim(folder / "slim"))
        hub.add("dataset", "org/zipped", folder / "zipped")
        hub.add("dataset", "org/closed", folder / "closed", gated=True)
        hub.add("model", "org/model", folder / "model")
        yield run(hub, folder / "home", READ), hub, (new, old)


def test_commits_and_pages_of_the_tree(read):
    answers, hub, (new, old) = read
    assert answers["commits"] == [new, old]
    assert len(new) == 40
    assert answers["paths"] == [
        "README.md", "data", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet", "sample", "sample/10BT", "sample/10BT/000.parquet",
    ]  # fmt: skip
    assert hub.requests.count(("GET", "/api/datasets/org/web/tree/main")) == 3  # pages of 3


@pytest.mark.parametrize("how", ["streamed", "downloaded"])
def test_datasets_in_their_real_layouts(how, read):
    answers, _, _ = read
    parquet = {
        split: [f"new data/{split}-{shard}-of-0000{count} {i}" for shard in ("00000", "00001")[:count] for i in range(6)]
        for split, count in (("train", 2), ("validation", 1))
    }
    assert answers[how] == {
        "parquet": parquet,
        "sample": {"train": [f"new sample/10BT/000 {i}" for i in range(6)]},
        "zstd": {split: [f"{split} {chunk} é" for chunk in ("chunk1", "chunk2")] for split in ("train", "validation", "test")},
        "gzip": {"train": ["one", "two"]},
    }
    assert answers["old"]["validation"][0] == "old data/validation-00000-of-00001 0"


def test_tokenizers(read):
    answers, _, _ = read
    assert answers["tokens"] == [2]


def test_the_hubs_own_errors(read):
    answers, _, _ = read
    assert answers["gated"] == [False, "manual"]
    assert answers["errors"] == {
        "repository": "RepositoryNotFoundError",
        "other type": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "entry": "RemoteEntryNotFoundError",
        "gated": "GatedRepoError",
        "gated dataset": "DatasetNotFoundError",
        "gated card": "README.md",
    }


def test_access_to_what_is_gated_and_files_that_fail_for_a_while(hub, tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed/train.jsonl.gz").write_bytes(gzip.compress(rows("secret " * 100)))
    commit = hub.add("dataset", "org/closed", tmp_path / "closed", gated=True)
    hub.break_file("train.jsonl.gz", status=503)
    hub.break_file("train.jsonl.gz", after=10)
    script = f'print(json.dumps(texts("org/closed", revision="{commit}", streaming=True)))'
    assert run(hub, tmp_path / "home", script, token=standin.GRANTED) == {"train": ["secret " * 100]}
    assert hub.faults == []
    refused = f'print(json.dumps(outcome(texts, "org/closed", revision="{commit}", streaming=True)))'
    assert run(hub, tmp_path / "home", refused, token="hf_other") == "DatasetNotFoundError"


def test_ranges_and_what_was_sent(hub, tmp_path):
    (tmp_path / "letters.txt").write_text("abcdefghij")
    commit = hub.add("model", "letters", tmp_path)
    path = f"/letters/resolve/{commit}/letters.txt"

    def get(span, method="GET"):
        request = urllib.request.Request(hub.url + path, headers={"Range": f"bytes={span}"}, method=method)
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.headers.get("Content-Range"), answer.read()

    assert get("2-4") == (206, "bytes 2-4/10", b"cde")
    assert get("8-99") == (206, "bytes 8-9/10", b"ij")
    assert get("7-") == (206, "bytes 7-9/10", b"hij")
    assert get("0-", "HEAD") == (206, "bytes 0-9/10", b"")
    assert hub.sent == {path: 8}
    assert hub.requests == [("GET", path)] * 3 + [("HEAD", path)]
    with pytest.raises(urllib.error.HTTPError, match="416"):
        get("10-")
