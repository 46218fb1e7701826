"""The pages whose commands are typed: every `sh` block of them, in order, in one copy of the tree with a short quickstart.

A fence's info string says what is done with a block: `sh` is typed; `sh hub`, `sh gpu`, `sh laws` are only checked for files,
recipes and options they name; `python` is run after all `sh` blocks; `text` must be printed by the `sh` block above it, numbers
aside, `text exact` to the letter (`…` stands for anything). Of a block that is indented, each line must be printed by some block.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forks
from conftest import ROOT, shared
from hub import Hub

PAGES = [name for name in ("README.md", "docs/manual.md", "docs/guide.md") if (ROOT / name).is_file()]
TOKEN = "hf_abcdefghijklmnopqrst"
# What makes a block a matter of seconds; the quickstart recipes of the copy are shortened too.
SHORTER = {
    "make test\n": "\n",
    "max_steps=20 ": "max_steps=4 ",
    "{stdlib_continuation: 10}": "{stdlib_continuation: 2}",
    "task_documents=8": "task_documents=2",
    "max_steps=60": "max_steps=24",
    "checkpoint_every=10": "checkpoint_every=4",
    "step-10 ": "step-4 ",
    "step-60": "step-24",
    "sleep 1": "sleep 0.1",
    "--suite quick": "--suite quick --limit 2",
    "--limit 20": "--limit 2",
    "step-500": "step-6",
    "step-400": "step-3",
    "--flops 4e11": "--flops 4e10",
    "training.max_steps=50": "training.max_steps=4",
    'evaluate("runs/quickstart"': 'evaluate("runs/quickstart", limit=2',
}
SHORT_QUICKSTART = {
    "max_steps: 500": "max_steps: 6",
    "train_vocab_size: 4096": "train_vocab_size: 1000",
    "validate_every: 100\n  max_windows: 128": "validate_every: 3\n  max_windows: 16",
}


def blocks(page):
    """Fenced blocks of a page: (info string, text)."""
    return re.findall(r"^```(.*)\n((?:.*\n)*?)^```$", text_of(page), flags=re.MULTILINE)


def text_of(page):
    """A page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


def indented_lines(page):
    """Lines of a page's indented blocks, but for what a model wrote and for lists of files."""
    outside = re.sub(r"^```.*\n(?:.*\n)*?^```$", "", text_of(page), flags=re.MULTILINE)
    for block in re.findall(r"(?:^    .*\n)+", outside, flags=re.MULTILINE):
        if not block.startswith("    runs/"):
            yield from (line[4:] for line in block.splitlines() if not line.startswith(("     ", "    sample: ")))


def without_numbers(line):
    """A line with every number, and the word for none, as `#`, and single spaces."""
    return re.sub(r"\bn/a\b|[+-]?\d[\d,.]*(e[+-]?\d+)?", "#", " ".join(line.split()))


def is_printed(line, printed, exact):
    """Whether a quoted line is among printed ones, where `…` stands for anything."""
    wanted = line if exact else without_numbers(line)
    pattern = re.compile(".*".join(map(re.escape, wanted.split("…"))))
    return any(pattern.fullmatch(there if exact else without_numbers(there)) for there in printed)


def typed(tmp_path_factory):
    """What every `sh` and `python` block printed, stdout and stderr in their order: {page: {number of the block: text}}."""
    folder = shared(tmp_path_factory, "pages", type_all)
    return folder / "checkout", json.loads((folder / "printed.json").read_text())


def type_all(folder):
    """Type all blocks in `folder`/checkout, and write down what they print."""
    checkout = copy_tree(folder / "checkout")
    printed, after = {page: {} for page in PAGES}, []
    with Hub() as hub:
        hub.account(TOKEN, "user")
        hub_env = hub.env(folder / "home", TOKEN)
        for page in PAGES:
            if page == "docs/guide.md":  # whose reader begins with nothing; the manual's has done what the README says
                for name in ("data", "runs"):
                    shutil.rmtree(checkout / name, ignore_errors=True)
            for number, (info, block) in enumerate(blocks(page)):
                if info == "sh":
                    at_hub = re.search(r"publish(?!.*--dry-run$)", block, flags=re.MULTILINE)  # a line that really pushes
                    printed[page][str(number)] = shell(block, checkout, hub_env if at_hub else dict(os.environ))
                elif info == "python":
                    after.append((page, number, block))
        for page, number, block in after:
            shutil.rmtree(checkout / "runs/quickstart", ignore_errors=True)
            (checkout / "block.py").write_text(shorter(block), encoding="utf-8")
            printed[page][str(number)] = shell("python block.py", checkout, dict(os.environ))
    (folder / "printed.json").write_text(json.dumps(printed))


def copy_tree(folder):
    """The tracked and new files, with the stand-ins of tests/forks.py as `.venv`."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
        elif (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(os.readlink(ROOT / name))
    programs = folder / ".venv/bin"
    programs.parent.mkdir()
    programs.symlink_to(Path(forks.python()).parent)
    (folder / ".venv/installed").touch()
    for recipe in (folder / "recipes").glob("quickstart*.yaml"):
        text = recipe.read_text()
        for long, short in SHORT_QUICKSTART.items():
            assert long in text, f"{recipe.name}: {long}"
            text = text.replace(long, short)
        recipe.write_text(text)
    return folder


def shorter(block):
    """A block with what would take minutes made short."""
    for long, short in SHORTER.items():
        block = block.replace(long, short)
    return block


def shell(block, folder, env):
    """What a block prints."""
    env = {key: value for key, value in env.items() if key not in ("ACCELERATE_USE_CPU", "OVERRIDES", "MAKEFLAGS")}
    env["PATH"] = f"{folder}/.venv/bin:{env['PATH']}"
    command = ["bash", "-ec", shorter(block).replace("source .venv/bin/activate\n", "")]
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}"
    assert TOKEN not in done.stdout
    return done.stdout


def options_of(script):
    """Options that a script's or a verb's `--help` names."""
    command = [sys.executable, script] if script.endswith(".py") else [sys.executable, "-m", "isoflop", script]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"--[\w-]+", done.stdout))
