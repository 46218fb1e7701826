"""Processes: the Accelerator, the proof that the launch is the one asked for, and stopping together.

How a run is launched is said in `accelerate_configs/`; accelerate silently does less than asked in several cases (a
MULTI_CPU config runs one process; a GPU config on a machine without GPUs runs unconnected copies that all write as rank 0;
FSDP and DeepSpeed are ignored on CPU), so what came up is held against what was asked before any work.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from isoflop.errors import UserError, nearest
from isoflop.recipe import Output

TRAINED_ENGINES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # one process, or DDP
EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, saved; the same command goes on


def build_accelerator(output: Output) -> Accelerator:
    """The Accelerator of this process. Raises `UserError` where it is not what the launch asked for."""
    trackers = usable_trackers(output)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else accelerate starts unconnected processes on a machine without GPUs
        log_with=trackers or None,
        project_dir=output.run_dir,
        # Gradients live in DDP's buckets instead of beside them: 4 bytes a parameter less.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    check_launch(accelerator)
    return accelerator


def usable_trackers(output: Output) -> list[str]:
    """The recipe's trackers that are installed. Raises `UserError` for an unknown name, or a required one that is not there."""
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    installed = [str(name) for name in get_available_trackers()]
    for name in output.trackers:
        if name not in known:
            raise UserError(f"output.trackers: {name!r} is not a tracker of Accelerate's{nearest(name, known)}")
        if name not in installed and output.trackers_required:
            raise UserError(
                f"output.trackers: {name!r} is not installed; run: pip install {name}, or set output.trackers_required=false"
                " to go on without it"
            )
        if name not in installed:
            print(f"tracker {name} is not installed: going on without it", file=sys.stderr, flush=True)
    return [name for name in output.trackers if name in installed]


def check_launch(accelerator: Accelerator) -> None:
    """Refuse when the process count or the engine is not the one asked for."""
    asked, asker = _asked_processes()
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asker} asked for {asked} processes, but this one runs alone with {accelerator.num_processes}: they would each"
            " train everything and write the same files. On CPU use accelerate_configs/2cpu_ddp.yaml (distributed_type"
            " MULTI_GPU starts processes, MULTI_CPU does not); on GPU check that torch sees the devices"
        )
    engines = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}
    for variable, engine in engines.items():
        if os.environ.get(variable, "").lower() == "true" and accelerator.distributed_type != engine:
            raise UserError(
                f"the launch config asked for {engine.value}, but accelerate came up as {accelerator.distributed_type.value}"
                f" on {accelerator.device.type}; use a config whose engine this machine can run"
            )
    if accelerator.distributed_type not in TRAINED_ENGINES:
        known = ", ".join(engine.value for engine in TRAINED_ENGINES)
        raise UserError(
            f"distributed_type: {accelerator.distributed_type.value} is not trained here (these are: {known}): its weights are in"
            " parts that saving and exporting do not gather; use accelerate_configs/1gpu.yaml or 2gpu_ddp.yaml"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"mixed_precision: {accelerator.mixed_precision} of the launch config is not trained here: fp16 needs loss"
            " scaling, which skips steps; set bf16, or 'no' for fp32"
        )


def _asked_processes() -> tuple[int, str]:
    """How many processes the launch asked for: torchrun says so in WORLD_SIZE, accelerate's simple launcher nowhere."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]), "the launcher (WORLD_SIZE)"
    launched_with = _launch_arguments(_parent_command())
    if launched_with is not None:
        arguments = launch_command_parser().parse_args(launched_with)
        if arguments.config_file is None and not arguments.cpu and Path(default_config_file).is_file():
            arguments.config_file = default_config_file
        config: Any = load_config_from_file(arguments.config_file) if arguments.config_file else None
        return arguments.num_processes or getattr(config, "num_processes", 1), f"accelerate launch ({arguments.config_file})"
    return 1, "this launch"


def _launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line, in any of its spellings; None where it is another command."""
    for place, argument in enumerate(command):
        name = argument.replace("\\", "/").rsplit("/", 1)[-1]
        if name == "accelerate" and command[place + 1 : place + 2] == ["launch"]:
            return command[place + 2 :]
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[place + 1 :]
    return None


def follow_launcher() -> None:
    """Have the kernel send SIGTERM when `accelerate launch` dies: its simple launcher passes no signal on.

    Linux only (prctl(2), PR_SET_PDEATHSIG); not under a shell, whose end must not end a run under nohup.
    """
    if sys.platform == "linux" and _launch_arguments(_parent_command()) is not None:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _parent_command() -> list[str]:
    parent = psutil.Process().parent()
    try:
        return parent.cmdline() if parent else []
    except psutil.Error:  # a parent that is another user's, or gone
        return []


class StopRequest:
    """SIGTERM and SIGINT become a request that the loop answers between micro-batches: save, then leave with `EXIT_RESUME`.

    A launcher gives its processes seconds before it kills them (torchrun 30), a step can take longer: what is unfinished of it is
    dropped and done again. Before training there is nothing to save, and the signal leaves at once. A context manager.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: str | None = None
        self._armed = False
        self._group: dist.ProcessGroup | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        follow_launcher()
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def arm(self) -> None:
        """From here on a signal waits for the loop. Collective."""
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # on the CPU: asking never waits for the device
        self._armed = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if not self._armed:
            print(f"{self.signal} before training: nothing to save, leaving", file=sys.stderr, flush=True)
            sys.exit(EXIT_RESUME)

    def agreed(self) -> bool:
        """Whether any rank was told to stop. Collective: every rank asks at the same point (under a millisecond)."""
        if self._group is None:
            return self.signal is not None
        told = torch.tensor([float(self.signal is not None)])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        return bool(told.item())


def reduce_sum(accelerator: Accelerator, value: float | torch.Tensor) -> float:
    """Sum over all processes in fp32; waits for the device."""
    own = torch.as_tensor(value, dtype=torch.float32, device=accelerator.device)
    return float(accelerator.reduce(own, "sum"))
