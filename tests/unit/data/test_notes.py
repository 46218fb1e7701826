"""What `plan`, `prepare` and `pretrain` note of a recipe and its data."""

import pytest
from conftest import ROOT

from isoflop.cli.plan import main as plan
from isoflop.config.loading import load_recipe
from isoflop.data.manifest import read_manifest
from isoflop.data.notes import data_notes
from isoflop.plan import cost

pytestmark = pytest.mark.usefixtures("on_the_console")


def test_a_step_larger_than_an_epoch_is_noted_everywhere(toy_recipe, write_recipe, run_in_process, tmp_path, capsys):
    from isoflop.prepare.run import prepare

    quiet = toy_recipe()
    manifest = read_manifest(quiet.data.prepared_dir)
    tokens = manifest.windows("train") * 32
    assert data_notes(quiet, manifest) == []
    step = (tokens // 128 + 1) * 128
    expected = (
        f"training.tokens_per_step = {step:,} visits every training window {step / tokens:.1f} times in one step ({tokens:,}"
        " tokens in all): repeats within a step teach nothing new; lower it, or give more text"
    )
    sizes = {"training__tokens_per_step": step, "training__max_steps": 1}
    large = toy_recipe(**sizes)
    assert data_notes(large, manifest) == [expected]
    assert data_notes(toy_recipe(training__tokens_per_step=step - 128), manifest) == []
    plan([str(write_recipe(**sizes))])
    assert f"warning: {expected}\n" in capsys.readouterr().out
    prepare(toy_recipe(**sizes, data__prepared_dir=str(tmp_path / "prepared")))
    assert f"prepare: note: {expected}\n" in capsys.readouterr().out
    prepare(toy_recipe(**sizes, data__prepared_dir=str(tmp_path / "prepared")))
    assert capsys.readouterr().out.endswith(f"is already prepared and nothing changed\nprepare: note: {expected}\n")
    run_in_process(large, dry_run=True)
    assert f"note: {expected}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("weight", "noted"), [(0.1, ["big"]), (0.9, ["small"])])
def test_each_source_of_a_mixture_is_noted_by_its_share(toy_recipe, weight, noted):
    text = {"kind": "text", "files": ["x"]}
    sources = {"small": {"weight": weight, "source": text}, "big": {"weight": 1 - weight, "source": text}}
    manifest = read_manifest(toy_recipe().data.prepared_dir)
    (source,) = manifest.sources.values()
    windows = source.splits["train"].windows
    recipe = toy_recipe(
        data__source={"kind": "mixture", "sources": sources}, training__tokens_per_step=windows * 32 * 5 // 4 // 128 * 128
    )
    both = manifest.model_copy(update={"sources": {"small": source, "big": source}})
    found = data_notes(recipe, both)
    assert [note.split("training window of ")[1].split()[0] for note in found] == noted


@pytest.mark.parametrize(("vocab_size", "unused"), [(4096, 0), (4223, 0), (4224, 0), (4352, 256), (50257, 46161)])
def test_rows_of_the_vocabulary_that_nothing_uses_are_noted_with_their_cost(vocab_size, unused):
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [f"model.vocab_size={vocab_size}"])
    found = data_notes(recipe, None)
    if not unused:
        assert found == []
        return
    parameters = cost.parameters(recipe.model)
    flops = 6 * 192 * unused / cost.flops_per_token(recipe.model, 256)
    assert found == [
        f"model.vocab_size = {vocab_size:,} and the tokenizer has 4,096 ids: {unused:,} rows are never used, which are"
        f" {unused * 192:,} parameters ({unused * 192 / parameters:.1%}) and {flops:.1%} of the FLOPs; 4,096 would do"
    ]


@pytest.mark.parametrize("file", [*(ROOT / "recipes").glob("*.yaml")], ids=lambda file: file.stem)
def test_no_shipped_recipe_is_noted(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert data_notes(load_recipe(file), None) == []
