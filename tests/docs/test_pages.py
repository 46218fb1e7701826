"""README, manual and guide: their commands are typed in one copy of the tree, and what they quote is what is printed."""

import json
import re
import shlex

import pytest
import typed_pages as pages
from conftest import ROOT

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """The copy of the tree, and what each block printed in it."""
    return pages.typed(tmp_path_factory)


@pytest.mark.parametrize("page", pages.PAGES)
def test_what_a_page_quotes_is_what_its_commands_print(page, typed):
    _, printed = typed
    last = None
    for number, (info, block) in enumerate(pages.blocks(page)):
        last = number if info == "sh" else last
        if info.startswith("text"):
            output = printed[page][str(last)]
            for line in block.splitlines():
                assert pages.is_printed(line, output.splitlines(), exact=info == "text exact"), f"{line}\n{output}"


@pytest.mark.parametrize("page", ["README.md", "docs/manual.md"])
def test_indented_lines_are_printed_by_some_command(page, typed):
    lines = [line for blocks in typed[1].values() for output in blocks.values() for line in output.splitlines()]
    missing = [line for line in pages.indented_lines(page) if not pages.is_printed(line, lines, exact=False)]
    assert [line for line in missing if not line.startswith("law runs/")] == []  # a sweep of half an hour: docs/circle.md


def test_the_typed_commands_did_what_they_say(typed):
    """In the files they left: steps and processes of each run, scores, one set of data however it was prepared."""
    checkout, printed = typed
    text = "\n".join(output for blocks in printed.values() for output in blocks.values())
    assert json.loads((checkout / "runs/quickstart/summary.json").read_text())["steps"] in (4, 6)
    for folder, processes in (("short", 1), ("two_processes", 2), ("sharded", 2)):
        if (run := checkout / "runs" / folder).exists():
            assert json.loads((run / "summary.json").read_text())["steps"] == 4
            environment = json.loads((run / "environment.json").read_text())
            assert environment["launch"]["num_processes"] == processes
    if (checkout / "data/shared").exists():
        manifests = [json.loads((checkout / f"data/{name}/manifest.json").read_text()) for name in ("quickstart", "shared")]
        assert manifests[0] == manifests[1]
    stopped = re.search(r"SIGTERM: saved; .*step-(\d+)", text)
    assert 4 <= int(stopped[1]) < 24
    assert f"resuming from runs/stopped/checkpoints/step-{stopped[1]}" in text
    assert "launch: 2 process(es) (MULTI_CPU)" in text


def commands(page, info):
    """Commands of all blocks of a kind, as words, without where their output goes."""
    for kind, block in pages.blocks(page):
        for line in block.splitlines() if kind == info else ():
            yield shlex.split(line.split(" > ")[0], comments=True)


@pytest.mark.parametrize("kind", ["sh hub", "sh gpu", "sh laws"])
@pytest.mark.parametrize("page", pages.PAGES)
def test_commands_that_are_not_typed_name_what_is_there(page, kind):
    """Each recipe loads with the overrides of its command, each file is there, each option is one of the script's or verb's."""
    helped = {}
    for words in commands(page, kind):
        for word in words:
            for name in re.findall(r"(?:scripts|recipes|accelerate_configs|sweeps)/[\w./]+\.(?:py|yaml|sbatch)", word):
                assert (ROOT / name).is_file(), name
        recipes = {path.stem: path for path in (ROOT / "recipes").glob("*.yaml")}
        recipe = next(
            (recipes.get(word) or ROOT / word for word in words if word in recipes or word.startswith("recipes/")), None
        )
        if recipe and recipe.suffix == ".yaml":
            load_recipe(recipe, [word for word in words if re.match(r"[a-z]+\.\w+=", word)])
        place = next((i for i, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py", word) or word == "isoflop"), None)
        if place is None:
            continue
        script = words[place + 1] if words[place] == "isoflop" else words[place]
        helped[script] = helped.get(script) or pages.options_of(script)
        options = {word.split("=")[0] for word in words[place:] if word.startswith("--")}
        assert options <= helped[script], words


def test_yaml_blocks_are_parts_of_recipes():
    tree = load_recipe(ROOT / "recipes/modern_124m.yaml").model_dump(mode="json")
    import yaml

    found = 0
    for page in pages.PAGES:
        for info, block in pages.blocks(page):
            if info == "yaml":
                sections = yaml.safe_load(block)
                Recipe.model_validate({**tree, **{name: tree.get(name, {}) | value for name, value in sections.items()}})
                found += 1
    assert found


@pytest.mark.parametrize("page", [*pages.PAGES, "docs/symptoms.md"])
def test_keys_links_and_launch_configs_that_a_page_names_are_there(page):
    text = pages.text_of(page)
    sections = {
        name: field.annotation for name, field in Recipe.model_fields.items() if hasattr(field.annotation, "model_fields")
    }
    for section, key in re.findall(rf"\b({'|'.join(sections)})\.([a-z]\w+)", text):
        assert key in sections[section].model_fields or key in ("md", "jsonl"), f"{section}.{key}"
    folder = (ROOT / page).parent
    for name, anchor in re.findall(r"\]\(([\w/.-]*)(?:#([\w-]+))?\)", text):
        target = folder / name if name else ROOT / page
        assert target.exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor
    for name in re.findall(r"`((?:\dgpu|\dcpu|cpu)\w*)`", text):
        assert (ROOT / f"accelerate_configs/{name}.yaml").is_file(), name
