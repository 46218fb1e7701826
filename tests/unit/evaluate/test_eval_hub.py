"""Tasks whose data come from the Hub, read from a stand-in that holds each dataset in the layout that a task's comment claims."""

import json
import math
import re
import subprocess
import sys

import hub as standin
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from transformers import AutoTokenizer
from uniform import VOCABULARY, uniform_model

pytestmark = pytest.mark.processes

CONVERTED = "refs/convert/parquet"
RUN = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
lm = HFLM(pretrained=sys.argv[1], device="cpu", batch_size=8)
manager = TaskManager(include_path=sys.argv[2])
every = {}
for name in sys.argv[3:]:
    found = simple_evaluate(lm, tasks=[name], task_manager=manager, limit=2, bootstrap_iters=0)
    for task, samples in found["samples"].items():
        every[task] = {
            "requests": samples[0]["arguments"],
            "target": samples[0]["target"],
            "documents": found["n-samples"][task]["original"],
            "scores": {key.removesuffix(",none"): value for key, value in found["results"][task].items()},
        }
print(json.dumps(every))
"""
LOAD = """
import sys
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
print({name: len(task.eval_docs) for name, task in manager.load(sys.argv[2:])["tasks"].items()})
"""

HELLASWAG = {
    "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
    "ctx": "[header] A man is sitting on a roof. he", "source_id": "activitynet~v_-JhWjGDPHMY", "split": "val",
    "endings": ["is using wrap to wrap skis.", "is ripping tiles off. [step] Look.", "is holding a cube.", "starts."],
    "split_type": "indomain", "label": "3",
}  # fmt: skip
STORY = {
    "sentences": [f"Line {i} , she printed ." for i in range(1, 20)] + ["He did n't know `` why '' -LRB- yet -RRB- ."],
    "question": "`` Oh , '' printed the XXXXX 's maid , `` it is late ; we must go . ''",
    "answer": "queen",
    "options": ["king", "queen", "dog", "cat", "mouse", "bird", "house", "tree", "ring", "boat"],
}
READ = " ".join(f"Line {i}, she printed." for i in range(1, 20)) + ' He didn\'t know "why" (yet). "Oh," printed the'
PAGE = " \n = Robert Boulter = \n \n Robert Boulter is an actor , born @-@ in 2000 's London . \n"
UNKNOWN = PAGE.replace("Boulter", "<unk>")
ARC = {"id": "1", "question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
BOOLQ = {"question": "is it so", "passage": "It is so.", "idx": 0, "label": 1}
PIQA = {"goal": "Boil", "sol1": "heat", "sol2": "cool", "label": 0}
WINOGRANDE = {"sentence": "Ann saw Bea, so _ waved.", "option1": "Ann", "option2": "Bea", "answer": "1"}
WRONG = {"distractor1": "a", "distractor2": "b", "distractor3": "c"}
SENTENCES = [{"sentence": f" no it was n't black monday number {i} "} for i in range(250)]
HEADLINE = {"text": 'He printed : " It is n\'t over , " ( again ) .'}
TEXT8 = "anarchism originated as a term " * 8000
# One byte over 5,000,000 behind the first letters, and that one is half of an é.
ENWIK8 = "<mediawiki>é" + "<page/>\n" * 624_999 + "</media"


def split_files(*splits, folder="data"):
    """Files of a folder with one part a split, as `push_to_hub` names them."""
    return {split: f"{folder}/{split}-00000-of-00001.parquet" for split in splits}


ALL = ("train", "validation", "test")
# (dataset, branch or commit): {configuration: (rows, files by split)}; a converted branch has no card, so no configurations.
DATASETS = {
    ("Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76"): {"default": ([HELLASWAG] * 3, split_files(*ALL))},
    ("Rowan/hellaswag", "main"): {"default": ([HELLASWAG] * 3, split_files(*ALL))},
    ("EleutherAI/wikitext_document_level", "main"): {
        name: ([{"page": page}] * 3, {split: f"{name}/{name}-{split}.parquet" for split in ALL})
        for name, page in (("wikitext-103-v1", UNKNOWN), ("wikitext-2-raw-v1", PAGE))
    },
    ("cam-cst/cbt", "main"): {name: ([STORY] * 3, split_files(*ALL, folder=name)) for name in ("CN", "NE")},
    ("afmck/text8", "main"): {"default": ([{"text": TEXT8}], split_files(*ALL))},
    ("ptb-text-only/ptb_text_only", CONVERTED): {
        None: (SENTENCES, {split: f"penn_treebank/{split}/0000.parquet" for split in ALL})
    },
    ("billion-word-benchmark/lm1b", "8d52bfd3cc2819fc1166dbb8144c328e2690de3e"): {
        None: ([HEADLINE] * 10_500, {split: f"plain_text/{split}/0000.parquet" for split in ("train", "test")})
    },
    ("LTCB/enwik8", CONVERTED): {None: ([{"text": ENWIK8}], {"train": "enwik8-raw/train/0000.parquet"})},
    ("EleutherAI/lambada_openai", "main"): {"default": ([{"text": "You know, printed Tom to Jim"}] * 3, split_files("test"))},
    ("allenai/ai2_arc", "main"): {name: ([ARC] * 3, split_files(*ALL, folder=name)) for name in ("ARC-Easy", "ARC-Challenge")},
    ("baber/piqa", "main"): {"default": ([PIQA] * 3, split_files("train", "validation"))},
    ("allenai/winogrande", "main"): {"winogrande_xl": ([WINOGRANDE] * 3, split_files(*ALL, folder="winogrande_xl"))},
    ("allenai/openbookqa", "main"): {"main": ([{"question_stem": "Fire is", **ARC}] * 3, split_files(*ALL, folder="main"))},
    ("allenai/sciq", "main"): {
        "default": ([{"question": "What?", "support": " It is d.", "correct_answer": "d", **WRONG}] * 3, split_files(*ALL))
    },
    ("aps/super_glue", "main"): {"boolq": ([BOOLQ] * 3, split_files(*ALL, folder="boolq"))},
}


def publish(hub, folder):
    """Commit every dataset, with the card that the Hub's own converter writes: its configurations, and their rows by split."""
    for number, ((name, revision), configurations) in enumerate(DATASETS.items()):
        configs, infos = [], []
        for config, (rows, files) in configurations.items():
            for path in files.values():
                file = folder / str(number) / path
                file.parent.mkdir(parents=True, exist_ok=True)
                compression = "none" if "train" in path else "snappy"  # another file, as the client fetches equal ones once
                pq.write_table(pa.Table.from_pylist(rows), file, compression=compression)
            patterns = [{"split": split, "path": path.replace("00000-of-00001.parquet", "*")} for split, path in files.items()]
            configs.append({"config_name": config, "data_files": patterns})
            splits = [{"name": split, "num_bytes": 1, "num_examples": len(rows)} for split in files]
            infos.append({"config_name": config, "splits": splits, "download_size": 1, "dataset_size": 1})
        if None not in configurations:
            card = yaml.safe_dump({"configs": configs, "dataset_info": infos})
            (folder / str(number) / "README.md").write_text(f"---\n{card}---\n")
        hub.add("dataset", name, folder / str(number), revision=revision)


