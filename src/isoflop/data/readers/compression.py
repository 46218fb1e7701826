"""Decompress gzip and zstd with Arrow, for everything that opens files through fsspec, as `datasets` does.

Python's own gzip is several times slower. fsspec's zstd (the zstandard package) reads a truncated file without an error; Arrow
raises one.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec.compression
import fsspec.utils
import pyarrow as pa

_BUFFER_BYTES = 1 << 20
_STARTS_WITH = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bz2": b"BZh", "xz": b"\xfd7zXZ\0"}


class _Decompressed(io.RawIOBase):
    """A compressed file, read from start to end."""

    def __init__(self, file: BinaryIO, compression: str) -> None:
        self._file = file
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._stream.readinto(buffer))

    def close(self) -> None:
        self._file.close()
        super().close()


def register() -> None:
    """Register Arrow's decompressors with fsspec in this process."""
    for name, extensions in (("gzip", "gz"), ("zstd", "zst")):

        def opened(file: BinaryIO, mode: str = "rb", name: str = name, **_: Any) -> BinaryIO:
            return cast(BinaryIO, io.BufferedReader(_Decompressed(file, name), _BUFFER_BYTES))

        fsspec.compression.register_compression(name, opened, extensions, force=True)


def compression_of(file: str) -> str | None:
    """Return the compression of a path or URL by its extension; of a local file without one, by its first bytes."""
    if "://" in file:
        return cast("str | None", fsspec.utils.infer_compression(urlsplit(file).path))
    if by_name := fsspec.utils.infer_compression(file):
        return cast(str, by_name)
    with Path(file).open("rb") as stream:
        begin = stream.read(8)
    return next((name for name, first in _STARTS_WITH.items() if begin.startswith(first)), None)


def open_bytes(file: str) -> AbstractContextManager[BinaryIO]:
    """Open a path or URL for its decompressed bytes."""
    return cast("AbstractContextManager[BinaryIO]", fsspec.open(file, "rb", compression=compression_of(file)))
