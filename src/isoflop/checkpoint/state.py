"""The tensors of a run under names that no engine changes, and how they are read back.

`model.<parameter>` and `optimizer.<parameter>.<moment>`, the parameter's name being that of the unwrapped model: a checkpoint of
one process, DDP, FSDP2 or DeepSpeed ZeRO-1 is loaded by any other, at any world size (torch.distributed.checkpoint cuts
and joins the shards). Hyperparameters are the recipe's and are not saved. Nothing that is loaded can run code.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.fsdp import FSDPModule

from isoflop.errors import UserError
from isoflop.untrusted import leaves_folder, read_bytes, shown

Tensors = dict[str, Tensor]

MOST_METADATA_BYTES = 256 * 2**20  # some 100 bytes a tensor and rank: of 1,000 tensors on 1,000 ranks half of it
# Full fp32 tensors that a ZeRO rank holds on the host at once while it loads.
LOAD_BYTES = 2 * 2**30


def is_zero(optimizer: Any) -> bool:
    """Whether an optimizer is DeepSpeed's, which keeps fp32 weights and moments in flat parts of its own."""
    return type(optimizer).__module__.startswith("deepspeed.")


def live_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Tensors:
    """The very tensors of an unwrapped model and its optimizer (DTensors under FSDP2); tied weights once.

    After a forward without gradients FSDP2 leaves what it does not reshard (embedding, last norm, head) as whole copies that the
    optimizer does not know, so all is resharded first.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = fresh_moments(parameter, optimizer)
            tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def fresh_moments(parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensors:
    """The state that AdamW makes at a parameter's first step: torch's fused one counts steps on the device."""
    device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
    dtype = getattr(optimizer, "moments_dtype", parameter.dtype)
    moments = {key: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32, device=device), **moments}


def load_tensors(path: Path, model: nn.Module, optimizer: Any) -> None:
    """Read a checkpoint into an unwrapped model and its optimizer, in place. Every rank reads what it holds."""
    if is_zero(optimizer):
        _load_zero(path, model, optimizer)
    else:
        read(path, live_tensors(model, optimizer))


def read(path: Path, tensors: Tensors) -> None:
    """Fill tensors by their names, in place.

    Raises `UserError` where the checkpoint's table of contents tries to run code or is none, and where what it describes does not
    fit the tensors or is not there.
    """
    reader = TensorReader(path)
    try:
        described = reader.read_metadata().state_dict_metadata  # DCP asks for it too, but would wrap the refusal
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}/.metadata: {error}; this is no checkpoint of isoflop: use another one, and find out who wrote it"
        ) from None
    try:
        for name, tensor in tensors.items():
            there = described.get(name)
            if isinstance(there, dcp_metadata.TensorStorageMetadata) and there.properties.dtype != tensor.dtype:
                raise ValueError(f"{name} is of {there.properties.dtype}, and the run's of {tensor.dtype}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            load_sharded(dict(tensors), storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # torch's, the zip reader's, and DCP's, which is no `Exception`
        cause = next((wrapped[0] for wrapped in getattr(error, "failures", {}).values()), error)
        raise UserError(
            f"{path} cannot be loaded: {type(cause).__name__}: {shown(' '.join(str(cause).split()))}; use another checkpoint, or"
            " the recipe that it was made by"
        ) from error


def gather_zero(model: nn.Module, optimizer: Any, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Name and full fp32 tensor, one after another, for the names that are `wanted` here. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    steps = _flat_state(optimizer)
    for name, parameter in model.named_parameters():
        gathered = {f"model.{name}": safe_get_full_fp32_param(parameter)}
        for key in ("exp_avg", "exp_avg_sq"):
            gathered[f"optimizer.{name}.{key}"] = safe_get_full_optimizer_state(parameter, key)
        gathered[f"optimizer.{name}.step"] = steps[0]["step"]
        yield from ((key, value) for key, value in gathered.items() if wanted(key))


def zero_sizes(model: nn.Module) -> dict[str, int]:
    """Elements of every tensor that `gather_zero` gives."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        sizes |= dict.fromkeys((f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"), parameter.numel())
        sizes[f"optimizer.{name}.step"] = 1
    return sizes


def set_zero_weights(model: nn.Module, weights: Tensors) -> None:
    """Give DeepSpeed's fp32 weights full values by name: on its own it starts them from weights already rounded to bf16."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in model.named_parameters():
        if name in weights:
            full = weights[name].to(parameter.device)
            safe_set_full_fp32_param(parameter, full)
            parameter.data.copy_(full)


def _load_zero(path: Path, model: nn.Module, optimizer: Any) -> None:
    """Full tensors on the host, some at a time, of which DeepSpeed keeps its rank's part."""
    from deepspeed.utils import safe_set_full_optimizer_state

    states = _flat_state(optimizer)
    batch: list[tuple[str, nn.Parameter]] = []
    parameters = list(model.named_parameters())
    for place, (name, parameter) in enumerate(parameters):
        batch.append((name, parameter))
        if place + 1 < len(parameters) and sum(12 * p.numel() for _, p in batch) < LOAD_BYTES:
            continue
        tensors = {f"optimizer.{n}.step": torch.zeros(()) for n, _ in batch}
        for n, p in batch:
            for key in (f"model.{n}", f"optimizer.{n}.exp_avg", f"optimizer.{n}.exp_avg_sq"):
                tensors[key] = torch.empty(p.shape, dtype=torch.float32)
        read(path, tensors)
        set_zero_weights(model, {n: tensors[f"model.{n}"] for n, _ in batch})
        for n, p in batch:
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(p, tensors[f"optimizer.{n}.{key}"].to(p.device), key)
        for state in states:
            state["step"].copy_(tensors[f"optimizer.{name}.step"])
        batch = []


