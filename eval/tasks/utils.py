"""Functions that the tasks beside this file name by `!function`: lm-eval imports them by path, without isoflop.

Documents come from single files of the Hub, from local files or from the sources of Python's standard library; texts that came
tokenized for parsers are joined up again, and long ones cut into documents that processes can share.
"""

import ast
import json
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import hf_hub_download

Document = dict[str, Any]

TEST_BYTES = 5_000_000  # of enwik8: by custom the last 5 MB are the test set
PIECE_CHARACTERS = 100_000  # of a long text, a document; a cut costs the first token its context, as does each window's edge
PTB_SENTENCES = 100  # a document: 2,000 words
LM1B_SENTENCES = 10_000  # one thirtieth of the held-out ones

BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}
JOINS = [
    (r'" ([^"]*) "', r'"\1"'),
    (r"`` ?| ?''", '"'),
    (r"` ", "'"),
    (r" (?=(?:n't|'s|'re|'ve|'ll|'d|'m)\b)", ""),
    (r" '(?= |$)", "'"),
    (r" (?=[.,;:!?%)\]}])", ""),
    (r"(?<=[(\[{$£]) ", ""),
]

MODULE_BYTES = range(10_000, 80_000)
MODULES = 20
EXCERPT_CHARACTERS = 4096
QUESTIONS = 200
QUESTION_LINES, ENDING_LINES = 8, 2
ENDING_BYTES = 62  # with the line break before it, a model of 64 positions takes it even byte by byte


def detokenize(text: str) -> str:
    """Undo the Penn Treebank's tokenization, so that text looks as on the web: `do n't -LRB- yet -RRB- .` is `don't (yet).`"""
    for tag, bracket in BRACKETS.items():
        text = text.replace(tag, bracket)
    for pattern, replacement in JOINS:
        text = re.sub(pattern, replacement, text)
    return text


def pieces(rows: Dataset) -> Dataset:
    """One long text, cut into documents."""
    text = rows[0]["text"]
    return Dataset.from_dict({"text": [text[i : i + PIECE_CHARACTERS] for i in range(0, len(text), PIECE_CHARACTERS)]})


def enwik8_test(rows: Dataset) -> Dataset:
    """The last 5,000,000 bytes of the single row that holds all, a character cut in two left out."""
    tail = rows[0]["text"].encode()[-TEST_BYTES:].decode(errors="ignore")
    return pieces(Dataset.from_dict({"text": [tail]}))


def ptb_documents(rows: Dataset) -> Dataset:
    """Consecutive sentences as lines of one document: the corpus is running text."""
    sentences = list(rows["sentence"])
    groups = [sentences[i : i + PTB_SENTENCES] for i in range(0, len(sentences), PTB_SENTENCES)]
    return Dataset.from_list([_tokenized_document(group) for group in groups])


def lm1b_documents(rows: Dataset) -> Dataset:
    """Each sentence a document: the corpus is shuffled sentences."""
    return Dataset.from_list([_tokenized_document([text]) for text in rows[:LM1B_SENTENCES]["text"]])


def _tokenized_document(sentences: Sequence[str]) -> Document:
    """With its words as the benchmarks count them: tokens, and one end a sentence (82,430 in PTB's test set)."""
    text = "\n".join(detokenize(sentence.strip()) for sentence in sentences)
    return {"text": text + "\n", "words": sum(len(sentence.split()) + 1 for sentence in sentences)}


def per_word(doc: Document, results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Perplexity per word of the tokenized original, whatever text stood for it."""
    return {"word_perplexity": (results[0], doc["words"])}


def cbt_context(doc: Document) -> str:
    """Twenty sentences, and the question up to its gap."""
    return _around_the_gap(doc)[0].rstrip()


def cbt_choices(doc: Document) -> list[str]:
    """Each candidate with the space before and the rest of the sentence behind it."""
    before, after = _around_the_gap(doc)
    space = before[len(before.rstrip()) :]
    return [f"{space}{option}{after}" for option in doc["options"]]


def _around_the_gap(doc: Document) -> tuple[str, str]:
    before, _, after = detokenize(" ".join([*doc["sentences"], doc["question"]])).partition("XXXXX")
    return before, after


def hub_rows(split: str, hub: dict[str, str], **_: Any) -> dict[str, Dataset]:
    """The rows of one Parquet file on the Hub: `repo_id`, `filename`, `revision`.

    `load_dataset` would fetch the training set as well, or with `data_files` not find its own cache when there is no network. The
    keys stand in a mapping of their own because lm-eval passes the model's arguments too, of which `revision` is one.
    """
    return {split: Dataset.from_parquet(hf_hub_download(repo_type="dataset", **hub))}


def local_rows(split: str, columns: Sequence[str], file: str | None = None, **_: Any) -> dict[str, Dataset]:
    """JSON lines from the file that `--metadata` names; lm-eval hands over the rest of its metadata as well.

    Raises `ValueError` without a file, or where a line lacks a column: lm-eval would take the column's name for the text.
    """
    if file is None:
        raise ValueError("""no file given; name one: --metadata '{"file": "x.jsonl"}'""")
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if missing := [column for column in columns if column not in row]:
            raise ValueError(f"{file}: document {number} has no {', '.join(missing)}; every line must have {', '.join(columns)}")
    return {split: Dataset.from_list([{column: row[column] for column in columns} for row in rows])}


def stdlib_texts(**_: Any) -> dict[str, Dataset]:
    """The first 4 KB of twenty modules."""
    return {
        "test": Dataset.from_list([{"module": name, "text": source[:EXCERPT_CHARACTERS]} for name, source in _modules().items()])
    }


def stdlib_questions(**_: Any) -> dict[str, Dataset]:
    """What follows in a function: its next lines, or lines of another module's; in HellaSwag's columns."""
    draw = random.Random(0)
    known = [(module, *question) for module, source in _modules().items() for question in _continuations(source)]
    rows = []
    for module, context, ending in draw.sample(known, QUESTIONS):
        others = sorted({other for name, _, other in known if name != module} - {ending})
        label, endings = draw.randrange(4), draw.sample(others, 3)
        rows.append({"ctx": context, "endings": [*endings[:label], ending, *endings[label:]], "label": label})
    return {"validation": Dataset.from_list(rows)}


def _modules() -> dict[str, str]:
    """Sources of modules of the standard library, spread over the alphabet; the same ones for one release of Python."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in folder.glob("[a-z]*.py") if file.stat().st_size in MODULE_BYTES)
    return {file.stem: file.read_text(encoding="utf-8") for file in files[:: len(files) // MODULES][:MODULES]}


def _continuations(source: str) -> Iterator[tuple[str, str]]:
    """(some lines, the next lines) of functions where these are short enough, without blank lines and outer indentation."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            lines = [line.rstrip() for line in source.split("\n")[node.lineno - 1 : node.end_lineno] if line.strip()]
            for end in range(QUESTION_LINES, len(lines) + 1, QUESTION_LINES):
                asked = textwrap.dedent("\n".join(lines[end - QUESTION_LINES : end])).split("\n")
                context, ending = "\n".join(asked[:-ENDING_LINES]), "\n".join(asked[-ENDING_LINES:])
                if len(ending.encode()) <= ENDING_BYTES:
                    yield context, ending
