"""Bad input to `pretrain`: each a clear error before any training, with nothing lost."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, metrics_of, run_command

from isoflop.checkpoint import folder as checkpoint
from isoflop.config.loading import load_recipe
from isoflop.train import trainer as pretrain_module
from isoflop.utils.errors import UserError


@pytest.fixture
def own_data(toy_tree, tmp_path):
    """A copy of the prepared toy data that a test may damage."""
    return shutil.copytree(toy_tree["data"]["prepared_dir"], tmp_path / "prepared")


def refuses(run, recipe, message):
    with pytest.raises(UserError, match=message):
        run(recipe)
    assert not (Path(recipe.output.run_dir) / "metrics.jsonl").exists()


def test_data_that_is_not_prepared(toy_recipe, run_in_process, tmp_path):
    recipe = toy_recipe(data__prepared_dir=str(tmp_path / "nowhere"))
    refuses(run_in_process, recipe, r"nowhere' has no manifest.json; run: isoflop prepare RECIPE")


def test_a_manifest_that_is_none(toy_recipe, run_in_process, own_data):
    (own_data / "manifest.json").write_text('{"format": 1')
    refuses(run_in_process, toy_recipe(data__prepared_dir=str(own_data)), r"manifest.json is not a manifest")


def test_data_prepared_from_other_values(toy_recipe, run_in_process):
    recipe = toy_recipe(training__sequence_length=16)
    refuses(run_in_process, recipe, r"prepared from other values \(training.sequence_length: 32 -> 16\)")


def test_tokenizer_ids_beyond_the_vocabulary(toy_recipe, run_in_process, own_data):
    """As a Hub tokenizer would bring them: the recipe cannot know its size, the manifest does."""
    manifest = json.loads((own_data / "manifest.json").read_text())
    manifest["tokenizer"]["num_ids"] = 321
    (own_data / "manifest.json").write_text(json.dumps(manifest))
    recipe = toy_recipe(data__prepared_dir=str(own_data))
    refuses(
        run_in_process, recipe, r"model.vocab_size = 320 is smaller than the tokenizer's 321 ids.*set model.vocab_size to 321"
    )


def test_a_shard_whose_checksum_fails(toy_recipe, run_in_process, own_data):
    shard = own_data / "text-train-00000-000.arrow"
    content = bytearray(shard.read_bytes())
    content[-500] ^= 1
    shard.write_bytes(content)
    recipe = toy_recipe(data__prepared_dir=str(own_data))
    refuses(run_in_process, recipe, r"prepared data is damaged: .*text-train-00000-000.arrow does not match its SHA-256")


def test_another_tokenizer_in_the_prepared_folder(toy_recipe, run_in_process, own_data):
    file = own_data / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    refuses(
        run_in_process, toy_recipe(data__prepared_dir=str(own_data)), r"tokenizer.json is not the one the windows were made with"
    )


def test_a_run_folder_of_another_recipe(toy_recipe, run_in_process):
    recipe = toy_recipe()
    assert run_in_process(recipe) == 0
    before = metrics_of(recipe)
    other = toy_recipe(optimizer__peak_learning_rate=1e-3, training__max_steps=20)
    with pytest.raises(UserError) as error:
        run_in_process(other)
    assert "belongs to another recipe (optimizer.peak_learning_rate: 0.003 -> 0.001; training.max_steps: 10 -> 20)" in str(
        error.value
    )
    assert metrics_of(recipe) == before


@pytest.mark.new_process
def test_two_runs_in_one_folder(toy_recipe, run_in_process, write_recipe):
    recipe = toy_recipe()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from isoflop.train.run_folder import RunFolder as F; f = F(sys.argv[1]); f.claim();"
         "print('held', flush=True); sys.stdin.read()", recipe.output.run_dir],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    refuses(run_in_process, recipe, rf"is in use by host .*, pid {holder.pid}; wait for that run")
    holder.kill()
    holder.wait()
    assert run_in_process(recipe) == 0  # the lock went with the process


def test_resuming_on_other_windows_made_from_the_same_recipe(toy_recipe, run_in_process, own_data):
    recipe = toy_recipe(data__prepared_dir=str(own_data))
    assert run_in_process(recipe) == 0
    (Path(recipe.output.run_dir) / "summary.json").unlink()
    manifest = json.loads((own_data / "manifest.json").read_text())
    splits = manifest["sources"]["text"]["splits"]
    splits["train"] |= {key: splits["validation"][key] for key in ("shards", "windows")}
    (own_data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"holds other windows than .*step-10 was trained on"):
        run_in_process(recipe)


def test_a_loss_that_is_not_a_number(toy_recipe, run_in_process, monkeypatch):
    recipe = toy_recipe()
    step = pretrain_module.train_step

    def diverging(job, progress):
        row = step(job, progress)
        return row | {"anomaly": "loss nan"} if progress.step == 6 else row

    monkeypatch.setattr(pretrain_module, "train_step", diverging)
    with pytest.raises(
        UserError, match=r"diverged at step 7: loss nan; the last good checkpoint is kept \(step-5\).* lower .*now 0.003"
    ):
        run_in_process(recipe)
    assert [row["step"] for row in metrics_of(recipe)] == [1, 2, 3, 4, 5, 6]
    newest = checkpoint.newest_intact(Path(recipe.output.run_dir) / "checkpoints")
    assert newest.name == "step-5"


def test_a_really_diverging_run_stops(toy_recipe, run_in_process):
    recipe = toy_recipe(optimizer__peak_learning_rate=1e30, schedule__warmup_steps=0, training__max_steps=50)
    with pytest.raises(UserError, match=r"diverged at step \d+: (loss|gradient norm) .*(nan|inf)"):
        run_in_process(recipe)


def test_a_disk_without_room_for_one_checkpoint(toy_recipe, run_in_process, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    refuses(
        run_in_process,
        toy_recipe(),
        r"5,000 bytes are free, 4 checkpoints of 345,984 \(0 are there\) and the model need 1,499,264",
    )
    with pytest.raises(UserError, match="bytes are free"):
        run_in_process(toy_recipe(), dry_run=True)


def test_a_disk_that_fills_up_while_training(write_recipe):
    """A real one: files may not grow past 20 kB once step 5 is saved; step 10's checkpoint is refused by the kernel."""
    code = (
        "import resource, sys\nfrom isoflop.train.command import pretrain_command\n"
        "import isoflop.train.trainer as p\nfrom isoflop.config.loading import load_recipe\n"
        "from isoflop.utils.command import run_command\nsave = p.save_checkpoint\n"
        "def limited(job, *what):\n    save(job, *what)\n    job.checkpoints.wait()\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "p.save_checkpoint = limited\nrun_command(lambda: pretrain_command(load_recipe(sys.argv[1])))\n"
    )
    file = write_recipe(output__checkpoint_every=5, evaluation__validate_every=100)
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "no space left while saving step 10" in done.stderr
    recipe = load_recipe(file)
    assert checkpoint.newest_intact(Path(recipe.output.run_dir) / "checkpoints").name == "step-5"
    assert run_command("python", "scripts/pretrain.py", file).stdout.count("resuming from") == 1


