"""`--launch`: run a verb under `accelerate launch`, printing the command that is run."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from isoflop.config.shipped import find


def add_options(parser: ArgumentParser) -> None:
    """Add `--launch` and `--num-processes`."""
    parser.add_argument(
        "--launch",
        metavar="CONFIG",
        help="run under `accelerate launch` with this config: a name such as 2gpu_zero1, or a path (default: this process alone)",
    )
    parser.add_argument(
        "--num-processes", metavar="N", type=int, help="processes, one per GPU, with --launch (default: as the config says)"
    )


def launch_command(verb: str, arguments: list[str], given: Namespace) -> list[str]:
    """Return the command line that runs a verb under `accelerate launch`."""
    beside = Path(sys.executable).with_name("accelerate")
    launcher = [str(beside), "launch"] if beside.is_file() else [sys.executable, "-m", "accelerate.commands.launch"]
    processes = ["--num_processes", str(given.num_processes)] if given.num_processes else []
    config = str(find("accelerate_configs", given.launch))
    return [*launcher, "--config_file", config, *processes, "--module", "isoflop", verb, *without_options(arguments)]


def without_options(arguments: list[str]) -> list[str]:
    """Return a command line without `--launch` and `--num-processes`."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip or name in ("--launch", "--num-processes"):
            skip = not skip and not equals
        else:
            kept.append(argument)
    return kept


def exec_launcher(verb: str, arguments: list[str], given: Namespace) -> None:
    """Replace this process by the launcher, so that signals reach it and its exit code is the command's. Does not return."""
    command = launch_command(verb, arguments, given)
    print(shlex.join(command), flush=True)
    os.execv(command[0], command)
