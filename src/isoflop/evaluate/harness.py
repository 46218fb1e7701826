"""lm-eval inside the package: tasks, standard errors, and evaluation of a saved model or of one in training.

Imports lm-eval, which takes seconds; import this module only if tasks are requested. lm-eval's values are unchanged; this module
adds `acc_per_token` and a standard error for every metric that has one in closed form.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from lm_eval.api import metrics as aggregations
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate, simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import hash_string, simple_parse_args_string

from isoflop.config.recipe import Evaluation
from isoflop.config.shipped import find
from isoflop.data.hub import explain_hub_error
from isoflop.evaluate.scores import EVAL
from isoflop.train.evaluation import untouched_random_state
from isoflop.utils.errors import UserError, nearest

LARGEST_BATCH = 64  # as in lm-eval
LOGITS_BYTES = 2**30  # of one batch in fp32; lm-eval holds them twice (logits, log-softmax), unlike training

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings about defaults would break the progress bar


class Interrupted(Exception):
    """Some rank received a signal during an evaluation."""


def task_folders() -> list[str]:
    """Return the folders of tasks and suites; those of the working directory's `eval/` override the package's."""
    own = Path("eval")
    return [str(EVAL), *([str(own)] if own.is_dir() and own.resolve() != EVAL.resolve() else [])]


def load_tasks(key: str, names: Sequence[str], metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Load lm-eval's tasks by name or YAML file, with their datasets; a suite, group or tag stands for all its tasks.

    `key` is the option that named them. Raises `UserError` for an unknown name, and for a dataset that cannot be loaded.
    """
    folders = task_folders()
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    registered = [_register(key, name, manager) for name in names]
    if not all(_is_complete(name, manager) for name in registered):
        manager = TaskManager(include_path=folders, metadata=metadata)  # indexes 14,000 task files in seconds
        registered = [_register(key, name, manager) for name in names]
    tasks: dict[str, Any] = {}
    for name, known_as in zip(names, registered, strict=True):
        try:
            tasks |= manager.load([known_as])["tasks"]
        except KeyError:
            hint = _nearest(name, manager)
            raise UserError(f"{key}: {name!r} is neither a suite of eval/ nor lm-eval's task{hint}") from None
        except Exception as error:  # of datasets, of the Hub's client, of a task's own functions
            reason = explain_hub_error(error, name) or f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"{key}: {name!r} cannot be loaded: {reason}. If its dataset cannot be downloaded here, download it on a machine"
                " with a network (HF_HOME is its cache), or leave the task out"
            ) from error
    return tasks


def _register(key: str, name: str, manager: TaskManager) -> str:
    """Return the name by which a manager knows a task or suite; register that of a YAML file first."""
    if not name.endswith(".yaml"):
        return name
    file = find("eval", name)
    try:
        entry, config = TaskIndex.entry_from_path(file), load_yaml(file, resolve_func=False)
    except Exception as error:  # of YAML, and of lm-eval's own tags
        raise UserError(f"{key}: {name!r} is not a task file of lm-eval: {' '.join(str(error).split())}") from None
    if entry is None:
        raise UserError(f"{key}: {name!r} names neither a task nor a group; add `task: NAME` or `group: NAME`")
    entry.name, entry.cfg = config.get("group") or config["task"], config  # of a group lm-eval takes the members for its name
    manager.task_index[entry.name] = entry
    return str(entry.name)


def _is_complete(name: str, manager: TaskManager) -> bool:
    """Whether a manager knows a name and all its members; lm-eval makes empty tasks of a group's unknown members."""
    entry = manager.task_index.get(name)
    members = (entry.cfg or {}).get("task", []) if entry else []
    return entry is not None and (isinstance(members, str) or all(member in manager.task_index for member in members))


def run_tasks(
    model: str,
    pretrained: str,
    tasks: dict[str, Any],
    *,
    backend: str,
    model_args: str,
    batch_size: str,
    device: str | None,
    limit: int | None,
) -> dict[str, Any] | None:
    """Return lm-eval's results for the model in `pretrained`, recorded under the name `model`; None on ranks but the first."""
    tracker = EvaluationTracker().general_config_tracker
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments = {"pretrained": pretrained, **simple_parse_args_string(model_args)}
    results: dict[str, Any] | None = simple_evaluate(
        model=(lm := _open(model, backend, arguments, {"batch_size": batch_size, "device": device})),
        tasks=list(tasks.values()),
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        bootstrap_iters=0,  # `add_errors` has them in closed form
        log_samples=True,
    )
    if results is None:
        return None
    results["task_hashes"] = {
        task: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
        for task, samples in results["samples"].items()
    }
    add_errors(results, tasks, lm)
    recorded = arguments | {"pretrained": model}  # not the temporary folder of an exported checkpoint
    results["config"] |= {"model": backend, "model_args": recorded, "batch_size": batch_size, "device": device}
    tracker.log_experiment_args(backend, recorded, None, None, True)
    tracker.log_end_time()
    return results | asdict(tracker)


