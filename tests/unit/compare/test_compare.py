"""Runs side by side: exact numbers, equal costs, scores that differ beyond their errors."""

import html
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import run_command
from hypothesis import given, settings
from hypothesis import strategies as st

import isoflop
from isoflop.compare.command import compare_command
from isoflop.compare.comparison import compare, differs, interpolated
from isoflop.compare.runs import BITS, NATS
from isoflop.config.loading import load_recipe
from isoflop.evaluate.scores import Score, write_results
from isoflop.plan import cost
from isoflop.train.plots import smoothed
from isoflop.utils.errors import UserError


@pytest.fixture
def runs(uninterrupted, tmp_path):
    """Copies of the two finished toy runs."""
    return [Path(shutil.copytree(uninterrupted[name].output.run_dir, tmp_path / name)) for name in ("llama", "gpt2")]


def rewrite(run, rows, **recipe):
    """Give a run other rows, and its recipe other values."""
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    for key, value in recipe.items():
        tree[key] |= value
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))


def row(step, loss, val_loss=None, elapsed_s=0.0, **more):
    common = {"tokens": 256 * step, "tokens_per_s": 1000.0 * step, "mfu": None, "peak_memory_bytes": 2**30}
    return {"step": step, "loss": loss, "val_loss": val_loss, "elapsed_s": elapsed_s, **common, **more}


def test_a_finished_runs_facts_are_those_of_its_own_files(runs):
    found = compare(runs).to_dict()
    summary = json.loads((runs[0] / "summary.json").read_text())
    facts = found["runs"][0]
    for key in ("tokens", "parameters", "flops", "loss", "val_loss", "steps", "tokens_per_s", "peak_memory_bytes"):
        assert facts[key] == summary[key], key
    assert facts["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], rel=1e-12)
    assert facts["tokens_per_parameter"] == 2560 / 28_832
    assert (facts["name"], facts["planned_steps"], facts["mfu"]) == ("llama", 10, None)
    assert found["unit"] == NATS


def test_losses_at_equal_tokens_flops_and_hours(runs):
    """The second is measured at 512 and 1024 tokens: at the first's 768 it lies half way."""
    rewrite(runs[0], [row(1, 6.0, 6.0, 3600.0), row(3, 5.0, 5.0, 7200.0)])
    rewrite(runs[1], [row(2, 5.0, 5.2, 1800.0), row(4, 4.0, 4.8, 5400.0)])
    found = compare(runs).to_dict()
    by_axis = {pair["axis"]: pair for pair in found["at_equal_cost"]}
    assert by_axis["tokens"]["at"] == 768
    assert by_axis["tokens"]["first_loss"] == 5.0
    assert by_axis["tokens"]["other_loss"] == pytest.approx(5.0)
    assert by_axis["hours"] == {
        "axis": "hours", "at": 1.5, "first": "llama", "other": "gpt2", "first_loss": pytest.approx(5.5), "other_loss": 4.8,
        "loss": "validation", "reason": None,
    }  # fmt: skip
    of_llama, of_gpt2 = (cost.flops_per_token(load_recipe(run / "recipe.yaml").model, 32) for run in runs)
    assert by_axis["flops"]["at"] == min(768 * of_llama, 1024 * of_gpt2)


def test_an_unfinished_run_is_marked_and_needs_no_validation_loss(runs, capsys):
    (runs[1] / "summary.json").unlink()
    rewrite(runs[1], [row(1, 5.5)])
    found = compare(runs).to_dict()
    assert found["runs"][1]["val_loss"] is None
    assert [pair["loss"] for pair in found["at_equal_cost"]] == ["training", "training", None]
    assert found["at_equal_cost"][0]["other_loss"] == 5.5
    assert compare_command([str(run) for run in runs], str(runs[0] / "out"), as_json=False) == 0
    printed = capsys.readouterr().out
    assert "1 of 10" in printed
    assert "\ngpt2: not compared at equal hours: one had ended before the other's first step\n" in printed


def test_a_short_run_beside_a_long_one_that_was_validated_later(runs, tmp_path, capsys, monkeypatch):
    """Of one seed, equal up to step 20: so they are equal there, in the table and as they are drawn."""
    import matplotlib.figure

    losses = [8.0 * step**-0.2 + 0.3 * (-1) ** step for step in range(1, 201)]
    long = [row(n, loss, 4.0 if n % 100 == 0 else None, elapsed_s=float(n)) for n, loss in enumerate(losses, 1)]
    short = [*long[:19], long[19] | {"val_loss": 5.0}]
    twin = Path(shutil.copytree(runs[0], tmp_path / "short"))
    rewrite(runs[0], long)
    rewrite(twin, short)
    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, *given, **named: (drawn.append(figure), save(figure, *given, **named))
    )
    assert compare_command([str(runs[0]), str(twin)], str(tmp_path / "out"), as_json=False) == 0
    smooth = list(smoothed([256 * n for n in range(1, 201)], losses, 256 * 200))
    found = json.loads((tmp_path / "out/comparison.json").read_text())["at_equal_cost"]
    for pair, at in zip(
        found, (256 * 20, 256 * 20 * cost.flops_per_token(load_recipe(twin / "recipe.yaml").model, 32), 20 / 3600), strict=True
    ):
        assert pair["at"] == pytest.approx(at)
        assert (pair["loss"], pair["first_loss"], pair["other_loss"]) == (
            "training",
            pytest.approx(smooth[19]),
            pytest.approx(smooth[19]),
        )
    assert "\ntraining: smoothed, of runs without validation losses in a common range of that cost\n" in capsys.readouterr().out
    first, _, second, _ = drawn[0].axes[0].lines
    assert list(first.get_ydata()) == smooth
    assert list(second.get_ydata()) == smooth[:20]


