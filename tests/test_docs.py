"""The pages that are computed: what they print is what stands in the tree."""

import re
import shutil
import subprocess
import sys

import ablation
import pytest
import reproductions
from conftest import ROOT

from isoflop.recipe import differences
from isoflop.recipe_file import load_recipe

DOCS = ROOT / "docs"


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_reproductions_page_is_what_its_script_prints():
    assert (DOCS / "reproductions.md").read_text(encoding="utf-8") == reproductions.page()


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
def test_the_founding_search_gives_what_it_published(constraint, layers, width, parameters, tokens, loss, spent):
    found = reproductions.founding_search(constraint)
    assert (found.layers, found.width, found.parameters) == (layers, width, parameters)
    assert found.tokens == pytest.approx(tokens, abs=1e6)
    assert found.loss == pytest.approx(loss, abs=5e-4)
    assert found.spent == pytest.approx(spent, abs=5e-3)


def test_the_chinchilla_table_is_6nd():
    assert all(6 * n * d == pytest.approx(flops, rel=0.05) for n, flops, d in reproductions.CHINCHILLA_TABLE)


def test_the_memory_page_keeps_its_promise():
    """5% of every operation counted; a real process, where libraries do not outweigh the tensors."""
    page = (DOCS / "memory.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| \d+ \| (?:yes|no) \| [\d,]+ \| [\d,]+ \| ([+-][\d.]+)% \|$", page, flags=re.MULTILINE)
    assert len(rows) == 21 + 6
    assert all(abs(float(difference)) <= 5 for name, difference in rows if name != "quickstart")


@pytest.mark.slow
def test_the_memory_page_is_made_anew(tmp_path):
    """Ten minutes of real steps: the page's script still runs, and its predictions are those of the page."""
    script = (
        (DOCS / "memory.py")
        .read_text(encoding="utf-8")
        .replace("HERE = Path(__file__).parent", f"HERE = Path({str(tmp_path)!r})")
    )
    (tmp_path / "memory.py").write_text(script, encoding="utf-8")
    subprocess.run([sys.executable, tmp_path / "memory.py"], cwd=ROOT, check=True)
    predictions = [
        re.findall(r"\| (?:yes|no) \| ([\d,]+) \|", (folder / "memory.md").read_text(encoding="utf-8"))
        for folder in (DOCS, tmp_path)
    ]
    assert predictions[0] == predictions[1]


def test_the_reliability_page_adds_up_and_lost_nothing():
    """Made by really doing each fault (`make pages`); a run that lost something would stand there."""
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    found = re.search(
        r"(\d+) faults of (\d+) kinds; what was lost: \*\*nothing\*\*\. \d+ tests passed, \d+ skipped, 0 failed", page
    )
    rows = re.findall(r"^\| (.+) \| (\d+) \| (.+) \|$", page, flags=re.MULTILINE)
    assert (sum(int(times) for _, times, _ in rows), len(rows)) == (int(found[1]), int(found[2]))
    faults = [fault for fault, _, _ in rows]
    for kind in (
        "`kill -9` of a whole job", "`kill -9` of one rank", "`kill -9` of a whole node", "SIGTERM", "SIGUSR1", "a truncated",
        "a bit-flipped", "a missing", "a full disk in a save", "a full disk in prepare", "a second process", "a loss spike",
        "a loss that is not a number", "a clock that jumps", "a tracker", "a pickle", "tokens and passwords",
        "a checkpoint of ZeRO-1 2",
    ):  # fmt: skip
        assert any(fault.startswith(kind) for fault in faults), kind


