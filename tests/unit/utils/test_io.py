import os

import pytest

from isoflop.utils.io import atomic_path, atomic_write


@pytest.mark.parametrize("content", ["naïve\n", b"\xff\x00"])
@pytest.mark.parametrize("options", [{}, {"durable": True}, {"shared": True}], ids=str)
def test_text_and_bytes_are_written_as_they_are(content, options, tmp_path):
    file = tmp_path / "a.json"
    for _ in range(2):
        atomic_write(file, content, **options)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_leaves_the_file_as_it_was_and_no_litter(tmp_path):
    file = tmp_path / "a.npy"
    file.write_text("before")

    def write():
        with atomic_path(file) as temporary:
            temporary.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert (os.listdir(tmp_path), file.read_text()) == (["a.npy"], "before")


@pytest.mark.parametrize("pattern", ["survey-*", "survey-*.npy", "*.npy", "survey*"])
def test_no_glob_for_complete_files_matches_a_temporary_one(pattern, tmp_path):
    with atomic_path(tmp_path / "survey-a-00000-0f.npy") as temporary:
        temporary.write_text("half")
        assert [file for file in tmp_path.glob(pattern) if not file.name.startswith(".")] == []
        assert not temporary.name.endswith(".npy")


def test_writers_of_a_shared_folder_do_not_take_each_others_temporary_file(tmp_path):
    file = tmp_path / "corpus.json"
    with atomic_path(file, shared=True) as first, atomic_path(file, shared=True) as second:
        assert first != second
        first.write_text("same")
        second.write_text("same")
    assert os.listdir(tmp_path) == ["corpus.json"]


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    file, synced = tmp_path / "manifest.json", []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), file.exists()))
    )
    atomic_write(file, "{}", durable=True)
    assert synced == [(str(tmp_path / ".manifest.json.partial"), False)]
