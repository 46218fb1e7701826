"""lm-eval as a part: its tasks loaded before anything starts, its numbers with their standard errors, its model in memory.

Imports lm-eval, so it is itself imported only where tasks are asked for. lm-eval's values are left as they are; beside them stand
`acc_per_token` (below) and a standard error for every metric that has one in closed form.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from lm_eval.api import metrics as aggregations
from lm_eval.api.model import LM, TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from isoflop.data.hub import why_not
from isoflop.errors import UserError, nearest
from isoflop.recipe import Evaluation
from isoflop.scores import EVAL
from isoflop.validation import untouched_random_state

LARGEST_BATCH = 64  # lm-eval's own largest
LOGITS_BYTES = 2**30  # of one batch in fp32; lm-eval holds them twice (logits, log-softmax), and training no logits at all

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # else pages about defaults, into the progress bar


class Interrupted(Exception):
    """A signal came to some rank in the middle of an evaluation."""


def load_tasks(key: str, names: Sequence[str], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """lm-eval's tasks by name, their datasets fetched; suites, groups and tags stand for all their tasks.

    `key` is what the user set, for the error. Raises `UserError` for an unknown name, or a dataset that cannot be had.
    """
    manager = TaskManager(include_path=str(EVAL), include_defaults=False, metadata=metadata)
    if not all(_is_whole(name, manager) for name in names):
        manager = TaskManager(include_path=str(EVAL), metadata=metadata)  # reads 14,000 task files, in seconds
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except KeyError:
            hint = _nearest(name, manager)
            raise UserError(f"{key}: {name!r} is neither a suite of eval/ nor lm-eval's task{hint}") from None
        except Exception as error:  # of datasets, of the Hub's client, of a task's own functions
            reason = why_not(error, name) or f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"{key}: {name!r} cannot be loaded: {reason}. Where its dataset cannot be reached from here, fetch it on a"
                " machine with a network (HF_HOME is its cache), or leave the task out"
            ) from error
    return tasks


def _is_whole(name: str, manager: TaskManager) -> bool:
    """Whether a name is known to a manager with all its members: of a group's unknown ones lm-eval would make empty tasks."""
    entry = manager.task_index.get(name)
    if entry is None:
        return Path(name).is_file()
    members = (entry.cfg or {}).get("task", [])
    return isinstance(members, str) or all(member in manager.task_index for member in members)


def _nearest(name: str, manager: TaskManager) -> str:
    hint = nearest(name, list(manager.all_tasks))
    return hint if "did you mean" in hint else "; `lm_eval ls tasks` lists them"


def add_errors(results: dict[str, Any], tasks: dict[str, Any], lm: LM) -> None:
    """Put `acc_per_token` and closed-form standard errors into lm-eval's results, and take the documents out of them."""
    for name, samples in results.pop("samples").items():
        task, values = tasks[name], results["results"][name]
        aggregation = task.aggregation()
        if task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input and isinstance(lm, TemplateLM):
            for sample in samples:
                sample["acc_per_token"] = acc_per_token(task, sample, lm)
            aggregation = {**aggregation, "acc_per_token": aggregations.mean}
            results["higher_is_better"][name]["acc_per_token"] = True
        for metric, aggregate in aggregation.items():
            for filtered in {sample["filter"] for sample in samples}:
                of_documents = [sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample]
                if of_documents:
                    values.setdefault(f"{metric},{filtered}", aggregate(of_documents))
                    stderr = standard_error(aggregate, of_documents)
                    values[f"{metric}_stderr,{filtered}"] = "N/A" if stderr is None else stderr


def acc_per_token(task: Any, sample: dict[str, Any], lm: TemplateLM) -> float:
    """1 where the right choice has the greatest mean log-probability a token: HellaSwag as the GPT-2 124M reproductions score it.

    lm-eval's `acc_norm` divides by characters instead. Source: Karpathy, build-nanogpt and llm.c, `hellaswag.py`.
    """
    choices = task.doc_to_choice(sample["doc"])
    lengths = [len(lm._encode_pair(*arguments)[1]) for arguments in sample["arguments"][: len(choices)]]
    means = [response[0] / length for response, length in zip(sample["filtered_resps"], lengths, strict=False)]
    target = sample["target"]
    right = [choices.index(t) if isinstance(t, str) else t for t in (target if isinstance(target, list) else [target])]
    return float(int(np.argmax(means)) in right)