def test_a_run_without_any_loss_is_named_as_the_reason(runs, capsys):
    rewrite(runs[1], [row(1, None), row(2, None)])
    compare_command([str(run) for run in runs], str(runs[0] / "out"), as_json=False)
    assert "\ngpt2: not compared at equal tokens: no loss of gpt2 is a number\n" in capsys.readouterr().out


def test_other_tokenizers_compare_in_bits_per_byte(runs):
    rewrite(runs[1], [row(1, 6.0, 6.0), row(10, 5.0, 5.0)], tokenizer={"train_vocab_size": 310})
    comparison = compare(runs)
    read, found = comparison.histories, comparison.to_dict()
    assert found["unit"] == BITS
    bytes_per_token = read[1].bytes_per_token
    assert found["at_equal_cost"][0]["other_loss"] == pytest.approx(5.0 / math.log(2) / bytes_per_token)
    (runs[1] / "summary.json").unlink()
    rewrite(runs[1], [row(1, 6.0, 6.0)], data={"prepared_dir": "/gone"})
    with pytest.raises(UserError, match=r"gpt2: these runs have several tokenizers or data, .* nor are its data at /gone"):
        compare([str(run) for run in runs])


def test_runs_of_one_tokenizer_among_others_are_named(runs, tmp_path, capsys):
    third = Path(shutil.copytree(runs[0], tmp_path / "third"))
    rewrite(runs[1], [row(1, 6.0, 6.0)], tokenizer={"train_vocab_size": 310})
    paths = [str(run) for run in (*runs, third)]
    assert compare(paths).same_data == [["llama", "third"], ["gpt2"]]
    compare_command(paths, str(tmp_path / "out"), as_json=False)
    assert "\nSame tokenizer and data: llama, third.\n" in capsys.readouterr().out


def test_a_run_that_diverged_at_once_is_shown_beside_others_and_alone(runs, tmp_path, capsys):
    rewrite(runs[1], [row(1, None), row(2, None)])
    for paths in (runs, runs[1:]):
        assert compare_command([str(run) for run in paths], str(tmp_path / "out"), as_json=False) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  gpt2"))
        assert line.split()[6:9] == ["n/a", "n/a", "n/a"]