def _open(model: str, backend: str, arguments: dict[str, Any], settings: dict[str, str]) -> LM:
    try:
        return get_model(backend).create_from_arg_obj(arguments, settings)
    except (OSError, ImportError, ValueError) as error:
        reason = explain_hub_error(error, str(arguments["pretrained"]), "model") or " ".join(str(error).split())
        raise UserError(
            f"{model!r} cannot be opened by lm-eval's {backend!r}: {reason}; give a run folder, one of its checkpoints, a folder"
            " with config.json, or user/name on the Hub"
        ) from error


def _nearest(name: str, manager: TaskManager) -> str:
    hint = nearest(name, list(manager.all_tasks))
    return hint if "did you mean" in hint else "; `lm_eval ls tasks` lists them"


def add_errors(results: dict[str, Any], tasks: dict[str, Any], lm: LM) -> None:
    """Add `acc_per_token`, closed-form standard errors and chance levels to lm-eval's results; remove the documents."""
    results["chance"] = {}
    for name, samples in results.pop("samples").items():
        task, values = tasks[name], results["results"][name]
        aggregation = task.aggregation()
        if task.OUTPUT_TYPE == "multiple_choice" and samples:
            results["chance"][name] = chance_level(task, samples)
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


def chance_level(task: Any, samples: list[dict[str, Any]]) -> float:
    """Return the accuracy of guessing at a multiple-choice task: the mean share of right choices over its documents."""
    right = [len(sample["target"]) if isinstance(sample["target"], list) else 1 for sample in samples]
    choices = [len(task.doc_to_choice(sample["doc"])) for sample in samples]
    return float(sum(map(operator.truediv, right, choices)) / len(samples))


def acc_per_token(task: Any, sample: dict[str, Any], lm: TemplateLM) -> float:
    """Return 1 if the right choice has the greatest mean log-probability per token, else 0.

    The GPT-2 124M reproductions score HellaSwag so; lm-eval's `acc_norm` divides by characters instead. Source: Karpathy,
    build-nanogpt and llm.c, `hellaswag.py`.
    """
    choices = task.doc_to_choice(sample["doc"])
    lengths = [len(lm._encode_pair(*arguments)[1]) for arguments in sample["arguments"][: len(choices)]]
    means = [response[0] / length for response, length in zip(sample["filtered_resps"], lengths, strict=False)]
    target = sample["target"]
    right = [choices.index(t) if isinstance(t, str) else t for t in (target if isinstance(target, list) else [target])]
    return float(int(np.argmax(means)) in right)


def standard_error(aggregate: Callable[..., float], values: list[Any]) -> float | None:
    """Return the standard error over documents of a mean, or of a function of one by the delta method; None for other metrics.

    A perplexity exp(-m) has exp(-m) times the error of m. A mean weighted by words or bytes is a ratio of two sums; its error
    follows from the residuals (Cochran, Sampling Techniques, 1977, section 2.11). lm-eval resamples the first and gives no error
    for the second.
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
    """lm-eval's model around one in training; the ranks share the documents.

    Every rank calls the model equally often with batches of one size, since each call gathers sharded weights. lm-eval pads the
    requests for that, and batch sizes here do not depend on a rank's own documents.
    """

    def __init__(self, causal_lm: Any, tokenizer: Any, accelerator: Accelerator, interrupted: Callable[[], bool]) -> None:
        bf16 = None if accelerator.mixed_precision == "no" else torch.bfloat16
        super().__init__(
            pretrained=causal_lm,
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval sets its padding token
            backend="causal",
            mixed_precision_dtype=bf16,
            logits_cache=False,  # it groups requests, which makes batches uneven
        )
        self.accelerator = accelerator  # gathers the results of the ranks
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._interrupted = interrupted
        self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode each pair once per run: every evaluation has the same documents."""
        pair = (context, continuation)
        if pair not in self._encoded:
            self._encoded[pair] = super()._encode_pair(context, continuation)
        return self._encoded[pair]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        self._fit_batch(int(self.all_gather(torch.tensor([longest], device=self.device)).max()))
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Compute lm-eval's rolling log-likelihoods in batches of full windows."""
        self._fit_batch(self.max_length)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _fit_batch(self, longest: int) -> None:
        """Set the batch size that keeps the logits within `LOGITS_BYTES`; `longest` is over all ranks."""
        fitting = LOGITS_BYTES // (4 * self.model.config.vocab_size * min(longest, self.max_length))
        self.batch_size_per_gpu = max(1, min(LARGEST_BATCH, fitting))

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        if self._interrupted():
            raise Interrupted
        logits: torch.Tensor = super()._model_call(inps, attn_mask, labels)
        return logits


class Downstream:
    """A recipe's tasks, evaluated every so many steps on the model in training."""

    def __init__(self, evaluation: Evaluation, lm: InMemory) -> None:
        """Load the tasks. Raises `UserError` for one that cannot be loaded, or has fewer documents than there are ranks."""
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
        """Return lm-eval's results for the tasks that are due at a step, on the main process; {} on others, and if none is due.

        Collective. None if a signal interrupted it. The model is in train mode afterwards, and all random states are unchanged.
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
    """Return the tasks as lm-eval's `evaluate` takes them; default: zero-shot, as in `simple_evaluate`."""
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # as in lm-eval
    return {"tasks": tasks, "groups": {}, "group_map": {}}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide lm-eval's progress bars: the run has its own."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
