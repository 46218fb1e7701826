"""Parts: many processes, kills, several machines, another engine: always the same windows."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import ROOT

from isoflop.config.loading import load_recipe
from isoflop.data import encoding, sources
from isoflop.data.encoding import EngineDiffers
from isoflop.data.manifest import read_manifest, verify_shards
from isoflop.data.windows import Windows
from isoflop.prepare import part as part_module
from isoflop.prepare.run import merge, partial_folder, prepare, verify
from isoflop.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("on_the_console")

SMALL = {
    "isoflop.data.sources.PART_BYTES": 30_000,
    "isoflop.data.readers.json_lines.BLOCK_BYTES": 2_000,
    "isoflop.data.documents.BATCH_BYTES": 2_000,
    "isoflop.prepare.part.SHARD_BYTES": 6_000,
}

# The same sizes in every process of a command, with a pause after each piece of work; Python imports it by itself.
SITE = """
import sys, time
if not {"resource_tracker"} & set(" ".join(sys.orig_argv).split(".")):
    import isoflop.data.sources as sources, isoflop.data.documents as documents, isoflop.prepare.part as part
    import isoflop.data.readers.json_lines as json_lines
    sources.PART_BYTES, documents.BATCH_BYTES, part.SHARD_BYTES, json_lines.BLOCK_BYTES = 30_000, 2_000, 6_000, 2_000
    encode = part.Encoder.__call__
    def slowly(self, texts):
        time.sleep(0.02)
        return encode(self, texts)
    part.Encoder.__call__ = slowly
