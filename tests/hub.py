"""A stand-in of the Hugging Face Hub on this machine, so that the real client libraries are tested over real HTTP, offline.

It answers what `huggingface_hub`, `datasets` and `transformers` ask of the Hub in order to read a repository: the commit of a
revision, its tree (in pages), its files (whole or in ranges), and the Hub's own errors for what is missing or gated; and, in
`hub_writing.py`, what is asked in order to publish one. A request can be made to fail a number of times. The libraries read
`HF_ENDPOINT` when they are imported: run them in a process of their own, with `Hub.env`.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import pytest
from hub_writing import Account, File, Repository, Writing, git_oid

VERBS = "(?P<verb>tree|revision|paths-info|refs|commits)(/(?P<revision>[^/]+)/?(?P<path>.*))?"
API = re.compile(f"/api/(?P<type>models|datasets)/(?P<name>.+?)(/{VERBS})?")
FILE = re.compile("(/(?P<type>datasets))?/(?P<name>.+?)/(?P<verb>resolve)/(?P<revision>[^/]+)/(?P<path>.+)")
GRANTED = "hf_granted"  # the token of an account that has access to the gated repositories
READABLE = ("README.md", ".gitattributes")  # in a gated repository too, as are its commits and its tree
PAGE = 1000  # entries that the Hub lists at once: of a tree, or of commits (there it is 50)


def entries(files, folder="", recursive=True):
    """Files and folders below a folder, as the Hub describes them."""
    paths = {entry for path in map(PurePosixPath, files) for entry in (path, *path.parents)}
    inside = sorted(str(path) for path in paths if PurePosixPath(folder) in path.parents[: None if recursive else 1])
    folders = {path: {"type": "directory", "oid": git_oid(path.encode()), "size": 0, "path": path} for path in inside}
    return [_described(path, files[path]) if path in files else folders[path] for path in inside]


def _described(path, file):
    large = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.sha256 else {}
    return {"type": "file", "oid": file.oid, "size": file.size, "path": path, **large}


class Hub(ThreadingHTTPServer):
    """Serves local folders as repositories until it is closed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}
        self.requests = []  # (method, path without its query) of each, in order
        self.sent = Counter()  # bytes of bodies, by path
        self.received = Counter()
        self.accounts = {}  # by token
        self.objects = {}  # large files, by SHA-256
        self.folder = tempfile.TemporaryDirectory()
        self.faults = []
        self.stalled = None  # the end of a path whose requests are not answered for a minute
        self.lock = threading.RLock()  # an answer is counted inside a change
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def add(self, repo_type, name, folder, gated=False, revision="main"):
        """Commit a folder to a branch of a "dataset" or "model", which is made if it is not there; returns the commit."""
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        contents = {path.relative_to(folder).as_posix(): path for path in paths}
        files = {name: File(path, path.stat().st_size, git_oid(path.read_bytes()), None) for name, path in contents.items()}
        repository = self.repositories.setdefault((f"{repo_type}s", name), Repository(name, gated=gated))
        return repository.commit(revision, files)

    def account(self, token, name, role="write"):
        """Make a token of a user known; its role is "write" or "read"."""
        self.accounts[token] = Account(name, role)
        return token

    def files(self, name, revision="main"):
        """What a model's repository holds at a revision, by path; None where there is no such revision."""
        repository = self.repositories[("models", name)]
        commit = repository.find(revision)
        return commit and {path: file.path.read_bytes() for path, file in repository.commits[commit].items()}

    def keep(self, content):
        """Keep what was sent in a file."""
        path = Path(self.folder.name) / hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        return path

    def file(self, content):
        """Content that was sent as a file of a commit."""
        return File(self.keep(content), len(content), git_oid(content), None)

    def break_file(self, path, times=1, status=500, after=None, method="GET"):
        """Fail the next requests whose path ends so: with a status, or by hanging up after some bytes (of theirs, where sent)."""
        self.faults += [(method, path, status, after)] * times

    def note(self, method, path):
        """Note a request; returns the (method, path, status, after) of the fault that is due."""
        with self.lock:
            self.requests.append((method, path))
        if self.stalled and path.endswith(self.stalled):
            time.sleep(60)
        with self.lock:
            due = next((fault for fault in self.faults if fault[0] == method and path.endswith(fault[1])), None)
            if due:
                self.faults.remove(due)
            return due

    def env(self, home, token=None):
        """Environment of a process whose Hub is this one, with its caches in a folder."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return inherited | ({"HF_TOKEN": token} if token else {}) | {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def close(self):
        self.shutdown()
        self.server_close()
        self.folder.cleanup()

    def __exit__(self, *_):
        self.close()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # clients hang up when they have seen enough
            super().handle_error(request, client_address)


class _Handler(Writing, BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self):
        url = urlsplit(self.path)
        form = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        fault = self.server.note(self.command, unquote(url.path))
        if fault and fault[3] is None:
            return self._error(fault[2], "Internal Error - We're working hard to fix this as soon as possible!")
        if url.path == "/api/whoami-v2":
            return self.whoami()
        asked = FILE.fullmatch(url.path) or API.fullmatch(url.path)
        if (repository := self.repository(asked)) is None:
            return None
        if asked["verb"] == "refs":
            return self.refs(repository)
        revision, path = unquote(asked["revision"] or "main"), unquote(asked["path"] or "")
        if (commit := repository.find(revision)) is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if asked["verb"] == "resolve":
            return self._file(repository, asked["name"], commit, path, fault and fault[3])
        query = parse_qs(f"{url.query}&{form}")
        if asked["verb"] == "tree":
            return self._tree(repository, commit, path, query)
        if asked["verb"] == "commits":
            return self._page(repository.history(commit), query)
        if asked["verb"] == "paths-info":
            return self._json([entry for entry in entries(repository.commits[commit]) if entry["path"] in query["paths"]])
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        gated = "manual" if repository.gated else False
        return self._json(
            {"id": asked["name"], "sha": commit, "private": repository.private, "gated": gated, "siblings": siblings}
        )

    do_HEAD = do_GET

    def do_POST(self):
        return self.do_GET() if "/paths-info/" in self.path else super().do_POST()

    def _tree(self, repository, commit, folder, query):
        listed = entries(repository.commits[commit], folder, query.get("recursive") == ["true"])
        if folder and not listed:
            return self._error(404, f"{folder} does not exist", "EntryNotFound")
        return self._page(listed, query)

    def _page(self, listed, query):
        end = int(query.get("cursor", ["0"])[0]) + PAGE
        more = f"<{self.server.url}{urlsplit(self.path).path}?{urlencode(query | {'cursor': end}, doseq=True)}>"
        return self._json(listed[end - PAGE : end], headers={"Link": f'{more}; rel="next"'} if end < len(listed) else {})

    def _file(self, repository, name, commit, path, after):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository.gated and token != GRANTED and path not in READABLE:
            return self._error(403 if token else 401, f"Access to {name} is restricted.", "GatedRepo")
        if not (file := repository.commits[commit].get(path)):
            return self._error(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": file.size}
        start, end = 0, file.size
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), min(int(span[2] or end) + 1, end)
            if start >= end:
                return self._error(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{file.size}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        with file.path.open("rb") as stream:
            stream.seek(start)
            return self._send(206 if span else 200, stream.read(end - start), headers, after)

    def _error(self, status, message, code=None, headers=None):
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._json({"error": message}, status, headers)

    def _json(self, content, status=200, headers=None):
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status, body, headers, after=None):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:after])
        self.close_connection = self.close_connection or after is not None
        with self.server.lock:
            self.server.sent[unquote(urlsplit(self.path).path)] += len(body[:after])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with Hub() as standin:
        yield standin