def test_scores_differ_beyond_196_errors_of_the_difference(runs, capsys):
    def results(acc, stderr):
        return {
            "results": {"piqa": {"acc,none": acc, "acc_stderr,none": stderr}},
            "higher_is_better": {"piqa": {"acc": True}},
            "n-samples": {"piqa": {"effective": 1838}},
        }

    for run, acc in zip(runs, (0.60, 0.64), strict=True):
        write_results(results(acc, 0.01), run / "evaluations/pretraining", 1)
        rewrite(run, [row(1, 6.0), row(2, 5.5, 5.6, **{"hellaswag/acc": 0.25, "hellaswag/acc_stderr": 0.01, "piqa/acc": 0.5})])
    found = compare(runs).to_dict()
    assert found["scores"] == [
        {"task": task, "metric": "acc", "runs": {
            "llama": {"value": first, "stderr": 0.01, "differs": False},
            "gpt2": {"value": second, "stderr": 0.01, "differs": second != first},
        }} for task, first, second in (("hellaswag", 0.25, 0.25), ("piqa", 0.60, 0.64))
    ]  # fmt: skip
    compare_command([str(run) for run in runs], str(runs[0] / "out"), as_json=False)
    assert "0.6400 ± 0.0100 *" in capsys.readouterr().out
    assert json.loads((runs[0] / "out/comparison.json").read_text()) == found
    assert "| piqa | acc | 0.6000 ± 0.0100 | 0.6400 ± 0.0100 * |" in (runs[0] / "out/comparison.md").read_text()


def test_errors_of_the_difference_are_both_runs_errors():
    one = Score("t", "m", 0.60, 0.01, 1, True)
    assert differs(one, one._replace(value=0.627)) is False  # 1.96 x 0.01 x sqrt(2) = 0.0277
    assert differs(one, one._replace(value=0.628)) is True
    assert differs(one, one._replace(stderr=None)) is None
    assert differs(None, one) is None


def test_runs_are_named_by_the_distinguishing_part_of_their_path(runs, tmp_path):
    twin = shutil.copytree(runs[0], tmp_path / "other" / "llama")
    assert [run.name for run in compare([runs[0], twin]).runs] == [f"{tmp_path.name}/llama", "other/llama"]


def test_runs_that_do_not_compare_are_refused(runs, tmp_path):
    with pytest.raises(UserError, match="llama is given twice; give every run once"):
        compare([str(runs[0]), f"{runs[0]}/"])
    with pytest.raises(UserError, match=r"is not a run folder: it has no recipe.yaml"):
        compare([str(tmp_path)])
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"--out .*taken: File exists; give a folder that can be written"):
        compare_command([str(runs[0])], str(tmp_path / "taken"), as_json=False)
    (runs[0] / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"has no finished step in metrics.jsonl yet"):
        compare([str(runs[0])])


def test_the_command_draws_and_writes(runs, tmp_path):
    done = run_command("python", "scripts/compare.py", *runs, "--out", tmp_path / "out")
    for printed in ("llama (nats per token)", "ahead by", "28,832", "comparison.png"):
        assert printed in done.stdout, printed
    assert (tmp_path / "out/comparison.png").read_bytes()[:4] == b"\x89PNG"
    exact = run_command("python", "scripts/compare.py", runs[0], "--json", "--out", tmp_path / "alone").stdout
    assert json.loads(exact) == compare(runs[0]).to_dict()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 1e12), st.floats(0.1, 12)), min_size=1, max_size=20, unique_by=lambda p: p[0]))
def test_a_curve_goes_through_its_own_measurements(points):
    costs, values = zip(*sorted(points), strict=True)
    for at, value in zip(costs, values, strict=True):
        assert interpolated(at, list(costs), list(values)) == pytest.approx(value)
    assert interpolated(costs[-1] * 1.01, list(costs), list(values)) is None


def test_a_notebook_gets_a_frame_and_a_page_and_nothing_is_printed(runs, capsys):
    found = isoflop.compare(runs)
    assert capsys.readouterr() == ("", "")
    frame = found.to_frame()
    assert list(frame.index) == ["llama", "gpt2"]
    assert frame.loc["llama", "parameters"] == 28_832
    assert found.page() in html.unescape(found._repr_html_())
    assert found._repr_html_().count("data:image/png;base64,") == 1
