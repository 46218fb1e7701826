"""Asynchronous saving: tensors are copied to the host, a thread with its own process group writes them.

Each rank copies and writes its own part: its shards under FSDP2, its share of the full tensors otherwise. At most one save is in
flight. Training waits only for the copy, or for the previous save where that is still being written.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.tensor import DTensor

from isoflop.checkpoint.folder import commit, list_checkpoints, remove_temporary, temporary
from isoflop.checkpoint.state import Tensors, live_tensors
from isoflop.train import deepspeed
from isoflop.utils.errors import UserError, is_disk_full, os_errors
from isoflop.utils.io import sha256

logger = logging.getLogger(__name__)


class Saver:
    """Writer of `folder/step-N`. Every method is collective."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # A separate group, on the CPU: the thread's collectives must not mix with those of training.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # A new thread starts on GPU 0, whichever is this rank's.
        device: dict[str, Any] = {}
        if torch.cuda.is_available():
            device = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", **device)
        self._checkpoint_bytes = 0
        self._in_flight: Future[UserError | None] | None = None
        self._host: Tensors = {}  # kept between saves: fresh (pinned) memory costs more time than the copy

    def save(
        self, step: int, model: nn.Module, optimizer: Any, trainer_state: dict[str, Any], on_saved: Callable[[], None]
    ) -> None:
        """Start saving an unwrapped model and its optimizer; `on_saved` runs on the main process when `step-N` is complete.

        A full disk at the previous save has been reported by then, and is tried again.
        """
        self._settle()
        staged = self._stage(model, optimizer)
        self._in_flight = self._thread.submit(self._write, step, staged, trainer_state, on_saved)

    def wait(self) -> None:
        """Wait until nothing is in flight. Raises `UserError` where the last save found the disk full."""
        if error := self._settle():
            raise error

    def close(self) -> None:
        """End the thread and its process group. Call it while all ranks are running."""
        self._thread.shutdown()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _settle(self) -> UserError | None:
        """Return the error of the save in flight, the same on every rank. Failures other than a full disk are raised."""
        pending, self._in_flight = self._in_flight, None
        return pending.result() if pending else None

    def _stage(self, model: nn.Module, optimizer: Any) -> Tensors:
        """Copy this rank's part to the host, where training cannot change it."""
        staged = {name: self._copy(name, tensor) for name, tensor in self._own_part(model, optimizer)}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are asynchronous
        return staged

    def _own_part(self, model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        if deepspeed.is_deepspeed(optimizer):
            sizes = deepspeed.tensor_sizes(model)
            self._checkpoint_bytes = 4 * sum(sizes.values())
            mine = self._share(sizes)
            yield from deepspeed.gather_tensors(model, optimizer, mine.__contains__)
            return
        tensors = live_tensors(model, optimizer)
        self._checkpoint_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())  # of the full tensors
        mine = self._share({name: tensor.numel() for name, tensor in tensors.items() if not isinstance(tensor, DTensor)})
        yield from ((name, tensor) for name, tensor in tensors.items() if isinstance(tensor, DTensor) or name in mine)

    def _share(self, sizes: dict[str, int]) -> set[str]:
        """Return the names of the full tensors that this rank writes: largest first, each to the rank with the least."""
        loads, owner = [0] * self._world, {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            owner[name] = loads.index(min(loads))
            loads[owner[name]] += sizes[name]
        return {name for name, rank in owner.items() if rank == self._rank}

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name not in self._host:
            self._host[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
        copy = self._host[name].copy_(local, non_blocking=True)
        if isinstance(tensor, DTensor):  # the same shard of the same tensor, on the host (from_local would move it to the device)
            subclass: Any = tensor
            names, context = subclass.__tensor_flatten__()
            inner = {name: getattr(tensor, name) for name in names} | {"_local_tensor": copy}
            copy = subclass.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
        return copy

    def _write(self, step: int, staged: Tensors, trainer_state: dict[str, Any], on_saved: Callable[[], None]) -> UserError | None:
        """In the thread: write the files, then on the main process checksum, rename and call `on_saved`. Collective."""
        tmp = temporary(self._folder, step)
        try:
            self._on_main(lambda: self._make_room(tmp))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
                # No copying ahead: all is on the host already, and the copier would wait for training's work on the GPU.
                save_sharded(staged, storage_writer=FileSystemWriter(tmp, per_thread_copy_ahead=0), process_group=self._group)
            checksums = self._checksums(tmp)
            self._on_main(lambda: commit(tmp, self._folder / f"step-{step}", trainer_state, joined(checksums)))
            self._on_main(on_saved)
            return None
        except (OSError, RuntimeError, CheckpointException) as error:
            if self._rank == 0:
                shutil.rmtree(tmp, ignore_errors=True)
            if not (is_disk_full(error) or os_errors(error)):
                raise
            refusal = self._no_space(step) if is_disk_full(error) else self._not_written(step, os_errors(error)[0])
            if self._rank == 0:
                logger.warning("checkpoint of step %d was not saved: %s", step, refusal)
            return refusal

    def _no_space(self, step: int) -> UserError:
        free, needed = shutil.disk_usage(self._folder).free, self._checkpoint_bytes
        missing = f"{needed - free:,} bytes are missing" if needed > free else "a quota or a limit on file sizes is in the way"
        intact = ", ".join(path.name for path in list_checkpoints(self._folder)) or "none"
        return UserError(
            f"output.run_dir: no space left while saving step {step}: {self._folder} has {free:,} bytes free, this checkpoint"
            f" needs about {needed:,}: {missing}; earlier checkpoints are intact ({intact}): free some space, then the same"
            " command resumes"
        )

    def _not_written(self, step: int, error: OSError) -> UserError:
        """Return the error for a folder that was removed, a read-only disk, a file server that is gone."""
        intact = ", ".join(path.name for path in list_checkpoints(self._folder)) or "none"
        return UserError(
            f"output.run_dir: step {step} cannot be saved: {error}; checkpoints there: {intact}; make {self._folder} writable,"
            " then the same command resumes"
        )

    def _make_room(self, tmp: Path) -> None:
        """Make an empty folder. A disk that is known to be too small is not filled first: other writes would fail."""
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_temporary(self._folder)
        if shutil.disk_usage(self._folder).free < self._checkpoint_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tmp.mkdir(exist_ok=True)  # files that somebody else put there stay

    def _checksums(self, tmp: Path) -> list[dict[str, str] | OSError]:
        """Gather the checksums of every rank's files on the main process; each rank hashes what it wrote."""
        own: dict[str, str] | OSError
        try:
            own = {file.name: sha256(file) for file in tmp.glob(f"__{self._rank}_*.distcp")}
        except OSError as error:  # raised on the main process for all ranks: one alone would leave the others waiting
            own = error
        if self._group is None:
            return [own]
        gathered: list[Any] | None = [None] * self._world if self._rank == 0 else None
        dist.gather_object(own, gathered, dst=0, group=self._group)
        return gathered or []

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run something on the main process; every rank waits for it, or raises what it raised."""
        outcome: list[Exception | None] = [None]
        if self._rank == 0:
            try:
                action()
            except Exception as error:
                outcome = [error]
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise outcome[0]


def joined(checksums: list[dict[str, str] | OSError]) -> dict[str, str]:
    """Merge the checksums of all ranks. Raises the error of a rank that had one."""
    found: dict[str, str] = {}
    for part in checksums:
        if isinstance(part, OSError):
            raise part
        found |= part
    return found