"""


@pytest.fixture
def small(monkeypatch):
    """Parts and shards so small that a toy corpus has many of them, in this process."""
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)


@pytest.fixture
def slow_command(tmp_path):
    """`scripts/prepare.py` with the same small sizes, taking its time."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)

    def start(file, *arguments):
        env = {**os.environ, "PYTHONPATH": f"{tmp_path}/site{os.pathsep}{ROOT}/src"}
        command = [sys.executable, "scripts/prepare.py", str(file), *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.fixture
def rows_recipe(write_recipe, corpus, tmp_path):
    """The toy recipe over JSON lines of some 1,200 documents in 12 files, with a folder of its own by name."""
    folder = tmp_path / "rows"
    folder.mkdir()
    texts = [text for file in sorted(corpus.iterdir()) for text in file.read_text().split("\n\n") if text.strip()]
    for number in range(12):
        lines = [json.dumps({"text": text, "score": len(text) % 97}) for text in texts[number::12]]
        (folder / f"{number:02}.jsonl").write_text("\n".join(lines) + "\n")

    def recipe(name, **changes):
        source = {"kind": "json", "files": [f"{folder}/*.jsonl"], **changes.pop("source", {})}
        file = write_recipe(name, data__prepared_dir=str(tmp_path / name), data__source=source, **changes)
        return load_recipe(file), file

    return recipe


def stream_of(recipe, split="train"):
    manifest = read_manifest(recipe.data.prepared_dir)
    windows = Windows(recipe.data.prepared_dir, manifest.shards(split), manifest.sequence_length)
    return windows.take(np.arange(len(windows))).reshape(-1)


def test_no_token_is_lost_between_parts_and_shards(rows_recipe, small, monkeypatch, toy_tree):
    """The stream of an undivided corpus, in another order: of each split the very last partial window alone is dropped."""
    tokenizer = f"tokenizer.name={toy_tree['data']['prepared_dir']}/tokenizer"
    many, one = (load_recipe(rows_recipe(name)[1], [tokenizer]) for name in ("many", "one"))
    source = prepare(many, num_workers=1).sources["json"]
    assert len(source.splits["train"].shards) > 11
    assert source.splits["train"].shards[-1].name == "json-train-tails-000.arrow"
    monkeypatch.setattr(sources, "PART_BYTES", 2**30)
    monkeypatch.setattr(part_module, "SHARD_BYTES", 2**30)
    undivided = prepare(one, num_workers=1).sources["json"]
    for split in (*source.splits.values(), *undivided.splits.values()):
        assert split.windows == (split.tokens - split.dropped_tokens) // 32
        assert split.dropped_tokens < 32
    for count in ("documents", "bytes", "tokens"):
        totals = [sum(getattr(split, count) for split in prepared.splits.values()) for prepared in (source, undivided)]
        assert totals[0] == totals[1]
    ids = [np.bincount(np.concatenate([stream_of(r, "train"), stream_of(r, "validation")]), minlength=300) for r in (many, one)]
    assert np.abs(ids[0] - ids[1]).sum() < 4 * 32


def test_an_overlapping_tail_keeps_every_token(rows_recipe, small):
    recipe, _ = rows_recipe("overlap", data__tail="overlap")
    dropping, _ = rows_recipe("drop")
    split, other = prepare(recipe, num_workers=1).split("train")[0], prepare(dropping, num_workers=1).split("train")[0]
    assert other.dropped_tokens > 0
    assert (split.dropped_tokens, split.repeated_tokens) == (0, 32 - other.dropped_tokens)
    assert split.windows == other.windows + 1
    assert split.tokens == split.windows * 32 - split.repeated_tokens
    kept, dropped = stream_of(recipe), stream_of(dropping)
    assert np.array_equal(kept[:-32], dropped)
    assert np.array_equal(kept[-32 : -other.dropped_tokens], dropped[-split.repeated_tokens :])


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_random_moments_it_resumes_to_the_same_windows(workers, rows_recipe, small, slow_command, tried):
    uninterrupted, _ = rows_recipe("uninterrupted")
    undivided = prepare(uninterrupted, num_workers=1)
    recipe, file = rows_recipe("killed")
    rng, kills, finished = random.Random(workers), 0, []
    while kills < 5:
        process = slow_command(file, "--workers", str(workers))
        finished.append(len(finished_shards(recipe)))
        while process.poll() is None and len(finished_shards(recipe)) == finished[-1]:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break
        kills += 1
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not alive  # no worker outlives its parent
    process = slow_command(file, "--workers", str(workers))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert kills >= 3
    assert finished == sorted(finished)  # what is finished stays
    assert finished[-1] > 0
    assert read_manifest(recipe.data.prepared_dir) == undivided
    verify(recipe)
    of = f"{workers} process{'es' if workers > 1 else ''}"
    tried(f"`kill -9` of prepare ({of})", kills, "finished shards stayed, the same bytes came out")


def finished_shards(recipe):
    return [file for file in partial_folder(recipe).glob("*.arrow") if not file.name.startswith(".")]


def test_a_part_resumes_after_its_last_shard(rows_recipe, small, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 2**30)
    uninterrupted, _ = rows_recipe("uninterrupted")
    undivided = prepare(uninterrupted, num_workers=1)
    recipe, _ = rows_recipe("stopped")
    encode, calls = encoding.Encoder.__call__, []

    def fails_late(self, texts):
        calls.append(len(texts))
        if len(calls) == 60:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(encoding.Encoder, "__call__", fails_late)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, num_workers=1)
    record = json.loads((partial_folder(recipe) / "json-00000.json").read_text())
    assert not record["done"]
    assert len(record["splits"]["train"]["shards"]) > 2
    before, calls[:] = sum(calls), [0] * 100
    assert prepare(recipe, num_workers=1) == undivided
    documents = sum(split.documents for split in undivided.sources["json"].splits.values())
    assert documents - record["rows"] <= sum(calls) < documents - before / 2  # only what was not in a shard is encoded again


def test_finished_parts_survive_a_broken_file(rows_recipe, small, tmp_path, toy_tree, capsys):
    tokenizer = {"name": f"{toy_tree['data']['prepared_dir']}/tokenizer"}
    broken, file = rows_recipe("repaired")
    broken = load_recipe(file, [f"tokenizer.name={tokenizer['name']}"])
    bad = tmp_path / "rows" / "07.jsonl"
    whole_file = bad.read_text()
    bad.write_text(whole_file[:-40])
    with pytest.raises(UserError, match=r"07.jsonl, line \d+ is not JSON: Unterminated string.*; fix it, or set data.filter.inv"):
        prepare(broken, num_workers=1)
    records = [json.loads(file.read_text()) for file in partial_folder(broken).glob("json-*.json")]
    done = sum(record["done"] for record in records)
    assert done >= 3
    bad.write_text(whole_file)
    capsys.readouterr()
    manifest = prepare(broken, num_workers=1)
    assert f"{done} of {num_parts(manifest)} parts are there already" in capsys.readouterr().out


