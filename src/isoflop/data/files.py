"""Find the files of a source, local or remote; identify their versions and formats; locate damage."""

from __future__ import annotations

import glob
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from isoflop.config.recipe_data import HubSource, PythonSource, Source
from isoflop.data.readers import compression, remote
from isoflop.utils.credentials import hide_credentials
from isoflop.utils.errors import UserError
from isoflop.utils.io import sha256

_BLOCK_BYTES = 1 << 20
_STDLIB, _PACKAGES = (Path(sysconfig.get_paths()[which]) for which in ("stdlib", "purelib"))

_FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow"}
_FORMATS |= {".csv": "csv", ".tsv": "csv"}
_STARTS_WITH = {b"PAR1": "parquet", b"ARROW1": "arrow"}

compression.register()


class SourceFile(NamedTuple):
    """A file of a source."""

    path: str
    """A local path, or a URL that fsspec opens."""
    bytes: int
    version: str | None = None
    """Identifies the version of a remote file; a local file is identified by its SHA-256."""

    @classmethod
    def local(cls, path: Path) -> SourceFile:
        """Return a file on this machine."""
        return cls(str(path), path.stat().st_size)


def source_files(source: Source, key: str) -> list[SourceFile]:
    """Return the files of a source in reading order; none for a source on the Hub."""
    if isinstance(source, PythonSource):
        return _python_files(_STDLIB) + (_python_files(_PACKAGES) if source.kind == "python_packages" else [])
    if isinstance(source, HubSource):
        folder = Path(source.name)
        return [SourceFile.local(path) for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
    files = [file for pattern in source.files for file in _expand(pattern.removeprefix("file://"), f"{key}.files")]
    if not any(file.bytes for file in files):
        raise UserError(f"{key}.files = {source.files} is empty: {len(files)} file(s) of 0 bytes; point it at text")
    return list(dict.fromkeys(files))  # a file that two patterns match is read once


def _python_files(root: Path) -> list[SourceFile]:
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(f for f in root.rglob("*.py") if not skipped & set(f.relative_to(root).parts))
    return [SourceFile.local(f) for f in files if f.stat().st_size and _is_utf8(f)]  # a few declare another encoding


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _expand(pattern: str, key: str) -> list[SourceFile]:
    if "://" in pattern:
        return [SourceFile(*found) for found in remote.expand(pattern, key)]
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    if files := [SourceFile.local(path) for path in found if path.is_file()]:
        return files
    if folder := next(iter(found), None):
        inside = sorted(path.suffix for path in folder.rglob("*") if path.is_file())
        ending = max(inside, key=inside.count) if inside else ""
        raise UserError(f"{key} = {pattern!r} is a folder; write the files in it, e.g. {str(folder / '**' / f'*{ending}')!r}")
    raise UserError(f"{key} = {pattern!r} matches no file (working directory {Path.cwd()}); correct the path")


def hash_files(files: list[SourceFile]) -> dict[str, str]:
    """Return the SHA-256 of local files and the version of others, by their names in the manifest."""

    def version(file: SourceFile) -> str:
        return file.version or sha256(Path(file.path))

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL: about 1 GB/s a thread
        digests = list(tqdm(pool.map(version, files), total=len(files), desc="hash sources", unit="file", delay=3))
    return {name_of(file): digest for file, digest in zip(files, digests, strict=True)}


def name_of(file: SourceFile | str) -> str:
    """Return a file's name in the manifest. Names of Python's own sources are the same in every environment."""
    name = file if isinstance(file, str) else file.path
    if "://" in name:
        return hide_credentials(name)
    path = Path(name)
    if path.is_relative_to(_PACKAGES):
        return str(_PACKAGES.name / path.relative_to(_PACKAGES))
    return str(path.relative_to(_STDLIB) if path.is_relative_to(_STDLIB) else path)


def format_of(file: str, read_start: bool) -> str | None:
    """Return the format of a file by its extension; with `read_start`, else by the first bytes of a local file."""
    path = PurePosixPath(urlsplit(file).path if "://" in file else file)
    for suffix in reversed(path.suffixes[-2:]):  # the last one may be that of the compression
        if kind := _FORMATS.get(suffix.lower()):
            return kind
    if not read_start or "://" in file:
        return None
    with Path(file).open("rb") as stream:
        begin = stream.read(8)
    return next((kind for first, kind in _STARTS_WITH.items() if begin.startswith(first)), None)


def find_damage(file: str) -> str | None:
    """Return where a local compressed file is truncated or damaged; None where it is intact."""
    if "://" in file:
        return None
    seen = 0
    try:
        with compression.open_bytes(file) as stream:
            while block := stream.read(_BLOCK_BYTES):
                seen += len(block)
    except OSError as error:
        size = Path(file).stat().st_size
        return f"{name_of(file)}: {error} after {seen:,} bytes of its text, in a file of {size:,} bytes"
    return None
