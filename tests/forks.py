"""Start Python commands in half a second instead of ten: servers that have imported the libraries fork them.

`python()` is the path of a stand-in for the interpreter. It passes its arguments, environment, working directory and standard
streams to a server, forwards signals, and ends as the command ends. Where a library would read another environment at import, a
server with fewer imports takes over, or the real interpreter. ISOFLOP_TEST_REAL=1 (`make test-all`) makes it the real one always.
"""

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

REAL = sys.executable
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Read when the interpreter, a C library or torch starts; and when the Hub's client is imported.
READ_AT_START = ("PYTHON", "LD_", "OMP_", "MKL_", "MALLOC_", "GLIBC_", "CUDA_", "LANG", "LC_", "MPL")
# The first two by `become`; the others are read at first use, or no matter for local files. Of other paths the server may have
# imported other modules.
HANDLED = ("PYTHONPATH", "PYTHONUNBUFFERED", "CUDA_VISIBLE_DEVICES", "HF_DATASETS_OFFLINE")
PATHS = (None, str(Path(__file__).parent.parent / "benchmarks"))
READ_BY_THE_HUB = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "XDG_", "HOME")
LIBRARIES = (
    "torch",
    "numpy",
    "scipy.optimize",
    "scipy.stats",
    "pyarrow.parquet",
    "pandas",
    "matplotlib.figure",
    "psutil",
    "yaml",
)
IMPORTS = {
    "light": LIBRARIES,
    "full": (
        *LIBRARIES, "datasets", "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
        "isoflop.train.trainer", "isoflop.prepare.run", "ranks",
    ),
}  # fmt: skip
MODULES = {"isoflop": "isoflop", "accelerate": "accelerate.commands.accelerate_cli"}  # console scripts

# --- the stand-in for the interpreter: `-IS`, and nothing imported but the above


def client(folder, name, arguments):
    """Hand a command to a server, and end as it does."""
    given = json.loads(Path(folder, "server.json").read_text())
    kind = server_for(given, arguments)
    if kind is None:
        program = given["python"] if name == "python" else f"{given['scripts']}/{name}"
        os.execv(program, [program, *arguments])
    request = {
        "arguments": arguments if name == "python" else ["-m", MODULES[name], *arguments], "name": name, "env": dict(os.environ),
        "executable": f"{folder}/bin/python", "cwd": os.getcwd(),
        "ignored": [n for n in FORWARDED if signal.getsignal(n) == signal.SIG_IGN],
    }  # fmt: skip
    job = Job(server(folder, kind), request, (0, 1, 2))
    for number in FORWARDED:  # also those ignored here: the command begins with them ignored, and may handle them
        signal.signal(number, lambda sent, _: job.kill(sent))
    code = job.wait()
    end(code)


def server(folder, kind):
    """Path of a server's socket; the first to ask starts the server."""
    import fcntl
    import subprocess
    import time

    path = Path(folder, kind)
    with Path(folder, f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            given = json.loads(Path(folder, "server.json").read_text())
            command = [given["python"], __file__, "serve", kind, str(path), str(given["owner"])]
            env = given["env"] | {"DS_ACCELERATOR": "cpu"}
            log = Path(folder, f"{kind}.log").open("w")
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd="/", start_new_session=True
            )
            while not path.exists():
                assert started.poll() is None, f"the server of forked commands has ended: {log.name}"
                time.sleep(0.05)
    return str(path)


def server_for(given, arguments):
    """Name of the server whose imports have read the same environment; None where only a new interpreter will do."""

    def differs(prefixes):
        names = {name for name in (*os.environ, *given["env"]) if name.startswith(prefixes)} - {*HANDLED}
        return any(os.environ.get(name) != given["env"].get(name) for name in names)

    understood = arguments and (not arguments[0].startswith("-") or arguments[0] in ("-c", "-m", "-u"))
    understood = understood and os.environ.get("PYTHONPATH") in PATHS
    if not understood or os.geteuid() != given["euid"] or differs(READ_AT_START):
        return None
    return "light" if differs(READ_BY_THE_HUB) else "full"