def num_parts(manifest):
    return len({shard.name[:16] for shard in manifest.shards("train") if "tails" not in shard.name})


def test_machines_share_the_parts_and_one_joins_them(rows_recipe, small, tmp_path):
    alone, _ = rows_recipe("alone")
    undivided = prepare(alone, num_workers=1)
    folders = []
    for index in range(3):
        recipe, _ = rows_recipe(f"machine{index}")
        assert prepare(recipe, num_workers=1, shard=(index, 3)) is None
        assert not Path(recipe.data.prepared_dir).exists()
        folders.append(partial_folder(recipe))
    joined, _ = rows_recipe("joined")
    shutil.copytree(folders[0], partial_folder(joined))
    with pytest.raises(
        UserError, match=r"joined.partial: \d+ of \d+ parts are not finished.*json-00001, json-00002.*copy them here"
    ):
        merge(joined)
    for folder in folders[1:]:
        shutil.copytree(folder, partial_folder(joined), dirs_exist_ok=True)
    inodes = {file.stat().st_ino for file in partial_folder(joined).glob("*.arrow")}
    assert merge(joined) == undivided
    shards = [file for file in Path(joined.data.prepared_dir).glob("*.arrow") if "tails" not in file.name]
    assert {file.stat().st_ino for file in shards} == inodes  # renamed with their folder, not copied
    verify_shards(joined.data.prepared_dir, undivided, full=True)
    other, _ = rows_recipe("joined", data__split_seed=5)
    shutil.copytree(folders[0], partial_folder(other))
    with pytest.raises(UserError, match=r"made from other values \(data.split_seed: 0 -> 5\)"):
        merge(other)


def test_machines_that_drop_duplicates_wait_for_one_another(rows_recipe, small, capsys):
    settings = {"data__filter": {"drop_duplicates": True}, "source": {"score_column": "score", "keep_fraction": 0.5}}
    alone, _ = rows_recipe("alone", **settings)
    undivided = prepare(alone, num_workers=1)
    assert set(undivided.sources["json"].left_out) == {"duplicate", "low score"}
    shared, _ = rows_recipe("shared", **settings)
    prepare(shared, num_workers=1, shard=(0, 2))
    assert "shard 0/2 is hashed; duplicates and scores are compared over all parts, and" in capsys.readouterr().out
    prepare(shared, num_workers=1, shard=(1, 2))
    prepare(shared, num_workers=1, shard=(0, 2))
    assert merge(shared) == undivided


def test_a_part_is_written_again_when_another_one_changes_its_duplicates(rows_recipe, small, tmp_path, toy_tree, capsys):
    _, file = rows_recipe("dedup", data__filter={"drop_duplicates": True})
    recipe = load_recipe(file, [f"tokenizer.name={toy_tree['data']['prepared_dir']}/tokenizer"])
    prepare(recipe, num_workers=1, shard=(0, 1))
    prepare(recipe, num_workers=1, shard=(0, 1))
    parts = re.search(r"(\d+) of \1 parts are there already", capsys.readouterr().out)[1]  # and with nothing changed all stay
    first, last = sorted((tmp_path / "rows").iterdir())[:: len(os.listdir(tmp_path / "rows")) - 1]
    first.write_text(last.read_text())
    manifest = prepare(recipe, num_workers=1)
    there = re.search(rf"(\d+) of {parts} parts are there already", capsys.readouterr().out)[1]
    assert 0 < int(there) <= int(parts) - 2  # the changed one, those with its new duplicates, and those that are originals now
    assert manifest.sources["json"].left_out["duplicate"] >= len(last.read_text().splitlines()) - 5


