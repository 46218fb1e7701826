"""Sources together: mixtures, the four ways in which datasets bring splits, and a look at the windows."""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import curve_of, metrics_of, run_command, weights_of

from isoflop.config.loading import load_recipe
from isoflop.data.manifest import read_manifest, validation_statistics
from isoflop.prepare.inspect import documents_of
from isoflop.prepare.run import prepare, verify

pytestmark = pytest.mark.usefixtures("on_the_console")

STOP_AT_7 = """
import os, signal, isoflop.train.trainer as pretrain
step = pretrain.train_step
def stopping(job, progress):
    if progress.step == 7:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(job, progress)
pretrain.train_step = stopping
"""


@pytest.fixture
def mixture(write_recipe, corpus, tmp_path):
    """A recipe of code (text files) and prose (JSON lines), 30 to 70."""
    prose = tmp_path / "prose.jsonl"
    prose.write_text(
        "".join(json.dumps({"text": f"The {i}th story of {i % 7} bears and a fox. " * 8}) + "\n" for i in range(300))
    )
    sources = {
        "code": {"weight": 0.3, "source": {"kind": "text", "files": [f"{corpus}/*.txt"]}},
        "prose": {"weight": 0.7, "source": {"kind": "json", "files": [str(prose)]}},
    }

    def write(name="mixture", **changes):
        source = {"kind": "mixture", "sources": sources}
        return write_recipe(name, data__prepared_dir=str(tmp_path / "mixed"), data__source=source, **changes)

    return write


def test_a_mixture_is_sampled_by_weight_and_its_shares_are_reported(mixture, capsys, ranks):
    file = mixture(training__max_steps=40)
    recipe = load_recipe(file)
    manifest = prepare(recipe)
    assert list(manifest.sources) == ["code", "prose"]
    printed = ranks.run("cpu", file)
    code, prose = manifest.split("train")
    shares = re.search(
        rf"windows of 32: code ([\d.]+)% of the tokens \(asked for 30.00%\), ([\d.]+) epochs of {code.windows:,} windows;"
        rf" prose ([\d.]+)% of the tokens \(asked for 70.00%\), ([\d.]+) epochs of {prose.windows:,} windows",
        printed,
    )
    assert shares, printed
    seen, windows = float(shares[1]) / 100, 40 * 256 // 32
    assert abs(seen - 0.3) < 6 * np.sqrt(0.21 / windows)
    assert float(shares[1]) + float(shares[3]) == pytest.approx(100)
    assert float(shares[2]) == pytest.approx(seen * windows / code.windows, abs=0.006)
    bytes_per_token, entropy = validation_statistics(manifest, recipe.data.shares())
    held_out = manifest.split("validation")
    assert bytes_per_token == pytest.approx(sum(w * s.bytes / s.tokens for w, s in zip((0.3, 0.7), held_out, strict=True)))
    assert entropy == pytest.approx(sum(w * s.unigram_entropy_nats for w, s in zip((0.3, 0.7), held_out, strict=True)))


