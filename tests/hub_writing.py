"""The half of the Hub's stand-in that is written to: accounts, repositories, commits, large files, branches and tags.

It answers what `huggingface_hub` asks in order to publish, with the Hub's own status codes and words. A commit takes effect as a
whole or not at all; a large file (LFS) is sent before the commit that names it, and kept even where that commit never comes.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from hub_card import faults_of_card

# The .gitattributes that the Hub puts into every model's repository, without its one folder.
LARGE_NAMES = """
*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx *.ot
*.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors *.tar.* *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*
"""
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_NAMES.split())
LARGE_BYTES = 10_000_000
BATCH = re.compile(r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
CHANGE = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<verb>preupload|commit|branch|tag)/(?P<revision>.+)")
NO_TOKEN = "Invalid username or password."
DENIED = "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
DENIED_LARGE = "Authorization error."
DENIED_NAME = 'You don\'t have the rights to create a model under the namespace "{}"'


class Account(NamedTuple):
    name: str
    role: str


class File(NamedTuple):
    path: Path  # where its content lies
    size: int
    oid: str  # git's, of the content
    sha256: str | None  # of a large file

    @property
    def etag(self):
        return self.sha256 or self.oid


@dataclass
class Repository:
    name: str
    gated: bool = False
    private: bool = False
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)  # files by path, by commit
    log: dict = field(default_factory=dict)  # (title, time, commit before it), by commit

    def commit(self, branch, files, title=""):
        """Move a branch to a new commit, unless nothing changed; returns the branch's commit."""
        parent = self.branches.get(branch)
        content = sorted((path, file.etag) for path, file in files.items())
        if parent and content == sorted((path, file.etag) for path, file in self.commits[parent].items()):
            return parent
        oid = hashlib.sha1(repr((parent, title, content)).encode()).hexdigest()
        self.commits[oid], self.log[oid], self.branches[branch] = files, (title, datetime.now(UTC), parent), oid
        return oid

    def find(self, revision):
        """The commit of a branch, a tag, or itself; None for what is not there."""
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None

    def history(self, commit):
        """A commit and those before it, as the Hub lists them."""
        listed = []
        while commit:
            title, time, parent = self.log[commit]
            authors = [{"user": self.name.split("/")[0]}]
            listed.append({"id": commit, "title": title, "message": "", "date": f"{time:%FT%T.000Z}", "authors": authors})
            commit = parent
        return listed


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Writing:
    """Methods of the stand-in's request handler."""

    def account(self):
        """Whose request it is; None for a token that is not known."""
        return self.server.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repository(self, asked):
        """What a request is about; None, with an answer, where there is no such thing for the account."""
        kind = (asked.groupdict().get("type") or "models") if asked else None
        repository = asked and self.server.repositories.get((kind, unquote(asked["name"])))
        account = self.account()
        if repository and not (repository.private and not (account and repository.name.startswith(f"{account.name}/"))):
            return repository
        if account:
            return self._error(404, "Repository not found", "RepoNotFound")
        # The Hub's own 401 has no code, but clients take such a one for a missing repository over https only.
        return self._error(401, NO_TOKEN, "RepoNotFound")

    def may_write(self, name, denied=DENIED):
        """Whether the request may change a repository; answers where it may not."""
        account, namespace = self.account(), name.split("/")[0]
        if account is None:
            self._error(401, NO_TOKEN)
        elif account != (namespace, "write"):
            self._error(403, denied.format(namespace))
        return account == (namespace, "write")

    def do_PUT(self):
        body = self.body()
        if body is not None:
            self.server.objects[hashlib.sha256(body).hexdigest()] = self.server.keep(body)
            self._send(200, b"", {})

    def do_POST(self):
        body, path = self.body(), unquote(urlsplit(self.path).path)
        if body is None:
            return None
        with self.server.lock:
            if path == "/api/validate-yaml":
                return self._validate(json.loads(body)["content"])
            if path.startswith("/api/repos/"):
                return self._create_or_delete(json.loads(body))
            asked = BATCH.fullmatch(path) or CHANGE.fullmatch(path)
            repository = self.repository(asked)
            if not repository or not self.may_write(repository.name, DENIED_LARGE if asked.re is BATCH else DENIED):
                return None
            if asked.re is BATCH:
                places = [self._place(wanted) for wanted in json.loads(body)["objects"]]
                return self._json({"transfer": "basic", "objects": places})
            if self.command == "DELETE":
                return self._forget(repository.branches if asked["verb"] == "branch" else repository.tags, asked["revision"])
            return getattr(self, f"_{asked['verb']}")(repository, asked["revision"], body)

    do_DELETE = do_POST

    def body(self):
        """What a request brings; None where a fault that was asked for, or the client itself, has ended it."""
        path = unquote(urlsplit(self.path).path)
        fault = self.server.note(self.command, path)
        cut, length = fault and fault[3], int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(length if cut is None else min(cut, length))
        with self.server.lock:
            self.server.received[path] += len(content)
        if cut is not None or len(content) < length:
            self.close_connection = True
        elif fault:
            self._error(fault[2], "Internal Error - We're working hard to fix this as soon as possible!")
        else:
            return content
        return None

    def whoami(self):
        account = self.account()
        if account is None:
            return self._error(401, NO_TOKEN)
        token = {"displayName": "a token", "role": account.role}
        return self._json({"type": "user", "name": account.name, "orgs": [], "auth": {"accessToken": token}})

    def refs(self, repository):
        def listed(kind, names):
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]

        return self._json(
            {"branches": listed("heads", repository.branches), "tags": listed("tags", repository.tags), "converts": []}
        )

    def _create_or_delete(self, wanted):
        account = self.account()
        name = f"{wanted.get('organization') or (account and account.name)}/{wanted['name']}"
        if not self.may_write(name, DENIED_NAME):
            return None
        if self.command == "DELETE":
            deleted = self.server.repositories.pop(("models", name), None)
            return self._json({}) if deleted else self._error(404, "Repository not found", "RepoNotFound")
        if ("models", name) in self.server.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
        repository = self.server.repositories[("models", name)] = Repository(name, private=wanted.get("visibility") == "private")
        repository.commit("main", {".gitattributes": self.server.file(ATTRIBUTES.encode())}, "initial commit")
        return self._json({"url": f"{self.server.url}/{name}", "name": name})

    def _place(self, wanted):
        """Where a large file is to be put: nowhere, if it is there."""
        place = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
        return wanted | ({} if wanted["oid"] in self.server.objects else {"actions": place})

    def _preupload(self, repository, revision, body):
        if (commit := repository.find(revision)) is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        there = repository.commits[commit]
        files = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            named = any(fnmatch(PurePosixPath(path).name, pattern) for pattern in LARGE_NAMES.split())
            large = named or wanted["size"] > LARGE_BYTES or b"\0" in base64.b64decode(wanted["sample"])
            known = {"oid": there[path].etag} if path in there else {}
            files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known})
        return self._json({"files": files})

    def _commit(self, repository, branch, body):
        if branch not in repository.branches:
            return self._error(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files = dict(repository.commits[repository.branches[branch]])
        header, *operations = map(json.loads, body.splitlines())
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = self.server.file(base64.b64decode(value["content"]))
            elif key == "lfsFile" and value["oid"] in self.server.objects:
                content = self.server.objects[value["oid"]]
                files[value["path"]] = File(content, content.stat().st_size, git_oid(value["oid"].encode()), value["oid"])
            elif key == "lfsFile":
                return self._error(400, f"An LFS pointer pointed to a file that does not exist: {value['path']}")
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            elif key == "deletedFile":
                return self._error(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                return self._error(400, f"Invalid operation: {key}")
        oid = repository.commit(branch, files, header["value"]["summary"])
        return self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repository.name}/commit/{oid}"})

    def _branch(self, repository, branch, body):
        return self._refer(repository, repository.branches, branch, json.loads(body).get("startingPoint", "main"))

    def _tag(self, repository, revision, body):
        return self._refer(repository, repository.tags, json.loads(body)["tag"], revision)

    def _refer(self, repository, names, name, revision):
        if (commit := repository.find(revision)) is None:
            return self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if name in names:
            return self._error(409, f"Reference already exists: {name}")
        names[name] = commit
        return self._json({})

    def _forget(self, names, name):
        return self._json({}) if names.pop(name, None) else self._error(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def _validate(self, content):
        faults = faults_of_card(content)
        if self.headers["Accept"] == "text/plain":
            return self._send(400 if faults else 200, "; ".join(faults).encode(), {})
        errors = [{"message": fault} for fault in faults]
        return self._json({"errors": errors, "warnings": []}, 400 if faults else 200)
