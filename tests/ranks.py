"""Runs of several ranks in seconds: a server that has imported everything forks them, with what `accelerate launch` would set.

The environment of an engine is taken from its file of accelerate_configs/ by accelerate's own functions. What differs from a real
launch is that no torchrun agent watches; the tests that need one use `conftest.launch`.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass
class Launched:
    """Ranks that are running, or have been."""

    server: "Ranks"
    number: int
    pids: list[int]
    output: Path

    def kill(self, rank, number=signal.SIGKILL):
        """Send one rank a signal."""
        os.kill(self.pids[rank], number)

    def wait(self, timeout=240):
        """Exit codes by rank (negative: the signal's number). Kills what has not ended in time, and says so."""
        codes = self.server.ask({"wait": self.pids, "timeout": timeout})
        assert None not in codes, f"still running after {timeout} s\n{self.text()}"
        return codes

    def text(self):
        """All they wrote."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def succeed(self, timeout=240):
        """Wait, and insist that all ended well."""
        codes = self.wait(timeout)
        assert set(codes) == {0}, f"{codes}\n{self.text()}"
        return self.text()


class Ranks:
    """The client's side."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
        )

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def preload(self, module):
        """Import what many runs need once, in the server."""
        self.ask({"import": module})

    def start(self, config, *arguments, processes=None, fp32=True, code=None, env=None, **flags):
        """Start `scripts/pretrain.py *arguments` under a launch config; `code` is run before it in every rank."""
        self.count += 1
        output = self.folder / f"ranks-{self.count}.txt"
        request = {
            "config": config, "arguments": [str(a) for a in arguments], "processes": processes, "fp32": fp32, "code": code or "",
            "env": env or {}, "output": str(output), "flags": flags,
        }  # fmt: skip
        return Launched(self, self.count, self.ask(request), output)

    def run(self, *arguments, **settings):
        """Start and succeed; returns what was written."""
        return self.start(*arguments, **settings).succeed()

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def launch_environment(config, processes, fp32, flags):
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
        return prepare_deepspeed_cmd_env(arguments)[1], arguments.num_processes
    return prepare_multi_gpu_env(arguments), arguments.num_processes


def _fork(request):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment, world = {}, 1
    if request["config"] != "cpu":
        environment, world = launch_environment(request["config"], request["processes"], request["fp32"], request["flags"])
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _become(rank, world, port, environment | request["env"], request)
        pids.append(pid)
    return pids


def _become(rank, world, port, environment, request):
    """The forked child: a rank of its own, from here on."""
    import runpy
    import traceback

    code = 1
    try:
        os.setpgid(0, 0)
        stream = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(stream, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.environ.update({key: str(value) for key, value in environment.items()})
        if request["config"] != "cpu":
            shares = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ.update({key: str(value) for key, value in shares.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = ["scripts/pretrain.py", *request["arguments"]]
        exec(request["code"], {"__name__": "before"})
        runpy.run_path("scripts/pretrain.py", run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids, timeout):
    codes, deadline = dict.fromkeys(pids), time.monotonic() + timeout
    while None in codes.values() and time.monotonic() < deadline:
        for pid in [pid for pid, code in codes.items() if code is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in [pid for pid, code in codes.items() if code is None]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return list(codes.values())


def _serve():
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    import isoflop.pretrain  # noqa: F401  what every rank needs, imported once

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        if "import" in request:
            answer = bool(importlib.import_module(request["import"]))
        else:
            answer = _wait(request["wait"], request["timeout"]) if "wait" in request else _fork(request)
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _serve()
