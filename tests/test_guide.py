"""The guide: its commands are typed in a copy of the tree, its figures and the messages of its symptoms held to the code."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub import Hub

from isoflop import cost, hardware
from isoflop.plan.launches import read_launch
from isoflop.plan.recipes import machines, plan_recipe
from isoflop.plan.text import duration
from isoflop.recipe import Recipe
from isoflop.recipe_file import load_recipe
from isoflop.scaling.laws import load_law

DOCS = ROOT / "docs"
GUIDE, SYMPTOMS = ((DOCS / name).read_text(encoding="utf-8") for name in ("guide.md", "symptoms.md"))
BLOCKS = re.findall(r"^```(.*)\n((?:.*\n)*?)^```$", GUIDE, flags=re.MULTILINE)
TOKEN = "hf_abcdefghijklmnopqrst"
# What makes a block a matter of seconds; the recipe of the copy is shortened too.
SHORTER = {
    "make setup": "make -o .venv/installed setup",  # the environment is there: nothing is installed again
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
}
CARDS = {"2x A6000": ("a6000", 2), "4x H20": ("h20", 4), "one RTX 5090": ("rtx5090", 1)}


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """Every `sh` block, typed in order in a copy of the tree with a short quickstart: the block's number, and what it printed."""
    folder = tmp_path_factory.mktemp("clone") / "isoflop"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    recipe = folder / "recipes/quickstart.yaml"
    short = (
        recipe.read_text().replace("max_steps: 500", "max_steps: 6").replace("train_vocab_size: 4096", "train_vocab_size: 1000")
    )
    recipe.write_text(short.replace("validate_every: 100\n  max_windows: 128", "validate_every: 3\n  max_windows: 16"))
    with Hub() as hub:
        hub.account(TOKEN, "user")
        env = {"here": dict(os.environ), "hub": hub.env(tmp_path_factory.mktemp("home"), TOKEN)}
        yield {
            number: shell(block, folder, env["hub" if "publish.py" in block else "here"])
            for number, (info, block) in enumerate(BLOCKS)
            if info == "sh"
        }


def shell(block, folder, env):
    """What a block prints, stdout and stderr in their order."""
    for long, shorter in SHORTER.items():
        block = block.replace(long, shorter)
    command = ["bash", "-ec", f"source .venv/bin/activate\n{block}"]
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}"
    assert TOKEN not in done.stdout
    return done.stdout


def without_numbers(line):
    """A line with every number, and the word for none, as `#`, and single spaces."""
    return re.sub(r"\bn/a\b|[+-]?\d[\d,.]*(e[+-]?\d+)?", "#", " ".join(line.split()))


def test_what_the_guide_quotes_is_what_its_commands_print(typed):
    last, quoted = None, 0
    for number, (info, block) in enumerate(BLOCKS):
        last = number if info == "sh" else last
        if not info.startswith("text"):
            continue
        printed = typed[last].splitlines()
        if info == "text":
            printed = [without_numbers(line) for line in printed]
        for line in block.splitlines():
            wanted = line if info == "text exact" else without_numbers(line)
            pattern = ".*".join(map(re.escape, wanted.split("…")))
            assert any(re.fullmatch(pattern, there) for there in printed), f"{line}\n{typed[last]}"
            quoted += 1
    assert quoted > 30


def test_a_stopped_run_goes_on_with_two_processes(typed):
    output = next(typed[number] for number, (_, block) in enumerate(BLOCKS) if "kill -TERM" in block)
    stopped = int(re.search(r"SIGTERM: saved; the same command goes on from step-(\d+)", output)[1])
    assert 4 <= stopped < 24
    assert f"resuming from runs/stopped/checkpoints/step-{stopped}" in output
    assert "launch: 2 process(es) (MULTI_CPU)" in output


def commands(info):
    """Commands of all blocks of a kind, as words, without what is set before them and where their output goes."""
    for kind, block in BLOCKS:
        for line in block.splitlines() if kind == info else ():
            yield shlex.split(line.split(" > ")[0], comments=True)


def test_commands_for_gpus_name_recipes_files_and_options_that_are_there():
    """Each recipe is loaded with the overrides of its command, each option is one of the script's, each folder some recipe's."""
    recipes = {path: load_recipe(path) for path in (ROOT / "recipes").glob("*.yaml")}
    folders = {Path(place).name for recipe in recipes.values() for place in (recipe.output.run_dir, recipe.data.prepared_dir)}
    helped, seen = {}, 0
    for words in commands("sh gpu"):
        script = next((word for word in words if re.fullmatch(r"scripts/\w+\.py", word)), None)
        for word in words:
            for name in re.findall(r"(?:scripts|recipes|accelerate_configs)/[\w.]+", word):
                assert (ROOT / name).is_file(), name
            for name in re.findall(r"\b(?:runs|data)/([\w.-]+)", word if "=" not in word else word.partition("pretrained=")[2]):
                assert name in folders | {"three_families"}, word
        if recipe := next((word for word in words if word.startswith("recipes/")), None):
            load_recipe(ROOT / recipe, [word for word in words[words.index(recipe) :] if re.match(r"[a-z]+\.\w+=", word)])
        if script is None:
            continue
        if script not in helped:
            done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
            helped[script] = set(re.findall(r"--[\w-]+", done.stdout))
        options = {word for word in words[words.index(script) :] if word.startswith("--")}
        assert options <= helped[script], words
        seen += 1
    assert seen >= 15
    assert set(helped) == {f"scripts/{name}.py" for name in ("prepare", "pretrain", "run_eval", "compare")}


