"""Regenerates docs/data.md and docs/data.png: python benchmarks/pages/data.py [--megabytes 100] [--rounds 3] (from the checkout's root).

Text to windows on disk, each way in a process of its own on the same documents, round by round; then memory, then loading.
Takes some minutes on two cores, and 1 GB of the temporary folder (TMPDIR). Wants tiktoken (`pip install -e .[dev]`); litdata and
datatrove are measured where they can be imported: `pip install --target build/peers --no-deps -r benchmarks/pages/peers.txt`, and
PYTHONPATH=build/peers.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import awkward as ak
import data_peers
import gigatoken
import matplotlib.figure
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import torch
from data_peers import PROCESSES, WINDOW, Job, datatrove, litdata, nanogpt, run_clm, tiktoken_encoding  # noqa: F401 (named in WAYS)
from datasets import Dataset, concatenate_datasets

from isoflop.config.loading import load_recipe
from isoflop.data.manifest import read_manifest
from isoflop.data.order import Order
from isoflop.data.tokenizers import train_tokenizer
from isoflop.data.windows import Windows
from isoflop.prepare.run import prepare

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FILES = 8  # of each format
SLICE_BYTES, TOKENIZER_BYTES = 10_000_000, 16_000_000
VOCABULARY, BATCH = 32_000, 8
BATCHES_A_STEP = 64  # 524,288 tokens
LOADING_S = 0.5  # that each measurement of loading takes
NODE_TOKENS_PER_S = 1e6  # a fast node's training
PEER, OURS, START, ALONE = "#8a8a8a", "#1f4e8c", "#7aa6d6", "#d1a14b"
# What is measured on both texts: label, a function's name, what it leaves, color.
SIDE_BY_SIDE = (
    ("nanoGPT's prepare.py", "nanogpt", "flat uint16 file", PEER),
    ("transformers' run_clm.py", "run_clm", "Arrow lists: ids, masks, labels", PEER),
    ("litdata: optimize", "litdata", "chunks", PEER),
    ("datatrove: DocumentTokenizer", "datatrove", "flat uint16 files", PEER),
    ("isoflop", "isoflop", "windows", OURS),
)
# All: label, a function's name or `command`, text, format, what it leaves, color.
WAYS = (
    *(
        (label, name, text, "json", leaves, color)
        for text in ("slice", "whole")
        for label, name, leaves, color in SIDE_BY_SIDE
        if name not in data_peers.MISSING
    ),
    ("isoflop, from Parquet", "isoflop", "whole", "parquet", "windows", OURS),
    ("isoflop, the command with its imports", "command", "whole", "json", "windows", START),
    ("gigatoken alone, from JSON lines", "gigatoken_alone", "whole", "json", "nothing", ALONE),
    ("gigatoken alone, from memory", "gigatoken_alone", "whole", "parquet", "nothing", ALONE),
)
PAGE = f"""# Data: text to windows, windows to batches

Made by `{{command}}` on {{machine}}.
All ways take turns in each round and may use {PROCESSES} processes or threads each; medians and ranges.

**Text**: this Python's own sources and documentation, each file once, cut into {{documents}} documents of log-normal length,
4 kB on average: {{corpus}}, in {FILES} JSON-lines and {FILES} Parquet files. Nothing is repeated: gigatoken remembers words, and
takes half as long or less for the same text again. Code repeats its words more than prose does.

