"""Damaged and hand-made variants of a file, and a watch over what reading one does.

`damaged(content)` draws variants of bytes, `retyped(tree)` those of a JSON or YAML tree. `watched(folder)` fails where anything
is written elsewhere, a process or a connection is started, or a pickle names what no description of tensors needs.
"""

import contextlib
import copy
import io
import os
import sys

from hypothesis import strategies as st

PIECES = [
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"[" * 2000, b'{"a":' * 2000, b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"-1",
    b"null", b"true", b'"../../x"', b"/etc/passwd", b"&a [*a]", b'!!python/object/apply:os.system ["touch x"]', b"\n- \n? :",
    b"cposix\nsystem\n(S'touch x'\ntR.", b"PK\5\6", b"r\xff\xff\xff\x0f", b"\x8e\xff\xff\xff\xff\xff\xff\0\0", b"\xe2\x80\xa8",
    b"\r", b"\t",
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e-320, 1e308,
    float("nan"), float("inf"), "", "x", "a" * 5000, "../../x", "/etc/passwd", "..", "a\0b", "a\nb", "\ud800", "\u202eé\u2028",
    "NaN", "1e3", [], {}, [[]], [None], ["x"], {"x": 1}, {"": {}}, {"../x": []}, [1, "a", None], [float("nan")], [10**400] * 3,
]  # fmt: skip


def _deep(levels):
    tree = 1
    for _ in range(levels):
        tree = [tree]
    return tree


@st.composite
def damaged(draw, content):
    """Bytes of a file after one to three changes: bits flipped, a part cut out, repeated, moved or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        first, last = sorted(draw(st.integers(0, len(content))) for _ in range(2))
        last = min(last, first + draw(st.sampled_from([1, 4, 64, 1 << 20])))
        change = draw(st.sampled_from(["flip", "byte", "cut", "end", "repeat", "insert", "insert", "replace", "move"]))
        part = content[first:last]
        if change == "flip" and part:
            content = content[:first] + bytes([part[0] ^ (1 << draw(st.integers(0, 7)))]) + content[first + 1 :]
        elif change == "byte" and part:
            content = content[:first] + bytes([draw(st.integers(0, 255))]) + content[first + 1 :]
        elif change == "cut":
            content = content[:first] + content[last:]
        elif change == "end":
            content = content[:first]
        elif change == "repeat":
            content = content[:last] + part * draw(st.integers(1, 3)) + content[last:]
        elif change in ("insert", "replace"):
            content = content[:first] + draw(st.sampled_from(PIECES)) + content[last if change == "replace" else first :]
        elif change == "move":
            rest = content[:first] + content[last:]
            place = draw(st.integers(0, len(rest)))
            content = rest[:place] + part + rest[place:]
    return content


@st.composite
def retyped(draw, tree):
    """A tree after one to three changes: a value replaced by one of another kind, a key deleted, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = None, None
        node = tree
        while isinstance(node, dict | list) and node and (parent is None or draw(st.integers(0, 4))):
            parent, key = node, draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            node = parent[key]
        if parent is None:
            continue
        change = draw(st.sampled_from(["value", "value", "value", "delete", "rename", "add", "deep", "swap"]))
        if change == "value":
            parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif change == "delete":
            del parent[key]
        elif change == "deep":
            parent[key] = _deep(draw(st.sampled_from([3, 100, 400])))
        elif change == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "", "../x", "/etc/passwd", "a\0", "é", str(key).upper()]))] = parent.pop(key)
        elif change == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "../x", "auto_map", "tokenizer_file", "name"]))] = copy.deepcopy(
                draw(st.sampled_from(VALUES))
            )
        elif change == "add":
            parent.append(copy.deepcopy(draw(st.sampled_from(VALUES))))
        elif change == "swap":
            other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
            parent[key], parent[other] = parent[other], parent[key]
    return tree


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "shutil.rmtree"}
_NEVER = {
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect",
    "socket.bind", "socket.getaddrinfo", "ctypes.dlopen", "urllib.Request", "import.remote",
}  # fmt: skip
_PICKLED = ("torch.", "torch", "pathlib", "pathlib._local", "collections")
_watch = {"folder": None, "seen": []}


def _hook(event, arguments):
    folder = _watch["folder"]
    if folder is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes | os.PathLike) and flags & _WRITES and not _within(path, folder):
            _watch["seen"].append(f"open {path!r} for writing")
    elif event in _PATHS:
        for path in arguments[: 2 if event == "os.rename" else 1]:
            if isinstance(arguments[-1], int) and arguments[-1] >= 0:  # relative to an open folder
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), os.fsdecode(path))
            if isinstance(path, str | bytes | os.PathLike) and not _within(path, folder):
                _watch["seen"].append(f"{event} {path!r}")
    elif event in _NEVER:
        _watch["seen"].append(f"{event} {arguments!r}"[:300])
    elif event == "pickle.find_class" and not str(arguments[0]).startswith(_PICKLED):
        _watch["seen"].append(f"pickle names {arguments!r}")


def _within(path, folder):
    path = os.path.realpath(os.fsdecode(path))
    return path == "/dev/null" or path.startswith(f"{folder}/")


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(folder):
    """Fail where the block does what reading a file never needs, outside of a folder."""
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    _watch.update(folder=os.path.realpath(folder), seen=[])
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        _watch["folder"], sys.dont_write_bytecode = None, bytecode
    assert not _watch["seen"], _watch["seen"]


def memory_bytes():
    """Resident set of this process."""
    return _status("VmRSS")


@contextlib.contextmanager
def memory_below(most_bytes):
    """Fail where the block needs more memory than this beyond what the process has."""
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # the peak starts over
    before = memory_bytes()
    yield
    assert _status("VmHWM") - before < most_bytes, f"{_status('VmHWM') - before:,} bytes"


def _status(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{key}:"))
