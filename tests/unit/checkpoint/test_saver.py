import errno
import resource
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch

from isoflop.checkpoint import folder as checkpoint
from isoflop.checkpoint import saver as saver_module
from isoflop.checkpoint.saver import Saver
from isoflop.checkpoint.state import load_tensors
from isoflop.train.optimizers import AdamWBf16Moments
from isoflop.utils.errors import UserError


def trained(steps=3, seed=0, width=300, optimizer_class=None):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Linear(width, 2))
    if optimizer_class:
        optimizer = optimizer_class(model.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        model(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(saver, step, **kwargs):
    saver.save(step, *trained(steps=step, **kwargs), {"step": step}, on_saved=lambda: None)
    saver.wait()


@pytest.mark.parametrize("optimizer_class", [None, AdamWBf16Moments])
def test_what_is_saved_is_loaded_bit_for_bit(optimizer_class, tmp_path):
    model, optimizer = trained(3, optimizer_class=optimizer_class)
    saver = Saver(tmp_path)
    saver.save(3, model, optimizer, {"step": 3, "elapsed_s": 1.5}, on_saved=lambda: None)
    saver.wait()
    path = tmp_path / "step-3"
    for steps_before in (0, 1):  # into an optimizer that has no state yet, and over one that has
        fresh, fresh_optimizer = trained(steps_before, seed=9, optimizer_class=optimizer_class)
        load_tensors(path, fresh, fresh_optimizer)
        assert checkpoint.read_trainer_state(path) == {"step": 3, "elapsed_s": 1.5}
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
        for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
            state, other = optimizer.state[ours], fresh_optimizer.state[theirs]
            assert state.keys() == other.keys()
            assert all(torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype for key in state)


def test_weights_alone_can_be_loaded(tmp_path):
    save(Saver(tmp_path), 2)
    fresh, _ = trained(0, seed=9)
    load_tensors(tmp_path / "step-2", fresh, None)
    assert all(torch.equal(a, b) for a, b in zip(trained(2)[0].parameters(), fresh.parameters(), strict=True))


def test_training_on_while_it_is_written_changes_nothing_of_it(tmp_path, monkeypatch):
    """What is saved is the state at the call, although the file is written later."""
    go_on, write = threading.Event(), Saver._write

    def late(self, *what):
        go_on.wait()
        return write(self, *what)

    monkeypatch.setattr(Saver, "_write", late)
    model, optimizer = trained(2)
    saver = Saver(tmp_path)
    saver.save(2, model, optimizer, {}, on_saved=lambda: None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
            optimizer.state[parameter]["exp_avg"].zero_()
    go_on.set()
    saver.wait()
    fresh, fresh_optimizer = trained(1, seed=9)
    load_tensors(tmp_path / "step-2", fresh, fresh_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(trained(2)[0].parameters(), fresh.parameters(), strict=True))
    assert fresh_optimizer.state[next(fresh.parameters())]["exp_avg"].abs().sum() > 0


def test_one_save_at_most_is_in_flight(tmp_path, monkeypatch):
    commit, committing = saver_module.commit, []

    def slow(*what):
        committing.append(1)
        time.sleep(0.3)
        assert len(committing) == 1
        commit(*what)
        committing.pop()

    monkeypatch.setattr(saver_module, "commit", slow)
    saver, state = Saver(tmp_path), trained(1)
    started = time.monotonic()
    for step in (1, 2, 3):
        saver.save(step, *state, {}, on_saved=lambda: None)
    assert time.monotonic() - started > 0.6  # the third began when the second was complete
    saver.wait()
    assert len(checkpoint.list_checkpoints(tmp_path)) == 3


@pytest.mark.slow
def test_training_waits_for_less_than_a_tenth_of_a_save(tmp_path, record_property):
    """24M parameters, 288 MB a checkpoint; paired medians of nine, the first save (which makes the buffers) left out."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(2000, 2000) for _ in range(6))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saver, shares = Saver(tmp_path), []
    for step in range(1, 11):
        started = time.perf_counter()
        saver.save(step, model, optimizer, {}, on_saved=lambda: checkpoint.prune(tmp_path, 1, None))
        blocked_s = time.perf_counter() - started
        saver.wait()
        shares.append(blocked_s / (time.perf_counter() - started))
    share = statistics.median(shares[1:])
    record_property("fault", "training waits while a checkpoint of 288 MB is saved")
    record_property("times", 9)
    record_property("proof", f"for {share:.1%} of the save's time (median)")
    assert share < 0.1


def test_a_write_that_fails_half_way_leaves_the_one_before(tmp_path, caplog):
    """A real refusal of the kernel: the process may not write files beyond 4 kB."""
    saver = Saver(tmp_path)
    save(saver, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            UserError, match=r"no space left while saving step 2: .* bytes free.*needs about 39,640: a quota.*step-1"
        ):
            save(saver, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint of step 2 was not saved: " in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "step-1"
    save(saver, 2)
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "step-2"


def test_a_disk_known_to_be_too_small_is_not_filled_first(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    monkeypatch.setattr(saver_module, "save_sharded", lambda *_, **__: pytest.fail("written"))
    with pytest.raises(UserError, match=r"has 5,000 bytes free, this checkpoint needs about 39,640: 34,640 bytes are missing"):
        save(Saver(tmp_path), 1)


def test_a_full_disk_while_sealing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = Saver(tmp_path)
    save(saver, 1)
    monkeypatch.setattr(saver_module, "commit", full)
    with pytest.raises(UserError, match="no space left while saving step 2"):
        save(saver, 2)
    assert checkpoint.newest_intact(tmp_path) == tmp_path / "step-1"


def test_other_failures_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saver_module, "commit", broken)
    with pytest.raises(UserError, match=r"step 2 cannot be saved: \[Errno 5\] Input/output error; checkpoints there: none; make"):
        save(Saver(tmp_path), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_is_saved_again_is_never_missing(tmp_path, monkeypatch):
    """Going back and saving the same step: the old one goes when the new one has its name."""
    saver, unlink, watched = Saver(tmp_path), Path.unlink, []
    save(saver, 2)

    def seen(path, *given, **named):
        watched.append(path.name)
        assert checkpoint.newest_intact(tmp_path) == tmp_path / "step-2"
        unlink(path, *given, **named)

    monkeypatch.setattr(Path, "unlink", seen)
    save(saver, 2)
    assert {"__0_0.distcp", "checksums.json"} <= set(watched)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_shares_of_the_ranks_are_even_and_leave_nothing_out():
    saver = Saver.__new__(Saver)
    sizes = {f"p{i}": size for i, size in enumerate([1000, 600, 500, 300, 100, 1, 1, 1])}
    shares = []
    for saver._rank in range(3):
        saver._world = 3
        shares.append(saver._share(sizes))
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert max(sum(sizes[name] for name in share) for share in shares) == 1000
