"""Find files by URL: `https://`, `s3://`, `gs://`, `hf://` and whatever else fsspec opens.

Credentials come from the environment, as each service's own tools read them: a recipe that holds one is refused.
"""

from __future__ import annotations

import hashlib
from typing import Any

import fsspec
from fsspec.registry import known_implementations

from isoflop.utils.errors import UserError, nearest

# Fields of a file system's answer that identify a file's version, the most reliable first.
_VERSION = [
    "sha256", "blob_id", "ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation", "Last-Modified", "LastModified",
    "last_modified", "updated", "mtime",
]  # fmt: skip
_BLOCK_BYTES = 1 << 20


def expand(pattern: str, key: str) -> list[tuple[str, int, str]]:
    """Return URL, bytes and version of the files that a URL or a glob of URLs matches. Raises `UserError` naming the remedy."""
    protocol = pattern.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        paths = sorted(system.glob(path)) if "*" in path or "[" in path.partition("://")[2] else [path]
        found = [(str(system.unstrip_protocol(one)), one, system.info(one)) for one in paths]
        files = [(url, *_size_and_version(system, one, info)) for url, one, info in found if info["type"] == "file"]
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        raise UserError(f"{key} = {pattern!r}: {error}; {protocol}:// needs it: pip install {package}") from None
    except Exception as error:  # the file system's own errors and its transport's
        if protocol not in fsspec.available_protocols():
            raise UserError(f"{key} = {pattern!r}: no files are read from {protocol}://{_nearest(protocol)}") from None
        reason = str(error.__cause__ or error) or type(error).__name__
        raise UserError(f"{key} = {pattern!r} cannot be read: {reason}; check the URL, the network and your access") from error
    if not files:
        raise UserError(f"{key} = {pattern!r} matches no file; correct the URL")
    return files


def _nearest(protocol: str) -> str:
    return nearest(protocol, ["hf", "https", "http", "s3", "gs", "az", "ftp", "sftp"])


def _size_and_version(system: Any, path: str, info: dict[str, Any]) -> tuple[int, str]:
    """Return a file's bytes, and a text that changes with its content."""
    field = next((name for name in _VERSION if info.get(name)), None)
    if field is not None and info.get("size") is not None:
        return int(info["size"]), f"{info['size']} bytes, {field.lower()} {info[field]!s}"
    digest, size = hashlib.sha256(), 0
    with system.open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()
