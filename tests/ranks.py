"""Runs of several ranks in seconds: the server of tests/forks.py forks them, with what `accelerate launch` would set.

The environment of an engine is taken from its file of accelerate_configs/ by accelerate's own functions. What differs from a real
launch is that no torchrun agent watches; the tests that need one use `conftest.launch`.
"""

import os
import signal
import socket
import time
from pathlib import Path

import forks
import yaml

ROOT = Path(__file__).parent.parent


class Launched:
    """Ranks that are running, or have been."""

    def __init__(self, jobs, output):
        self.jobs, self.output = jobs, output
        self.pids = [job.pid for job in jobs]

    def kill(self, rank, number=signal.SIGKILL):
        """Send one rank a signal."""
        self.jobs[rank].kill(number)

    def wait(self, timeout=240):
        """Exit codes by rank (negative: the signal's number). Ranks that still run after `timeout` seconds are killed."""
        deadline = time.monotonic() + timeout
        codes = [job.wait(max(0.01, deadline - time.monotonic())) for job in self.jobs]
        hanging = [job for job, code in zip(self.jobs, codes, strict=True) if code is None]
        for number, pause_s in ((signal.SIGQUIT, 1), (signal.SIGKILL, 0)):  # the first makes a rank write its stacks
            for job in hanging:
                job.kill(number)
            time.sleep(pause_s if hanging else 0)
        assert not hanging, f"still running after {timeout} s\n{self.text()}"
        return codes

    def text(self):
        """All they wrote."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def succeed(self, timeout=240):
        """Wait, and require exit code 0 of all; returns what they wrote."""
        codes = self.wait(timeout)
        assert set(codes) == {0}, f"{codes}\n{self.text()}"
        return self.text()


class Ranks:
    """Starts ranks, and keeps what they write in a folder."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def preload(self, module):
        """Import what many runs need once, in the server."""
        forks.Job(forks.server(forks.folder(), "full"), {"import": module}, (0, 1, 2)).wait()

    def start(self, config, *arguments, processes=None, fp32=True, code=None, env=None, script="scripts/pretrain.py", **flags):
        """Start `script *arguments` under a launch config; `code` is run before it in every rank."""
        self.count += 1
        output = self.folder / f"ranks-{self.count}.txt"
        request = {
            "name": "python", "arguments": [str(script), *map(str, arguments)], "cwd": str(ROOT), "ignored": [],
            "code": code or "", "line_buffered": True,
        }  # fmt: skip
        request["env"] = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        changes = {name: str(value) for name, value in (env or {}).items()}
        if config == "cpu":
            request["env"] |= changes
            return Launched([self._job(request, output)], output)
        file = yaml.safe_load((ROOT / f"accelerate_configs/{config}.yaml").read_text())
        world = processes or file["num_processes"]
        changes |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        changes |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        launch = {"config": config, "processes": processes, "fp32": fp32, "flags": flags}
        ranks = [changes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        return Launched([self._job(request | {"launch": launch | {"changes": one}}, output) for one in ranks], output)

    def _job(self, request, output):
        with open(output, "ab") as stream, open(os.devnull) as nothing:
            return forks.Job(forks.server(forks.folder(), "full"), request, (nothing.fileno(), stream.fileno(), stream.fileno()))

    def run(self, *arguments, **settings):
        """Start and succeed; returns what was written."""
        return self.start(*arguments, **settings).succeed()


def free_port():
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_environment(config, processes, fp32, flags, changes):
    """What `accelerate launch --config_file` puts into the environment of its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    command = ["--config_file", f"accelerate_configs/{config}.yaml"]
    command += [f"--num_processes={processes}"] if processes else []
    command += ["--mixed_precision=no"] if fp32 else []
    command += [f"--{name}={value}" for name, value in flags.items()]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "scripts/pretrain.py"]))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    return {name: str(value) for name, value in (environment | changes).items()}
