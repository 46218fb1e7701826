"""A disk that is full: what was there stays, and the message says how much is missing."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import curve_of, run_command, weights_of

from isoflop.checkpoint import folder as checkpoints
from isoflop.config.loading import load_recipe


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of so many bytes; skipped where this user may not mount one."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no small file system can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


# A checkpoint of the toy run takes 0.35 MB. Before step 8 something else fills the disk but for less than that.
FILL = """
import os, isoflop.train.trainer as pretrain
step = pretrain.train_step
def filling(job, progress):
    if progress.step == 7:
        with open({other!r}, "wb") as stream:
            free = os.statvfs(os.path.dirname({other!r}))
            stream.write(bytes(free.f_bavail * free.f_bsize - 250_000))
    return step(job, progress)
pretrain.train_step = filling
"""


@pytest.mark.parametrize("config", ["cpu", pytest.param("2gpu_fsdp2", marks=pytest.mark.distributed)])
def test_a_disk_that_fills_up_while_training(config, small_disk, write_recipe, ranks, tried):
    disk = small_disk(4_000_000)
    file = write_recipe()
    other, run = disk / "other", f"output.run_dir={disk}/run"
    launched = ranks.start(config, file, run, code=FILL.format(other=str(other)))
    codes = launched.wait()
    assert set(codes) == {2}, launched.text()
    assert re.search(r"no space left while saving step 10: .* needs about [\d,]+: [\d,]+ bytes are missing", launched.text())
    assert "earlier checkpoints are intact (step-5)" in launched.text()
    assert [path.name for path in (disk / "run/checkpoints").iterdir()] == ["step-5"]
    assert checkpoints.verify(disk / "run/checkpoints/step-5") == []
    other.unlink()
    assert "resuming from" in ranks.run(config, file, run)
    ranks.run(config, file)
    ours, whole = load_recipe(file, [run]), load_recipe(file)
    assert curve_of(ours) == curve_of(whole)
    assert weights_of(ours) == weights_of(whole)
    tried(f"a full disk in a save (`{config}`)")


def test_a_disk_that_has_room_again_by_the_next_save(small_disk, write_recipe, ranks, tried):
    """A save that finds no room is reported at once and tried again at the next step that is due; training continues."""
    disk = small_disk(4_000_000)
    file = write_recipe()
    other, run = disk / "other", f"output.run_dir={disk}/run"
    code = FILL.format(other=str(other))
    code += f"""
def emptying(job, progress):
    if progress.step == 12 and os.path.exists({str(other)!r}):
        job.checkpoints._saver._in_flight.result()  # until the failure is known
        os.remove({str(other)!r})
    return filling(job, progress)
pretrain.train_step = emptying
"""
    longer = [run, "training.max_steps=15"]
    printed = ranks.run("cpu", file, *longer, code=code)
    assert "checkpoint of step 10 was not saved: output.run_dir: no space left" in printed
    assert [path.name for path in checkpoints.list_checkpoints(disk / "run/checkpoints")] == ["step-5", "step-15"]
    tried("a full disk in one save, with room again at the next", proof="training went on, the next checkpoint is complete")


def test_a_full_disk_while_preparing(small_disk, write_recipe, tried):
    disk = small_disk(300_000)
    file = write_recipe()
    command = ("python", "scripts/prepare.py", file, f"data.prepared_dir={disk}/data")
    done = run_command(*command, check=False)
    assert done.returncode == 2, done.stderr
    assert re.search(
        r"error: data\.prepared_dir = .*no space left, [\d,]+ bytes are free there; finished parts are kept", done.stderr
    )
    assert os.listdir(disk) == ["data.partial"]
    subprocess.run(["mount", "-o", "remount,size=3000000", disk], check=True)
    run_command(*command)
    assert (disk / "data/manifest.json").exists()
    assert os.listdir(disk) == ["data"]
    tried("a full disk in prepare", proof="the message says what is free; with more room the same command went on to whole data")


@pytest.mark.parametrize("until", [8, 99], ids=["for two steps", "to the end"])
def test_metrics_that_find_no_room(until, write_recipe, ranks, uninterrupted, tried):
    """The kernel's own full device in place of the file's. Rows wait in memory; at the end there has to be room."""
    recipe = load_recipe(file := write_recipe())
    code = f"""
import isoflop.train.records as records
write, full = records.StepFile._write_waiting, open("/dev/full", "ab", buffering=0)
def short_of_room(self):
    if self._file.name == "metrics.jsonl" and 7 <= self.last_step <= {until}:
        full.write(b"row")
    write(self)
records.StepFile._write_waiting = short_of_room
"""
    launched = ranks.start("cpu", file, code=code)
    code, reported = launched.wait(), launched.text()
    assert (
        reported.count("metrics.jsonl: No space left on device; training continues, its lines are kept in memory meanwhile") == 1
    )
    assert "Traceback" not in reported
    if until == 99:
        assert code == [2]
        assert re.search(r"error: \S*metrics\.jsonl: No space left on device; 4 lines are not written: free some space", reported)
        reported = ranks.run("cpu", file)
        assert "rows are missing: steps 7 to 9" in reported
        assert [row[0] for row in curve_of(recipe)] == [1, 2, 3, 4, 5, 6, 10]  # the last one is in the checkpoint
    else:
        assert code == [0]
        assert curve_of(recipe) == curve_of(uninterrupted["llama"])
    assert weights_of(recipe) == weights_of(uninterrupted["llama"])
    tried("no room for rows of the metrics", proof="training went on; rows written when there was room, else missing by name")


def test_limits_on_the_size_of_files_count_as_a_full_disk(write_recipe, ranks, tried):
    """For users who may not mount: the kernel refuses to let files grow past 20 kB once step 5 is saved."""
    code = """
import resource, isoflop.train.trainer as pretrain
save = pretrain.save_checkpoint
def limited(job, *what):
    save(job, *what)
    job.checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
pretrain.save_checkpoint = limited
"""
    file = write_recipe(evaluation__validate_every=100)
    launched = ranks.start("cpu", file, code=code)
    assert launched.wait() == [2], launched.text()
    assert "no space left while saving step 10" in launched.text()
    assert checkpoints.newest_intact(Path(load_recipe(file).output.run_dir) / "checkpoints").name == "step-5"
    assert "resuming from" in ranks.run("cpu", file)
    tried("a limit on file sizes in a save", proof="the checkpoint before is intact, the same command went on")
