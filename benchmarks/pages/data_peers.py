"""The peers of benchmarks/pages/data.py. litdata and datatrove need packages that are no dependencies: measured where they can be imported.

`pip install --target build/peers --no-deps -r benchmarks/pages/peers.txt`, then PYTHONPATH=build/peers.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import tiktoken
import torch
from datasets import Dataset, Features, List, Value, load_dataset
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, default_data_collator

from isoflop.data.tokenizers import END_OF_TEXT

PROCESSES, WINDOW = 2, 1024
Job = dict[str, Any]  # files, format, tokenizer, out
PACKAGES = ("litdata", "datatrove")
MISSING = [name for name in PACKAGES if not importlib.util.find_spec(name)]


def tiktoken_encoding(folder: str | Path) -> tiktoken.Encoding:
    """The same vocabulary for tiktoken: the bytes of each entry, ranked by its id."""
    ranks = {entry: number for number, entry in gigatoken.Tokenizer(f"{folder}/tokenizer.json").vocab.items()}
    special = {END_OF_TEXT: ranks.pop(END_OF_TEXT.encode())}
    return tiktoken.Encoding("same", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


# Each that takes a job returns when it began and what it made, here tokens.


def nanogpt(job: Job) -> tuple[float, int]:
    """As data/openwebtext/prepare.py does, in batches of as many documents as its 1,024 batches of OpenWebText hold."""
    encoding = tiktoken_encoding(job["tokenizer"])
    start = time.perf_counter()

    def encode(row: dict[str, str]) -> dict[str, Any]:
        ids = encoding.encode_ordinary(row["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    rows = load_dataset("json", data_files=job["files"], split="train", num_proc=PROCESSES)
    splits = rows.train_test_split(test_size=0.005, seed=0, shuffle=True)
    written = 0
    for name, split in splits.map(encode, remove_columns=["text"], num_proc=PROCESSES).items():
        ids = np.memmap(f"{job['out']}-{name}.bin", dtype=np.uint16, mode="w+", shape=(sum(split["len"]),))
        batches, at = max(1, len(split) // 8000), 0
        for number in range(batches):
            batch = np.concatenate(split.shard(batches, number, contiguous=True).with_format("numpy")[:]["ids"])
            ids[at : at + len(batch)] = batch
            at += len(batch)
        ids.flush()
        written += at
    return start, written


def run_clm(job: Job) -> tuple[float, int]:
    """As examples/pytorch/language-modeling/run_clm.py does; it puts nothing between documents."""

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(itertools.chain(*lists)) for name, lists in rows.items()}
        whole = len(joined["input_ids"]) // WINDOW * WINDOW
        cut = {name: [ids[i : i + WINDOW] for i in range(0, whole, WINDOW)] for name, ids in joined.items()}
        return cut | {"labels": cut["input_ids"].copy()}

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    start = time.perf_counter()
    rows = load_dataset("json", data_files=job["files"], split="train")
    rows = rows.map(lambda batch: tokenizer(batch["text"]), batched=True, num_proc=PROCESSES, remove_columns=["text"])
    return start, len(rows.map(group, batched=True, num_proc=PROCESSES)) * WINDOW


def litdata_ids(file: str, tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """The ids of each document of a JSON-lines file."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield torch.tensor([*tokenizer.encode(json.loads(line)["text"]).ids, end], dtype=torch.int32)


