import errno
import json
import resource

import pytest
import torch


from isoflop.errors import UserError


def trained(steps=3, seed=0, moments="fused"):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 300), torch.nn.Linear(300, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    inputs = torch.ones(4, 8)
    for _ in range(steps):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder, step, **kwargs):
    model, optimizer = trained(steps=step, **kwargs)
    return checkpoint.save(folder, step, model, optimizer, {"step": step, "row": None})


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    model, optimizer = trained(3)
    path = checkpoint.save(tmp_path, 3, model, optimizer, {"step": 3, "elapsed_s": 1.5})
    fresh, fresh_optimizer = trained(1, seed=9)
    assert checkpoint.load(path, fresh, fresh_optimizer) == {"step": 3, "elapsed_s": 1.5}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    for ours, theirs in zip(optimizer.state.values(), fresh_optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert fresh_optimizer.param_groups[0]["fused"] is True


def test_weights_alone_can_be_loaded(tmp_path):
    path = save(tmp_path, 2)
    fresh, _ = trained(1, seed=9)
    checkpoint.load(path, fresh, None)
    assert all(torch.equal(a, b) for a, b in zip(trained(2)[0].parameters(), fresh.parameters(), strict=True))


def damage_truncate(path):
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


def damage_flip(path):
    file = next(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_remove(path):
    (path / ".metadata").unlink()


def damage_checksums(path):
    (path / "checksums.json").unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_truncate, ".distcp"),
        (damage_flip, ".distcp"),
        (damage_remove, ".metadata is missing"),
        (damage_checksums, "checksums.json"),
    ],
)
def test_a_broken_newest_is_named_and_the_one_before_is_used(damage, named, tmp_path, capsys):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "step-1"
    message = capsys.readouterr().err
    assert "step-2 is broken" in message
    assert named in message


def test_nothing_partial_is_ever_listed_and_the_next_save_clears_it(tmp_path):
    (tmp_path / ".step-7.partial").mkdir()
    (tmp_path / ".step-7.partial" / "junk").write_text("half")
    assert checkpoint.list_checkpoints(tmp_path) == []
    assert checkpoint.newest_whole(tmp_path) is None
    save(tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-8"]


@pytest.mark.parametrize(("keep_last", "keep_every", "left"), [(2, None, [4, 5]), (1, 2, [2, 4, 5]), (9, None, [1, 2, 3, 4, 5])])
def test_retention(keep_last, keep_every, left, tmp_path):
    for step in range(1, 6):
        (tmp_path / f"step-{step}").mkdir()
    checkpoint.prune(tmp_path, keep_last, keep_every)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == left


def test_going_back_discards_what_came_later(tmp_path):
    for step in (10, 20, 30):
        (tmp_path / f"step-{step}").mkdir()
    checkpoint.discard_after(tmp_path, 20)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [10, 20]


def test_steps_are_ordered_as_numbers_and_copies_by_hand_are_left_alone(tmp_path):
    for step in (100, 20, 3, "20-good"):
        (tmp_path / f"step-{step}").mkdir()
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [3, 20, 100]


def test_a_write_that_fails_half_way_leaves_the_one_before(tmp_path):
    """A real refusal of the kernel: the process may not write files beyond 4 kB."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match=r"no space left while saving step 2: .* bytes free.*needs about .*step-1"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "step-1"
    save(tmp_path, 2)
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "step-2"


def test_a_full_disk_while_sealing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_seal", full)
    with pytest.raises(UserError, match="no space left while saving step 2"):
        save(tmp_path, 2)
    assert checkpoint.newest_whole(tmp_path) == tmp_path / "step-1"


def test_other_failures_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_seal", broken)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_under_a_checksum(tmp_path):
    path = save(tmp_path, 1)
    files = {file.name for file in path.iterdir()}
    assert set(json.loads((path / "checksums.json").read_text())) == files - {"checksums.json"}
    assert {".metadata", "trainer_state.json"} < files
