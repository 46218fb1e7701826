"""Flight recorder: what is set before the process group is made; how dumps of an earlier launch are kept, named and read."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isoflop.train.flight_recorder import describe_dumps, enable_flight_recorder

VARIABLES = (
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
)


@pytest.fixture(autouse=True)
def rank_0_of_2_with_gpus(monkeypatch):
    """The environment of a rank under torchrun, which is as it was afterwards."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def variables():
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_dumps_go_to_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enable_flight_recorder(Path("runs/toy"))
    assert variables() == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/runs/toy/flight_recorder/latest/rank-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    assert (tmp_path / "runs/toy/flight_recorder/latest").is_dir()
    assert describe_dumps(Path("runs/toy")) is None


@pytest.mark.parametrize("prefix", ["TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"])
@pytest.mark.parametrize("size", ["TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"])
def test_what_the_user_set_stays_by_its_old_name_too(tmp_path, monkeypatch, prefix, size):
    own = {prefix: "/elsewhere/rank_", size: "100", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    enable_flight_recorder(tmp_path)
    assert variables() == own


@pytest.mark.parametrize("without", ["gpus", "other ranks"])
def test_nothing_is_set_where_there_is_nothing_to_record(tmp_path, monkeypatch, without):
    if without == "gpus":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    else:
        monkeypatch.delenv("WORLD_SIZE")
    enable_flight_recorder(tmp_path)
    assert variables() == {}
    assert list(tmp_path.iterdir()) == []


def dump(rank, last):
    """A dump as torch 2.13 writes it, of a rank whose last collective is number `last`."""
    entries = [
        {
            "frames": [{"name": "all_reduce", "filename": "pretrain.py", "line": 1}],
            "record_id": number,
            "pg_id": 0,
            "process_group": ("0", "default_pg"),
            "thread_name": "python",
            "thread_id": "1",
            "collective_seq_id": number,
            "p2p_seq_id": 0,
            "op_id": number,
            "profiling_name": "nccl:all_reduce",
            "time_created_ns": 1_000 * number,
            "input_sizes": [[2]],
            "input_dtypes": ["Float"],
            "output_sizes": [[2]],
            "output_dtypes": ["Float"],
            "state": "completed" if number < last else "scheduled",
            "time_discovered_started_ns": None,
            "time_discovered_completed_ns": None,
            "retired": False,
            "timeout_ms": 600_000,
            "is_p2p": False,
        }
        for number in range(1, last + 1)
    ]
    groups = {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1]"}}
    return pickle.dumps({"version": "2.10", "pg_config": groups, "pg_status": {}, "entries": entries})


def leave_dumps(run_dir, lasts, modified_s):
    for rank, last in lasts.items():
        file = run_dir / f"flight_recorder/latest/rank-{rank}"
        file.write_bytes(dump(rank, last))
        os.utime(file, (modified_s, modified_s))


def test_dumps_of_earlier_launches_are_kept_and_the_newest_are_named(tmp_path):
    enable_flight_recorder(tmp_path)
    leave_dumps(tmp_path, {0: 3, 1: 2}, modified_s=1_700_000_000)
    assert describe_dumps(tmp_path) is None  # of this launch
    enable_flight_recorder(tmp_path)
    first = tmp_path / "flight_recorder/2023-11-14T22-13-20"
    assert describe_dumps(tmp_path) == (
        f"flight recorder: an earlier launch hung or failed in a collective; dumps of rank 0, 1: {first}; to see where ranks"
        f" differ, run: torchfrtrace --allow-incomplete-ranks {first}; to end this note, delete the folder"
    )
    leave_dumps(tmp_path, {1: 5}, modified_s=1_700_003_600)
    enable_flight_recorder(tmp_path)
    second = tmp_path / "flight_recorder/2023-11-14T23-13-20"
    assert f"dumps of rank 1: {second};" in describe_dumps(tmp_path)
    assert sorted(file.name for file in first.iterdir()) == ["rank-0", "rank-1"]
    assert list((tmp_path / "flight_recorder/latest").iterdir()) == []


def test_only_rank_0_moves_dumps(tmp_path, monkeypatch):
    enable_flight_recorder(tmp_path)
    leave_dumps(tmp_path, {0: 3}, modified_s=1_700_000_000)
    monkeypatch.setenv("RANK", "1")
    enable_flight_recorder(tmp_path)
    assert (tmp_path / "flight_recorder/latest/rank-0").exists()


def test_torchs_analyzer_reads_the_folder_that_is_named(tmp_path):
    enable_flight_recorder(tmp_path)
    leave_dumps(tmp_path, {0: 3, 1: 2}, modified_s=1_700_000_000)
    enable_flight_recorder(tmp_path)
    command = describe_dumps(tmp_path).split("run: ")[1].split(";")[0].split()
    assert command[0] == "torchfrtrace"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", *command[1:]],
        capture_output=True,
        text=True,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "Not all ranks joining collective, sequence number: 3" in printed
    assert "missing ranks: {1}" in printed