def test_attention_that_is_not_installed(write_recipe, run_in_process):
    recipe = load_recipe(write_recipe(), ["model.attn_implementation=flash_attention_2"])
    refuses(run_in_process, recipe, r"model.attn_implementation = 'flash_attention_2': ")


def test_the_command_says_what_is_wrong_in_one_line(write_recipe):
    done = run_command("python", "scripts/pretrain.py", write_recipe(), "training.max_step=5", check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("training.max_step: unknown key; did you mean max_steps?\n")
    assert "Traceback" not in done.stderr


def test_flags_may_stand_anywhere(write_recipe):
    done = run_command("python", "scripts/pretrain.py", "--dry-run", write_recipe(), "training.max_steps=3")
    assert "would train 3 steps" in done.stdout
    for flags in (["--resume"], ["--resume-from", "5"]):
        done = run_command("python", "scripts/pretrain.py", *flags, write_recipe(), "training.max_steps=3", check=False)
        assert done.returncode == 2
        assert {1: "has no intact checkpoint", 2: "--resume-from 5: "}[len(flags)] in done.stderr


def test_checkpoints_that_are_all_broken_are_not_a_fresh_start(toy_recipe, run_in_process):
    recipe = toy_recipe()
    assert run_in_process(recipe) == 0
    folder = Path(recipe.output.run_dir)
    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        (path / ".metadata").unlink()
    with pytest.raises(
        UserError, match=r"no intact checkpoint \(step-5, step-10 are broken\); put one back, or delete the run's folder"
    ):
        run_in_process(recipe)
    assert len(metrics_of(recipe)) == 10


def test_a_warm_up_as_long_as_the_run_is_said(write_recipe):
    done = run_command("python", "scripts/pretrain.py", "--dry-run", write_recipe(), "schedule.warmup_steps=10")
    assert "note: schedule.warmup_steps = 10 covers the entire run: the learning rate never decays" in done.stdout


def test_the_start_says_what_memory_it_expects(toy_recipe, run_in_process, capsys):
    """And for what: the parts add up to the whole."""
    assert run_in_process(toy_recipe(), dry_run=True) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: "))
    total, parts = line.removeprefix("memory: ").split(" bytes a process at the peak = ")
    assert int(total.replace(",", "")) == sum(int(n.replace(",", "")) for n in re.findall(r"(?<=\s)[\d,]{3,}", f" {parts}"))
    assert "of the process before the model was built" in parts
