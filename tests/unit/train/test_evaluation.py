import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from isoflop.modeling.build import build_config, build_model
from isoflop.modeling.loss import TrainingModel
from isoflop.train.evaluation import bits_per_byte, sample_texts, validation_loss

FIELDS = {
    "model_type": "gpt2", "attn_implementation": "sdpa", "vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2,
    "n_positions": 64,
}  # fmt: skip


class FakeWindows:
    """Ten windows of eight tokens."""

    sequence_length = 8

    def take(self, indices):
        return np.random.default_rng(0).integers(0, 300, (10, 8))[indices]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 16])
def test_the_mean_does_not_depend_on_how_the_windows_are_batched(micro_batch_size):
    model = TrainingModel(build_model(build_config(FIELDS, 0, 0), True, seed=0)).train()
    indices = np.array([7, 0, 3, 9, 1, 2, 5])
    ids = torch.from_numpy(FakeWindows().take(indices))
    with torch.no_grad():
        expected = model.eval().causal_lm(input_ids=ids, labels=ids).loss.item()
    model.train()  # with GPT-2's dropout of 0.1, which validation must be without
    accelerator = Accelerator(cpu=True)
    loss = validation_loss(model, accelerator, FakeWindows(), indices, micro_batch_size, interrupted=lambda: False)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert model.training
    assert validation_loss(model, accelerator, FakeWindows(), indices, micro_batch_size, interrupted=lambda: True) is None
    assert model.training


def test_bits_per_byte_by_hand():
    assert bits_per_byte(3 * math.log(2), bytes_per_token=3.0) == pytest.approx(1.0)


def test_samples_are_seeded(toy_tree):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy_tree["data"]["prepared_dir"] + "/tokenizer")
    model = build_model(build_config(FIELDS, tokenizer.eos_token_id, None), True, seed=0).train()
    texts = sample_texts(model, tokenizer, ["import ", "def "], 8)
    assert texts == sample_texts(model, tokenizer, ["import ", "def "], 8)
    assert texts[0].startswith("import ")
    assert texts[1].startswith("def ")
    assert model.training


@pytest.mark.parametrize("new_tokens", [8, 63])
def test_a_prompt_longer_than_the_positions_is_cut(new_tokens, toy_tree):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy_tree["data"]["prepared_dir"] + "/tokenizer")
    model = build_model(build_config(FIELDS, None, None), True, seed=0).train()
    prompt = "import os, sys\n" * 50
    (text,) = sample_texts(model, tokenizer, [prompt], new_tokens)
    kept = tokenizer(prompt)["input_ids"][-(64 - new_tokens) :]
    assert text.startswith(tokenizer.decode(kept))
