"""The tasks that need no network, through lm-eval's own command; the suites; the published scores."""

import json
import math
import re
import sys
from collections import Counter

import pytest
import torch
import yaml
from conftest import ROOT, run_command
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from uniform import VOCABULARY, uniform_model

EVAL = ROOT / "eval"
QUESTIONS = [
    {"ctx": "He returns", "endings": ["the self.", "to.", "of the self.", "and to the self."], "label": 1, "text": "the é"},
    {"ctx": "def", "endings": [" x" * 9, "[b] y" * 3, "a", "zz"], "label": 0, "text": "return self"},
    {"ctx": "the self", "endings": ["is", "was", "were", "are to be"], "label": 2, "text": "of and to"},
]


@pytest.fixture(scope="module")
def ours():
    return TaskManager(include_path=str(EVAL), include_defaults=False)


@pytest.fixture(scope="module")
def theirs():
    return TaskManager()


@pytest.fixture(scope="module")
def utils():
    """The module beside the tasks, loaded as lm-eval loads it."""
    return sys.modules[load_yaml(EVAL / "tasks/cbt_cn.yaml")["doc_to_text"].__module__]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the command wrote of the quick suite and both local tasks, for a model without opinions."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    # `revision` is an argument of the model, and reaches the functions of the tasks as well.
    model = f"pretrained={uniform_model(folder / 'model')},revision=main"
    run_command(
        "lm_eval", "--model", "hf", "--model_args", model, "--tasks", "quick,local_hellaswag,local_perplexity", "--device", "cpu",
        "--include_path", EVAL, "--metadata", json.dumps({"file": str(folder / "x.jsonl")}), "--batch_size", "8", "--log_samples",
        "--output_path", folder / "out",
    )  # fmt: skip
    results = json.loads(next((folder / "out").rglob("results_*.json")).read_text())
    files = {re.match(r"samples_(\w+)_\d{4}-", file.name)[1]: file for file in (folder / "out").rglob("samples_*.jsonl")}
    samples = {task: [json.loads(line) for line in file.read_text().splitlines()] for task, file in files.items()}
    return results, samples, AutoTokenizer.from_pretrained(folder / "model")


def requests(sample):
    return [(asked["arg_0"], asked["arg_1"]) for asked in sample["arguments"].values()]


def count(tokenizer, text):
    return len(tokenizer(text)["input_ids"])


def test_every_file_is_a_task_or_a_suite_by_its_name(ours):
    tasks = {file.stem for file in (EVAL / "tasks").glob("*.yaml")} - {"_rolling"}
    suites = {file.stem for file in (EVAL / "suites").glob("*.yaml")}
    assert set(ours.all_subtasks) == tasks
    assert set(ours.all_groups) == suites == {"quick", "gpt2_zero_shot", "pretraining"}


def test_no_name_hides_one_of_lm_evals(ours, theirs):
    assert not set(ours.all_tasks) & set(theirs.all_tasks)


def test_suites_name_tasks_that_exist(ours, theirs):
    for suite in ours.all_groups:
        assert set(ours.task_index[suite].cfg["task"]) <= {*ours.all_subtasks, *theirs.all_subtasks}
    assert [len(ours.task_index[suite].cfg["task"]) for suite in ("gpt2_zero_shot", "pretraining")] == [9, 9]


def test_every_file_says_what_it_is():
    for file in EVAL.rglob("*.yaml"):
        assert file.read_text().startswith("# "), file


def test_the_quick_suite_counts_its_documents(found):
    results, samples, _ = found
    counted = {task: count["effective"] for task, count in results["n-samples"].items()}
    assert counted == {"stdlib_perplexity": 20, "stdlib_continuation": 200, "local_hellaswag": 3, "local_perplexity": 3}
    assert counted == {task: len(rows) for task, rows in samples.items()}


