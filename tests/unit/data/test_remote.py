"""Files elsewhere, over real HTTP from a server on this machine, and in fsspec's memory."""

import functools
import http.server
import json
import threading

import fsspec
import hub as standin
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import documents_of, run_command

from isoflop.config.recipe_data import Data
from isoflop.data.files import hash_files, source_files
from isoflop.data.manifest import read_manifest
from isoflop.data.sources import open_source
from isoflop.utils.errors import UserError

pytestmark = pytest.mark.processes

hub = standin.hub  # the fixture


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Lists folders, tells when a file was changed, and knows nothing of ranges."""

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder and the URL that it is served under."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "site"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def source(kind, *files, **fields):
    return Data.model_validate({"source": {"kind": kind, "files": list(files), **fields}, "prepared_dir": "unused"}).source


def texts_of(*arguments, **fields):
    return documents_of(open_source(source(*arguments, **fields), "data.source"))


@pytest.mark.parametrize(
    ("kind", "name"), [("json", "rows.jsonl"), ("json", "rows.jsonl.gz"), ("parquet", "rows.parquet"), ("text", "doc07.txt")]
)
def test_a_url_gives_the_documents_of_the_file(kind, name, fifty_documents, hub, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.add("dataset", "org/rows", fifty_documents)
    url = f"{hub.url}/datasets/org/rows/resolve/main/{name}"
    for given in (url, f"{url}?download=true"):
        assert texts_of(kind, given) == texts_of(kind, str(fifty_documents / name))
        file = hub.repositories["datasets", "org/rows"].commits[hub.repositories["datasets", "org/rows"].branches["main"]][name]
        versions = hash_files(source_files(source(kind, given), "data.source"))
        assert versions == {given: f'{file.size} bytes, etag "{file.oid}"'}


def test_globs_of_urls_and_what_changed(site):
    folder, url = site
    for name, text in (("b", "second"), ("a", "first"), ("c", "third")):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (folder / "readme.md").write_text("no rows")
    assert texts_of("json", f"{url}/*.jsonl") == ["first", "second", "third"]
    before = hash_files(source_files(source("json", f"{url}/*.jsonl"), "data.source"))
    (folder / "b.jsonl").write_text(json.dumps({"text": "longer than before"}) + "\n")
    after = hash_files(source_files(source("json", f"{url}/*.jsonl"), "data.source"))
    assert [name.rsplit("/", 1)[1] for name in before if before[name] != after[name]] == ["b.jsonl"]


def test_errors_of_remote_files_are_named(site):
    folder, url = site
    (folder / "rows.jsonl").write_text('{"text": "a"}\n{\n')
    with pytest.raises(UserError, match=rf"^data.source: {url}/rows.jsonl, line 2 is not JSON: .*invalid_rows=skip"):
        texts_of("json", f"{url}/rows.jsonl")
    pq.write_table(pa.table({"text": [str(i) * 40 for i in range(200_000)]}), folder / "large.parquet", compression="none")
    assert (folder / "large.parquet").stat().st_size > 6 * 2**20  # than fsspec asks for at once
    with pytest.raises(UserError, match=r"large.parquet cannot be read: its server sends files from their start only; download"):
        texts_of("parquet", f"{url}/large.parquet")


def test_urls_that_cannot_be_read(site):
    _, url = site
    cases = [
        (f"{url}/none.jsonl", "none.jsonl' cannot be read: 404.*; check the URL, the network and your access"),
        (f"{url}/*.none", r"\*.none' matches no file; correct the URL"),
        ("http://127.0.0.1:9/rows.jsonl", r"cannot be read: Cannot connect to host 127.0.0.1:9"),
        ("htps://host/rows.jsonl", r"no files are read from htps://; did you mean https\?"),
        ("s3://bucket/rows.jsonl", r"'s3://bucket/rows.jsonl': .*; s3:// needs it: pip install s3fs"),
        ("gs://bucket/*.jsonl", r"'gs://bucket/\*.jsonl': .*; gs:// needs it: pip install gcsfs"),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=rf"^data.source.files = .*{message}"):
            texts_of("json", given)


def test_no_credential_of_a_url_is_shown(site):
    """A recipe that holds one is refused; the file systems' own messages repeat it."""
    _, url = site
    secret = "Pl4nted0123456789"
    for given in (url.replace("http://", f"http://user:{secret}@") + "/none.jsonl", f"{url}/none.jsonl?X-Amz-Signature={secret}"):
        with pytest.raises(UserError) as error:
            texts_of("json", given)
        assert secret not in str(error.value)
        assert "***" in str(error.value)


def test_a_file_without_a_version_is_identified_by_its_content():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/isoflop/1.jsonl": b'{"text": "a"}\n', "/isoflop/2.jsonl": b'{"text": "b"}\n'})
    assert texts_of("json", "memory://isoflop/*.jsonl") == ["a", "b"]
    before = hash_files(source_files(source("json", "memory://isoflop/*.jsonl"), "data.source"))
    memory.pipe("/isoflop/2.jsonl", b'{"text": "c"}\n')
    after = hash_files(source_files(source("json", "memory://isoflop/*.jsonl"), "data.source"))
    assert [name for name in before if before[name] != after[name]] == ["memory:///isoflop/2.jsonl"]
    memory.rm("/isoflop", recursive=True)


def test_a_local_url_is_a_local_file(fifty_documents):
    file = str(fifty_documents / "rows.jsonl")
    assert source_files(source("json", f"file://{file}"), "data.source") == source_files(source("json", file), "data.source")


def test_the_hubs_files_by_url_are_prepared_and_a_change_is_noticed(hub, write_recipe, tmp_path):
    """Two processes, which each open the URLs by themselves; the Hub is asked with the user's token."""
    (tmp_path / "rows/data").mkdir(parents=True)
    for number in range(3):
        lines = [json.dumps({"text": f"document {i} of file {number}, " * 20}) + "\n" for i in range(100)]
        (tmp_path / f"rows/data/{number}.jsonl").write_text("".join(lines))
    hub.add("dataset", "org/rows", tmp_path / "rows")
    file = write_recipe(
        "elsewhere",
        data__prepared_dir=str(tmp_path / "prepared"),
        data__source={"kind": "json", "files": ["hf://datasets/org/rows/data/*.jsonl"]},
        data__validation_fraction=0.1,
    )
    env = hub.env(tmp_path / "hf_home", standin.GRANTED) | {"OMP_NUM_THREADS": "1"}
    run_command("python", "scripts/prepare.py", file, "--workers", "2", env=env)
    prepared = read_manifest(str(tmp_path / "prepared")).sources["json"]
    assert sum(split.documents for split in prepared.splits.values()) == 300
    assert list(prepared.files) == [f"hf://datasets/org/rows/data/{number}.jsonl" for number in range(3)]
    assert "nothing changed" in run_command("python", "scripts/prepare.py", file, env=env).stdout
    (tmp_path / "rows/data/1.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    hub.add("dataset", "org/rows", tmp_path / "rows")
    done = run_command("python", "scripts/prepare.py", file, env=env, check=False)
    assert done.returncode == 2
    assert "was prepared from something else: hf://datasets/org/rows/data/1.jsonl: " in done.stderr