def test_the_data_page_says_how_text_becomes_windows():
    """Ratios of one run on one machine; a page that is made again has others, and the same order."""
    page = (DOCS / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| [\d,]* \| [^|]+ \| ([\d.]+) \(", page, flags=re.MULTILINE)
    largest = max(int(megabytes) for _, megabytes, _ in rows)
    rates = {way: float(rate) for way, megabytes, rate in rows if int(megabytes) == largest}
    assert rates["isoflop"] > 3 * rates["nanoGPT's prepare.py"] > 3 * rates["transformers' run_clm.py"]
    share = float(re.search(r"^\| isoflop: `Windows.take` \| .* \| ([\d.]+)% \|$", page, flags=re.MULTILINE)[1])
    assert share < 1
    assert "as many tokens as" in page


@pytest.mark.slow
def test_the_data_page_is_made_anew(tmp_path):
    """A minute at toy size: the page's script still runs."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("data.py", "data_peers.py"):
        shutil.copy(DOCS / name, folder)
    for name in ("recipes", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, folder / "data.py", "--megabytes", "20", "--rounds", "1"], cwd=ROOT, check=True)
    assert (folder / "data.md").read_text(encoding="utf-8").count("\n| ") > 15
    assert (folder / "data.png").read_bytes()[:4] == b"\x89PNG"


def test_the_circle_page_says_what_was_predicted_and_what_came_out():
    """One run of the whole way; a page that is made again has others' numbers, which have to add up as well."""
    page = (DOCS / "circle.md").read_text(encoding="utf-8")
    rows = ("predicted before training", "measured")
    found = [re.search(rf"^\| {row} \| (.+) \|$", page, flags=re.MULTILINE)[1] for row in rows]
    predicted, measured = map(float, found)
    interval = re.search(r"^\| 90% interval of a run \| ([\d.]+) to ([\d.]+) \|$", page, flags=re.MULTILINE)
    low, high = map(float, interval.groups())
    error = float(re.search(r"^\| error \| ([+-][\d.]+)% \|$", page, flags=re.MULTILINE)[1])
    assert error == pytest.approx(100 * (predicted / measured - 1), abs=0.01)
    kept = (abs(error) < 2) + (low <= measured <= high)
    assert ("Neither was kept", "One of the two was kept", "Both were kept")[kept] in page
    assert len(re.findall(r"^\| c\d\.\d+e\+\d+_n\d+ \|", page, flags=re.MULTILINE)) == 20
    for name in ("circle_law.png", "circle_run.png"):
        assert f"]({name})" in page
        assert (DOCS / name).read_bytes()[:4] == b"\x89PNG"


def test_the_laws_page_keeps_its_promises():
    """Speed on the machine that made it; coverage of 90% intervals over 500 seeds, of which a standard error is 1.3%."""
    page = (DOCS / "laws.md").read_text(encoding="utf-8")
    assert float(re.search(r"^\| fit, all starts \| [\d,]+ \| ([\d.]+) \|$", page, flags=re.MULTILINE)[1]) < 0.5
    assert float(re.search(r"^\| bootstrap \| 1,000 resamples \| ([\d.]+) \|$", page, flags=re.MULTILINE)[1]) < 15
    least, others = re.search(r"Objective ([\d.]+)\..* the least is\s+([\d.]+)\.\n", page, flags=re.DOTALL).groups()
    assert float(least) <= float(others) * (1 + 1e-8)
    table = page.split("holds the truth\n")[1].split("##")[0]
    shares = [
        float(share) for row in re.findall(r"^\|.*%.*\|$", table, flags=re.MULTILINE) for share in re.findall(r"([\d.]+)%", row)
    ]
    assert len(shares) == 22
    assert all(85 <= share <= 95 for share in shares)


@pytest.mark.slow
def test_the_laws_page_is_made_anew(tmp_path):
    """Few seeds: the page's script still runs."""
    script = (DOCS / "laws.py").read_text(encoding="utf-8")
    script = script.replace("HERE = Path(__file__).parent", f"HERE = Path({str(tmp_path)!r})")
    (tmp_path / "laws.py").write_text(script, encoding="utf-8")
    subprocess.run([sys.executable, tmp_path / "laws.py", "--seeds", "3"], cwd=ROOT, check=True)
    assert (tmp_path / "laws.md").read_text(encoding="utf-8").count("\n| ") > 15


def test_the_laptops_ablation_makes_the_changes_of_the_124m_recipes():
    recipes = {path.stem.removeprefix("124m_"): load_recipe(path) for path in (ROOT / "recipes/ablations").glob("124m_*.yaml")}
    assert set(recipes) == set(ablation.CHANGES)
    runs = {name: ablation.run_of(name, 0, []) for name in recipes}

    def changed(each, name):
        found = {change.split(":")[0] for change in differences(each["baseline"].trajectory(), each[name].trajectory())}
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
    summary = {"tokens_per_s": 100.0, "peak_memory_bytes": 10**9, "elapsed_s": 60.0}
    results = [
        ablation.Result(name, [ablation.run_of(name, 0, [])], [3 + worth.get(name, 0.0) + seed for seed in seeds], [summary] * 3)
        for name in ablation.CHANGES
    ]
    worths = ablation.worth_of(results)
    assert [name for name, each in worths.items() if each.told] == ["rope", "all_three"]
    assert worths["rope"].difference == pytest.approx(-0.1)
    assert worths["rope"].low < -0.1 < worths["rope"].high < 0
    assert ablation.spread_of(results) == pytest.approx(0.01)
    loud = [each._replace(losses=[2.5, 3.0, 3.5]) if each.name == "learning_rate" else each for each in results]
    assert ablation.unsteady(loud) == ["learning_rate"]
    assert ablation.worth_of(loud)["rope"].told  # what one change makes unsteady hides no other
    assert not ablation.worth_of(loud)["learning_rate"].told
    extra, half = ablation.more_than_the_sum(results)
    assert extra == pytest.approx(-0.05)
    assert half == pytest.approx(2.0739 * 0.01 * (8 / 3) ** 0.5, rel=1e-4)  # Student's t of 22 degrees of freedom
    page = ablation.page(results, worths)
    assert "**Told apart from other seeds:**\n`all_three` (-0.150), `rope` (-0.100)." in page
    assert "-0.0500 ± 0.0339 nats beyond the sum of each alone, which is told apart from none." in page
    ablation.draw(results, worths, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").read_bytes()[:4] == b"\x89PNG"


def test_the_ablation_page_adds_up():
    """Three seeds of each change, trained by `make pages`; the figures are those of one machine."""
    page = (DOCS / "ablation.md").read_text(encoding="utf-8")
    baseline = float(re.search(r"^\| `baseline` \| ([\d.]+) \|", page, flags=re.MULTILINE)[1])
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d.]+) \| [\d.]+ \| (\**)([+-][\d.]+)\** \| ([+-][\d.]+) to ([+-][\d.]+) \|", page, flags=re.MULTILINE
    )
    assert len(rows) == 10
    for name, loss, marked, difference, low, high in rows:
        assert float(loss) - baseline == pytest.approx(float(difference), abs=1.1e-4)
        assert float(low) < float(difference) < float(high)
        assert bool(marked) == (float(low) > 0 or float(high) < 0), name
    assert (DOCS / "ablation.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_ablation_page_is_made_anew(tmp_path):
    """Some minutes at toy size with two seeds: the page's script still trains, scores and draws."""
    text = (DOCS / "ablation.py").read_text(encoding="utf-8").replace("SEEDS = 3", "SEEDS = 2")
    text = text.replace("HERE = Path(__file__).parent", f"HERE = Path({str(tmp_path)!r})")
    text = text.replace("data/ablation", f"{tmp_path}/data/ablation")
    (tmp_path / "ablation.py").write_text(text, encoding="utf-8")
    small = ["model.hidden_size=24", "training.max_steps=4", "evaluation.validate_every=2", "evaluation.max_windows=8"]
    folders = [f"output.run_dir={tmp_path}/runs/baseline", f"data.prepared_dir={tmp_path}/data/ablation"]
    command = [sys.executable, tmp_path / "ablation.py", *small, "schedule.warmup_steps=1", *folders]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "ablation.md").read_text(encoding="utf-8").count("\n| `") == 22