@pytest.mark.distributed
def test_a_mixture_resumes_at_any_number_of_processes(mixture, ranks):
    undivided = mixture("undivided")
    prepare(load_recipe(undivided))
    ranks.run("cpu", undivided)
    split = mixture("split")
    launched = ranks.start("cpu", split, code=STOP_AT_7)
    assert launched.wait() == [75]
    assert "resuming from" in ranks.run("cpu", split)
    assert curve_of(load_recipe(split)) == curve_of(load_recipe(undivided))
    two = mixture("two", training__micro_batch_size=2)
    ranks.run("2cpu_ddp", two, processes=2)
    losses = [[row["loss"] for row in metrics_of(load_recipe(file))] for file in (undivided, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_weights_can_change_without_preparing_again(mixture, run_in_process, capsys):
    recipe = load_recipe(mixture("first"))
    prepare(recipe)
    other = load_recipe(
        mixture("second"), ["data.source.sources.code.weight=0.6", "data.source.sources.prose.weight=0.4", "training.max_steps=2"]
    )
    prepare(other)
    assert "already prepared and nothing changed" in capsys.readouterr().out
    assert run_in_process(other) == 0
    assert recipe.identity_fields() != other.identity_fields()  # but a run folder belongs to its weights
    assert weights_of(other)


@pytest.mark.parametrize("own", [None, "validation", "val", "test"])
def test_however_a_dataset_is_split_it_ends_in_the_same_layout(own, write_recipe, corpus, tmp_path):
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    for split, rows in {"train": texts[:30], **({own: texts[30:]} if own else {})}.items():
        datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    source = {"kind": "hub", "name": str(tmp_path / "set")}
    recipe = load_recipe(write_recipe(data__prepared_dir=str(tmp_path / "p"), data__source=source, data__validation_fraction=0.2))
    manifest = prepare(recipe)
    splits = manifest.sources["hub"].splits
    assert set(splits) == {"train", "validation"}
    assert all(split.windows > 0 for split in splits.values())
    if own:
        assert (splits["train"].documents, splits["validation"].documents) == (30, 10)
    else:
        assert splits["train"].documents + splits["validation"].documents == 30
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == [
        "hub-train-00000-000.arrow",
        "hub-validation-00000-000.arrow" if own is None else "hub-validation-00001-000.arrow",
        "manifest.json",
        "tokenizer",
    ]


def test_a_folder_prepared_with_a_contamination_report_still_opens(toy_tree, toy_recipe, tmp_path):
    folder = Path(shutil.copytree(toy_tree["data"]["prepared_dir"], tmp_path / "old"))
    tree = json.loads((folder / "manifest.json").read_text())
    current = read_manifest(str(folder))
    tree["contamination"] = {"exam": {"ngram_tokens": 13, "documents": 2, "documents_found": 1}}
    tree["made_from"] |= {"data.contamination.ngram_tokens": 13, "data.contamination.sets.exam.kind": "json"}
    (folder / "manifest.json").write_text(json.dumps(tree))
    assert read_manifest(str(folder)) == current
    assert prepare(toy_recipe(data__prepared_dir=str(folder))).fingerprint() == current.fingerprint()


def test_inspect_prints_windows_in_the_order_of_training(toy_tree, write_recipe, uninterrupted):
    file = write_recipe()
    recipe = load_recipe(file)
    manifest = read_manifest(recipe.data.prepared_dir)
    done = run_command("python", "scripts/prepare.py", file, "--inspect", "9")
    heads = re.findall(
        r"━━━ window ([\d,]+) of ([\d,]+) \(text\), step (\d), row (\d): 32 tokens of (\d) document\(s\)", done.stdout
    )
    assert [(head[2], head[3]) for head in heads] == [("1", str(row)) for row in range(1, 9)] + [("2", "1")]
    assert len({head[0] for head in heads}) == 9
    assert int(heads[0][1].replace(",", "")) == manifest.windows("train")
    assert len(re.findall(r"^─── \d+ tokens, (?:the document ends|cut)$", done.stdout, re.M)) == sum(
        int(head[4]) for head in heads
    )


def test_documents_of_a_window():
    pieces = documents_of(np.array([5, 6, 0, 7, 0, 0, 8]), eos_token_id=0)
    assert [piece.tolist() for piece in pieces] == [[5, 6, 0], [7, 0], [0], [8]]


def test_a_copied_folder_is_checked_byte_for_byte(toy_tree, write_recipe, tmp_path):
    copy = shutil.copytree(toy_tree["data"]["prepared_dir"], tmp_path / "copied")
    file = write_recipe(data__prepared_dir=str(copy), data__source={"kind": "hub", "name": "no/such-dataset"})
    done = run_command("python", "scripts/prepare.py", file, "--verify")  # needs neither the text nor the Hub
    assert re.search(r"copied: 2 shards, [\d,]+ bytes, every byte as manifest.json says", done.stdout)
    shard = copy / "text-train-00000-000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 4
    shard.write_bytes(content)
    done = run_command("python", "scripts/prepare.py", file, "--verify", check=False)
    assert done.returncode == 2
    assert "error: prepared data is damaged: " in done.stderr
    shard.unlink()
    recipe = load_recipe(file)
    with pytest.raises(Exception, match=r"text-train-00000-000.arrow is missing"):
        verify(recipe)
    assert Path(copy).exists()