def test_a_uniform_model_needs_the_same_bits_for_every_token(found):
    results, samples, tokenizer = found
    for task in ("stdlib_perplexity", "local_perplexity"):
        texts = [sample["doc"]["text"] for sample in samples[task]]
        bits = sum(count(tokenizer, text) for text in texts) * math.log2(VOCABULARY)
        size = sum(len(text.encode()) for text in texts)
        assert results["results"][task]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-6)
        assert results["results"][task]["byte_perplexity,none"] == pytest.approx(2 ** (bits / size), rel=1e-5)


def test_excerpts_are_of_twenty_modules(found):
    documents = [sample["doc"] for sample in found[1]["stdlib_perplexity"]]
    assert len({document["module"] for document in documents}) == 20
    assert {len(document["text"]) for document in documents} == {4096}


def test_a_uniform_model_guesses_what_follows(found):
    results, samples, tokenizer = found
    right = 0
    for sample in samples["stdlib_continuation"]:
        context, endings, label = sample["doc"]["ctx"], sample["doc"]["endings"], sample["doc"]["label"]
        assert requests(sample) == [(context, "\n" + ending) for ending in endings]
        lengths = [count(tokenizer, f"{context}\n{ending}") - count(tokenizer, context) for ending in endings]
        right += lengths.index(min(lengths)) == label
    assert results["results"]["stdlib_continuation"]["acc,none"] == right / 200
    assert 0.15 < right / 200 < 0.35
    assert 0.15 < results["results"]["stdlib_continuation"]["acc_norm,none"] < 0.35


def test_questions_of_the_standard_library_are_fair(found, utils):
    documents = [sample["doc"] for sample in found[1]["stdlib_continuation"]]
    known = {(name, *pair) for name, source in utils._modules().items() for pair in utils._continuations(source)}
    modules_of = {ending: {name for name, _, other in known if other == ending} for _, _, ending in known}
    for document in documents:
        assert len(set(document["endings"])) == 4
        assert len(document["ctx"].splitlines()) == 6
        right = document["endings"][document["label"]]
        (asked,) = {name for name, context, ending in known if (context, ending) == (document["ctx"], right)}
        wrong = [ending for ending in document["endings"] if ending != right]
        assert all(modules_of[ending] - {asked} for ending in wrong)
        assert max(len(ending.encode()) for ending in document["endings"]) <= 62
    assert all(35 < places < 65 for places in Counter(document["label"] for document in documents).values())


def test_the_questions_are_the_same_every_time(found, utils):
    assert list(utils.stdlib_questions()["validation"]) == [sample["doc"] for sample in found[1]["stdlib_continuation"]]


def test_a_local_file_is_asked_raw(found):
    results, samples, tokenizer = found
    right = 0
    for row, sample in zip(QUESTIONS, samples["local_hellaswag"], strict=True):
        assert requests(sample) == [(row["ctx"], f" {ending}") for ending in row["endings"]]
        lengths = [count(tokenizer, f"{row['ctx']} {ending}") for ending in row["endings"]]
        right += lengths.index(min(lengths)) == int(row["label"])
    assert results["results"]["local_hellaswag"]["acc,none"] == right / 3
    assert [sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples["local_perplexity"]] == [
        "the é",
        "return self",
        "of and to",
    ]


def test_a_local_task_without_its_file_says_how_to_name_one(ours):
    with pytest.raises(ValueError, match=re.escape("""no file given; name one: --metadata '{"file": "x.jsonl"}'""")):
        ours.load("local_hellaswag")


def test_a_line_without_a_column_is_named(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "one"}\n\n{"page": "two"}\n')
    manager = TaskManager(include_path=str(EVAL), include_defaults=False, metadata={"file": str(file)})
    with pytest.raises(ValueError, match=re.escape(f"{file}: document 2 has no text; every line must have text")):
        manager.load("local_perplexity")


