"""Export to one GGUF file for llama.cpp, Ollama and LM Studio, by `gguf`, llama.cpp's own package.

Entered by `export_gguf`. llama.cpp's converter recognizes tokenizers by a hash of ids, and none that was trained here. This one
reads the pre-tokenizer's settings. For metadata, names and layouts see gguf-py/gguf/constants.py and conversion/ in llama.cpp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from isoflop.train.export import model_folder
from isoflop.utils.errors import UserError
from isoflop.utils.io import atomic_path

# llama.cpp's pre-tokenizer "llama-bpe" (src/llama-vocab.cpp): how text is split before merges.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def export_gguf(model: str | Path, type: str = "f16", output: str | Path | None = None) -> Path:
    """Write the GGUF file of a run, a checkpoint or a saved model; return its path. Raises `UserError`."""
    if not Path(model).is_dir():
        raise UserError(f"{model} is not a folder; give a run folder, or that of a saved model")
    with model_folder(str(model)) as (folder, _):
        target = Path(output or f"{str(model).rstrip('/')}.{type}.gguf")
        if target.exists() and not _is_gguf(target):
            raise UserError(f"--output = {str(target)!r} exists and is not a GGUF file; give another name")
        write_gguf(Path(folder), target, type)
    return target


def export_command(model: str, to: str = "gguf", type: str = "f16", output: str | None = None) -> int:
    """Write a run's model in another format, of which GGUF is the only one so far; return the exit code."""
    target = export_gguf(model, type, output)
    print(f"{target}: {target.stat().st_size:,} bytes; try it: llama-completion -m {target} -p 'import ' -n 32")
    return 0


def write_gguf(folder: Path, target: Path, type_name: str) -> None:
    """Write the model in `folder` (config.json, safetensors, tokenizer) as the file `target`, one tensor in memory at a time.

    Matrices are of `type_name`; vectors and learned positions are fp32, as llama.cpp requires. Raises `UserError` for a model or
    tokenizer that llama.cpp does not support.
    """
    with atomic_path(target) as temporary:
        _write_gguf(folder, temporary, type_name)


def _write_gguf(folder: Path, file: Path, type_name: str) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _require_supported(config)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}[config.model_type]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    _add_shape(writer, config)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if type_name == "f32" else f"MOSTLY_{type_name.upper()}"])
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = []
    for stored, origin in _stored(folder):
        tensor, name = _tensor(stored, origin, config), str(names.get_name(stored, try_suffixes=(".weight", ".bias")))
        kind, num_bytes = _kind_and_bytes(name, tensor.shape, type_name)
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, num_bytes, raw_dtype=kind)
        tensors.append((stored, origin, kind))
    file.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for stored, origin, kind in tqdm(tensors, unit=" tensors", disable=None):
        writer.write_tensor_data(gguf.quantize(_tensor(stored, origin, config), kind))
    writer.close()


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _kind_and_bytes(name: str, shape: tuple[int, ...], type_name: str) -> tuple[gguf.GGMLQuantizationType, int]:
    """Return the type of a tensor in the file, and its size in bytes."""
    small = len(shape) == 1 or name.startswith("position_embd")
    kind = gguf.GGMLQuantizationType["F32" if small else type_name.upper()]
    try:
        return kind, math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
    except ValueError as error:
        raise UserError(f"--type = {type_name}: {name} has rows of {shape[-1]}: {error}; take f16") from None


def _stored(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield each tensor's name and file."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            yield from ((name, file) for name in opened.keys())  # noqa: SIM118 - it is not a dictionary


def _tensor(name: str, file: Path, config: PretrainedConfig) -> np.ndarray[Any, Any]:
    """Return a tensor in fp32 in llama.cpp's layout: matrices (out, in), both dimensions of a rotary pair adjacent."""
    with safe_open(file, "pt") as opened:
        tensor: np.ndarray[Any, Any] = opened.get_tensor(name).float().numpy()
    if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return np.ascontiguousarray(tensor.T)  # transformers' Conv1D stores (in, out)
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    if number := heads.get(name.split(".")[-2]):
        pairs = tensor.reshape(number, 2, len(tensor) // number // 2, *tensor.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(tensor.shape))
    return tensor


def _require_supported(config: PretrainedConfig) -> None:
    """Raise `UserError` for a model that llama.cpp computes differently or not at all."""
    activations = {"llama": ("silu",), "gpt2": ("gelu_new", "gelu_pytorch_tanh")}
    if config.model_type not in activations:
        raise UserError(f"model_type = {config.model_type!r}: llama.cpp computes no such model; gpt2 and llama can be exported")
    activation = config.hidden_act if config.model_type == "llama" else config.activation_function
    if activation not in activations[config.model_type]:
        raise UserError(
            f"activation {activation!r}: llama.cpp computes {activations[config.model_type][0]} in a {config.model_type}"
        )
    rope = getattr(config, "rope_parameters", None) or {"rope_type": "default"}
    if rope["rope_type"] != "default":
        raise UserError(f"rope_parameters.rope_type = {rope['rope_type']!r} is not exported; llama.cpp's own converter has it")


def _add_shape(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(config.head_dim)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, num_ids: int) -> None:
    """Write a byte-level BPE: entries, their types, merges, and the special tokens that it adds to a text."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for every byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer_name(tree))
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    types = dict.fromkeys(by_id, gguf.TokenType.NORMAL)
    for number, added in tokenizer.added_tokens_decoder.items():
        types[number] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    writer.add_token_list([by_id.get(number, f"[PAD{number}]") for number in range(num_ids)])
    writer.add_token_types([types.get(number, gguf.TokenType.UNUSED) for number in range(num_ids)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in tree["model"]["merges"]])
    for kind in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    around = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(around[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)


def pre_tokenizer_name(tree: dict[str, Any]) -> str:
    """Return llama.cpp's name of a tokenizer.json's pre-tokenizer. Raises `UserError` for an unsupported one."""
    steps = tree["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    shape = [(step.get("type"), step.get("add_prefix_space", False), step.get("use_regex", True)) for step in steps]
    if tree["model"]["type"] == "BPE" and tree["normalizer"] is None:
        if shape == [("ByteLevel", False, True)]:
            return "gpt-2"
        if [kind for kind, *_ in shape] == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") == LLAMA3_SPLIT:
            return "llama-bpe"
    raise UserError(
        "the tokenizer splits text neither as GPT-2's nor as Llama 3's; llama.cpp's own convert_hf_to_gguf.py knows more"
        " tokenizers, by name: run it on the model's folder"
    )
