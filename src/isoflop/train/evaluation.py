"""Evaluation during training: the loss on validation windows, and sampled texts."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from numpy.typing import NDArray

from isoflop.data.order import rank_micro_batches
from isoflop.data.windows import Windows
from isoflop.modeling.loss import IGNORE_INDEX

SAMPLE_SEED = 42
NO_WINDOW = -1  # pads the last batches


def validation_loss(
    model: torch.nn.Module,
    accelerator: Accelerator,
    windows: Windows,
    indices: NDArray[np.int64],
    micro_batch_size: int,
    interrupted: Callable[[], bool],
) -> float | None:
    """Return the mean loss in nats per target over the windows at `indices`, split over the ranks. Collective.

    Every rank runs the same number of batches, the last ones padded with windows that carry no loss. Returns None where
    `interrupted()`, asked before each batch on every rank, is true.
    """
    per_round = micro_batch_size * accelerator.num_processes
    rounds = math.ceil(len(indices) / per_round)
    filled = np.concatenate([indices, np.full(rounds * per_round - len(indices), NO_WINDOW)])
    shares = rank_micro_batches(filled, micro_batch_size, accelerator.num_processes, accelerator.process_index)
    total = torch.zeros((), dtype=torch.float64 if accelerator.device.type != "mps" else torch.float32, device=accelerator.device)
    model.eval()
    try:
        with torch.no_grad():
            for mine in shares:
                if interrupted():
                    return None
                ids = torch.from_numpy(windows.take(np.maximum(mine, 0))).to(accelerator.device)
                targets = ids[:, 1:].clone()
                targets[torch.from_numpy(mine == NO_WINDOW).to(ids.device)] = IGNORE_INDEX
                total += model(ids, targets)
    finally:
        model.train()
    summed: torch.Tensor = accelerator.reduce(total, "sum")
    return summed.item() / (len(indices) * (windows.sequence_length - 1))


def bits_per_byte(loss_nats: float, bytes_per_token: float) -> float:
    """Convert nats per token to bits per UTF-8 byte of the validation text, which compare between tokenizers."""
    return loss_nats / math.log(2) / bytes_per_token


def sample_texts(causal_lm: Any, tokenizer: Any, prompts: list[str], new_tokens: int) -> list[str]:
    """Return a continuation of each prompt (temperature 0.8, top-k 50), with one seed on all ranks. Collective.

    Afterwards the model is in training mode again and every random state is as before.
    """
    causal_lm.eval()
    try:
        with untouched_random_state(causal_lm.device):
            torch.manual_seed(SAMPLE_SEED)
            return [_continued(causal_lm, tokenizer, prompt, new_tokens) for prompt in prompts]
    finally:
        causal_lm.train()


def _continued(causal_lm: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    room = causal_lm.config.max_position_embeddings - new_tokens
    ids = torch.tensor([tokenizer(prompt)["input_ids"][-room:]], device=causal_lm.device)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 50, "pad_token_id": tokenizer.eos_token_id}
    # Sharded weights are gathered in every call: a rank whose text has ended keeps calling until all texts have.
    synced = dist.is_initialized() and dist.get_world_size() > 1
    mask = torch.ones_like(ids)
    output = causal_lm.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, synced_gpus=synced, **settings)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


@contextlib.contextmanager
def untouched_random_state(device: torch.device) -> Iterator[None]:
    """Restore every random state at the end, and run compiled layers eagerly: other shapes would be compiled again."""
    states = random.getstate(), np.random.get_state()
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
