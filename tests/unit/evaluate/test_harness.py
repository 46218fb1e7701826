"""lm-eval on the model in training: the same numbers on any number of ranks, and nothing of training moves."""

import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import curve_of, metrics_of, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api import metrics as aggregations
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from isoflop.config.recipe import Evaluation
from isoflop.evaluate.harness import Downstream, InMemory, Interrupted, load_tasks, standard_error
from isoflop.evaluate.scores import scores_of
from isoflop.utils.errors import UserError

pytestmark = pytest.mark.processes

WORDS = ["def", "self", "return", "import", "value", "name", "for", "in", "if", "not", "is", "None", "class", "print", "open"]
COMMON = {"num_fewshot": 0, "dataset_path": "json", "metadata": {"version": 1.0}}
METRICS = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Files of three small tasks, one of each kind of request: multiple choice, rolling, and the last word."""
    folder, dice = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def phrase(low, high):
        return " ".join(dice.choices(WORDS, k=dice.randint(low, high)))

    def task(name, rows, **fields):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = folder / f"{name}.yaml"
        fields |= COMMON | {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        file.write_text(yaml.safe_dump(fields))
        return str(file)

    choices = [{"ctx": phrase(3, 12), "endings": [phrase(1, 6) for _ in range(4)], "label": i % 4} for i in range(37)]
    texts = [{"text": phrase(20, 90)} for _ in range(11)]
    norm, perplexity = {"metric": "acc_norm", **METRICS[0]} | {"metric": "acc_norm"}, {"metric": "perplexity"}
    rolling = [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    last = {"doc_to_text": "{{text.rsplit(' ', 1)[0]}}", "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}"}
    asked = {"doc_to_text": "{{ctx}}", "doc_to_target": "{{label}}", "doc_to_choice": "endings"}
    whole = {"doc_to_text": "", "doc_to_target": "{{text}}"}
    return {
        "toy_choice": task("toy_choice", choices, output_type="multiple_choice", metric_list=[*METRICS, norm], **asked),
        "toy_rolling": task("toy_rolling", texts, output_type="loglikelihood_rolling", metric_list=rolling, **whole),
        "toy_last_word": task("toy_last_word", texts, output_type="loglikelihood", metric_list=[*METRICS, perplexity], **last),
    }


@pytest.fixture(scope="module")
def model(uninterrupted):
    """Folder of an exported toy model."""
    return f"{uninterrupted['llama'].output.run_dir}/model"


def in_memory(model, interrupted=lambda: False):
    loaded = AutoModelForCausalLM.from_pretrained(model).train()
    return InMemory(loaded, AutoTokenizer.from_pretrained(model), Accelerator(cpu=True), interrupted)


def downstream(model, tasks, **settings):
    return Downstream(Evaluation(tasks=dict.fromkeys(tasks.values(), 5), **settings), in_memory(model))


def test_the_numbers_are_lm_evals_own(model, tasks):
    mine = downstream(model, tasks).results(step=5, last=False)
    lm = HFLM(pretrained=model, batch_size=4, device="cpu")
    theirs = simple_evaluate(lm, tasks=list(tasks.values()), task_manager=TaskManager(include_defaults=False))
    for task, values in theirs["results"].items():
        for key, value in values.items():
            if isinstance(value, float) and key != "perplexity_stderr,none":  # resampled there
                assert mine["results"][task][key] == pytest.approx(value, rel=1e-5), (task, key)
    assert mine["n-samples"] == {name: {"original": n, "effective": n} for name, n in zip(tasks, (37, 11, 11), strict=True)}
    assert "samples" not in mine


def test_the_choice_is_also_made_by_the_mean_over_tokens(model, tasks):
    """As `hellaswag.py` of the 124M reproductions does: cross-entropy of the ending's tokens, their mean, the least of four."""
    (score,) = [
        s for s in scores_of(downstream(model, tasks).results(5, False)) if (s.task, s.metric) == ("toy_choice", "acc_per_token")
    ]
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    right = []
    for line in Path(tasks["toy_choice"]).with_suffix(".jsonl").read_text().splitlines():
        row, losses = json.loads(line), []
        for ending in row["endings"]:
            context, both = tokenizer(row["ctx"]).input_ids, tokenizer(f"{row['ctx']} {ending}").input_ids
            kept = both[-65:]
            with torch.no_grad():
                logits = loaded(torch.tensor([kept[:-1]])).logits[0]
            of_ending = len(both) - len(context)
            losses.append(torch.nn.functional.cross_entropy(logits[-of_ending:], torch.tensor(kept[-of_ending:])).item())
        right.append(float(np.argmin(losses) == row["label"]))
    assert score.value == statistics.mean(right)
    assert score.stderr == pytest.approx(statistics.stdev(right) / math.sqrt(37))
    assert (score.num_documents, score.higher_is_better) == (37, True)


def test_training_is_the_same_bit_for_bit_with_and_without(toy_recipe, run_in_process, tasks):
    plain = toy_recipe("plain")
    watched = toy_recipe(
        "watched", evaluation__tasks={tasks["toy_choice"]: 2, tasks["toy_rolling"]: 5}, evaluation__sample_every=3
    )
    for recipe in (plain, watched):
        run_in_process(recipe)
    assert curve_of(watched) == curve_of(plain)
    assert weights_of(watched) == weights_of(plain)
    steps = {row["step"]: {key.split("/")[0] for key in row if "/" in key} for row in metrics_of(watched)}
    choice, rolling = {"toy_choice"}, {"toy_rolling"}
    assert steps == {
        1: set(), 2: choice, 3: set(), 4: choice, 5: rolling, 6: choice, 7: set(), 8: choice, 9: set(), 10: choice | rolling,
    }  # fmt: skip


