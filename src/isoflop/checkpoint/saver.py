"""Saving while training goes on: tensors are copied to the host, the rest happens in a thread with a process group of its own.

Each rank copies and writes its own part: its shards under FSDP2, its share of the whole tensors otherwise. One save at most is in
flight. Training waits for the copy alone, unless the save before is still being written.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
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

from isoflop.checkpoint.folder import list_checkpoints, partial, remove_partials, seal
from isoflop.checkpoint.state import Tensors, gather_zero, is_zero, live_tensors, zero_sizes
from isoflop.disk import sha256
from isoflop.errors import UserError, is_disk_full, os_errors


class Saver:
    """Writes `folder/step-N`. Every method is collective."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Of its own and on the CPU: collectives of a thread must not mix with those of training.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # A new thread would work on the first GPU, whichever is this rank's.
        device: dict[str, Any] = {}
        if torch.cuda.is_available():
            device = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", **device)
        self._checkpoint_bytes = 0
        self._in_flight: Future[UserError | None] | None = None
        self._host: Tensors = {}  # kept between saves: fresh (pinned) memory costs more time than the copy

    def save(self, step: int, model: nn.Module, optimizer: Any, trainer_state: dict[str, Any], then: Callable[[], None]) -> None:
        """Begin to save an unwrapped model and its optimizer; `then` runs on the main process when `step-N` is whole.

        A disk that was full at the save before has been reported by then and is tried again.
        """
        self._settle()
        staged = self._stage(model, optimizer)
        self._in_flight = self._thread.submit(self._write, step, staged, trainer_state, then)

    def wait(self) -> None:
        """Return when nothing is in flight. Raises `UserError` when the last save found the disk full."""
        if error := self._settle():
            raise error

    def close(self) -> None:
        """End thread and process group, while all ranks are still there."""
        self._thread.shutdown()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _settle(self) -> UserError | None:
        """The outcome of the save in flight, the same on every rank; other failures than a full disk are raised."""
        flying, self._in_flight = self._in_flight, None
        return flying.result() if flying else None

    def _stage(self, model: nn.Module, optimizer: Any) -> Tensors:
        """Copies of this rank's part on the host, which training cannot change any more."""
        staged = {name: self._copy(name, tensor) for name, tensor in self._own_part(model, optimizer)}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies were only begun
        return staged

    def _own_part(self, model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
        if is_zero(optimizer):
            sizes = zero_sizes(model)
            self._checkpoint_bytes = 4 * sum(sizes.values())
            mine = self._share(sizes)
            yield from gather_zero(model, optimizer, mine.__contains__)
            return
        tensors = live_tensors(model, optimizer)
        self._checkpoint_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())  # of whole tensors
        mine = self._share({name: tensor.numel() for name, tensor in tensors.items() if not isinstance(tensor, DTensor)})
        yield from ((name, tensor) for name, tensor in tensors.items() if isinstance(tensor, DTensor) or name in mine)

    def _share(self, sizes: dict[str, int]) -> set[str]:
        """Names of the whole tensors that this rank writes: the largest first, each to the rank with the least so far."""
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

    def _write(self, step: int, staged: Tensors, trainer_state: dict[str, Any], then: Callable[[], None]) -> UserError | None:
        """In the thread: the files, then on the main process checksums, name and `then`; ranks meet before and after."""
        aside = partial(self._folder, step)
        try:
            self._on_main(lambda: self._make_room(aside))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
                # No copying ahead: all is on the host already, and the copier would wait for training's work on the GPU.
                save_sharded(staged, storage_writer=FileSystemWriter(aside, per_thread_copy_ahead=0), process_group=self._group)
            checksums = self._checksums(aside)
            self._on_main(lambda: seal(aside, self._folder / f"step-{step}", trainer_state, joined(checksums)))
            self._on_main(then)
            return None
        except (OSError, RuntimeError, CheckpointException) as error:
            if self._rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            if not (is_disk_full(error) or os_errors(error)):
                raise
            refusal = self._no_space(step) if is_disk_full(error) else self._not_written(step, os_errors(error)[0])
            if self._rank == 0:
                print(f"checkpoint of step {step} was not saved: {refusal}", file=sys.stderr, flush=True)
            return refusal

    def _no_space(self, step: int) -> UserError:
        free, needed = shutil.disk_usage(self._folder).free, self._checkpoint_bytes
        missing = f"{needed - free:,} bytes are missing" if needed > free else "a quota or a limit on file sizes is in the way"
        whole = ", ".join(path.name for path in list_checkpoints(self._folder)) or "none"
        return UserError(
            f"output.run_dir: no space left while saving step {step}: {self._folder} has {free:,} bytes free, this checkpoint"
            f" needs about {needed:,}: {missing}; earlier checkpoints are whole ({whole}): free some space, then the same command"
            " goes on"
        )

    def _not_written(self, step: int, error: OSError) -> UserError:
        """For a folder that was removed meanwhile, a disk that became read-only, a file server that is gone."""
        whole = ", ".join(path.name for path in list_checkpoints(self._folder)) or "none"
        return UserError(
            f"output.run_dir: step {step} cannot be saved: {error}; checkpoints there: {whole}; make {self._folder} writable,"
            " then the same command resumes"
        )

    def _make_room(self, aside: Path) -> None:
        """A fresh folder; a disk that is known to be too small is not filled first, which would fail what else is written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_partials(self._folder)
        if shutil.disk_usage(self._folder).free < self._checkpoint_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        aside.mkdir(exist_ok=True)  # what somebody else put there is left

    def _checksums(self, aside: Path) -> list[dict[str, str] | OSError]:
        """On the main process those of every rank's files: each rank hashes what it wrote."""
        own: dict[str, str] | OSError
        try:
            own = {file.name: sha256(file) for file in aside.glob(f"__{self._rank}_*.distcp")}
        except OSError as error:  # raised on the main process, for all: a rank alone would leave the others waiting
            own = error
        if self._group is None:
            return [own]
        gathered: list[Any] | None = [None] * self._world if self._rank == 0 else None
        dist.gather_object(own, gathered, dst=0, group=self._group)
        return gathered or []

    def _on_main(self, action: Callable[[], None]) -> None:
        """Do something on the main process; every rank goes on after it, or raises what it raised."""
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
    """The checksums of all ranks. Raises what a rank met."""
    found: dict[str, str] = {}
    for part in checksums:
        if isinstance(part, OSError):
            raise part
        found |= part
    return found
