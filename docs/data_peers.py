"""Ways of docs/data.py that need packages of their own, which are no dependencies: measured where they can be imported.

`pip install --target build/peers --no-deps -r docs/peers.txt`, then PYTHONPATH=build/peers.
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

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

PROCESSES, WINDOW = 2, 1024  # docs/data.py's
END_OF_TEXT = "<|endoftext|>"
PACKAGES = ("litdata", "datatrove")
MISSING = [name for name in PACKAGES if not importlib.util.find_spec(name)]


def litdata_ids(file: str, tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """The ids of each document of a JSON-lines file."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield torch.tensor([*tokenizer.encode(json.loads(line)["text"]).ids, end], dtype=torch.int32)


def litdata(job: dict[str, Any]) -> tuple[float, int]:
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


def datatrove(job: dict[str, Any]) -> tuple[float, int]:
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


def loaders(windows: np.ndarray, out: str, batch: int) -> dict[str, Callable[[int], torch.Tensor]]:
    """Batches of these windows, (count, WINDOW), by the loader of each package from its own format, by one process."""
    ways: dict[str, Callable[[int], torch.Tensor]] = {}
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
