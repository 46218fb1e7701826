"""Local files of text: which there are, what is in them by SHA-256, and what is wrong with one that cannot be read."""

from __future__ import annotations

import codecs
import glob
import json
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from isoflop.data import compression
from isoflop.disk import sha256
from isoflop.errors import UserError
from isoflop.recipe_data import HubSource, PythonSource, Source

_BLOCK_BYTES = 1 << 20
_STDLIB, _PACKAGES = (Path(sysconfig.get_paths()[which]) for which in ("stdlib", "purelib"))

compression.register()


def local_files(source: Source, key: str) -> list[Path]:
    """The files of a source, in the order in which they are read; none for what is on the Hub."""
    if isinstance(source, PythonSource):
        return _python_files(_STDLIB) + (_python_files(_PACKAGES) if source.kind == "python_packages" else [])
    if isinstance(source, HubSource):
        folder = Path(source.name)
        return sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    return _expand(source.files, key)


def _python_files(root: Path) -> list[Path]:
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(f for f in root.rglob("*.py") if not left_out & set(f.relative_to(root).parts))
    return [f for f in files if f.stat().st_size and _is_utf8(f)]  # a few declare another encoding


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _expand(patterns: list[str], key: str) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not found:
            raise UserError(f"{key}.files = {pattern!r} matches no file (working directory {Path.cwd()}); correct the path")
        files += found
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{key}.files = {patterns} is empty: {len(files)} file(s) of 0 bytes; point it at text")
    return list(dict.fromkeys(files))  # a file that two patterns match is one file


def hash_files(files: list[Path]) -> dict[str, str]:
    """SHA-256 of local files, by their names in the manifest."""
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter: about 1 GB/s a thread
        digests = list(tqdm(pool.map(sha256, files), total=len(files), desc="hash sources", unit="file", delay=3))
    return {name_of(file): digest for file, digest in zip(files, digests, strict=True)}


def name_of(file: Path) -> str:
    """A local file's name in the manifest; of Python's own sources the same in every environment."""
    if file.is_relative_to(_PACKAGES):
        return str(_PACKAGES.name / file.relative_to(_PACKAGES))
    return str(file.relative_to(_STDLIB) if file.is_relative_to(_STDLIB) else file)


def find_fault(file: Path, kind: str) -> str | None:
    """What is wrong with a local file: a broken gzip or zstd member, text that is not UTF-8, a line that is not JSON."""
    if kind == "parquet" or file.suffix == ".parquet":
        try:
            for _ in pq.ParquetFile(file).iter_batches():
                pass
        except (pa.ArrowInvalid, OSError) as error:
            return f"{name_of(file)} is not a whole Parquet file: {error}"
        return None
    decoder, seen = codecs.getincrementaldecoder("utf-8")(), 0
    with file.open("rb") as raw, fsspec.open(str(file), "rb", compression="infer") as stream:
        try:
            while block := stream.read(_BLOCK_BYTES):
                decoder.decode(block)
                seen += len(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            return (
                f"{name_of(file)} is not UTF-8: {error.reason} near byte {seen + error.start}"
                f" (convert it, e.g. iconv -f latin1 -t utf-8 {file})"
            )
        except OSError as error:
            return f"{name_of(file)}: {error} after {seen:,} bytes of its text, in a file of {raw.seek(0, 2):,} bytes"
    return _bad_line(file) if kind == "json" or ".json" in file.name else None


def _bad_line(file: Path) -> str | None:
    with fsspec.open(str(file), "rt", compression="infer", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line)
            except json.JSONDecodeError as error:
                if line.strip():
                    return f"{name_of(file)}: line {number} is not JSON: {error.msg} at column {error.colno}"
            except RecursionError:
                return f"{name_of(file)}: line {number} is nested too deep"
    return None