def _flat_state(zero_optimizer: Any) -> list[Tensors]:
    """The inner AdamW's state of each flat partition, made where no step was done yet."""
    inner = zero_optimizer.optimizer
    flat = [parameter for group in inner.param_groups for parameter in group["params"]]
    for parameter in flat:
        if not inner.state[parameter]:
            inner.state[parameter] = fresh_moments(parameter, inner)
    # Give every parameter its view of the moments: DeepSpeed does so after the first group's first step; the second has none yet.
    zero_optimizer._hp_optimizer_states_linked = False
    zero_optimizer._lazy_init_hp_params_optimizer_state()
    return [inner.state[parameter] for parameter in flat]


class TensorReader(FileSystemReader):
    """DCP's reader, but its `.metadata`, a pickle, may name nothing except DCP's descriptions of tensors.

    Tensors themselves are read with `weights_only` by torch; what is not a tensor would be unpickled without it, so no
    description of such a thing is let through.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._contents: dcp_metadata.Metadata | None = None
        """Read once: DCP asks for it again."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        """The checkpoint's table of contents. Raises `pickle.UnpicklingError` for anything that is not one, or is more."""
        if self._contents is None:
            self._contents = self._read_contents()
        self._contents.storage_meta = self._contents.storage_meta or dcp_metadata.StorageMeta()
        self._contents.storage_meta.load_id = self.load_id
        return self._contents

    def _read_contents(self) -> dcp_metadata.Metadata:
        folder = Path(self.path)
        try:
            content = read_bytes(folder / ".metadata", MOST_METADATA_BYTES, "use another checkpoint")
            metadata: dcp_metadata.Metadata = _Descriptions(io.BytesIO(content)).load()
            for one in metadata.state_dict_metadata.values():
                if not isinstance(one, dcp_metadata.TensorStorageMetadata) or not isinstance(one.properties.dtype, torch.dtype):
                    raise pickle.UnpicklingError("it describes what is no tensor")
            places = metadata.storage_data.values()
            for name in {place.relative_path for place in places}:
                if Path(name).name != name:
                    raise pickle.UnpicklingError(f"it names the file {shown(name)}, which is not in this folder")
                if outside := leaves_folder(folder / name, folder):
                    raise pickle.UnpicklingError(outside)
            if any(place.transform_descriptors or place.offset < 0 or place.length < 0 for place in places):
                raise pickle.UnpicklingError("it describes tensors as no checkpoint of isoflop has them")
            if not isinstance(metadata.storage_meta, dcp_metadata.StorageMeta | None):
                raise pickle.UnpicklingError("its storage_meta is none")
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # a pickle that is cut short or made by hand may raise anything
            raise pickle.UnpicklingError(f"it is no table of contents ({type(error).__name__}: {shown(str(error))})") from None
        return metadata

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        """A tensor's part of a file: a zip archive, which torch writes uncompressed. A compressed one could hold any amount."""
        with zipfile.ZipFile(_Part(file, sinfo.offset, sinfo.length)) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > sinfo.length:
                raise pickle.UnpicklingError(f"{sinfo.relative_path} is compressed, or claims more bytes than it has")
        return super()._slice_file(file, sinfo)


class _Part(io.RawIOBase):
    """A part of a file as a file. DCP's own view of one cannot seek from its end (torch 2.13), where a zip has its directory."""

    def __init__(self, stream: BinaryIO, offset: int, length: int) -> None:
        self._stream, self._offset, self._length, self._place = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._offset + self._place)
        read = self._stream.read(min(len(buffer), max(0, self._length - self._place)))
        buffer[: len(read)] = read
        self._place += len(read)
        return len(read)


def _build(unpickler: Any) -> None:
    """Give a description its fields. A class or a function is given none."""
    described = unpickler.stack[-2]
    if not is_dataclass(described) or isinstance(described, type):
        raise pickle.UnpicklingError("it gives fields to what is no description of tensors")
    pickle._Unpickler.dispatch[pickle.BUILD[0]](unpickler)


class _Descriptions(pickle._Unpickler):
    """The classes that DCP's metadata of tensors is made of, and no others (Python's documentation, "Restricting Globals").

    The unpickler written in Python: the one in C takes memory for what a few bytes claim (CPython's issue 115952).
    """

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch": {"Size", "float32", "float16", "bfloat16", "int64"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},  # Python 3.13's
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no description of tensors needs")
        return super().find_class(module, name)

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: _build}
    del dispatch[pickle.BYTEARRAY8[0]]  # it takes memory before it reads
