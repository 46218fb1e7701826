"""A wheel of the tree, installed without the tree: the quickstart and a fit by `isoflop` alone, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.new_process
FEW = [
    "tokenizer.train_vocab_size=1000", "model.vocab_size=1024", "training.max_steps=4", "schedule.warmup_steps=1",
    "evaluation.validate_every=4", "evaluation.max_windows=16",
]  # fmt: skip
TABLE = "parameters,tokens,loss\n" + "".join(
    f"{n:.0f},{d:.0f},{1.69 + 406.4 / n**0.34 + 410.7 / d**0.28:.5f}\n"
    for n in (1e6, 2e6, 4e6, 8e6, 16e6)
    for d in (2e7, 6e7, 2e8, 6e8)
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Site-packages with the wheel alone; the libraries are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:  # not the checkout, where an earlier build may have left files
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (tree / name).symlink_to(os.readlink(ROOT / name))
        else:
            (tree / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree], check=True)
    (wheel,) = folder.glob("isoflop-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def test_the_wheel_works_in_an_empty_folder(installed, tmp_path):
    env = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "PATH": f"{installed}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def isoflop(*arguments, code=0):
        command = [str(installed / "bin/isoflop"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    where = subprocess.run([sys.executable, "-c", "import isoflop; print(isoflop.__file__)"], cwd=tmp_path, env=env, text=True,
                           capture_output=True, check=True)  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(installed)
    assert "llama2_1.36b" in isoflop("recipes")
    assert "fits under 2gpu_zero1" in isoflop("plan", "recipe", "llama2_1.36b", "--gpu", "a6000", "--gpus", 2)
    assert "1,294,159,104" in isoflop("plan", "recipes/llama2_1.36b.yaml", "--full")
    assert "wrote data/quickstart" in isoflop("prepare", "quickstart", *FEW)
    assert "validation loss" in isoflop("pretrain", "quickstart", *FEW)
    assert "runs/quickstart is finished" in isoflop("pretrain", "quickstart", *FEW)
    assert "acc_per_token" in isoflop("eval", "runs/quickstart", "--suite", "quick", "--limit", 2)
    assert "quickstart" in isoflop("compare", "runs/quickstart")
    (tmp_path / "runs.csv").write_text(TABLE)
    assert "law: law.json" in isoflop("fit", "runs.csv", "--out", "law.json", "--resamples", 20)
    assert "law law.json" in isoflop("plan", "budget", "--flops", "1e16", "--family", "quickstart", "--law", "law.json")
    mistake = isoflop("pretrain", "quickstart", "--max_steps", 10, code=2)
    assert "give it as training.max_steps=10" in mistake
    assert not {path.name for path in tmp_path.iterdir()} - {
        "data",
        "runs",
        "runs.csv",
        "law.json",
        "law.md",
        "law.png",
        "law_report.json",
    }
