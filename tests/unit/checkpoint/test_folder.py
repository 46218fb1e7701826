import json
import subprocess
import sys

import pytest

from isoflop.checkpoint import folder as checkpoint


def committed(folder, step, content=b"tensors" * 50):
    """A checkpoint of two files, as the saver leaves it."""
    tmp = checkpoint.temporary(folder, step)
    tmp.mkdir(parents=True)
    (tmp / "__0_0.distcp").write_bytes(content)
    (tmp / ".metadata").write_bytes(b"contents")
    checkpoint.commit(tmp, folder / f"step-{step}", {"step": step}, known={})
    return folder / f"step-{step}"


def damage_truncate(path):
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def damage_flip(path):
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(content)


def damage_remove(path):
    (path / ".metadata").unlink()


def damage_checksums(path):
    (path / "checksums.json").unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_truncate, "__0_0.distcp does not match"),
        (damage_flip, "__0_0.distcp does not match"),
        (damage_remove, ".metadata is missing"),
        (damage_checksums, "checksums.json"),
    ],
)
def test_a_broken_newest_is_named_and_the_one_before_is_used(damage, named, tmp_path, caplog):
    committed(tmp_path, 1)
    damage(committed(tmp_path, 2))
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "step-1"
    message = caplog.text
    assert "step-2 is broken" in message
    assert named in message


def test_nothing_partial_is_ever_listed(tmp_path):
    checkpoint.temporary(tmp_path, 7).mkdir()
    (checkpoint.temporary(tmp_path, 7) / "__0_0.distcp").write_text("half")
    assert checkpoint.list_checkpoints(tmp_path) == []
    assert checkpoint.newest_intact(tmp_path) is None
    checkpoint.remove_temporary(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_under_a_checksum(tmp_path):
    path = committed(tmp_path, 1)
    files = {file.name for file in path.iterdir()}
    assert files == {".metadata", "__0_0.distcp", "trainer_state.json", "checksums.json"}
    assert set(json.loads((path / "checksums.json").read_text())) == files - {"checksums.json"}
    assert checkpoint.read_trainer_state(path) == {"step": 1}


def test_the_same_step_reached_again_replaces_what_was_there(tmp_path):
    committed(tmp_path, 1, b"first")
    assert (committed(tmp_path, 1, b"second") / "__0_0.distcp").read_bytes() == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "keep", "left"),
    [
        (2, None, [], [4, 5]),
        (1, 2, [], [2, 4, 5]),
        (9, None, [], [1, 2, 3, 4, 5]),
        (1, None, [3], [3, 5]),
        (1, 4, [1], [1, 4, 5]),
    ],
)
def test_retention(keep_last, keep_every, keep, left, tmp_path):
    for step in range(1, 6):
        committed(tmp_path, step)
    checkpoint.prune(tmp_path, keep_last, keep_every, keep)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == left


HOLD = """
import sys
from pathlib import Path
from isoflop.checkpoint.folder import read_locked
with read_locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.new_process
@pytest.mark.parametrize("ends", ["in order", "killed"])
def test_what_another_process_reads_or_pushes_is_not_deleted_under_it(ends, tmp_path):
    for step in (1, 2, 3):
        committed(tmp_path, step)
    command = [sys.executable, "-c", HOLD, tmp_path / "step-1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        checkpoint.prune(tmp_path, keep_last=1, keep_every=None)
        assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-1", "step-3"]
        if ends == "killed":
            holder.kill()
    checkpoint.prune(tmp_path, keep_last=1, keep_every=None)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-3"]


def test_going_back_discards_what_came_later(tmp_path):
    for step in (10, 20, 30):
        committed(tmp_path, step)
    checkpoint.discard_after(tmp_path, 20)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [10, 20]


def test_steps_are_ordered_as_numbers_and_copies_by_hand_are_left_alone(tmp_path):
    for step in (100, 20, 3):
        committed(tmp_path, step)
    (tmp_path / "step-20").rename(tmp_path / "step-20-good")
    committed(tmp_path, 20)
    (tmp_path / "step-50").mkdir()  # somebody's own
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [3, 20, 100]
