"""GGUF files, read back by transformers' own reader, which shares no code with the writer."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from conftest import ROOT, TOY_MODELS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from isoflop.data.tokenizers import PAD, set_pad_token, train_tokenizer
from isoflop.publish.gguf import LLAMA3_SPLIT, pre_tokenizer_name, write_gguf
from isoflop.utils.errors import UserError

TEXT = "def read(self):\n\treturn 'é' * 12345  # don't\n"
CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "gpt2": (GPT2Config, GPT2LMHeadModel)}


def saved(folder, family, num_ids=300, **fields):
    """A random model of a family with a tokenizer trained here, saved by transformers."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**TOY_MODELS[family], **fields})).eval()
    model.save_pretrained(folder)
    tokenizer = train_tokenizer([[TEXT, Path(gguf.__file__).with_name("gguf_reader.py").read_text()]], num_ids)
    set_pad_token(tokenizer, num_ids)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("llama", {"tie_word_embeddings": False, "head_dim": 16, "num_key_value_heads": 4}),
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu_pytorch_tanh"}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "stock",
)
def test_transformers_reads_the_same_model_back(family, fields, tmp_path):
    model = saved(tmp_path / "model", family, **fields)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    # Fields of no GGUF key in transformers' reader: it gives GPT-2 1,024 positions.
    known = {"n_positions": 64} if family == "gpt2" else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", **known).eval()
    ids = torch.arange(120).reshape(2, 60)
    with torch.no_grad():
        assert (model(ids).logits - again(ids).logits).abs().max() < 1e-6
    ours, theirs = (
        AutoTokenizer.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"),
    )
    assert theirs(TEXT)["input_ids"] == ours(TEXT)["input_ids"]
    assert (theirs.pad_token, theirs.eos_token) == (PAD, ours.eos_token)
    assert not (tmp_path / ".model.gguf.partial").exists()


def test_types_and_special_tokens_are_written(tmp_path):
    saved(tmp_path / "model", "llama", num_ids=300)
    bits = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5}
    for name, per_number in bits.items():
        write_gguf(tmp_path / "model", tmp_path / name, name)
        reader = gguf.GGUFReader(tmp_path / name)
        by_name = {tensor.name: tensor for tensor in reader.tensors}
        matrix = by_name["blk.1.ffn_gate.weight"]
        assert (matrix.n_bytes * 8 / matrix.n_elements, by_name["output_norm.weight"].tensor_type.name) == (per_number, "F32")
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert (value["tokenizer.ggml.pre"], value["tokenizer.ggml.add_bos_token"], value["tokenizer.ggml.add_eos_token"]) == (
        "gpt-2", False, False,
    )  # fmt: skip
    tokens, types = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    of_type = {kind: [token for token, number in zip(tokens, types, strict=True) if number == kind] for kind in gguf.TokenType}
    assert of_type[gguf.TokenType.CONTROL] == ["<|endoftext|>", PAD]
    assert of_type[gguf.TokenType.UNUSED] == [f"[PAD{number}]" for number in range(300, 320)]


def tree_of(pre_tokenizer, model=None):
    tokenizer = Tokenizer(model or models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    return json.loads(tokenizer.to_str())


def test_a_pre_tokenizer_is_recognized_by_its_settings_and_others_are_refused():
    level, split = pre_tokenizers.ByteLevel, pre_tokenizers.Split
    assert pre_tokenizer_name(tree_of(level(add_prefix_space=False))) == "gpt-2"
    parts = [split(tokenizers_regex(LLAMA3_SPLIT), "isolated"), level(add_prefix_space=False, use_regex=False)]
    assert pre_tokenizer_name(tree_of(pre_tokenizers.Sequence(parts))) == "llama-bpe"
    other = [split(tokenizers_regex(r"\p{L}+"), "isolated"), level(add_prefix_space=False, use_regex=False)]
    for pre_tokenizer in (level(add_prefix_space=True), pre_tokenizers.Sequence(other), pre_tokenizers.Whitespace()):
        with pytest.raises(UserError, match=r"neither as GPT-2's nor as Llama 3's; llama\.cpp's own convert_hf_to_gguf\.py"):
            pre_tokenizer_name(tree_of(pre_tokenizer))


def tokenizers_regex(pattern):
    from tokenizers import Regex

    return Regex(pattern)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt2", {"activation_function": "relu"}, "activation 'relu': llama.cpp computes gelu_new in a gpt2"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu': llama.cpp computes silu in a llama"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
            "rope_parameters.rope_type = 'linear' is not exported",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, fields, message, tmp_path):
    saved(tmp_path, family, **fields)
    with pytest.raises(UserError, match=re.escape(message)):
        write_gguf(tmp_path, tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.glob("*gguf*"))


def test_rows_that_blocks_do_not_divide_are_refused(tmp_path):
    saved(tmp_path, "llama", hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(UserError, match=r"--type = q8_0: .* has rows of 48: .*; take f16"):
        write_gguf(tmp_path, tmp_path / "model.gguf", "q8_0")
    assert not list(tmp_path.glob("*gguf*"))


def test_the_command_on_a_run_and_on_one_of_its_checkpoints(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted["llama"].output.run_dir, run)
    (run / "notes.gguf").write_text("mine")
    command = [sys.executable, "scripts/export.py"]
    for model, target in ((run, f"{run}.f16.gguf"), (run / "checkpoints" / "step-5", tmp_path / "five.gguf")):
        done = subprocess.run([*command, model, "--output", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert str(target) in done.stdout
        assert len(gguf.GGUFReader(target).tensors) == 20
    for arguments, message in (
        ([run, "--output", run / "notes.gguf"], "exists and is not a GGUF file"),
        ([uninterrupted["hybrid"].output.run_dir], "model_type = 'hybrid': llama.cpp computes no such model"),
        ([tmp_path / "nothing"], "nothing is not a folder"),
    ):
        done = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert message in done.stderr
    assert (run / "notes.gguf").read_text() == "mine"