def test_no_random_state_moves_and_the_model_trains_on(model, tasks):
    measured = downstream(model, tasks)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert measured.results(5, False)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert measured._lm.model.training
    assert measured.results(step=4, last=False) == {}
    assert measured.results(step=4, last=True)


def test_a_signal_is_answered_in_the_middle(model, tasks):
    answers = iter([False, False, True])
    measured = Downstream(Evaluation(tasks={tasks["toy_choice"]: 1}), in_memory(model, lambda: next(answers)))
    measured._lm._fit_batch = lambda longest: None  # batches of one: the third call of many
    assert measured.results(1, False) is None
    assert measured._lm.model.training
    with pytest.raises(StopIteration):
        next(answers)
    assert issubclass(Interrupted, Exception)


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["2gpu_ddp", "2gpu_fsdp2", "2gpu_zero1"])
def test_ranks_share_the_documents(ranks, write_recipe, run_in_process, toy_recipe, tasks, config):
    """37 and 11 documents over two ranks: neither divides."""
    evaluation = {"evaluation__tasks": dict.fromkeys(tasks.values(), 4), "training__max_steps": 4}
    alone = toy_recipe("alone", **evaluation)
    run_in_process(alone)
    cpu = {"ACCELERATE_USE_CPU": "true"} if config == "2gpu_ddp" else {}
    ranks.run(config, write_recipe("shared", training__micro_batch_size=2, **evaluation), env=cpu)
    shared = toy_recipe("shared", training__micro_batch_size=2, **evaluation)
    one, two = metrics_of(alone)[-1], metrics_of(shared)[-1]
    scores = [key for key in one if "/" in key]
    assert len(scores) == 2 * (3 + 3 + 2)
    for key in scores:
        assert two[key] == pytest.approx(one[key], rel=1e-4), key


def test_a_task_that_is_not_there_ends_the_run_before_it_starts(toy_recipe, run_in_process, tmp_path):
    with pytest.raises(UserError, match=r"evaluation.tasks: 'helaswag' is neither a suite .* did you mean hellaswag\?"):
        run_in_process(toy_recipe("a", evaluation__tasks={"helaswag": 5}))
    (tmp_path / "gone.yaml").write_text(
        yaml.safe_dump(
            {**COMMON, "task": "gone", "test_split": "test", "dataset_kwargs": {"data_files": {"test": "/gone.jsonl"}}}
        )
    )
    with pytest.raises(UserError, match=r"evaluation.tasks: .*gone.yaml' cannot be loaded: .* on a machine with a network"):
        run_in_process(toy_recipe("a", evaluation__tasks={str(tmp_path / "gone.yaml"): 5}))
    assert not (tmp_path / "runs/a/metrics.jsonl").exists()


def test_too_few_documents_for_the_ranks_are_refused(model, tasks):
    lm = in_memory(model)
    lm._world_size = 16
    with pytest.raises(UserError, match=r"'toy_rolling' would run on 11 documents, which 16 processes cannot share"):
        Downstream(Evaluation(tasks={tasks["toy_rolling"]: 1}), lm)


def test_fewer_documents_where_asked(model, tasks):
    results = downstream(model, tasks, task_documents=7).results(5, False)
    assert {count["effective"] for count in results["n-samples"].values()} == {7}


def test_suites_stand_for_their_tasks():
    assert set(load_tasks("--suite", ["quick"])) == {"stdlib_continuation", "stdlib_perplexity"}
    # A suite with members of lm-eval's own gets as far as the first dataset, which is not here.
    with pytest.raises(UserError, match=r"--suite: 'pretraining' cannot be loaded: .*hellaswag"):
        load_tasks("--suite", ["pretraining"])


def test_a_task_says_itself_what_it_lacks():
    with pytest.raises(UserError, match=r"'local_perplexity' cannot be loaded: ValueError: no file given; name one: --metadata"):
        load_tasks("--suite", ["local_perplexity"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, -0.1), st.integers(1, 40)), min_size=2, max_size=40))
def test_the_error_of_a_weighted_mean_is_that_of_a_mean_where_weights_are_equal(pairs):
    """With equal weights the ratio is a mean, whose error has a formula of its own."""
    equal = [(value, 5) for value, _ in pairs]
    expected = aggregations.mean_stderr([value / 5 for value, _ in pairs])
    assert standard_error(aggregations.bits_per_byte, equal) == pytest.approx(expected / math.log(2), abs=1e-9)
    perplexity = aggregations.weighted_perplexity(equal)
    assert standard_error(aggregations.weighted_perplexity, equal) == pytest.approx(expected * perplexity, rel=1e-6, abs=1e-9)


def test_the_error_of_a_ratio_is_what_resampling_finds():
    dice = np.random.default_rng(0)
    weights = dice.integers(5, 50, 400)
    values = [(float(-2.0 * w + dice.normal(0, 6)), int(w)) for w in weights]
    resampled = [aggregations.bits_per_byte([values[i] for i in dice.integers(0, 400, 400)]) for _ in range(1500)]
    assert standard_error(aggregations.bits_per_byte, values) == pytest.approx(statistics.stdev(resampled), rel=0.08)
    likelihoods = dice.normal(-3, 1.5, 400).tolist()
    resampled = [aggregations.perplexity(dice.choice(likelihoods, 400).tolist()) for _ in range(1500)]
    assert standard_error(aggregations.perplexity, likelihoods) == pytest.approx(statistics.stdev(resampled), rel=0.08)
    assert standard_error(aggregations.median, [1.0, 2.0, 3.0]) is None
    assert standard_error(aggregations.mean, [1.0]) is None
