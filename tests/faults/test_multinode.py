"""Several launchers on one machine stand for several nodes; Slurm's two commands are stood in for."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, metrics_of

from isoflop.config.loading import load_recipe

SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
nodes = [subprocess.Popen(command, stdout=open(f"{folder}/node-{{n}}.log", "w"), stderr=subprocess.STDOUT) for n in range(2)]
sys.exit(max(abs(node.wait()) for node in nodes))
"""
pytestmark = pytest.mark.new_process  # it looks for launchers among the processes below one another
ACCELERATE = str(Path(sys.executable).parent / "accelerate")
SCONTROL = "#!/bin/bash\nif [ $1 = show ]; then echo 127.0.0.1; else echo $* >> {folder}/scontrol.log; fi\n"


@pytest.fixture
def cluster(tmp_path):
    """Start the Slurm template on two nodes that are launchers of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, text in (
        ("srun", SRUN.format(python=sys.executable, folder=tmp_path)),
        ("scontrol", SCONTROL.format(folder=tmp_path)),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    started = []

    def start(*arguments, **variables):
        env = {
            **os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "CONFIG": "accelerate_configs/2gpu_fsdp2.yaml", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]", "PORT": str(port), "LAST_CALL": "3", **variables,
        }  # fmt: skip
        command = ["bash", "scripts/pretrain.sbatch", *map(str, arguments)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=env))
        return started[-1]

    yield start
    for process in started:
        for child in reversed(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []):
            child.kill()


def launchers(process):
    return [
        child for child in psutil.Process(process.pid).children(recursive=True) if child.cmdline()[1:3] == [ACCELERATE, "launch"]
    ]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_goes_on_by_itself_on_the_node_that_remains(cluster, write_recipe, tmp_path, tried):
    file = write_recipe(
        training__max_steps=300, output__checkpoint_every=10, evaluation__validate_every=300, training__micro_batch_size=1
    )
    folder = Path(load_recipe(file).output.run_dir)
    process = cluster(file)
    wait_for(lambda: list((folder / "checkpoints").glob("step-*")))
    holds_the_meeting = {
        c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == int(port_of(process))
    }
    lost = next(node for node in launchers(process) if node.pid not in holds_the_meeting)
    for child in [lost, *lost.children(recursive=True)]:
        child.kill()
    process.wait(240)
    logs = "".join((tmp_path / f"node-{n}.log").read_text() for n in range(2))
    assert "resuming from" in logs
    assert "another process of this run is gone" in logs
    assert [row["step"] for row in metrics_of(load_recipe(file))] == list(range(1, 301))
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["launch"]["num_processes"] == 2
    assert environment["earlier_launches"][0]["launch"]["num_processes"] == 4
    assert (folder / "summary.json").exists()
    tried("`kill -9` of a whole node of two", proof="the node that remained ended the run, every step once")


def port_of(process):
    return psutil.Process(launchers(process)[0].pid).environ()["PORT"]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_fixed_set_of_two_nodes(write_recipe, tmp_path):
    """The first command of docs/multinode.md, on two launchers of this machine with two processes each."""
    file = write_recipe(training__micro_batch_size=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    nodes = []
    for rank in range(2):
        command = [ACCELERATE, "launch", "--config_file", "accelerate_configs/2node_8gpu_fsdp2.yaml", "--num_processes", "4"]
        command += ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        log = (tmp_path / f"node-{rank}.log").open("w")
        nodes.append(subprocess.Popen([*command, "scripts/pretrain.py", str(file)], cwd=ROOT, env=env, stdout=log, stderr=log))
    assert [node.wait(200) for node in nodes] == [0, 0]
    environment = json.loads((Path(load_recipe(file).output.run_dir) / "environment.json").read_text())
    assert (environment["launch"]["num_processes"], environment["launch"]["distributed_type"]) == (4, "FSDP")


@pytest.mark.distributed
@pytest.mark.slow
def test_before_the_time_limit_the_run_saves_and_the_job_is_queued_again(cluster, write_recipe, tmp_path, tried):
    file = write_recipe(training__max_steps=100_000, evaluation__validate_every=100_000, training__micro_batch_size=1)
    folder = Path(load_recipe(file).output.run_dir)
    process = cluster(file)
    wait_for(lambda: list((folder / "checkpoints").glob("step-*")))
    for node in launchers(process):
        node.send_signal(signal.SIGUSR1)
    assert process.wait(120) not in (0, 128 + signal.SIGUSR1)  # the launchers answered it, and were not ended by it
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    logs = "".join((tmp_path / f"node-{n}.log").read_text() for n in range(2))
    saved = int(re.search(r"(?:SIGUSR1|another rank): saved; the same command resumes from step-(\d+)", logs)[1])
    assert metrics_of(load_recipe(file))[-1]["step"] == saved
    tried("SIGUSR1 to the launchers of two nodes, as Slurm sends it", proof="saved at the step it came in; the job queued again")
