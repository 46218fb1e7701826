"""gzip and zstd by Arrow's decompressors, for everything that opens files through fsspec, as `datasets` does.

Python's own gzip is several times slower, and fsspec's zstd (by the zstandard package) ends a file that was cut short without a
word. Arrow says when one is cut.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO, cast

import fsspec.compression
import pyarrow as pa

_BUFFER_BYTES = 1 << 20


class _Decompressed(io.RawIOBase):
    """A compressed file, readable from start to end."""

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
    """Make Arrow's decompressors those of fsspec in this process."""
    for name, extensions in (("gzip", "gz"), ("zstd", "zst")):

        def opened(file: BinaryIO, mode: str = "rb", name: str = name, **_: Any) -> BinaryIO:
            return cast(BinaryIO, io.BufferedReader(_Decompressed(file, name), _BUFFER_BYTES))

        fsspec.compression.register_compression(name, opened, extensions, force=True)