def test_the_table_of_cards_is_what_plan_computes():
    header, *rows = [line.strip("| ").split(" | ") for line in GUIDE.splitlines() if line.startswith(("| recipe |", "| `"))][:6]
    assert header == ["recipe", *CARDS, "checkpoint"]
    assert [row[0].strip("`") for row in rows] == ["gpt2_1.36b", "llama2_1.36b", "llama3_1.5b", "llama3_2.2b", "modern_124m"]
    for name, *cells, checkpoint in rows:
        recipe = load_recipe(ROOT / f"recipes/{name.strip('`')}.yaml")
        assert f"{cost.checkpoint_bytes(recipe.model, recipe.optimizer) / 1e9:.1f} GB" == checkpoint
        for cell, (kind, num_gpus) in zip(cells, CARDS.values(), strict=True):
            hold_to_plan(recipe, cell, kind, num_gpus)


def hold_to_plan(recipe, cell, kind, num_gpus):
    """One cell: launch config, micro-batch where it is not the recipe's, memory and time; or that no micro-batch fits."""
    machine = machines(kind, None, None)
    if cell == "does not fit":
        assert not plan_recipe(recipe, "", load_law("hoffmann"), machine, num_gpus)["largest_micro_batch"]["1gpu"][kind]
        return
    config, micro, memory, time = re.fullmatch(r"`(\w+)`(?:, micro-batch (\d+))?: ([\d.]+) GiB, (.+)", cell).groups()
    assert read_launch(ROOT / f"accelerate_configs/{config}.yaml").num_processes == num_gpus
    if micro:
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch_size": int(micro)})})
    plan = plan_recipe(recipe, "", load_law("hoffmann"), machine, num_gpus)
    assert f"{plan['memory_bytes'][config] / 2**30:.2f}" == memory
    assert plan["largest_micro_batch"][config][kind] >= recipe.training.micro_batch_size
    assert duration(plan["hours"][config][kind]) == time


@pytest.mark.parametrize(
    ("recipe", "overrides", "config", "gib", "gpu", "largest"),
    [
        ("llama2_1.36b", ["training.micro_batch_size=4"], "2gpu_zero1", "25.50", "a6000", 8),
        (
            "llama3_1.5b",
            ["training.activation_checkpointing=true", "training.micro_batch_size=4"],
            "1gpu",
            "28.69",
            "rtx5090",
            4,
        ),
    ],
)
def test_what_fits_after_a_change_is_what_plan_computes(recipe, overrides, config, gib, gpu, largest):
    loaded = load_recipe(ROOT / f"recipes/{recipe}.yaml", overrides)
    launch, sections = read_launch(ROOT / f"accelerate_configs/{config}.yaml"), (loaded.model, loaded.training, loaded.optimizer)
    assert f"{cost.predicted_memory(*sections, launch).total / 2**30:.2f}" == gib
    assert cost.largest_micro_batch(*sections, launch, hardware.GPUS[gpu].memory_bytes) == largest
    assert f"{gib} GiB" in GUIDE


def literals():
    """Every text of the library, with `…` for what is put in when it is printed."""
    for path in [*(ROOT / "src/isoflop").rglob("*.py"), *(ROOT / "modeling").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def symptoms():
    """Rows of the page of symptoms: what is seen, why, what to do."""
    rows = [re.split(r" \| ", line.strip("| ")) for line in SYMPTOMS.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] not in ("what you see", "---")]


def test_the_messages_among_the_symptoms_are_those_of_the_library():
    texts = list(literals())
    messages = [quoted for seen, *_ in symptoms() for quoted in re.findall(r"`([^`]+)`", seen) if " " in quoted]
    assert len(messages) > 25
    for message in messages:
        pattern = re.compile(".*".join(re.escape(piece) for piece in message.strip("… ").split("…")))
        assert any(pattern.search(text) for text in texts), message


def test_every_symptom_has_a_cause_and_a_remedy():
    assert len(symptoms()) > 40
    for row in symptoms():
        assert len(row) == 3, row
        assert all(cell.strip() for cell in row), row


@pytest.mark.parametrize("page", [GUIDE, SYMPTOMS], ids=["guide", "symptoms"])
def test_keys_links_and_recipes_that_a_page_names_are_there(page):
    sections = {
        name: field.annotation for name, field in Recipe.model_fields.items() if hasattr(field.annotation, "model_fields")
    }
    keys = re.findall(rf"\b({'|'.join(sections)})\.([a-z]\w+)", page)
    assert keys
    for section, key in keys:
        assert key in sections[section].model_fields or key in ("md", "jsonl"), f"{section}.{key}"
    for name, anchor in re.findall(r"\]\(([\w/.-]*)(?:#([\w-]+))?\)", page):
        target = DOCS / name if name else DOCS / "guide.md"
        assert target.is_file(), name
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
    for name in re.findall(r"`((?:\dgpu|\dcpu|cpu)\w*)`", page):
        assert (ROOT / f"accelerate_configs/{name}.yaml").is_file(), name