**Tokenizer**: a byte-level BPE of {VOCABULARY:,} entries trained on the first {TOKENIZER_BYTES // 10**6} MB; tokenizers, tiktoken
and gigatoken gave the same ids on {{sample}} documents.

## Text to windows on disk

![MB of text a second](data.png)

{{ways}}

- MB is UTF-8 of the documents. Each run is a process of its own with empty caches, timed without its imports from before it
  opens the files until all is written; the command's row is the wall time of everything. Files are in the page cache.
- The peers are written after their sources: nanoGPT maps `tiktoken.encode_ordinary` and writes a `np.memmap`; run_clm maps
  `tokenizer`, then `group_texts`; litdata's `optimize` puts the ids of `tokenizers` into chunks for its `TokensLoader`;
  datatrove's `DocumentTokenizer` writes files of ids.{{missing}} The first {{small}} alone show what starting costs each: compare
  equal sizes.
- isoflop also reads its tokenizer, compares gigatoken with tokenizers, checks UTF-8, hashes what it reads and writes, and syncs;
  the peers' tokenizer is read before. It makes {{as_many}} tokens as nanoGPT's way. gigatoken alone writes nothing.
- Where a document has `<|endoftext|>` in its letters, `Tokenizer.encode` takes it for the special token, and the document ends
  there: hence litdata's and datatrove's fewer tokens. isoflop and nanoGPT keep the letters.

## Memory of prepare

The most that the command and its children held at once: resident, shared pages counted in each process, sampled every 5 ms.

{{memory}}

## Batches

{BATCH} windows of {WINDOW} as one int64 tensor, from the same text in each way's own format, in the page cache, by one process.
isoflop and datasets read the keyed order, which is counted; nanoGPT reads anywhere, and makes targets; run_clm shuffles, and
brings a mask and labels; litdata shuffles chunks and what is in each, datatrove all windows. A step's share: the time of a
batch over the time that a node at {NODE_TOKENS_PER_S / 1e6:.0f}M tokens/s trains on it, if one core made all its batches and
nothing overlapped.

{{batches}}

{{versions}}.
"""


def corpus(megabytes: float) -> list[str]:
    """This Python's own text files, each once, in the order of their hashes, cut into documents of log-normal length."""
    files = {}
    for root in {Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib")}:
        for file in root.rglob("*"):
            if file.suffix in {".py", ".txt", ".rst", ".md"} and file.is_file():
                files[hashlib.sha256(file.read_bytes()).digest()] = file
    texts, size = [], 0
    for digest in sorted(files):
        try:
            texts.append(files[digest].read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # a few declare another encoding
            continue
        size += len(texts[-1].encode())
        if size >= megabytes * 1e6:
            break
    text = "".join(texts)
    lengths = np.random.default_rng(0).lognormal(np.log(4096) - 0.5, 1.0, len(text) // 1024).astype(int) + 1  # mean 4096
    ends = np.cumsum(lengths)
    return [text[start:end] for start, end in itertools.pairwise([0, *ends[ends < len(text)].tolist(), len(text)])]


def first_bytes(documents: list[str], limit: int) -> list[str]:
    """The first documents, of `limit` bytes together."""
    return documents[: int(np.searchsorted(np.cumsum([len(text.encode()) for text in documents]), limit)) + 1]


def write_text(documents: list[str], folder: Path) -> dict[str, Any]:
    """Write the documents in both formats; their counts, and the files by format."""
    folder.mkdir()
    files = {name: [str(folder / f"{number}.{name}") for number in range(FILES)] for name in ("json", "parquet")}
    for number in range(FILES):
        some = documents[len(documents) * number // FILES : len(documents) * (number + 1) // FILES]
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in some)
        Path(files["json"][number]).write_text(lines, encoding="utf-8")
        pq.write_table(pa.table({"text": some}), files["parquet"][number])
    return {"MB": sum(len(text.encode()) for text in documents) / 1e6, "documents": len(documents), **files}


def train(documents: list[str], folder: Path) -> int:
    """Write the tokenizer that every way uses; the size of a sample on which all libraries gave the same ids."""
    texts = first_bytes(documents, TOKENIZER_BYTES)
    train_tokenizer((texts[i : i + 1000] for i in range(0, len(texts), 1000)), VOCABULARY).save_pretrained(folder)
    sample, file = documents[:: max(1, len(documents) // 1000)], str(folder / "tokenizer.json")
    reference = tokenizers.Tokenizer.from_file(file)
    reference.encode_special_tokens = True
    expected = [encoding.ids for encoding in reference.encode_batch(sample)]
    assert expected == tiktoken_encoding(folder).encode_ordinary_batch(sample), "tiktoken gives other ids"
    assert expected == gigatoken.Tokenizer(file).encode_batch(sample).to_list(), "gigatoken gives other ids"
    return len(sample)


# Each of these returns when it began and what it made, here tokens.


def gigatoken_alone(job: Job) -> tuple[float, int]:
    """One call over all documents, of JSON files or in memory already; the ids stay in memory."""
    tokenizer = gigatoken.Tokenizer(f"{job['tokenizer']}/tokenizer.json")
    if job["format"] == "json":
        start = time.perf_counter()
        return start, int(ak.count(tokenizer.encode_files(gigatoken.JsonlFileSource(job["files"]), parallel=True)))
    texts = pa.concat_tables([pq.read_table(file) for file in job["files"]])["text"].cast(pa.large_string())
    start = time.perf_counter()
    return start, int(ak.count(tokenizer.encode_batch(ak.from_arrow(texts), parallel=True)))


def recipe_of(job: Job) -> list[str]:
    """A recipe's file and overrides."""
    sizes = {"model.vocab_size": VOCABULARY, "model.max_position_embeddings": WINDOW, "training.sequence_length": WINDOW}
    named = {"data.source": json.dumps({"kind": job["format"], "files": job["files"]}), "tokenizer.name": job["tokenizer"]}
    values = sizes | named | {"training.tokens_per_step": BATCH * WINDOW, "data.prepared_dir": job["out"]}
    return ["recipes/quickstart.yaml", *(f"{key}={value}" for key, value in values.items())]


def isoflop(job: Job) -> tuple[float, int]:
    """The library's own call: it reads the tokenizer, starts processes, syncs and hashes what it reads and writes."""
    file, *overrides = recipe_of(job)
    recipe = load_recipe(file, overrides)
    start = time.perf_counter()
    manifest = prepare(recipe, num_workers=PROCESSES)
    assert manifest
    return start, sum(split.tokens for name in ("train", "validation") for split in manifest.split(name))


def loading(job: Job) -> tuple[float, dict[str, float]]:
    """Tokens a second of each way to make batches of the same windows, each from its own format, all in the page cache."""
    shards = read_manifest(job["prepared"]).shards("train")
    windows = Windows(job["prepared"], shards, WINDOW)
    order, now = Order.of([len(windows)], [1.0], seed=0), np.empty((BATCHES_A_STEP, BATCH), dtype=np.int64)
    arrow = concatenate_datasets([Dataset.from_file(f"{job['prepared']}/{shard.name}") for shard in shards]).with_format("numpy")

    def indices(batch: int) -> np.ndarray:
        if batch % BATCHES_A_STEP == 0:  # as training does: at once for all batches of a step
            now[:] = order.of_step(batch // BATCHES_A_STEP, BATCHES_A_STEP * BATCH).reshape(now.shape)
        return now[batch % BATCHES_A_STEP]

    ways: dict[str, Callable[[int], torch.Tensor]] = {
        "isoflop: `Windows.take`": lambda batch: torch.from_numpy(windows.take(indices(batch))),
        'datasets: `with_format("numpy")[indices]`': lambda batch: torch.from_numpy(arrow[indices(batch)]["input_ids"]),
        **data_peers.loaders(windows.take(np.arange(len(windows))), job["out"], BATCH),
    }
    return 0.0, {label: tokens_per_s(make) for label, make in ways.items()}


def tokens_per_s(make: Callable[[int], torch.Tensor]) -> float:
    """How fast a function from a number to a batch is."""
    assert make(0).shape == (BATCH, WINDOW)
    start, batch = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < LOADING_S:
        make(batch := batch + 1)
    return batch * BATCH * WINDOW / seconds


def run(arguments: list[str], job: Job, sampled: bool = False) -> tuple[str, float, int]:
    """Run Python: what it printed, its seconds and, if sampled, the most memory that it and its children held, bytes."""
    caches = {
        "HF_DATASETS_CACHE": job["out"] + "-cache",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    environment = os.environ | caches | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": str(PROCESSES)}
    log, start, peak = Path(job["out"] + "-log"), time.perf_counter(), 0
    with log.open("w", encoding="utf-8") as output:
        process = psutil.Popen([sys.executable, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT)
        while sampled and process.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]))
            time.sleep(0.005)
        process.wait()
    seconds, printed = time.perf_counter() - start, log.read_text(encoding="utf-8")
    if process.returncode:
        raise SystemExit(f"{arguments[-1]}: {printed[-3000:]}")
    return printed, seconds, peak


class Bench:
    """A temporary folder with the corpus and the tokenizer, in which things are run."""

    def __init__(self, folder: Path, megabytes: float) -> None:
        documents = corpus(megabytes)
        self._folder, self._runs = folder, itertools.count()
        self.texts = {"slice": write_text(first_bytes(documents, SLICE_BYTES), folder / "slice")}
        self.texts["whole"] = write_text(documents, folder / "whole")
        self.sample = train(documents, folder / "tokenizer")

    def job(self, text: str, form: str) -> Job:
        """A piece of work with a folder of its own."""
        place = self._folder / f"run-{next(self._runs)}"
        place.mkdir()
        return {"files": self.texts[text][form], "format": form, "tokenizer": f"{self._folder}/tokenizer", "out": f"{place}/out"}

    def work(self, name: str, job: Job) -> tuple[float, Any]:
        """Seconds and outcome of a piece of work, in a process of its own that imports first."""
        if name == "command":
            return run(["scripts/prepare.py", *recipe_of(job), f"--workers={PROCESSES}"], job)[1], 0
        code = "import data, json, sys, time; start, made = getattr(data, sys.argv[1])(json.loads(sys.argv[2]))"
        tell = "; print(); print(json.dumps([time.perf_counter() - start, made]))"
        seconds, outcome = json.loads(run(["-c", code + tell, name, json.dumps(job)], job)[0].splitlines()[-1])
        return seconds, outcome

    def rounds(self, count: int) -> tuple[list[list[float]], list[int]]:
        """Seconds of every way in every round, and its tokens; what a run leaves is deleted."""
        seconds: list[list[float]] = [[] for _ in WAYS]
        tokens = [0] * len(WAYS)
        for number, (place, (label, work, text, form, *_)) in itertools.product(range(count), enumerate(WAYS)):
            job = self.job(text, form)
            taken, tokens[place] = self.work(work, job)
            seconds[place].append(taken)
            shutil.rmtree(Path(job["out"]).parent)
            print(f"round {number}: {label}, {text}: {self.texts[text]['MB'] / taken:.2f} MB/s", flush=True)
        return seconds, tokens

    def peak_bytes(self, text: str, processes: int) -> int:
        """The most memory that the command held."""
        job = self.job(text, "json")
        return run(["scripts/prepare.py", *recipe_of(job), f"--workers={processes}"], job, sampled=True)[2]

    def loading(self, count: int) -> dict[str, list[float]]:
        """Tokens a second of every way to load, in every round."""
        job, found = self.job("whole", "json"), defaultdict(list)
        self.work("isoflop", job)
        for _ in range(count):
            for label, rate in self.work("loading", self.job("whole", "json") | {"prepared": job["out"]})[1].items():
                found[label].append(rate)
        return found


def table(header: str, rows: list[list[str]]) -> str:
    """A Markdown table."""
    cells = [cell.strip() for cell in header.split("|")]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells, ["---"] * len(cells), *rows])


def spread(values: list[float]) -> str:
    """The median, and the range, to three digits."""
    return "{} ({} to {})".format(*(f"{value:.3g}" for value in (statistics.median(values), min(values), max(values))))


def ways_table(bench: Bench, seconds: list[list[float]], tokens: list[int]) -> str:
    """What was measured, and the ratio to the library's own call on the same text in the same round."""
    ours = {way[2]: taken for way, taken in reversed(list(zip(WAYS, seconds, strict=True))) if way[1] == "isoflop"}
    rows = []
    for (label, _, text, _, leaves, _), taken, made in zip(WAYS, seconds, tokens, strict=True):
        ratio = "1" if taken is ours[text] else spread([one / our for one, our in zip(taken, ours[text], strict=True)])
        rates = [bench.texts[text]["MB"] / one for one in taken]
        rows.append([label, f"{bench.texts[text]['MB']:.0f}", f"{made:,}" if made else "", leaves, spread(rates), ratio])
    return table("way | text, MB | tokens | what it leaves | MB/s | time / isoflop's on that text", rows)


def draw(bench: Bench, seconds: list[list[float]], file: Path) -> None:
    """MB/s of every way."""
    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    rates = [bench.texts[way[2]]["MB"] / statistics.median(taken) for way, taken in zip(WAYS, seconds, strict=True)]
    labels = [f"{way[0]} ({bench.texts[way[2]]['MB']:.0f} MB)" for way in WAYS]
    axes.bar_label(axes.barh(labels, rates, color=[way[5] for way in WAYS]), [f"{rate:.3g}" for rate in rates], padding=3)
    axes.set(xscale="log", xlabel="MB of text a second", xlim=(min(rates) / 3, max(rates) * 2))
    axes.invert_yaxis()
    figure.savefig(file, dpi=110)


def page(bench: Bench, asked: float, rounds: int) -> str:
    """Measure all; the tables, and how they were made."""
    seconds, tokens = bench.rounds(rounds)
    draw(bench, seconds, DOCS / "data.png")
    sizes = {name: text["MB"] for name, text in bench.texts.items()}
    held = [[f"{sizes[name]:.0f}", *(f"{bench.peak_bytes(name, n) / 2**20:,.0f}" for n in (1, PROCESSES))] for name in sizes]
    rates = {label: [rate / 1e6 for rate in found] for label, found in bench.loading(rounds).items()}
    loaded = [
        [label, spread(found), f"{NODE_TOKENS_PER_S / 1e6 / statistics.median(found):.2%}"] for label, found in rates.items()
    ]
    made = {way[1:3]: number for way, number in zip(WAYS, tokens, strict=True)}
    libraries = ["datasets", "transformers", "tokenizers", "tiktoken", "gigatoken", "pyarrow", "numpy", "torch"]
    libraries += [name for name in data_peers.PACKAGES if name not in data_peers.MISSING]
    return PAGE.format(
        command=f"python benchmarks/pages/data.py --megabytes {asked:.0f} --rounds {rounds}",
        machine=f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB of memory",
        corpus=f"{sizes['whole']:.1f} MB{'' if sizes['whole'] >= asked else ' (all there is)'}",
        documents=f"{bench.texts['whole']['documents']:,}",
        small=f"{sizes['slice']:.0f} MB",
        sample=f"{bench.sample:,}",
        ways=ways_table(bench, seconds, tokens),
        as_many="as many" if all(made["nanogpt", text] == made["isoflop", text] for text in sizes) else "NOT as many",
        memory=table(f"text, MB | MiB, --workers=1 | MiB, --workers={PROCESSES}", held),
        batches=table("way | M tokens/s | share of a step", loaded),
        missing=f" Not there to be measured: {', '.join(data_peers.MISSING)}." if data_peers.MISSING else "",
        versions=", ".join(f"{name} {version(name).split('+')[0]}" for name in libraries),
    )


def main() -> None:
    """Measure in a temporary folder, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="of text; what is there, if that is less")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        written = page(Bench(Path(folder), arguments.megabytes), arguments.megabytes, arguments.rounds)
    (DOCS / "data.md").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
