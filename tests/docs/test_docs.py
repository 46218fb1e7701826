"""Computed pages: their programs still run, and give the numbers of the tree."""

import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import ablation
import pytest
import reproductions
from conftest import ROOT, run_command

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import differences
from isoflop.config.shipped import shipped as shipped_files
from isoflop.data.manifest import data_settings

DOCS, PROGRAMS = ROOT / "docs", ROOT / "benchmarks/pages"


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_reproductions_page_is_what_its_script_prints():
    assert (DOCS / "reproductions.md").read_text(encoding="utf-8") == reproductions.page()


SHIPPED = shipped_files("recipes")
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), ROOT / "recipes/ablations/README.md"]


def typed_commands():
    """Every command of the project on its pages: the verb, and its arguments."""
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if re.match(r"\s*([A-Z_]+=\S+ )*((python|nohup|accelerate) .*scripts/\w+\.py|isoflop )", line):
                words = shlex.split(line, comments=True)
                place = next(place for place, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py|isoflop", word))
                typed = words[place:] if words[place] != "isoflop" else words[place + 1 :]
                yield typed[0].removeprefix("scripts/").removesuffix(".py"), typed[1:]


def test_commands_of_all_pages_can_be_typed_one_after_another():
    """In one checkout: none writes a file that another one has written, or trains or prepares other values into its folder."""
    written, owners = [], {}
    for script, words in typed_commands():
        if "--write" in words:
            written.append(words[words.index("--write") + 1])
        shipped = [word for word in words if word.removeprefix("recipes/").removesuffix(".yaml") in SHIPPED]
        if script not in ("pretrain", "prepare") or not shipped:
            continue
        loaded = load_recipe(shipped[0], [word for word in words if re.match(r"[a-z]+(\.\w+)?=", word)])
        owned = {loaded.data.prepared_dir: data_settings(loaded)}
        if script == "pretrain" and "--dry-run" not in words:
            owned[loaded.output.run_dir] = loaded.identity_fields()
        for folder, values in owned.items():
            assert not differences(owners.setdefault(folder, values), values), f"{folder}: {shlex.join(words)}"
    assert len(written) >= 2
    assert len(set(written)) == len(written), written
    assert not [name for name in written if (ROOT / name).exists()]
    assert len(owners) >= 15


def test_the_figure_is_drawn(tmp_path):
    reproductions.draw_profile(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("constraint", "layers", "width", "parameters", "tokens", "loss", "spent"),
    [
        ((0.0, 1e9), 18, 2048, 1_544_628_224, 101.909e9, 2.335, 0.64),
        ((10.0, 30.0), 30, 2048, 2_224_154_624, 61.545e9, 2.351, 0.60),
    ],
)
def test_the_original_search_gives_what_it_published(constraint, layers, width, parameters, tokens, loss, spent):
    found = reproductions.reported_search(constraint)
    assert (found.layers, found.width, found.parameters) == (layers, width, parameters)
    assert found.tokens == pytest.approx(tokens, abs=1e6)
    assert found.loss == pytest.approx(loss, abs=5e-4)
    assert found.spent == pytest.approx(spent, abs=5e-3)


def test_the_chinchilla_table_is_6nd():
    assert all(6 * n * d == pytest.approx(flops, rel=0.05) for n, flops, d in reproductions.CHINCHILLA_TABLE)


def copy_of(name, folder, **changes):
    """A page's program that writes into a folder, with some other constants."""
    text = (PROGRAMS / f"{name}.py").read_text(encoding="utf-8")
    pairs = {"Path(__file__).parents[2]": f"Path({str(ROOT)!r})", 'DOCS = ROOT / "docs"': f"DOCS = Path({str(folder)!r})"}
    for old, new in (pairs | changes).items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder / f"{name}.py"


@pytest.mark.slow
def test_the_memory_page_is_made_again(tmp_path):
    """Ten minutes of real steps: the page's program still runs, and its predictions are those of the page."""
    run_command(sys.executable, copy_of("memory", tmp_path), timeout=1800)
    predictions = [
        re.findall(r"\| (?:yes|no) \| ([\d,]+) \|", (folder / "memory.md").read_text(encoding="utf-8"))
        for folder in (DOCS, tmp_path)
    ]
    assert predictions[0] == predictions[1]


@pytest.mark.slow
def test_the_data_page_is_made_again(tmp_path):
    """A minute at toy size: the page's program still runs."""
    shutil.copy(PROGRAMS / "data_peers.py", tmp_path)
    run_command(sys.executable, copy_of("data", tmp_path), "--megabytes", "20", "--rounds", "1", timeout=1800)
    assert (tmp_path / "data.md").read_text(encoding="utf-8").count("\n| ") > 15
    assert (tmp_path / "data.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_laws_page_is_made_again(tmp_path):
    """Few seeds: the page's program still runs."""
    run_command(sys.executable, copy_of("laws", tmp_path), "--seeds", "3", timeout=1800)
    assert (tmp_path / "laws.md").read_text(encoding="utf-8").count("\n| ") > 15


def test_the_laptops_ablation_makes_the_changes_of_the_124m_recipes():
    recipes = {path.stem.removeprefix("124m_"): load_recipe(path) for path in (ROOT / "recipes/ablations").glob("124m_*.yaml")}
    assert set(recipes) == set(ablation.CHANGES)
    runs = {name: ablation.run_of(name, 0, []) for name in recipes}

    def changed(each, name):
        found = {change.split(":")[0] for change in differences(each["baseline"].identity_fields(), each[name].identity_fields())}
        return {key for key in found if not key.startswith("tokenizer")}  # half the text would make another

    for name, recipe in recipes.items():
        assert changed({each: run.recipe for each, run in runs.items()}, name) == changed(recipes, name)
        assert runs[name].recipe.model.positions == recipe.model.positions
        assert runs[name].recipe.model.mlp == recipe.model.mlp
    steps, flops = runs["baseline"].steps, runs["baseline"].flops
    for name, run in runs.items():
        if "equal_flops" in name:
            assert run.flops == pytest.approx(flops, rel=0.6 / run.steps)  # half a step, and its rounding
        else:
            assert (run.steps, run.flops) == ((2 * steps, 2 * flops) if name == "epochs" else (steps, flops))


def test_the_laptops_ablation_tells_differences_from_seeds(tmp_path):
    """Made-up losses: seeds differ by 0.01, one change is worth 0.1, all three together 0.05 beyond the sum."""
    worth = {"rope": -0.1, "all_three": -0.15}
    seeds = (-0.01, 0.0, 0.01)
    summary = SimpleNamespace(tokens_per_s=100.0, peak_memory_bytes=10**9, elapsed_s=60.0)
    results = [
        ablation.Result(name, [ablation.run_of(name, 0, [])], [3 + worth.get(name, 0.0) + seed for seed in seeds], [summary] * 3)
        for name in ablation.CHANGES
    ]
    worths = ablation.worth_of(results)
    assert [name for name, each in worths.items() if each.distinct] == ["rope", "all_three"]
    assert worths["rope"].difference == pytest.approx(-0.1)
    assert worths["rope"].low < -0.1 < worths["rope"].high < 0
    assert ablation.spread_of(results) == pytest.approx(0.01)
    loud = [each._replace(losses=[2.5, 3.0, 3.5]) if each.name == "learning_rate" else each for each in results]
    assert ablation.unsteady(loud) == ["learning_rate"]
    assert ablation.worth_of(loud)["rope"].distinct  # what one change makes unsteady hides no other
    assert not ablation.worth_of(loud)["learning_rate"].distinct
    extra, half = ablation.more_than_the_sum(results)
    assert extra == pytest.approx(-0.05)
    assert half == pytest.approx(2.0739 * 0.01 * (8 / 3) ** 0.5, rel=1e-4)  # Student's t of 22 degrees of freedom
    page = ablation.page(results, worths)
    assert "**Beyond seed noise:**\n`all_three` (-0.150), `rope` (-0.100)." in page
    assert "-0.0500 ± 0.0339 nats beyond the sum of each alone, which is beyond seed noise." in page
    ablation.draw(results, worths, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_ablation_page_is_made_again(tmp_path):
    """Some minutes at toy size with two seeds: the page's program still trains, scores and draws."""
    program = copy_of("ablation", tmp_path, **{"SEEDS = 3": "SEEDS = 2", "data/ablation": f"{tmp_path}/data/ablation"})
    small = ["model.hidden_size=24", "training.max_steps=4", "evaluation.validate_every=2", "evaluation.max_windows=8"]
    folders = [f"output.run_dir={tmp_path}/runs/baseline", f"data.prepared_dir={tmp_path}/data/ablation"]
    run_command(sys.executable, program, *small, "schedule.warmup_steps=1", *folders, timeout=1800)
    assert (tmp_path / "ablation.md").read_text(encoding="utf-8").count("\n| `") == 22
