"""Scores beside published ones: nearest in size, and a difference called one only beyond the error."""

import json
import os

import pytest
import yaml

from isoflop.evaluate.scores import (
    HEADER,
    PUBLISHED_HEADER,
    Reference,
    Score,
    compare_with_reference,
    nearest_reference,
    read_scores,
    score_markdown,
    score_table,
    scores_of,
    table_rows,
    write_results,
)

RESULTS = {
    "results": {
        "hellaswag": {
            "alias": "hellaswag", "sample_len": 10042, "acc,none": 0.28, "acc_stderr,none": 0.0045, "acc_norm,none": 0.29,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.01, "exact_match_stderr,strict-match": 0.003},
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 40.5, "word_perplexity_stderr,none": 0.5},
        "a group": {"alias": "a group"},
    },
    "higher_is_better": {
        "hellaswag": {"acc": True, "acc_norm": True}, "gsm8k": {"exact_match": True}, "wikitext": {"word_perplexity": False},
        "a group": {"acc": None},
    },
    "n-samples": {
        "hellaswag": {"original": 10042, "effective": 10042}, "gsm8k": {"original": 1319, "effective": 100},
        "wikitext": {"original": 62, "effective": 62},
    },
}  # fmt: skip
REFERENCES = {
    "source": "Radford et al. 2019, table 3",
    "models": [
        {"name": "GPT-2 117M", "parameters": 124_439_808, "scores": {"wikitext": {"word_perplexity": 29.41}}},
        {"name": "GPT-2 345M", "parameters": 354_823_168, "scores": {"wikitext": {"word_perplexity": 22.76}}},
    ],
}


def test_accuracies_stand_beside_chance_and_scores_beside_their_tasks_note(tmp_path):
    """Perplexities have none, nor have results of older runs; published columns stand only where there are some."""
    configs = {"wikitext": {"metadata": {"version": 1.0, "note": "of its own text"}}, "hellaswag": {"metadata": None}}
    results = RESULTS | {"chance": {"hellaswag": 0.25}, "configs": configs}
    scores = {(score.task, score.metric): score for score in scores_of(results)}
    assert {key: score.chance for key, score in scores.items()} == {
        ("hellaswag", "acc"): 0.25, ("hellaswag", "acc_norm"): 0.25, ("gsm8k", "exact_match,strict-match"): None,
        ("wikitext", "word_perplexity"): None,
    }  # fmt: skip
    shown = score_table(list(scores.values()), None)
    assert shown.splitlines()[0].split() == ["task", "metric", "value", "standard", "error", "chance", "documents"]
    assert shown.splitlines()[1].split() == ["hellaswag", "acc", "0.2800", "0.0045", "0.2500", "10,042"]
    assert shown.splitlines()[-1] == "wikitext: of its own text"
    assert max(map(len, shown.splitlines())) <= 100
    write_results(results, tmp_path, None)
    page = (tmp_path / "results.md").read_text()
    assert "| hellaswag | acc_norm | 0.2900 | n/a | 0.2500 | 10,042 |" in page
    assert page.endswith("\n\n- wikitext: of its own text\n")


@pytest.fixture
def references(tmp_path):
    folder = tmp_path / "references"
    folder.mkdir()
    (folder / "gpt2.yaml").write_text(yaml.safe_dump(REFERENCES))
    return folder


def test_scores_are_those_of_lm_evals_results():
    assert scores_of(RESULTS) == [
        Score("hellaswag", "acc", 0.28, 0.0045, 10042, True),
        Score("hellaswag", "acc_norm", 0.29, None, 10042, True),
        Score("gsm8k", "exact_match,strict-match", 0.01, 0.003, 100, True),
        Score("wikitext", "word_perplexity", 40.5, 0.5, 62, False),
    ]


@pytest.mark.parametrize(
    ("parameters", "model"),
    [(1_000_000, "GPT-2 117M"), (209_000_000, "GPT-2 117M"), (211_000_000, "GPT-2 345M"), (2_000_000_000, "GPT-2 345M")],
)
def test_the_nearest_reference_is_that_of_the_nearest_ratio_of_parameters(references, parameters, model):
    """The geometric mean of both sizes, 210.1M, is the border."""
    found = nearest_reference("wikitext", "word_perplexity", parameters, references)
    assert found.model == model
    assert found.source == "Radford et al. 2019, table 3"


def test_nothing_published_is_nothing_found(references):
    assert nearest_reference("wikitext", "bits_per_byte", 1, references) is None
    assert nearest_reference("piqa", "acc", 1, references) is None
    assert nearest_reference("wikitext", "word_perplexity", None, references) is None


@pytest.mark.parametrize(
    ("value", "stderr", "higher", "printed"),
    [
        (0.30, 0.01, True, "within the error"),
        (0.3135, 0.0100, True, "within the error"),
        (0.3138, 0.0100, True, "+0.0198, better"),
        (0.25, 0.01, True, "-0.044, worse"),
        (0.25, 0.01, False, "-0.044, better"),
        (0.25, None, True, "-0.044, error unknown"),
    ],
)
def test_a_difference_is_one_beyond_196_standard_errors(value, stderr, higher, printed):
    assert compare_with_reference(Score("t", "m", value, stderr, 10, higher), Reference("GPT-2", 1, 0.294, "s")) == printed


def test_the_published_tables_stand_beside_the_scores():
    """eval/references of this checkout: a 124M model's scores beside OpenAI's and the reproductions'."""
    header, rows = table_rows([Score("wikitext", "word_perplexity", 37.5, 0.4, 62, False)], 124_475_904)
    assert header == HEADER + PUBLISHED_HEADER
    assert rows == [["wikitext", "word_perplexity", "37.5000", "0.4000", "n/a", "62", "GPT-2 117M", "29.4100", "+8.09, worse"]]
    page = score_markdown([Score("lambada_openai", "acc", 0.46, 0.007, 5153, True)], 117_000_000)
    assert page.splitlines()[0] == f"| {' | '.join(HEADER + PUBLISHED_HEADER)} |"
    assert "| GPT-2 117M | 0.4599 | within the error |" in page
    assert "- GPT-2 117M: Radford et al. 2019, table 3" in page


def test_the_newest_results_of_a_run_count(tmp_path):
    newer = json.loads(json.dumps(RESULTS))
    newer["results"] = {"hellaswag": {"acc,none": 0.5}}
    newer["n-samples"] = {"hellaswag": {"effective": 5}}
    write_results(RESULTS, tmp_path / "training", 100_000_000)
    write_results(newer, tmp_path / "pretraining", None)
    write_results(newer, tmp_path / "step-5" / "pretraining", None)  # of a checkpoint: not the run's
    os.utime(tmp_path / "training/results.json", (1, 1))
    scores = {(score.task, score.metric): score.value for score in read_scores(tmp_path)}
    assert scores == {
        ("hellaswag", "acc"): 0.5, ("hellaswag", "acc_norm"): 0.29, ("gsm8k", "exact_match,strict-match"): 0.01,
        ("wikitext", "word_perplexity"): 40.5,
    }  # fmt: skip
    assert json.loads((tmp_path / "training/results.json").read_text()) == RESULTS
    assert "| hellaswag | acc | 0.2800 | 0.0045 | n/a | 10,042 |" in (tmp_path / "training/results.md").read_text()