@pytest.mark.parametrize(
    ("tokenized", "text"),
    [
        ("do n't -LRB- yet -RRB- .", "don't (yet)."),
        ("`` Kind , '' printed he ; `` and nice . ''", '"Kind," printed he; "and nice."'),
        ('He printed : " It is over , " ( Sept. 1 ) for $ 5 million .', 'He printed: "It is over," (Sept. 1) for $5 million.'),
        ("the boys ' toys are Bob 's , ` he printed ' .", "the boys' toys are Bob's, 'he printed'."),
        ("I 've 10 % , you 'll see : they 'd 're 'm !", "I've 10%, you'll see: they'd're'm!"),
        ("mr. <unk> is chairman of <unk> n.v. for N years", "mr. <unk> is chairman of <unk> n.v. for N years"),
    ],
)
def test_tokenized_text_is_joined_up(utils, tokenized, text):
    assert utils.detokenize(tokenized) == text


# Radford et al. 2019, table 3, in the paper's units and order: percent, perplexity, bits.
TABLE_3 = {
    ("lambada_openai", "perplexity"): [35.13, 15.60, 10.87, 8.63],
    ("lambada_openai", "acc"): [45.99, 55.48, 60.12, 63.24],
    ("cbt_cn", "acc"): [87.65, 92.35, 93.45, 93.30],
    ("cbt_ne", "acc"): [83.4, 87.1, 88.0, 89.05],
    ("wikitext", "word_perplexity"): [29.41, 22.76, 19.93, 18.34],
    ("ptb", "word_perplexity"): [65.85, 47.33, 40.31, 35.76],
    ("enwik8", "bits_per_byte"): [1.16, 1.01, 0.97, 0.93],
    ("text8", "bits_per_byte"): [1.17, 1.06, 1.02, 0.98],
    ("wikitext_103", "word_perplexity"): [37.50, 26.37, 22.05, 17.48],
    ("lm1b", "word_perplexity"): [75.20, 55.72, 44.575, 42.16],
}


def references(name):
    return yaml.safe_load((EVAL / "references" / f"{name}.yaml").read_text())


def test_references_hold_the_published_table():
    models = references("gpt2")["models"]
    for number, model in enumerate(models):
        held = {(task, metric): value for task, scores in model["scores"].items() for metric, value in scores.items()}
        assert held == {
            (task, metric): pytest.approx(values[number] / (100 if metric == "acc" else 1), abs=1e-9)
            for (task, metric), values in TABLE_3.items()
        }
    assert [model["name"] for model in models] == [f"GPT-2 {size}" for size in ("117M", "345M", "762M", "1542M")]


def test_references_of_the_suite_are_those_of_the_table(ours):
    assert set(ours.task_index["gpt2_zero_shot"].cfg["task"]) == {task for task, _ in TABLE_3}


def test_references_count_parameters_as_transformers_does():
    counted = []
    for layers, hidden, heads in ((12, 768, 12), (24, 1024, 16), (36, 1280, 20), (48, 1600, 25)):
        with torch.device("meta"):
            counted.append(GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=hidden, n_head=heads)).num_parameters())
    assert [model["parameters"] for model in references("gpt2")["models"]] == counted


def test_hellaswag_references_are_per_token():
    assert [(model["parameters"], model["scores"]) for model in references("hellaswag_124m")["models"]] == [
        (124439808, {"hellaswag_completion": {"acc_per_token": 0.294}}),
        (124475904, {"hellaswag_completion": {"acc_per_token": 0.28}}),
        (123587328, {"hellaswag_completion": {"acc_per_token": 0.32}}),
    ]


def test_references_name_metrics_that_their_tasks_have(ours, theirs):
    index = theirs.task_index | ours.task_index
    for file in (EVAL / "references").glob("*.yaml"):
        page = references(file.stem)
        assert page["source"]
        for task, scores in ((task, scores) for model in page["models"] for task, scores in model["scores"].items()):
            config = index[task].cfg
            metrics = {metric["metric"] for metric in config["metric_list"]}
            assert set(scores) <= metrics | ({"acc_per_token"} if config["output_type"] == "multiple_choice" else set())
