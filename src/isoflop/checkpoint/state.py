"""A run's tensors under names that no engine changes, and how they are read back.

`model.<parameter>` and `optimizer.<parameter>.<moment>`, the parameter's name being that of the unwrapped model: a checkpoint of
one process, DDP, FSDP2 or DeepSpeed ZeRO-1 is loaded by any other, at any world size (torch.distributed.checkpoint splits
and joins the shards). Hyperparameters come from the recipe and are not saved. Loading cannot run code.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import warnings
import zipfile
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

from isoflop.train import deepspeed
from isoflop.train.optimizers import fresh_moments
from isoflop.utils.errors import UserError
from isoflop.utils.untrusted import leaves_folder, read_bytes, shown

Tensors = dict[str, Tensor]

MOST_METADATA_BYTES = 256 * 2**20  # about 100 bytes per tensor and rank; 1,000 tensors on 1,000 ranks take half of it


def live_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Tensors:
    """Return the tensors, not copies, of an unwrapped model and its optimizer (DTensors under FSDP2); tied weights once.

    After a forward pass without gradients FSDP2 leaves some parameters (embedding, last norm, head) as full copies that the
    optimizer does not know, so all modules are resharded first.
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


def load_tensors(path: Path, model: nn.Module, optimizer: Any) -> None:
    """Read a checkpoint into an unwrapped model and its optimizer, in place. Every rank reads what it holds."""
    if deepspeed.is_deepspeed(optimizer):
        deepspeed.load_tensors(model, optimizer, lambda tensors: read(path, tensors))
    else:
        read(path, live_tensors(model, optimizer))


def read(path: Path, tensors: Tensors) -> None:
    """Fill tensors by their names, in place.

    Raises `UserError` where the checkpoint's metadata tries to run code or is not metadata, and where the tensors it describes
    are missing or do not fit.
    """
    reader = TensorReader(path)
    try:
        described = reader.read_metadata().state_dict_metadata  # DCP reads it too, but would wrap the error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}/.metadata: {error}; this is not a checkpoint of isoflop: use another one, and find out who wrote it"
        ) from None
    try:
        for name, tensor in tensors.items():
            there = described.get(name)
            if isinstance(there, dcp_metadata.TensorStorageMetadata) and there.properties.dtype != tensor.dtype:
                raise ValueError(f"{name} is {there.properties.dtype}, and the run's is {tensor.dtype}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            load_sharded(dict(tensors), storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # torch's, the zip reader's, and DCP's, which is no `Exception`
        cause = next((wrapped[0] for wrapped in getattr(error, "failures", {}).values()), error)
        raise UserError(
            f"{path} cannot be loaded: {type(cause).__name__}: {shown(' '.join(str(cause).split()))}; use another checkpoint, or"
            " the recipe that it was trained with"
        ) from error


class TensorReader(FileSystemReader):
    """DCP's reader, restricted: its `.metadata`, a pickle, may name only DCP's descriptions of tensors.

    torch reads tensors with `weights_only`. It would unpickle anything else without it, so descriptions of anything else are
    refused.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._contents: dcp_metadata.Metadata | None = None
        """Read once; DCP asks for it again."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        """Return the checkpoint's metadata. Raises `pickle.UnpicklingError` for anything else."""
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
                    raise pickle.UnpicklingError("it describes something that is not a tensor")
            places = metadata.storage_data.values()
            for name in {place.relative_path for place in places}:
                if Path(name).name != name:
                    raise pickle.UnpicklingError(f"it names the file {shown(name)}, which is not in this folder")
                if outside := leaves_folder(folder / name, folder):
                    raise pickle.UnpicklingError(outside)
            if any(place.transform_descriptors or place.offset < 0 or place.length < 0 for place in places):
                raise pickle.UnpicklingError("it describes tensors as isoflop never writes them")
            if not isinstance(metadata.storage_meta, dcp_metadata.StorageMeta | None):
                raise pickle.UnpicklingError("its storage_meta is not one")
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # a pickle that is cut short or made by hand may raise anything
            raise pickle.UnpicklingError(
                f"it is not metadata of a checkpoint ({type(error).__name__}: {shown(str(error))})"
            ) from None
        return metadata

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        """Return a tensor's part of a file, an uncompressed zip archive. A compressed one could expand to any size."""
        with zipfile.ZipFile(_Part(file, sinfo.offset, sinfo.length)) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > sinfo.length:
                raise pickle.UnpicklingError(f"{sinfo.relative_path} is compressed, or claims more bytes than it has")
        return super()._slice_file(file, sinfo)


class _Part(io.RawIOBase):
    """A part of a file as a file. DCP's own view cannot seek from the end (torch 2.13), where a zip has its directory."""

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
    """Set the fields of a description. Classes and functions are refused."""
    described = unpickler.stack[-2]
    if not is_dataclass(described) or isinstance(described, type):
        raise pickle.UnpicklingError("it sets fields of something that is not a description of tensors")
    pickle._Unpickler.dispatch[pickle.BUILD[0]](unpickler)


class _Descriptions(pickle._Unpickler):
    """The classes that DCP's metadata of tensors is made of, and no others (Python's documentation, "Restricting Globals").

    Python's own unpickler: the one in C allocates whatever size a few bytes claim (CPython issue 115952).
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
    del dispatch[pickle.BYTEARRAY8[0]]  # it allocates memory before it reads
