"""The command as a user types it: numbers, JSON keys, files and errors."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from isoflop.cli.plan import main, with_subcommand
from isoflop.config.loading import load_recipe
from isoflop.config.recipe import gradient_accumulation_steps
from isoflop.config.shipped import find
from isoflop.plan import cost, hardware
from isoflop.plan.budgets import plan_budget
from isoflop.plan.planner import plan as make_plan
from isoflop.plan.summary import best_fit
from isoflop.scaling.laws import PUBLISHED, load_law
from isoflop.utils.errors import UserError


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def plan(capsys):
    """The JSON answer to a command line."""

    def ask(*arguments):
        assert main([*map(str, arguments), "--json"], "plan") == 0
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.fixture
def text(capsys):
    """The answer as a terminal shows it."""

    def ask(*arguments):
        assert main([*map(str, arguments)], "plan") == 0
        return capsys.readouterr().out

    return ask


@pytest.mark.new_process
def test_a_plan_is_there_within_three_seconds_and_without_torch():
    started = time.perf_counter()
    code = (
        "import runpy, sys; sys.argv = ['plan.py', *sys.argv[1:]]\ntry: runpy.run_path('scripts/plan.py', run_name='__main__')\n"
    )
    code += "except SystemExit as e: assert e.code == 0\nassert 'torch' not in sys.modules"
    for arguments in (["recipes/llama2_1.36b.yaml"], ["--flops", "1.36e21", "--family", "llama3"]):
        subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, capture_output=True)
    assert time.perf_counter() - started < 2 * 3


def test_a_recipe_has_the_keys_and_numbers_that_others_rely_on(plan):
    found = plan("recipes/llama2_1.36b.yaml")
    assert found["parameters"]["total"] == 1_294_159_104
    assert found["parameters"]["without_embedding"] == 1_220_431_104
    classes = ("embedding", "position", "attention", "ffn", "norm", "head")
    assert sum(found["parameters"][name] for name in classes) == 1_294_159_104
    # 3 x (2 x (18 x (4 x 2304^2 + 3 x 2304 x 6144) + 32000 x 2304) + 4 x 2048 x 2304 x 18)
    assert found["flops_per_token"] == 8_341_291_008
    assert found["flops_per_token_6n"] == 6 * 1_294_159_104
    assert (found["steps"], found["tokens"]) == (25_000, 13_107_200_000)
    assert found["tokens_per_parameter"] == pytest.approx(10.128, abs=5e-4)
    assert found["steps_at_20_per_parameter"] == 49_369
    assert found["predicted_loss"] == pytest.approx(float(load_law("hoffmann").loss(1_294_159_104, 13_107_200_000)))
    assert set(found["laws"]) == set(PUBLISHED)
    assert found["laws"]["besiroglu"]["predicted_loss_interval"][0] < found["laws"]["besiroglu"]["predicted_loss"]
    assert set(found["memory_bytes"]) >= {"cpu", "1gpu", "2gpu_ddp", "2gpu_zero1", "2gpu_fsdp2"}
    assert found["memory_bytes"]["1gpu"] == sum(found["memory_by_part_bytes"]["1gpu"].values())
    assert set(found["hours"]["2gpu_ddp"]) >= {"a6000", "rtx5090", "h20", "h100"}


def test_hours_tokens_and_mfu_are_one_arithmetic(plan):
    found = plan("recipes/llama2_1.36b.yaml", "--gpus", 4, "--gpu", "h20", "--mfu", 0.5, "--price", 2.0)
    seconds = 13_107_200_000 * 8_341_291_008 / (0.5 * 148e12)
    assert found["gpu_hours"]["h20"] == pytest.approx(seconds / 3600)
    assert found["hours"]["4gpu_fsdp2"]["h20"] == pytest.approx(seconds / 3600 / 4)
    assert found["dollars"]["h20"] == pytest.approx(2 * seconds / 3600)
    assert found["mfu"]["h20"] == {"mfu": 0.5, "source": "given"}


def test_epochs_over_a_dataset_whose_size_is_stated(plan, text):
    found = plan("recipes/llama2_1.36b.yaml")["repeated_data"]
    assert found["epochs"] == pytest.approx(13.1072 / 6)
    assert found["effective_tokens"] == pytest.approx(12.8406e9, rel=1e-5)
    assert found["predicted_loss"] - plan("recipes/llama2_1.36b.yaml")["predicted_loss"] == pytest.approx(0.0032, abs=5e-5)
    assert "2.18 epochs: 13,107,200,000 tokens of 6,000,000,000 (stated on the card of DKYoon/SlimPajama-6B)" in text(
        "recipes/llama2_1.36b.yaml", "--full"
    )


def test_epochs_over_prepared_data_are_counted(plan, write_recipe, toy_tree):
    found = plan(write_recipe())["repeated_data"]
    manifest = json.loads((Path(toy_tree["data"]["prepared_dir"]) / "manifest.json").read_text())
    unique = manifest["sources"]["text"]["splits"]["train"]["windows"] * 32
    assert (found["unique_tokens"], found["epochs"]) == (unique, 2560 / unique)
    assert found["unique_tokens_source"].startswith("counted, ")


def test_the_largest_micro_batch_fits_and_the_next_does_not(plan):
    found = plan("recipes/llama3_1.5b.yaml")
    for launch, kinds in found["largest_micro_batch"].items():
        for kind, micro in kinds.items():
            room = hardware.usable_bytes(hardware.GPUS[kind].memory_bytes)
            windows = 256 // int(launch.split("gpu")[0])
            sizes = [m for m in range(1, windows + 1) if windows % m == 0]
            memory = {
                m: plan("recipes/llama3_1.5b.yaml", f"training.micro_batch_size={m}")["memory_bytes"][launch]
                for m in ({micro} | {s for s in sizes if s == 2 * micro or (micro == 0 and s == 1)}) - {0}
            }
            assert all((size_bytes <= room) == (m <= micro) for m, size_bytes in memory.items()), (launch, kind)
        if launch == "2gpu_zero1":
            break  # one engine's row, on every kind: each asks for a whole plan


@pytest.mark.parametrize(
    ("constraint", "layers", "width", "head_dim", "loss"),
    [((), 16, 2560, 64, 2.2919), (("--constrain-tokens-per-parameter", 10, 30), 18, 3072, 64, 2.2970)],
)
def test_a_search_has_the_keys_and_numbers_that_others_rely_on(plan, constraint, layers, width, head_dim, loss):
    found = plan("--flops", 1.36e21, "--family", "llama3", "--law", "hoffmann-rounded", *constraint)
    best = found["best"]
    assert (best["num_hidden_layers"], best["hidden_size"], best["head_dim"]) == (layers, width, head_dim)
    assert best["predicted_loss"] == pytest.approx(loss, abs=5e-5)
    assert best["tokens"] * best["flops_per_token"] == pytest.approx(1.36e21, rel=1e-12)
    assert best["flops"] == 1.36e21
    assert best["on_grid_edge"] is (not constraint)
    assert found["near_optimal"][0] == best
    assert all(candidate["predicted_loss"] <= best["predicted_loss"] + 0.001 for candidate in found["near_optimal"])
    assert any("edge of the grid" in warning for warning in found["warnings"]) is (not constraint)
    assert [c["hidden_size"] for c in found["near_20_tokens_per_parameter"]] == ([] if constraint else [3072, 3072])


def test_days_and_dollars_are_flops_by_one_arithmetic(plan):
    days = plan("--gpus", 2, "--gpu", "a6000", "--days", 16, "--mfu", 0.38)
    assert days["flops"] == pytest.approx(2 * 16 * 86400 * 154.85e12 * 0.38)
    assert days["gpu_hours"]["a6000"] == pytest.approx(2 * 16 * 24)
    dollars = plan("--dollars", 500, "--gpu", "h100", "--price", 2.5)
    assert dollars["budget"]["gpu_hours"] == 200
    assert dollars["flops"] == pytest.approx(200 * 3600 * 989e12 * dollars["budget"]["mfu"])
    assert dollars["gpu_hours"]["h100"] == pytest.approx(200)
    assert "llm-foundry" in dollars["budget"]["mfu_source"]


def test_hardware_that_is_not_in_the_list_is_described_by_its_peak(plan):
    found = plan("--gpus", 8, "--gpu", "mine", "--peak-tflops", 100, "--days", 1, "--mfu", 0.4)
    assert found["flops"] == pytest.approx(8 * 86400 * 100e12 * 0.4)


def test_hardware_whose_mfu_is_not_known_has_no_hours(plan, text):
    found = plan("recipes/llama2_1.36b.yaml", "--gpu", "mine", "--peak-tflops", 100)
    assert found["mfu"]["mine"]["mfu"] is None
    assert found["gpu_hours"]["mine"] is None
    assert "n/a: not known for this hardware; give --mfu" in text(
        "recipes/llama2_1.36b.yaml", "--gpu", "mine", "--peak-tflops", 100
    )


@pytest.mark.parametrize("days", [1, 5, 16, 18, 20, 64, 300])
@pytest.mark.parametrize("law", ["hoffmann", "kaplan"])
def test_the_best_shape_takes_the_hours_of_the_budget_whatever_its_mfu(plan, days, law):
    found = plan("--gpus", 8, "--gpu", "a6000", "--days", days, "--law", law)
    assert found["gpu_hours"]["a6000"] == pytest.approx(8 * days * 24)
    row = hardware.mfu_row("a6000", found["best"]["parameters"])
    assert (found["budget"]["mfu"], found["budget"]["mfu_source"]) == (row.mfu, row.source)


def test_a_search_says_what_repeating_its_familys_data_costs(plan, tmp_path):
    found = plan("--flops", 1e21, "--write", tmp_path / "w.yaml")
    repeated = found["recipe"]["repeated_data"]
    assert any(warning.startswith(f"{repeated['epochs']:.2f} epochs: ") for warning in found["warnings"])
    assert repeated["epochs"] == found["recipe"]["tokens"] / 6e9
    assert (
        f"{repeated['predicted_loss']:.4f} with {repeated['epochs']:.2f} epochs of the data" in (tmp_path / "w.yaml").read_text()
    )


def test_a_micro_batch_that_does_not_fit_is_made_smaller(plan, tmp_path):
    found = plan("--gpus", 1, "--gpu", "rtx5090", "--days", 20, "--write", tmp_path / "w.yaml")
    recipe = load_recipe(tmp_path / "w.yaml")
    launch, memory = cost.Launch("1gpu", "single"), hardware.GPUS["rtx5090"].memory_bytes
    assert (
        cost.largest_micro_batch(recipe.model, recipe.training, recipe.optimizer, launch, memory)
        == recipe.training.micro_batch_size
    )
    assert any(
        note.startswith("micro_batch_size: 8 changed to ") and "predicted to fit" in note for note in found["recipe"]["notes"]
    )


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(
    "arguments", [("--flops", "1e21"), ("--flops", "1e20", "--sequence-length", "3000"), ("models", "gpt2-xl")]
)
def test_what_is_written_divides_by_the_gpus(plan, arguments, num_gpus, tmp_path):
    plan(*arguments, "--gpus", num_gpus, "--gpu", "h200", "--write", tmp_path / "w.yaml")
    recipe = load_recipe(tmp_path / "w.yaml")
    assert gradient_accumulation_steps(recipe.training, num_gpus) >= 1
    launch = cost.Launch("x", "ddp" if num_gpus > 1 else "single", num_gpus)
    predicted = cost.predicted_memory(recipe.model, recipe.training, recipe.optimizer, launch).total
    assert predicted <= hardware.usable_bytes(hardware.GPUS["h200"].memory_bytes)


def test_a_model_that_no_card_holds_is_written_with_the_word(plan, text, tmp_path):
    printed = text("models", "llama-2-7b", "--gpus", 2, "--gpu", "a6000", "--write", tmp_path / "w.yaml")
    assert "micro_batch_size: not even 1 is predicted to fit 2 GPU(s) under fsdp2" in printed
    assert "# micro_batch_size: not even 1" in (tmp_path / "w.yaml").read_text()


REASON = "its data begin at 70M parameters and 5B tokens (here 2.82M and 1.02M)"
OTHER_OPTIMIZER = "its runs were trained with adamw, and this one's optimizer.name is muon"


def test_a_law_that_says_nothing_of_a_recipe_is_not_printed_as_if_it_did(plan, text):
    found = plan("recipes/quickstart.yaml", "optimizer.name=adamw")
    assert (found["predicted_loss"], found["predicted_loss_interval"], found["outside"]) == (None, None, REASON)
    assert found["laws"]["kaplan"]["outside"] == "its data begin at 22M tokens (here 1.02M)"
    assert all(law["predicted_loss"] is None for law in found["laws"].values())
    assert [warning.split(":")[0] for warning in found["warnings"]] == ["law hoffmann has no prediction"]
    formula = f"{float(load_law('hoffmann').loss(2_816_064, 1_024_000)):.2f}"
    assert formula == "12.30"
    for arguments in ((), ("--full",)):
        shown = text("recipes/quickstart.yaml", "optimizer.name=adamw", *arguments)
        assert f"hoffmann has no prediction: {REASON}" in shown
        assert formula not in shown
    compared = text("compare", "recipes/quickstart.yaml", "recipes/llama2_1.36b.yaml")
    assert f"warning: recipes/quickstart.yaml: law hoffmann has no prediction: {OTHER_OPTIMIZER}" in compared
    assert formula not in compared
    assert "2.5616" in compared


def test_where_no_law_predicts_a_rule_of_thumb_chooses_and_says_so(plan, text, tmp_path):
    found = plan("--flops", "2e16", "--family", "quickstart")
    assert found["chosen_by"] == "20 tokens a parameter, a rule of thumb"
    assert found["outside"] == OTHER_OPTIMIZER
    best = found["best"]
    assert best["tokens_per_parameter"] == pytest.approx(20, rel=0.05)
    assert 48 <= best["hidden_size"] / best["num_hidden_layers"] <= 80
    shown = text("--flops", "2e16", "--family", "quickstart", "--write", tmp_path / "w.yaml")
    assert f"chosen by 20 tokens a parameter, a rule of thumb; law hoffmann has no prediction: {OTHER_OPTIMIZER}" in shown
    assert shown.count("law hoffmann has no prediction") == 1
    assert "law hoffmann has no prediction" in (tmp_path / "w.yaml").read_text().splitlines()[0]
    assert f"then: isoflop pretrain {tmp_path}/w.yaml --launch 1gpu --dry-run" in shown
    small = text("--flops", "2e12", "--family", "quickstart", "--write", tmp_path / "small.yaml")
    assert f"then: isoflop pretrain {tmp_path}/small.yaml --dry-run" in small  # a config for GPUs is refused on a CPU
    known = plan("--flops", "1.36e21", "--family", "llama3")
    assert (known["chosen_by"], known["outside"]) == ("the loss that law hoffmann predicts", None)


SUMMARIES = [
    ("recipes/llama2_1.36b.yaml",),
    ("recipes/llama2_1.36b.yaml", "--gpu", "a6000"),
    ("recipes/llama2_1.36b.yaml", "--gpus", "4"),
    ("recipes/llama2_1.36b.yaml", "--gpu", "rtx5090", "--gpus", "1"),
    ("recipes/llama3_2.2b.yaml", "training.tokens_per_step=16777216", "--gpu", "a6000", "--gpus", "2"),
    ("recipes/quickstart.yaml",),
    ("recipes/llama2_1.36b.yaml", "--gpu", "mine", "--peak-tflops", "100"),
    ("models", "llama-3-8b"),
]


@pytest.mark.parametrize("arguments", SUMMARIES, ids=" ".join)
def test_a_recipes_plan_is_a_summary_of_at_most_thirteen_lines(text, arguments):
    """The lines that answer are short; commands are as long as what was typed, and warnings are sentences that come last."""
    lines = text(*arguments).splitlines()
    assert len(lines) <= 13
    assert all(len(line) <= 130 for line in lines if not line.startswith(("warning: ", "next: ")))
    assert lines[1].startswith("loss: ")
    assert "--full has" in lines[-1]
    assert len(text(*arguments, "--full").splitlines()) > 40


def test_the_summary_says_whether_it_fits_where_how_long_and_what_to_type(text):
    named = text("recipes/llama2_1.36b.yaml", "--gpu", "a6000", "--gpus", 2).splitlines()
    assert named[1] == "loss: 2.5616 (no interval) by law hoffmann, nats per token of the law's own data"
    assert named[2:6] == [
        "2 x a6000: fits under 2gpu_zero1 at micro-batch 8 (36.27 of 44.65 GiB; needs DeepSpeed)",
        "time: 13.2 d at an MFU of 31.0%",
        "next: isoflop prepare recipes/llama2_1.36b.yaml",
        "next: isoflop pretrain recipes/llama2_1.36b.yaml --launch 2gpu_zero1",
    ]
    smaller = text("recipes/llama2_1.36b.yaml", "seed=7", "--gpu", "rtx5090", "--gpus", 1)
    assert "isoflop pretrain recipes/llama2_1.36b.yaml seed=7 --launch 1gpu training.micro_batch_size=2\n" in smaller
    assert "1 x rtx5090: does not fit" in text("recipes/llama3_2.2b.yaml", "--gpu", "rtx5090", "--gpus", 1)
    three = text("recipes/llama2_1.36b.yaml", "--gpu", "a6000", "--gpus", 3)
    assert "3 x a6000: the 256 windows of a step (training.tokens_per_step) do not divide by 3" in three
    unnamed = text("recipes/llama2_1.36b.yaml")
    assert "  a6000    26.4 d (4)     13.2 d   6.6 d   3.3 d\n" in unnamed
    assert "next: name your GPUs (--gpu a6000 --gpus 2) for the launch to type" in unnamed
    assert "rtx5090" not in text("recipes/llama2_1.36b.yaml", "--gpu", "h100")


@pytest.mark.parametrize("recipe", ["gpt2_124m", "gpt2_1.36b", "llama2_1.36b", "llama3_1.5b", "llama3_2.2b"])
def test_what_the_summary_says_fits_is_predicted_to_fit(recipe):
    found = make_plan(f"recipes/{recipe}.yaml")
    for gpu in (row.spec.name for row in found.memory_and_time.gpus):
        for num_gpus in (1, 2, 4, 8):
            fit = best_fit(found, gpu, num_gpus)
            rows = [row for row in found.memory_and_time.launches if row.launch.num_processes == num_gpus and row.config]
            largest = {row.launch.name: row.largest_micro_batch.get(gpu) or 0 for row in rows}
            if fit is None:
                assert not any(value for name, value in largest.items() if "fp" not in name)
            else:
                own = found.stats.micro_batch_size
                assert 0 < fit.micro_batch_size <= largest[fit.row.launch.name]
                assert fit.micro_batch_size == own or max(largest.values()) < own


def test_the_critical_batch_is_taken_at_the_loss_of_guessing_where_the_law_gives_more(plan):
    found = plan("recipes/quickstart.yaml")
    assert found["critical_batch_tokens"] == pytest.approx(2e8 / 8.31776617 ** (1 / 0.21), rel=1e-6)


def test_a_long_plan_gets_larger_steps_where_the_critical_batch_allows(plan, tmp_path):
    plan("models", "llama-2-7b", "--write", tmp_path / "w.yaml")
    training = load_recipe(tmp_path / "w.yaml").training
    assert training.tokens_per_step > 524_288
    assert training.tokens_per_step * training.max_steps <= 2e12


def test_a_fitted_law_from_a_file_is_used(plan, tmp_path):
    law = tmp_path / "mine.yaml"
    coefficients = "{E: 2.69, A: 1606.4, alpha: 0.34, B: 3210.7, beta: 0.36}"
    law.write_text(f"form: chinchilla\ncoefficients: {coefficients}\ncounts: total\nsource: a fit\n")
    found = plan("recipes/gpt2_124m.yaml", "--law", law)
    n, d = 124_475_904, found["tokens"]
    assert found["predicted_loss"] == pytest.approx(2.69 + 1606.4 / n**0.34 + 3210.7 / d**0.36)
    assert found["laws"][str(law)]["predicted_loss"] == found["predicted_loss"]
    searched = plan("--flops", 1e21, "--law", law)
    assert searched["law"] == str(law)
    plan("--flops", 1e21, "--law", law, "--write", tmp_path / "scored.yaml")
    assert load_recipe(tmp_path / "scored.yaml").law == str(law)  # `pretrain` keeps the score by it
    assert plan(tmp_path / "scored.yaml")["law"] == str(law)
    assert plan(tmp_path / "scored.yaml", "--law", "kaplan")["law"] == "kaplan"
    plan("--flops", 1e21, "--write", tmp_path / "plain.yaml")
    assert load_recipe(tmp_path / "plain.yaml").law is None


def test_compare_has_a_row_a_recipe(plan, text):
    names = ["gpt2_1.36b", "llama2_1.36b", "llama3_1.5b", "llama3_2.2b"]
    paths = [f"recipes/{name}.yaml" for name in names]
    found = plan("compare", *paths)["recipes"]
    assert [row["steps_at_20_per_parameter"] for row in found] == [53_614, 49_369, 58_923, 84_845]
    assert [round(row["tokens_per_parameter"], 1) for row in found] == [9.3, 10.1, 8.5, 5.9]
    shown = text("compare", *paths)
    for row in found:
        assert f"{row['parameters']['total']:,}" in shown
        assert f"{row['predicted_loss']:.4f}" in shown
        assert (
            sum(
                row["recipe"].split("/")[1].removesuffix(".yaml") == line.split()[0]
                for line in shown.splitlines()
                if line.split()
            )
            == 1
        )


def test_models_lists_the_published_shapes(plan, text):
    found = {row["name"]: row for row in plan("models")["models"]}
    assert found["llama-2-70b"]["tokens_per_parameter"] == pytest.approx(2e12 / 68_976_648_192)
    assert found["gpt2-small"]["tokens_per_parameter"] is None
    assert "405,853,388,800" in text("models")


def test_a_published_model_is_planned_on_its_own_tokens(plan):
    found = plan("models", "llama-3-8b")
    assert found["tokens"] == pytest.approx(15e12, rel=1e-6)
    assert found["tokens"] <= 15e12
    assert plan("models", "gpt2-xl")["tokens_per_parameter"] == pytest.approx(20, rel=1e-3)


def test_a_shape_for_a_target(plan):
    found = plan("--parameters", 182.4e6, "--aspect", 32)
    assert (found["hidden_size"], found["num_hidden_layers"], found["num_attention_heads"]) == (768, 24, 24)
    assert found["parameters_12_layers_width_squared"] == 169_869_312


@pytest.mark.parametrize(
    "arguments",
    [
        ("--flops", "1.36e21", "--family", "llama3"),
        ("--flops", "1e20", "--family", "gpt2", "--sequence-length", "1024"),
        ("--flops", "3e15", "--family", "quickstart"),
        ("--flops", "1e19", "--family", "recipes/modern_124m.yaml"),
        ("--flops", "1e22", "--family", "llama-3.1-8b"),
        ("--gpus", "2", "--gpu", "a6000", "--days", "16"),
    ],
)
def test_what_is_written_loads_and_spends_the_budget_and_no_more(plan, arguments, tmp_path):
    path = tmp_path / "mine.yaml"
    found = plan(*arguments, "--write", path)
    recipe = load_recipe(path)
    assert path.read_text().startswith("# Planned from ")
    assert cost.parameters(recipe.model) == found["best"]["parameters"]
    tokens = recipe.training.max_steps * recipe.training.tokens_per_step
    assert found["best"]["tokens"] - recipe.training.tokens_per_step < tokens <= found["best"]["tokens"]
    assert recipe.schedule.warmup_steps <= recipe.training.max_steps / 10
    assert recipe.output.run_dir == "runs/mine"
    planned = plan(path)
    assert planned["flops"] <= found["flops"] * (1 + 1e-12)
    assert planned["predicted_loss"] == pytest.approx(found["best"]["predicted_loss"], abs=1e-3)


def test_a_published_model_is_a_recipes_starting_point(plan, tmp_path):
    plan("models", "gpt2-medium", "--write", tmp_path / "medium.yaml")
    recipe = load_recipe(tmp_path / "medium.yaml")
    assert cost.parameters(recipe.model) == 354_823_168
    assert (recipe.training.sequence_length, recipe.model.vocab_size) == (1024, 50257)
    assert recipe.data.prepared_dir == "data/slimpajama-6b-gpt2-1024"


def test_tokens_per_step_far_above_the_critical_batch_are_warned_of(plan):
    found = plan("recipes/gpt2_124m.yaml", "training.tokens_per_step=8388608")
    assert any("times the critical batch of" in warning for warning in found["warnings"])
    assert not any("critical batch" in warning for warning in plan("recipes/gpt2_124m.yaml")["warnings"])


def test_a_small_budget_is_written_with_a_smaller_step(plan, tmp_path):
    plan("--flops", "1e18", "--family", "gpt2", "--write", tmp_path / "small.yaml")
    text = (tmp_path / "small.yaml").read_text()
    recipe = load_recipe(tmp_path / "small.yaml")
    assert recipe.training.tokens_per_step < 524_288
    assert recipe.training.max_steps >= 1000
    assert f"# tokens_per_step {recipe.training.tokens_per_step:,}: 0.58 D^0.571 = " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--flops", "0"), r"--flops 0 is not a positive number; give one above 0"),
        (("--flops", "-1e21"), r"--flops -1e\+21 is not a positive number"),
        (("--flops", "nan"), r"--flops nan is not a positive number"),
        (("--gpus", "0", "--gpu", "a6000", "--days", "1"), r"--gpus 0 is not a positive number"),
        (("--flops", "1e15"), r"1e\+15 FLOPs are too few for family llama3.*least budget is 1.25e\+18"),
        (("--flops", "1e21", "--family", "lama3"), r"--family lama3.*did you mean llama3"),
        (("--gpu", "a600", "--days", "3"), r"--gpu a600: not a known GPU; did you mean a6000\? known are a6000, rtx3090"),
        (("--gpu", "zz", "--days", "3"), r"--gpu zz: not a known GPU; known are a6000, rtx3090, .*give --peak-tflops"),
        (("--days", "3"), r"--days needs --gpu, one of a6000"),
        (("--dollars", "500", "--gpu", "h100"), r"--dollars needs --price"),
        (("budget",), r"give one budget: --flops 1.36e21.*given: none"),
        ((), r"give one of recipe, budget, compare, models, shape"),
        (("--flops", "1e21", "--days", "3"), r"given: --flops, --days"),
        (("--flops", "1e21", "--mfu", "38"), r"--mfu 38 is not within 0 to 1"),
        (("--flops", "1e21", "--law", "hofman"), r"law hofman.*did you mean hoffmann"),
        (("--flops", "1e21", "--constrain-tokens-per-parameter", "30", "10"), r"30 10 is not 0 <= LOW < HIGH; give e.g. 10 30"),
        (("--width", "1000", "--aspect", "32"), r"--width 1000 is not a multiple of --aspect 32.*nearest: 992 or 1024"),
        (("--flops", "1e21", "--constrain-tokens-per-parameter", "10", "inf"), r"10 inf is not 0 <= LOW < HIGH"),
        (("--flops", "1e300"), r"--flops 1e\+300 is not within 0 to 1e\+30"),
        (("--flops", "abc"), r"argument --flops: invalid float value: 'abc'; .*--help. lists every option"),
        (("--flo", "1e21"), r"--flo: no such option; did you mean --flops"),
        (("--gpu", "h100", "--peak-tflops", "5", "--days", "1"), r"--peak-tflops 5: h100 is known with 989; leave it out"),
        (("--gpu", "mine", "--peak-tflops", "5", "--days", "1"), r"--gpu mine: its MFU is not known.*give --mfu"),
        (("recipes/quickstart.yaml", "--flops", "1e21"), r"--flops: no such option"),
        (("recipes/quickstart.yaml", "--write", "x.yaml"), r"--write: no such option"),
        (("compare", "recipes/quickstart.yaml", "--measure"), r"--measure: no such option"),
        (("models", "--law", "kaplan"), r"--law is for one model; give its name"),
        (("--flops", "1e21", "--width", "768", "--aspect", "32"), r"--flops: no such option"),
        (("--aspect", "32"), r"give two of --parameters, --width and --aspect"),
        (("--parameters", "1e6", "--width", "64", "--aspect", "32"), r"give two of --parameters, --width and --aspect"),
        (("--parameters", "182.4e6", "--aspect", "7", "--family", "llama2"), r"heads of 7: rotary positions need an even size"),
        (("models", "gpt2-xl", "training.max_steps=5"), r"models takes one name"),
        (("recipes",), r"recipes cannot be read: Is a directory; give a YAML file of recipes/"),
        (("",), r"recipe '' does not exist"),
        (("x" * 5000,), r"recipe 'xxx.*5,002 characters.* does not exist"),
        (("recipes/llama2_1.36b.yaml", "model.hidden_size=100000000000000000001"), r"is not a multiple of num_attention_heads"),
        (("--flops", "1e21", "--family", ""), r"--family : not a family"),
        (("--flops", "1e21", "--write", "/proc/mine.yaml"), r"--write /proc/mine.yaml cannot be written"),
        (("recipes/quickstart.yaml", "--measure", "--mfu", "0.4"), r"--mfu 0.4 and --measure both set the MFU"),
        (("models", "gpt5"), r"models gpt5: not a published model; known here: gpt2-large"),
        (("compare",), r"compare needs recipes"),
        (("recipes/lama2.yaml",), r"recipe recipes/lama2.yaml does not exist; did you mean"),
        (("recipes/gpt2_1.36b.yaml", "model.n_head=18"), r"n_embd = 2432 is not a multiple of n_head = 18; nearest n_head"),
        (("--flops", "1e21", "--write", "/nowhere/mine.yaml"), r"--write /nowhere/mine.yaml: give a .yaml file in a folder"),
        (("--flops", "1e21", "--write", "recipes/llama2_1.36b.yaml"), r"exists already; delete it, or give another name"),
    ],
)  # fmt: skip
def test_bad_input_names_value_rule_and_remedy(arguments, message):
    with pytest.raises(UserError, match=message):
        main(list(arguments), "plan")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("recipes/x.yaml seed=3 --full", "recipe recipes/x.yaml seed=3 --full"),
        ("--gpu a6000 --json recipes/x.yaml", "recipe --gpu a6000 --json recipes/x.yaml"),
        ("--price=2 --flops 1e21", "budget --price=2 --flops 1e21"),
        ("--constrain-tokens-per-parameter 10 30 --flops 1e21", "budget --constrain-tokens-per-parameter 10 30 --flops 1e21"),
        ("--json compare a.yaml b.yaml", "compare --json a.yaml b.yaml"),
        ("--gpu h100 models llama-3-8b", "models --gpu h100 llama-3-8b"),
        ("--parameters 1e8 --aspect=32", "shape --parameters 1e8 --aspect=32"),
        ("recipe recipes/x.yaml", "recipe recipes/x.yaml"),
        ("--help", "--help"),
    ],
)
def test_command_lines_without_a_subcommand_are_accepted(old, new):
    assert with_subcommand(old.split()) == new.split()


@pytest.mark.parametrize("question", ["", "recipe", "budget", "compare", "models", "shape"])
def test_help_fits_80_columns(capsys, question):
    with pytest.raises(SystemExit):
        main([*question.split(), "--help"])
    shown = capsys.readouterr().out
    assert f"isoflop plan {question}".strip() in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_any_folder_will_do(plan, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan("llama2_1.36b")["parameters"]["total"] == 1_294_159_104
    written = text("budget", "--gpus", 2, "--gpu", "a6000", "--days", 16, "--write", "mine.yaml")
    assert find("accelerate_configs", written.split("--launch ")[1].split()[0]).is_file()
    assert cost.parameters(load_recipe("mine.yaml").model) == 891_078_144


def test_a_plan_in_a_notebook(write_recipe):
    found = make_plan("recipes/llama2_1.36b.yaml", ["seed=7"], gpu="a6000", num_gpus=2)
    assert found.stats.parameters == 1_294_159_104
    assert "2 x a6000: fits under 2gpu_zero1" in str(found)
    assert "isoflop pretrain recipes/llama2_1.36b.yaml seed=7" in str(found)
    frame = found.to_frame().set_index("launch")
    assert frame.loc["2gpu_zero1", "memory_bytes"] == found.memory_and_time.of("2gpu_zero1").memory.total
    assert frame.loc["2gpu_zero1", "hours_a6000"] == pytest.approx(317, rel=0.01)
    assert found._repr_html_().count("<tr>") == 1 + len(frame)
    loaded = make_plan(load_recipe(write_recipe()))
    assert "next: python" not in str(loaded)
    with pytest.raises(UserError, match=r"overrides = \['seed=1'\] are for a file"):
        make_plan(load_recipe(write_recipe()), ["seed=1"])
    bought = plan_budget(1.36e21, family="llama3", law="hoffmann-rounded")
    assert bought.best.candidate.model.hidden_size == 2560
    assert "best with any D/N" in str(bought)
    with pytest.raises(UserError, match="--flops 0 is not a positive number"):
        plan_budget(0)