def run(hub, folder, script, *arguments, **env):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    env = hub.env(folder / "home") | env
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The stand-in, and a folder with a model in `model`, whose `home` keeps what was fetched."""
    folder = tmp_path_factory.mktemp("eval_hub")
    uniform_model(folder / "model", positions=1024)
    with standin.Hub() as hub:
        publish(hub, folder)
        yield hub, folder


@pytest.fixture(scope="module")
def asked(served):
    """By task: what it asks of the model for its first document, how many it has, and the scores of the first two."""
    hub, folder = served
    return json.loads(
        run(hub, folder, RUN, folder / "model", ROOT / "eval", "hellaswag_completion", "gpt2_zero_shot", "pretraining")
    )


def test_hellaswag_is_asked_raw(asked):
    task = asked["hellaswag_completion"]
    assert task["requests"] == [[HELLASWAG["ctx"], " " + ending] for ending in HELLASWAG["endings"]]
    assert task["target"] == 3
    assert task["documents"] == 3
    assert task["scores"]["acc"] == 1.0  # "starts." has the fewest tokens, which is all that this model sees


@pytest.mark.parametrize("name", ["cbt_cn", "cbt_ne"])
def test_the_book_test_scores_each_choice_with_the_rest_of_the_sentence(asked, name):
    task = asked[name]
    assert task["requests"] == [[READ, f' {option}\'s maid, "it is late; we must go."'] for option in STORY["options"]]
    assert task["target"] == STORY["options"].index("queen")
    assert task["documents"] == 3
    assert task["scores"]["acc"] == 0.0  # "queen" has not the fewest tokens


LOADED_BY_LM_EVAL = "Rowan|allenai|aps|baber|EleutherAI/lambada_openai|EleutherAI/wikitext_document_level wikitext-2"
TEXTS = {
    "wikitext_103": ("\n= Robert <unk> =\n\nRobert <unk> is an actor, born-in 2000's London.\n", 3),
    "ptb": ("".join(f"no it wasn't black monday number {i}\n" for i in range(100)), 3),
    "lm1b": ('He printed: "It isn\'t over," (again).\n', 10_000),
    "enwik8": ("<page/>\n" * 12_500, 50),
    "text8": (TEXT8[:100_000], 3),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_scored_as_documents(asked, name):
    text, documents = TEXTS[name]
    assert asked[name]["requests"] == [[text]]
    assert asked[name]["documents"] == documents


@pytest.mark.parametrize(("name", "words"), [("ptb", 900), ("lm1b", 15), ("wikitext_103", 19)])
def test_perplexity_is_per_word_of_the_tokenized_text(asked, served, name, words):
    """PTB and 1BW: tokens and an end of sentence, 8 + 1 and 14 + 1. WikiText as lm-eval: 17, and an empty one at each end."""
    text = TEXTS[name][0]
    if name == "ptb":  # the second document of the two that were scored has other numbers
        text += "".join(f"no it wasn't black monday number {i}\n" for i in range(100, 200))
        words *= 2
    expected = math.exp(tokens(served, text) * math.log(VOCABULARY) / words)
    assert asked[name]["scores"]["word_perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_bits_are_per_byte_of_the_text_itself(asked, served, name):
    text = {"enwik8": "<page/>\n" * 25_000, "text8": TEXT8[:200_000]}[name]
    parts = [text[: len(text) // 2], text[len(text) // 2 :]]
    bits = sum(tokens(served, part) for part in parts) * math.log2(VOCABULARY)
    assert asked[name]["scores"]["bits_per_byte"] == pytest.approx(bits / len(text), rel=1e-6)


def tokens(served, text):
    return len(AutoTokenizer.from_pretrained(served[1] / "model")(text)["input_ids"])


def test_our_tasks_fetch_the_scored_file_alone(asked, served):
    sent = [re.sub(f"/resolve/(main|{CONVERTED}|[0-9a-f]+)/", " ", path) for path in served[0].sent if path.endswith(".parquet")]
    files = {path.removeprefix("/datasets/") for path in sent if "/api/" not in path}
    assert sorted(file for file in files if not re.match(LOADED_BY_LM_EVAL, file)) == [
        "EleutherAI/wikitext_document_level wikitext-103-v1/wikitext-103-v1-test.parquet",
        "LTCB/enwik8 enwik8-raw/train/0000.parquet",
        "afmck/text8 data/test-00000-of-00001.parquet",
        "billion-word-benchmark/lm1b plain_text/test/0000.parquet",
        "cam-cst/cbt CN/validation-00000-of-00001.parquet",  # NE's is the same here, so that the client has it already
        "ptb-text-only/ptb_text_only penn_treebank/test/0000.parquet",
    ]


def test_what_was_fetched_is_found_without_a_network(asked, served):
    hub, folder = served
    before = len(hub.requests)
    names = ["cbt_cn", "wikitext_103", "ptb", "enwik8", "text8"]
    loaded = run(hub, folder, LOAD, ROOT / "eval", *names, HF_HUB_OFFLINE="1")
    assert loaded == str({name: asked[name]["documents"] for name in names})
    assert len(hub.requests) == before


def test_lm_evals_own_tasks_run_in_the_suites(asked):
    assert asked["lambada_openai"]["requests"] == [["You know, printed Tom to", " Jim"]]
    assert set(asked["lambada_openai"]["scores"]) >= {"acc", "perplexity"}
    assert asked["wikitext"]["requests"] == [[TEXTS["wikitext_103"][0].replace("<unk>", "Boulter")]]
    assert asked["hellaswag"]["requests"][1][1] == " is ripping tiles off. Look."
    assert asked["arc_easy"]["requests"] == asked["arc_challenge"]["requests"]
    assert asked["arc_easy"]["requests"] == [["Question: Which is hot?\nAnswer:", f" {text}"] for text in ("ice", "fire")]
    assert asked["piqa"]["requests"] == [["Question: Boil\nAnswer:", " heat"], ["Question: Boil\nAnswer:", " cool"]]
    assert asked["winogrande"]["requests"] == [["Ann saw Bea, so Ann", " waved."], ["Ann saw Bea, so Bea", " waved."]]
    assert asked["openbookqa"]["requests"] == [["Fire is", " ice"], ["Fire is", " fire"]]
    assert asked["sciq"]["requests"][3] == ["It is d.\nQuestion: What?\nAnswer:", " d"]
    assert asked["boolq"]["requests"] == [["It is so.\nQuestion: is it so?\nAnswer:", answer] for answer in (" no", " yes")]
    assert all(asked[name]["documents"] == 3 for name in ("lambada_openai", "hellaswag", "arc_easy", "winogrande", "boolq"))
