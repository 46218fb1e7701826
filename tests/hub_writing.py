"""The half of the Hub's stand-in that is written to: accounts, repositories, commits, large files, branches and tags.

It answers what `huggingface_hub` asks in order to publish, with the Hub's own status codes. A commit takes effect as a whole or
not at all; a large file (LFS) is sent before the commit that names it, and kept even where that commit never comes.
"""

import base64
import hashlib
import json
import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

LFS_NAMES = (".safetensors", ".bin", ".png", ".parquet")  # of the .gitattributes that the Hub gives every repository
LFS_BYTES = 10_000_000
LICENSES = {"apache-2.0", "mit", "odc-by", "cc-by-4.0", "cc-by-sa-4.0", "llama2", "llama3", "gpl-3.0", "other", "unknown"}
BATCH = re.compile(r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
CHANGE = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<verb>preupload|commit|branch|tag)/(?P<revision>.+)")


class Account(NamedTuple):
    name: str
    role: str


class File(NamedTuple):
    path: object  # where its content lies
    size: int
    oid: str  # git's, of the content
    sha256: str | None  # of a large file

    @property
    def etag(self):
        return self.sha256 or self.oid


class Repository(NamedTuple):
    name: str
    gated: bool
    private: bool
    branches: dict
    tags: dict
    commits: dict  # files by path, by commit

    def commit(self, branch, files):
        """Move a branch to a new commit, unless nothing changed."""
        oid = hashlib.sha1(repr(sorted((path, file.etag) for path, file in files.items())).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision):
        """The commit of a branch, a tag, or itself; None for what is not there."""
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Writing:
    """Methods of the stand-in's request handler."""

    def account(self):
        return self.server.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self, name):
        """Whether the request may change a repository; answers where it may not."""
        account = self.account()
        if account is None:
            self._error(401, "Invalid username or password.")
        elif account.role != "write" or account.name != name.split("/")[0]:
            self._error(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]!r}")
        return account is not None and account.role == "write" and account.name == name.split("/")[0]

    def do_PUT(self):
        body = self.body()
        if body is not None:
            self.server.objects[hashlib.sha256(body).hexdigest()] = self.server.keep(body)
            self._send(200, b"", {})

    def do_POST(self):
        body, path = self.body(), unquote(urlsplit(self.path).path)
        if body is None:
            return None
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        asked = BATCH.fullmatch(path) or CHANGE.fullmatch(path)
        repository = asked and self.server.repositories.get(("models", asked["name"]))
        if not repository:
            return self._error(401, "Invalid username or password.", "RepoNotFound")
        if not self.may_write(asked["name"]):
            return None
        if asked.re is BATCH:
            return self._json({"transfer": "basic", "objects": [self._place(wanted) for wanted in json.loads(body)["objects"]]})
        with self.server.lock:
            return getattr(self, f"_{asked['verb']}")(repository, asked["revision"], body)

    def body(self):
        """What a request brings; None where a fault that was asked for has ended it."""
        path = unquote(urlsplit(self.path).path)
        fault = self.server.note(self.command, path)
        chunked, length = self.headers.get("Transfer-Encoding") == "chunked", int(self.headers.get("Content-Length", 0))
        if fault and fault[3] is not None:
            self.server.received[path] += len(self.rfile.read(min(fault[3], length)))
            self.close_connection = True
            self.connection.close()
            return None
        content = b"".join(iter(self._chunk, b"")) if chunked else self.rfile.read(length)
        self.server.received[path] += len(content)
        if fault:
            self._error(fault[2], "Internal Error - We're working hard to fix this as soon as possible!")
            return None
        return content

    def _chunk(self):
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def whoami(self):
        account = self.account()
        if account is None:
            return self._error(401, "Invalid username or password.")
        token = {"displayName": "a token", "role": account.role}
        return self._json({"type": "user", "name": account.name, "orgs": [], "auth": {"accessToken": token}})

    def refs(self, repository):
        def listed(kind, names):
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]

        return self._json(
            {"branches": listed("heads", repository.branches), "tags": listed("tags", repository.tags), "converts": []}
        )

    def _create(self, wanted):
        account = self.account()
        name = f"{wanted.get('organization') or (account and account.name)}/{wanted['name']}"
        if not self.may_write(name):
            return None
        if ("models", name) in self.server.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        repository = self.server.repositories[("models", name)] = Repository(name, False, private, {}, {}, {})
        repository.commit("main", {".gitattributes": self.server.file(b"*.safetensors filter=lfs diff=lfs merge=lfs -text")})
        return self._json({"url": f"{self.server.url}/{name}", "name": name})

    def _place(self, wanted):
        """Where a large file is to be put: nowhere, if it is there."""
        place = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
        return wanted | ({} if wanted["oid"] in self.server.objects else {"actions": place})

    def _preupload(self, repository, revision, body):
        there = repository.commits[repository.find(revision)]
        files = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            large = path.endswith(LFS_NAMES) or "tfevents" in path or wanted["size"] > LFS_BYTES
            known = {"oid": there[path].etag} if path in there else {}
            files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known})
        return self._json({"files": files})

    def _commit(self, repository, branch, body):
        if branch not in repository.branches:
            return self._error(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files = dict(repository.commits[repository.branches[branch]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = self.server.file(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile" and value["oid"] not in self.server.objects:
                return self._error(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            elif line["key"] == "lfsFile":
                content = self.server.objects[value["oid"]]
                files[value["path"]] = File(content, value["size"], git_oid(value["oid"].encode()), value["oid"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(branch, files)
        return self._json({"commitUrl": f"{self.server.url}/{repository.name}/commit/{oid}", "commitOid": oid, "success": True})

    def _branch(self, repository, branch, body):
        if branch in repository.branches:
            return self._error(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.find(json.loads(body or b"{}").get("startingPoint", "main"))
        return self._json({})

    def _tag(self, repository, revision, body):
        tag = json.loads(body)["tag"]
        if tag in repository.tags:
            return self._error(409, f"Tag {tag} already exists")
        repository.tags[tag] = repository.find(revision)
        return self._json({})

    def _validate(self, content):
        """The rules of the Hub's documentation on model cards that a card made here could break."""
        front = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
        data = yaml.safe_load(front[1]) if front else {}
        faults = [f"license must be one of {sorted(LICENSES)}"] if data.get("license", "mit") not in LICENSES else []
        for key in ("tags", "datasets"):
            if not all(isinstance(value, str) for value in data.get(key, [])):
                faults.append(f"{key} must be a list of strings")
        for model in data.get("model-index", []):
            for result in model["results"]:
                if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                    faults.append("model-index: a result needs task.type, dataset.type and dataset.name")
                if not all("value" in metric and metric.get("type") for metric in result["metrics"]):
                    faults.append("model-index: a metric needs a type and a value")
        return self._send(400, "; ".join(faults).encode(), {}) if faults else self._json({"errors": [], "warnings": []})