def standard_error(aggregate: Callable[..., float], values: list[Any]) -> float | None:
    """Standard error over documents of a mean, or of what lm-eval makes of one by the delta method; None for other metrics.

    A perplexity exp(-m) has exp(-m) times the error of m. A mean weighted by words or bytes is a ratio of two sums, whose error
    follows from the residuals (Cochran, Sampling Techniques, 1977, section 2.11). lm-eval resamples the first, and leaves
    the second without an error.
    """
    n = len(values)
    if n < 2:
        return None
    if aggregate in (aggregations.mean, aggregations.perplexity):
        mean = aggregations.mean_stderr(values)
        return float(mean if aggregate is aggregations.mean else aggregations.perplexity(values) * mean)
    if aggregate in (aggregations.weighted_perplexity, aggregations.bits_per_byte):
        sums, weights = np.array(values, dtype=np.float64).T
        residuals = sums - sums.sum() / weights.sum() * weights
        ratio = float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / weights.sum())
        return ratio / math.log(2) if aggregate is aggregations.bits_per_byte else ratio * float(aggregate(values))
    return None


class InMemory(HFLM):  # type: ignore[misc]  # lm-eval comes without types
    """lm-eval's model around one in training, its documents shared out over the ranks.

    Every rank calls the model equally often with batches of one size, so that sharded weights can be gathered in each call:
    lm-eval pads the requests, and here no batch depends on what else a rank has.
    """

    def __init__(self, causal_lm: Any, tokenizer: Any, accelerator: Accelerator, interrupted: Callable[[], bool]) -> None:
        bf16 = None if accelerator.mixed_precision == "no" else torch.bfloat16
        super().__init__(
            pretrained=causal_lm,
            tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token
            backend="causal",
            mixed_precision_dtype=bf16,
            logits_cache=False,  # its groups make batches uneven
        )
        self.accelerator = accelerator  # gathers what the ranks found
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._interrupted = interrupted
        self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encoded once in a run: the documents are the same every time."""
        pair = (context, continuation)
        if pair not in self._encoded:
            self._encoded[pair] = super()._encode_pair(context, continuation)
        return self._encoded[pair]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        self._fit_batch(int(self.all_gather(torch.tensor([longest], device=self.device)).max()))
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As lm-eval's, in batches of full windows."""
        self._fit_batch(self.max_length)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _fit_batch(self, longest: int) -> None:
        """As many sequences as keep the logits within `LOGITS_BYTES`, the longest of any rank deciding."""
        fitting = LOGITS_BYTES // (4 * self.model.config.vocab_size * min(longest, self.max_length))
        self.batch_size_per_gpu = max(1, min(LARGEST_BATCH, fitting))

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        if self._interrupted():
            raise Interrupted
        logits: torch.Tensor = super()._model_call(inps, attn_mask, labels)
        return logits


class Downstream:
    """The tasks of a recipe, ready to be run on the model in training every so many steps."""

    def __init__(self, evaluation: Evaluation, lm: InMemory) -> None:
        """Raises `UserError` for a task that cannot be loaded, or has fewer documents than there are ranks."""
        self._every, self._limit, self._lm = evaluation.tasks, evaluation.task_documents, lm
        self._tasks = {name: load_tasks("evaluation.tasks", [name]) for name in evaluation.tasks}
        for name, task in ((name, task) for tasks in self._tasks.values() for name, task in tasks.items()):
            documents = min(len(task.eval_docs), self._limit or len(task.eval_docs))
            if documents < lm.world_size:
                raise UserError(
                    f"evaluation.tasks: {name!r} would run on {documents} documents, which {lm.world_size} processes cannot"
                    " share; raise evaluation.task_documents, or leave the task out"
                )

    def results(self, step: int, last: bool) -> dict[str, Any] | None:
        """lm-eval's results for the tasks that are due, on the main process ({} on others, or where none is due). Collective.

        None when a signal came meanwhile. The model is back in train mode after it, and no random state has moved.
        """
        due = [name for name, every in self._every.items() if last or step % every == 0]
        tasks = {name: task for group in due for name, task in self._tasks[group].items()}
        if not tasks:
            return {}
        self._lm.model.eval()
        try:
            with quiet(), untouched_random_state(self._lm.device):
                results = evaluate(
                    lm=self._lm, task_dict=zero_shot(tasks), limit=self._limit, bootstrap_iters=0, log_samples=True
                )
        except Interrupted:
            return None
        finally:
            self._lm.model.train()
        if results is None:
            return {}
        add_errors(results, tasks, self._lm)
        return dict(results)


def zero_shot(tasks: dict[str, Any]) -> dict[str, Any]:
    """Tasks as `evaluate` takes them; zero-shot where a task says nothing else, as `simple_evaluate` has it."""
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own
    return {"tasks": tasks, "groups": {}, "group_map": {}}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's bars on stderr: the run has a bar of its own."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
