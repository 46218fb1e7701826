"""Run folders as `scripts/pretrain.py` leaves them: exact N, D, FLOPs and losses, and what may not stand side by side."""

import json
import math

import pytest
import yaml
from conftest import TOY_MODELS, metrics_row, summary_with

from isoflop.config.recipe import Recipe
from isoflop.data.manifest import Manifest, PreparedSource, Shard, Split, TokenizerInfo
from isoflop.plan import cost
from isoflop.scaling.laws import LossDecayModel
from isoflop.scaling.runs import measured_runs
from isoflop.utils.errors import UserError

WIDTHS = (16, 32, 64)


def final_loss(parameters, tokens):
    return 1.0 + 40 / parameters**0.34 + 60 / tokens**0.28


def write_run(folder, width=32, steps=100, finished=True, **changes):
    """A run's folder with the three files that are read of it; `changes` are sections of its recipe. Returns its recipe."""
    folder.mkdir(parents=True)
    tree = {
        "model": TOY_MODELS["llama"] | {"hidden_size": width, "intermediate_size": 2 * width},
        "tokenizer": {"train_vocab_size": 300},
        "data": {"source": {"kind": "text", "files": ["texts/*.txt"]}, "prepared_dir": str(folder.parent / "prepared")},
        "training": {"sequence_length": 32, "tokens_per_step": 256, "micro_batch_size": 4, "max_steps": steps},
        "optimizer": {"peak_learning_rate": 3e-3},
        "evaluation": {"sample_tokens": 4},
        "output": {"run_dir": str(folder)},
    }
    tree = {key: tree.get(key, {}) | changes.get(key, {}) for key in tree | changes}
    recipe = Recipe.model_validate(tree)
    last = final_loss(cost.parameters(recipe.model), 256 * steps)
    losses = {step: last * (2 - step / steps) if step % 10 == 0 else None for step in range(1, steps + 1)}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    rows = [metrics_row(step, val_loss=loss) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        flops = 256 * steps * cost.flops_per_token(recipe.model, 32)
        (folder / "summary.json").write_text(json.dumps(summary_with(tokens=256 * steps, flops=flops, val_loss=last)))
    return recipe


def write_manifest(folder, windows):
    facts = {"documents": 1, "bytes": 1, "tokens": 1, "dropped_tokens": 0, "repeated_tokens": 0, "unigram_entropy_nats": None}
    split = Split(windows=windows, shards=[Shard(name="a.arrow", bytes=0, sha256="", windows=windows)], **facts)
    source = PreparedSource(files={}, revision=None, left_out={}, splits={"train": split, "validation": split})
    tokenizer = TokenizerInfo(sha256="", num_ids=300, eos_token_id=0, bos_token_id=None, revision=None)
    facts = {"made_from": {}, "engine": "", "dtype": "uint16", "sequence_length": 32}
    manifest = Manifest(tokenizer=tokenizer, sources={"text": source}, **facts)
    folder.mkdir()
    (folder / "manifest.json").write_text(manifest.model_dump_json())


@pytest.fixture
def sweep(tmp_path):
    """Three sizes, each of 100 and of 200 steps."""
    return {(w, s): write_run(tmp_path / "sweep" / f"w{w}_s{s}", w, s) for w in WIDTHS for s in (100, 200)}


def test_points_and_curves_are_those_of_the_folders(sweep, tmp_path):
    measured = measured_runs([str(tmp_path / "sweep")])
    by_name = dict(zip([curve.name for curve in measured.curves], zip(*measured.points[:4], strict=True), strict=True))
    for (width, steps), recipe in sweep.items():
        n, d = cost.parameters(recipe.model), 256 * steps
        assert by_name[f"w{width}_s{steps}"] == (n, d, d * cost.flops_per_token(recipe.model, 32), final_loss(n, d))
    curve = next(curve for curve in measured.curves if curve.name == "w64_s100")
    assert curve.tokens.tolist() == [2560 * i for i in range(1, 11)]
    assert curve.flops.tolist() == [t * cost.flops_per_token(sweep[64, 100].model, 32) for t in curve.tokens]
    assert curve.loss[4] == pytest.approx(1.5 * curve.loss[-1])
    assert (measured.warnings, measured.notes, measured.counts) == ([], [], "total")
    assert measured.points.unique_tokens is None
    assert measured.origin == (
        "6 runs; tokenizer: a byte-level BPE of 300 entries trained on the data; data: texts/*.txt; sequence length 32"
    )


def test_folders_may_be_given_one_by_one(sweep, tmp_path):
    one_by_one = measured_runs([str(folder) for folder in sorted((tmp_path / "sweep").iterdir())])
    assert one_by_one.points.loss.tolist() == measured_runs([str(tmp_path / "sweep")]).points.loss.tolist()


def test_the_gap_to_the_final_loss_by_share_of_the_tokens(sweep, tmp_path):
    """These runs lie at (2 - share) times their last loss, whatever their size and length."""
    progress = measured_runs([str(tmp_path / "sweep")]).progress
    assert progress.schedule == "cosine"
    assert [gap[0] for gap in progress.gaps] == [0.5, 0.6, 0.7, 0.8, 0.9]
    for share, intercept, *rest in progress.gaps:
        assert intercept == pytest.approx(math.log(math.log(2 - share)))
        assert rest == pytest.approx([0, 0, 0], abs=1e-9)
        assert progress.log_gap(share, 1e6, 1e9) == pytest.approx([math.log(2 - share)] * 3)
    assert progress.log_gap(1.0, 1e6, 1e9) == (0, 0, 0)
    assert isinstance(progress, LossDecayModel)


def test_larger_and_longer_runs_may_still_fall_further(tmp_path):
    """Losses above the last one by a factor exp(0.1 sqrt(N D) / 1e5) at half of the tokens: the law of it is found."""
    for width in WIDTHS:
        for steps in (100, 200):
            folder = tmp_path / "sweep" / f"w{width}_s{steps}"
            recipe = write_run(folder, width, steps)
            fall = 0.1 * math.sqrt(cost.parameters(recipe.model) * 256 * steps) / 1e5
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            last = rows[-1]["val_loss"]
            for row in rows[:-1]:
                row["val_loss"] = last * math.exp(fall) if row["step"] in (10, steps // 2) else None
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    progress = measured_runs([str(tmp_path / "sweep")]).progress
    share, _, by_n, by_d, deviation = progress.gaps[0]
    assert (share, by_n, by_d, deviation) == pytest.approx((0.5, 0.5, 0.5, 0), abs=1e-9)
    assert progress.log_gap(0.5, 1e6, 1e8) == pytest.approx([0.1 * math.sqrt(1e14) / 1e5] * 3)


def test_few_runs_have_no_loss_decay_model(tmp_path):
    from isoflop.scaling.runs import loss_decay

    assert loss_decay([]) is None


def test_runs_of_several_schedules_have_no_loss_decay_model(sweep, tmp_path):
    write_run(tmp_path / "sweep" / "other", 32, 300, schedule={"name": "linear"})
    assert measured_runs([str(tmp_path / "sweep")]).progress is None


def test_an_unfinished_run_is_named_and_left_out(sweep, tmp_path):
    write_run(tmp_path / "sweep" / "late", 32, 300, finished=False)
    measured = measured_runs([str(tmp_path / "sweep")])
    assert len(measured.points.loss) == 6
    assert measured.warnings == [f"{tmp_path}/sweep/late is not finished and is left out"]


def test_a_run_that_diverged_is_named_and_left_out(sweep, tmp_path):
    write_run(tmp_path / "sweep" / "lost", 32, 300)
    summary = tmp_path / "sweep/lost/summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"val_loss": math.nan}))
    measured = measured_runs([str(tmp_path / "sweep")])
    assert len(measured.points.loss) == 6
    assert measured.warnings == ["lost ended at a loss that is not a number and is left out"]


def test_more_tokens_than_the_training_split_has_are_a_warning(sweep, tmp_path):
    write_manifest(tmp_path / "sweep" / "prepared", windows=1000)  # 32,000 tokens; 200 steps are 51,200
    measured = measured_runs([str(tmp_path / "sweep")])
    assert measured.points.unique_tokens.tolist() == [32_000.0] * 6
    assert len(measured.warnings) == 3
    assert measured.warnings[0] == (
        "w16_s200 saw 51,200 tokens of 32,000 (1.60 epochs): repeated tokens are worth less than fresh ones"
    )


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tokenizer": {"train_vocab_size": 310}}, "tokenizer.train_vocab_size: 300 -> 310"),
        (
            {"data": {"source": {"kind": "text", "files": ["other/*"]}}},
            r"data.source.files: \['texts/\*.txt'\] -> \['other/\*'\]",
        ),
        ({"training": {"sequence_length": 64}}, "training.sequence_length: 32 -> 64"),
    ],
)
def test_losses_that_do_not_compare_are_refused(changes, what, sweep, tmp_path):
    write_run(tmp_path / "sweep" / "z", 32, 300, **changes)
    with pytest.raises(UserError, match=rf"z: its losses do not compare with those of w16_s100 \({what}\)"):
        measured_runs([str(tmp_path / "sweep")])


def test_too_few_runs_are_refused(sweep, tmp_path):
    with pytest.raises(UserError, match=r"1 finished runs, and a law of 5 coefficients needs 6 or more; train more"):
        measured_runs([str(tmp_path / "sweep/w16_s100")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no run \(recipe.yaml and metrics.jsonl\)"):
        measured_runs([str(tmp_path / "empty")])