class Job:
    """A command that a server has forked. The server kills it when this end is closed."""

    def __init__(self, path, request, streams):
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(path)
        content = json.dumps(request).encode()
        socket.send_fds(self.connection, [len(content).to_bytes(8, "big")], streams)
        self.connection.sendall(content)
        self.answers = self.connection.makefile("r")
        self.pid = int(self.answers.readline())

    def wait(self, timeout=None):
        """Exit code (negative: the signal's number); None where the command still runs after `timeout` seconds."""
        self.connection.settimeout(timeout)
        try:
            return int(self.answers.readline() or -signal.SIGKILL)
        except TimeoutError:
            return None

    def kill(self, number=signal.SIGKILL):
        """Send the command a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


# --- the server


def serve(name, path, owner):
    """Fork commands until the test process `owner` is gone."""
    import importlib
    import multiprocessing.spawn  # noqa: F401  # takes this interpreter for its processes, which inherit more than three streams
    import select

    for module in IMPORTS[name]:
        importlib.import_module(module)
    sys.path.pop(0)  # tests/
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno())
    wake.setblocking(False)
    os.rename(f"{path}.new", path)
    running = {}
    while True:
        ready, _, _ = select.select([listener, wake, *running], [], [], 2)
        if not os.path.exists(f"/proc/{owner}"):
            break
        if wake in ready:
            wake.recv(4096)
        for connection in [one for one in ready if one in running]:
            if not connection.recv(1):  # the stand-in is gone
                with contextlib.suppress(ProcessLookupError):
                    os.kill(running[connection], signal.SIGKILL)
        for connection, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[connection]
                answer(connection, os.waitstatus_to_exitcode(status))
                connection.close()
        if listener in ready:
            accept(listener, running, (wake, woken))
    for pid in running.values():
        os.kill(pid, signal.SIGKILL)


def answer(connection, number):
    """Send a line; the other end may be gone."""
    with contextlib.suppress(OSError):
        connection.sendall(f"{number}\n".encode())


def accept(listener, running, others):
    """Fork what a connection asks for."""
    connection, _ = listener.accept()
    header, streams, *_ = socket.recv_fds(connection, 8, 3)
    content = b""
    while len(content) < int.from_bytes(header, "big"):
        content += connection.recv(2**20)
    request = json.loads(content)
    if "import" in request:
        __import__(request["import"])
        answer(connection, 0)
        answer(connection, 0)
        connection.close()
        return
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for one in (listener, connection, *others, *running):
            one.close()
        become(request, streams)
    for stream in streams:
        os.close(stream)
    running[connection] = pid
    answer(connection, pid)


def become(request, streams):
    """Be the command, from here on."""
    import atexit
    import faulthandler
    import random
    import tempfile
    import threading
    import traceback

    code = 1
    try:
        os.setpgid(0, 0)
        for number in (signal.SIGHUP, *FORWARDED):  # ignored where the tests run under nohup
            signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        # ruff: noqa: SIM115
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", buffering=1 if os.isatty(1) or request.get("line_buffered") else -1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
        faulthandler.register(signal.SIGQUIT, sys.stderr)  # what a command that hangs is asked with
        sys.executable = request.get("executable", sys.executable)  # what the command starts is forked too
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        tempfile.tempdir = None
        random.seed()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        if "launch" in request:
            from ranks import launch_environment

            os.environ.update(launch_environment(**request["launch"]))
        for path in reversed(list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))):
            sys.path.insert(0, path)
        sys.stdout.reconfigure(write_through=bool(os.environ.get("PYTHONUNBUFFERED")))
        exec(request.get("code", ""), {"__name__": "before"})
        run(request["name"], request["arguments"])
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if not isinstance(left.code, int | None):
            print(left.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError:
        code = code or 120  # as the interpreter has it
    finally:
        end(code)


def end(code):
    """End with an exit code, or by a signal where it is negative."""
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def run(name, arguments):
    """What `python ARGUMENTS` does."""
    import runpy
    import types

    script, *others = arguments
    if script == "-u":
        sys.stdout.reconfigure(write_through=True)
        script, *others = others
    if script == "-c":
        sys.argv, main = ["-c", *others[1:]], types.ModuleType("__main__")
        sys.path.insert(0, "")
        sys.modules["__main__"] = main
        exec(compile(others[0], "<string>", "exec"), main.__dict__)
    elif script == "-m":
        sys.argv = [name if name != "python" else others[0], *others[1:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *others]
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
        runpy.run_path(script, run_name="__main__")


# --- the test process

_made = []


def folder():
    """Where the stand-ins `python` and `isoflop`, the environment's other commands and the servers' sockets lie."""
    import atexit
    import shutil
    import tempfile

    if _made:
        return _made[0]
    _made.append(there := Path(tempfile.mkdtemp(prefix="forks-")))
    scripts = Path(REAL).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{scripts}:{os.environ['PATH']}"}
    given = {"python": REAL, "scripts": str(scripts), "env": env, "euid": os.geteuid(), "owner": os.getpid()}
    (there / "server.json").write_text(json.dumps(given))
    (there / "bin").mkdir()
    for script in scripts.iterdir():
        if not script.name.startswith(("python", "activate")):
            (there / "bin" / script.name).symlink_to(script)
    for name in ("python", *MODULES):
        (there / "bin" / name).unlink(missing_ok=True)
        (there / "bin" / name).write_text(f'#!/bin/sh\nexec {REAL} -IS {__file__} {there} {name} "$@"\n')
        (there / "bin" / name).chmod(0o755)
    atexit.register(shutil.rmtree, there, ignore_errors=True)
    return there


def python():
    """Path of the interpreter that tests start commands with."""
    if os.environ.get("ISOFLOP_TEST_REAL") == "1" or os.environ.get("ISOFLOP_TEST_GPU") == "1":
        return REAL
    return str(folder() / "bin/python")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        client(*sys.argv[1:3], sys.argv[3:])