def test_documents_are_kept_by_score_and_once(rows_recipe, small):
    everything, _ = rows_recipe("all")
    texts = prepare(everything, num_workers=1).sources["json"]
    kept, _ = rows_recipe(
        "kept",
        data__filter={"drop_duplicates": True, "min_characters": 30},
        source={"score_column": "score", "keep_fraction": 0.5},
    )
    source = prepare(kept, num_workers=1).sources["json"]
    documents = sum(split.documents for split in source.splits.values())
    assert sum(source.left_out.values()) + documents == sum(split.documents for split in texts.splits.values())
    assert documents / (documents + source.left_out["low score"]) == pytest.approx(0.5, abs=0.02)  # ties are kept


def test_a_difference_found_late_restarts_the_corpus(rows_recipe, small, monkeypatch, capsys):
    slow, _ = rows_recipe("slow")
    check, sampled = encoding.Encoder.check_sample, []

    def differs_in_the_third_part(self, rows, texts, first):
        check(self, rows, texts, first)
        sampled.append(self._engine)
        if self._engine == "gigatoken" and len(sampled) == 40:
            raise EngineDiffers("'some text'")

    monkeypatch.setattr(encoding.Encoder, "check_sample", differs_in_the_third_part)
    manifest = prepare(slow, num_workers=1)
    assert (
        "gigatoken gave other ids than tokenizers for 'some text'; tokenizers encodes the corpus again" in capsys.readouterr().out
    )
    assert manifest.engine == "tokenizers"
    fast, _ = rows_recipe("fast")
    monkeypatch.setattr(encoding.Encoder, "check_sample", check)
    again = prepare(fast, num_workers=1)
    assert again.engine == "gigatoken"
    assert again.fingerprint() == manifest.fingerprint()


def test_a_second_prepare_of_the_same_folder_is_refused(rows_recipe):
    from isoflop.utils.io import lock

    recipe, _ = rows_recipe("locked")
    with (
        lock(partial_folder(recipe) / "lock", "data", "wait"),
        pytest.raises(UserError, match=r"data.prepared_dir = .*locked' is in use by host .*, pid \d+; wait for that process"),
    ):
        prepare(recipe, num_workers=1)


@pytest.mark.distributed
def test_a_killed_worker_is_reported(rows_recipe, slow_command):
    recipe, file = rows_recipe("oom")
    process = slow_command(file, "--workers", "2")
    while not finished_shards(recipe):
        time.sleep(0.02)
        assert process.poll() is None
    servers = [p for p in psutil.Process(process.pid).children() if "forkserver" in " ".join(p.cmdline())]
    os.kill(next(worker for server in servers for worker in server.children()).pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: one of 2 processes was killed, most likely because memory ran out" in output


def peak_memory_of_prepare(file):
    process = subprocess.Popen(
        [sys.executable, "scripts/prepare.py", file, "--workers", "1"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    peak, watched = 0, psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, watched.memory_info().rss)
        time.sleep(0.02)
    assert process.wait() == 0
    return peak


def test_memory_does_not_grow_with_the_corpus(write_recipe, corpus, toy_tree, tmp_path):
    """Ten times the text: what one process holds is its libraries and a few batches, 0.8 GB in all."""
    texts, peaks = [file.read_text() for file in sorted(corpus.iterdir())], []
    for times in (1, 10):
        rows = tmp_path / f"rows{times}.jsonl"
        with rows.open("w") as stream:
            for i in range(times * 75):  # 21 MB and 210 MB, 15 and 150 million tokens
                stream.writelines(json.dumps({"text": f"{i} {text}"}) + "\n" for text in texts)
        source = {"kind": "json", "files": [str(rows)]}
        file = write_recipe(f"times{times}", data__prepared_dir=str(tmp_path / f"data{times}"), data__source=source)
        tokenizer = f"name: {toy_tree['data']['prepared_dir']}/tokenizer"
        file.write_text(file.read_text().replace("train_vocab_size: 300", tokenizer))
        peaks.append(peak_memory_of_prepare(file))
    assert peaks[1] < min(1.5 * peaks[0], 0.85e9), peaks
