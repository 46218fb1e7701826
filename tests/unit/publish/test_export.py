"""What leaves the house: exported models in both generations of transformers, and their pad tokens."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from conftest import ROOT, TOY_MODELS, train
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
)

from isoflop.data.tokenizers import END_OF_TEXT, PAD, set_pad_token, train_tokenizer
from isoflop.train.export import OPENED_WITH

VERSION_4 = ROOT / "build" / "transformers4"
MODELS = {
    "llama": TOY_MODELS["llama"] | {"rope_theta": 500000.0},
    "gpt2": TOY_MODELS["gpt2"],
    "hybrid": TOY_MODELS["hybrid"],
    "rotary_hybrid": TOY_MODELS["hybrid"] | {"positions": "rope", "rope_theta": 500000.0, "norm_position": "pre"},
}
PROMPTS = ["import os", "def read(self, size):\n    return"]
# Run under either generation: a model's logits, its greedy continuation of two prompts as a batch and one by one, and ids.
OPEN = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
prompts, target, *folders = json.loads(sys.argv[1]), *sys.argv[2:]

def find(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    def continued(texts):
        ids = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)
    with torch.no_grad():
        out = model(torch.arange(60).reshape(2, 30), output_hidden_states=True)
    return {
        "dtype": str(model.dtype), "ids": tokenizer(prompts)["input_ids"], "logits": out.logits.tolist(),
        "hidden_states": len(out.hidden_states), "batch": continued(prompts),
        "single": [continued([prompt])[0] for prompt in prompts],
        "pad": tokenizer.pad_token, "eos": tokenizer.eos_token, "special": sorted(tokenizer.all_special_tokens),
    }

with open(target, "w") as stream:
    json.dump({"version": transformers.__version__, "found": [find(folder) for folder in folders]}, stream)
"""


def opened(folders, tmp_path, **environment):
    """What a process of its own finds in exported folders, with remote code allowed and a cache of its own for it."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), **environment}
    command = [sys.executable, "-c", OPEN, json.dumps(PROMPTS), str(tmp_path / "found.json"), *map(str, folders)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "found.json").read_text())


@pytest.fixture(scope="module")
def exported(toy_tree, tmp_path_factory):
    """A model folder of each class, of runs of two steps."""
    folder, training = tmp_path_factory.mktemp("exported"), toy_tree["training"] | {"max_steps": 2}
    for name, model in MODELS.items():
        train({**toy_tree, "model": model, "training": training}, folder / name)
    return {name: folder / name / "model" for name in MODELS}


def test_both_generations_of_transformers_compute_the_same(exported, tmp_path):
    if not VERSION_4.is_dir():
        pytest.skip("build/transformers4 is not there; `make build/transformers4` installs it")
    new = opened(exported.values(), tmp_path)
    old = opened(exported.values(), tmp_path, PYTHONPATH=str(VERSION_4))
    assert (old["version"], new["version"]) == OPENED_WITH
    for name, of_old, of_new in zip(exported, old["found"], new["found"], strict=True):
        logits = [torch.tensor(found.pop("logits")) for found in (of_old, of_new)]
        assert (logits[0] - logits[1]).abs().max() < 1e-6, name
        assert of_old == of_new, name
        assert of_old["batch"] == of_old["single"], name
        assert (of_old["pad"], of_old["eos"], of_old["special"]) == (PAD, END_OF_TEXT, sorted([PAD, END_OF_TEXT])), name


def test_what_one_generation_renamed_is_there_under_both_names(exported):
    config = json.loads((exported["llama"] / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "default"}
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, None)
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert json.loads((exported["llama"] / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "rope_theta" not in json.loads((exported["gpt2"] / "config.json").read_text())
    assert "rope_theta" not in json.loads((exported["hybrid"] / "config.json").read_text())


def test_the_versions_named_in_cards_are_those_of_the_tests():
    pinned = dict(line.split("==") for line in (ROOT / "tests" / "unit" / "publish" / "transformers4.txt").read_text().split())
    assert (pinned["transformers"], version("transformers")) == OPENED_WITH


def test_a_pad_token_hides_no_end_of_text_from_a_loss(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported["llama"])
    model = AutoModelForCausalLM.from_pretrained(exported["llama"])
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = [tokenizer(text + tokenizer.eos_token) for text in PROMPTS]
    labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)["labels"]
    assert (labels == tokenizer.eos_token_id).sum() == 2
    assert (labels == -100).sum() == abs(len(rows[0]["input_ids"]) - len(rows[1]["input_ids"])) > 0


TEXTS = st.lists(st.text(), min_size=1, max_size=5)
FULL = train_tokenizer([PROMPTS * 50], 257)  # no row is free in a model of 257
BEFORE = Tokenizer.from_str(FULL.backend_tokenizer.to_str())
set_pad_token(FULL, 257)


@given(TEXTS)
def test_no_text_gets_other_ids_for_the_pad_token(texts):
    texts = [text.replace(PAD, "") for text in texts]
    assert FULL(texts)["input_ids"] == [encoded.ids for encoded in BEFORE.encode_batch(texts)]
    assert FULL.batch_decode(FULL(texts)["input_ids"]) == BEFORE.decode_batch(FULL(texts)["input_ids"], skip_special_tokens=False)


def test_a_full_byte_level_vocabulary_keeps_its_size():
    assert len(FULL) == 257
    assert FULL.pad_token_id == BEFORE.token_to_id("ÿ") < 257  # byte 0xFF, which no UTF-8 text contains
    assert FULL("ÿ")["input_ids"] == BEFORE.encode("ÿ").ids  # the letter is two other bytes


def words(**special):
    """A tokenizer of words, with ids 0 to 2."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **special)


@pytest.mark.parametrize(
    ("special", "num_ids", "pad"),
    [
        ({"unk_token": "<unk>"}, 3, ("<unk>", 0)),
        ({"unk_token": "<unk>"}, 4, (PAD, 3)),
        ({"pad_token": "<unk>"}, 4, ("<unk>", 0)),
        ({"pad_token": "</s>", "unk_token": "<unk>"}, 4, (PAD, 3)),
        ({}, 3, ("</s>", 1)),
    ],
)
def test_the_pad_token_of_other_tokenizers(special, num_ids, pad):
    tokenizer = words(**special)
    set_pad_token(tokenizer, num_ids)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == pad
    assert tokenizer("hello", padding=True)["input_ids"] == [2]
    assert len(tokenizer) <= num_ids
