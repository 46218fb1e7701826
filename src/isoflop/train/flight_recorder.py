"""Flight recorder of torch's NCCL process groups: on a hang each rank writes its last collectives to the run folder.

Entered by `enable_flight_recorder`, before the process group is made, and by `describe_dumps`, whose line the next launch prints.
Rank N of the current launch writes `flight_recorder/latest/rank-N`; a folder named by their time holds an earlier launch's dumps.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import torch

# Newest collectives that each rank keeps: torch's default (c10d/FlightRecorder.hpp, torch 2.11 to 2.13).
_BUFFER_ENTRIES = 2000
_PREFIX = "rank-"  # torch appends the rank; torchfrtrace reads it from the end of the file's name


def enable_flight_recorder(run_dir: Path) -> None:
    """Have each rank write `flight_recorder/latest/rank-N` when a collective times out (10 minutes by default) or fails.

    Sets the environment variables that torch reads, except those that are set already. Moves dumps of an earlier launch to a
    folder of their own. Does nothing without GPUs or with one process.
    """
    if not torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    latest = run_dir / "flight_recorder" / "latest"
    if os.environ.get("RANK", "0") == "0":
        _archive(latest)
    latest.mkdir(parents=True, exist_ok=True)  # torch does not make it, and would write nothing
    # The first name is that of torch 2.11 to 2.13; the second is an older one, which they read too, with a warning.
    _set_default(str(_BUFFER_ENTRIES), "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
    _set_default(str(latest.absolute() / _PREFIX), "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    _set_default("1", "TORCH_NCCL_DUMP_ON_TIMEOUT")


def describe_dumps(run_dir: Path) -> str | None:
    """Return a line that names the newest dumps of earlier launches and how to read them; None where there are none."""
    folders = [folder for folder in (run_dir / "flight_recorder").glob("*") if folder.name != "latest" and _dumps(folder)]
    if not folders:
        return None
    newest = max(folders, key=lambda folder: folder.name)
    ranks = ", ".join(str(rank) for rank in sorted(int(file.name.removeprefix(_PREFIX)) for file in _dumps(newest)))
    return (
        f"flight recorder: an earlier launch hung or failed in a collective; dumps of rank {ranks}: {newest}; to see where ranks"
        f" differ, run: torchfrtrace --allow-incomplete-ranks {newest}; to end this note, delete the folder"
    )


def _archive(latest: Path) -> None:
    """Move the dumps of an earlier launch to a folder named by the time of the newest."""
    if dumps := _dumps(latest):
        time = datetime.fromtimestamp(max(file.stat().st_mtime for file in dumps), UTC)
        latest.rename(latest.with_name(f"{time:%Y-%m-%dT%H-%M-%S}"))


def _dumps(folder: Path) -> list[Path]:
    """Files that ranks wrote to a folder."""
    return [file for file in folder.glob(f"{_PREFIX}*") if file.name.removeprefix(_PREFIX).isdecimal()]


def _set_default(value: str, *names: str) -> None:
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = value