def litdata(job: Job) -> tuple[float, int]:
    """As its documentation prepares text for language models: `optimize` with a function of a file, and `TokensLoader`."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{job['out']}-chunks"
    from litdata import TokensLoader, optimize  # type: ignore[import-not-found]

    read = partial(litdata_ids, tokenizer=Tokenizer.from_file(f"{job['tokenizer']}/tokenizer.json"))
    start = time.perf_counter()
    optimize(
        fn=read, inputs=job["files"], output_dir=job["out"], chunk_bytes="64MB", item_loader=TokensLoader(block_size=WINDOW),
        num_workers=PROCESSES, verbose=False,
    )  # fmt: skip
    chunks = json.loads((Path(job["out"]) / "index.json").read_text(encoding="utf-8"))["chunks"]
    return start, sum(chunk["dim"] for chunk in chunks)


def datatrove(job: Job) -> tuple[float, int]:
    """As its examples tokenize: JSON lines to files of ids, a task for each process; nothing is shuffled."""
    from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
    from datatrove.pipeline.readers import JsonlReader  # type: ignore[import-not-found]
    from datatrove.pipeline.tokens import DocumentTokenizer  # type: ignore[import-not-found]

    start = time.perf_counter()
    tokenizer = DocumentTokenizer(
        job["out"], f"{job['tokenizer']}/tokenizer.json", eos_token=END_OF_TEXT, shuffle_documents=False
    )
    reader = JsonlReader(str(Path(job["files"][0]).parent), glob_pattern="*.json")
    LocalPipelineExecutor([reader, tokenizer], PROCESSES, PROCESSES, logging_dir=f"{job['out']}-logs").run()
    return start, sum(file.stat().st_size for file in Path(job["out"]).glob("*.ds")) // 2  # uint16 for this vocabulary


def run_clm_loader(ids: np.ndarray, batch: int) -> DataLoader[Any]:
    """Over a dataset with the columns and types that run_clm's has."""
    types = {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8")), "labels": List(Value("int64"))}
    columns = {"input_ids": list(ids), "attention_mask": list(np.ones_like(ids)), "labels": list(ids)}
    rows = Dataset.from_dict(columns, Features(types))
    return DataLoader(rows, batch, shuffle=True, drop_last=True, collate_fn=default_data_collator)


def get_batch(file: str, batch: int) -> torch.Tensor:
    """As nanoGPT's train.py does."""
    data = np.memmap(file, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - WINDOW, (batch,))
    torch.stack([torch.from_numpy(data[i + 1 : i + 1 + WINDOW].astype(np.int64)) for i in starts])  # its targets
    return torch.stack([torch.from_numpy(data[i : i + WINDOW].astype(np.int64)) for i in starts])


def loaders(windows: np.ndarray, out: str, batch: int) -> dict[str, Callable[[int], torch.Tensor]]:
    """Batches of these windows, (count, WINDOW), by the loader of each peer from its own format, by one process."""
    windows.astype(np.uint16).tofile(out)
    collated = itertools.chain.from_iterable(itertools.repeat(run_clm_loader(windows, batch)))
    ways: dict[str, Callable[[int], torch.Tensor]] = {
        "nanoGPT: `get_batch`": lambda _: get_batch(out, batch),
        "run_clm: `DataLoader`, `default_data_collator`": lambda _: next(collated)["input_ids"],
    }
    if "litdata" not in MISSING:
        from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

        blocks = TokensLoader(block_size=WINDOW)
        os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{out}-litdata-cache"
        optimize(
            fn=torch.from_numpy, inputs=list(windows.astype(np.int32)), output_dir=f"{out}-litdata", chunk_bytes="64MB",
            item_loader=blocks, num_workers=1, verbose=False,
        )  # fmt: skip
        chunks = StreamingDataset(f"{out}-litdata", item_loader=blocks, shuffle=True, drop_last=True)
        streamed = itertools.chain.from_iterable(itertools.repeat(StreamingDataLoader(chunks, batch_size=batch)))
        ways["litdata: `StreamingDataLoader`, shuffled"] = lambda _: next(streamed).long()
    if "datatrove" not in MISSING:
        from datatrove.utils.dataset import DatatroveFolderDataset  # type: ignore[import-not-found]

        folder = Path(f"{out}-datatrove")
        folder.mkdir()
        windows.astype(np.uint16).tofile(folder / "00000_unshuffled.ds")
        files = DatatroveFolderDataset(str(folder), seq_len=WINDOW - 1, shuffle=True)  # it reads one id more, the last target
        read = itertools.chain.from_iterable(itertools.repeat(DataLoader(files, batch, shuffle=True, drop_last=True)))
        ways["datatrove: `DatatroveFolderDataset`, shuffled"] = lambda _: next(read)["input_ids"]
    return ways
