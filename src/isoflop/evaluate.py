"""Evaluate: a model's scores by lm-eval, beside published ones.

Entered by `evaluate_model`. What is evaluated is a run, one of its checkpoints, a local folder or a name on the Hub; under
`accelerate launch` the GPUs share the documents.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import hash_string, simple_parse_args_string

from isoflop.checkpoint.folder import TRAINER_STATE, find_faults, newest_whole
from isoflop.data.hub import why_not
from isoflop.errors import UserError
from isoflop.export import export_checkpoint
from isoflop.harness import add_errors, load_tasks
from isoflop.recipe_file import load_recipe
from isoflop.run_folder import RunFolder
from isoflop.scores import RESULTS, require_own_results, score_table, scores_of, write_results


class Request(NamedTuple):
    """What is evaluated, and how; the fields are those of scripts/run_eval.py."""

    model: str
    suite: str = "quick"
    backend: str = "hf"
    model_args: str = ""
    batch_size: str = "8"
    device: str | None = None
    limit: int | None = None
    metadata: dict[str, Any] | None = None
    output: str | None = None


def evaluate_model(request: Request) -> int:
    """Run a suite, write `results.json` (as lm-eval does) and `results.md`, print the table; returns the exit code.

    Raises `UserError` for a model or a task that is not there.
    """
    tasks = load_tasks("--suite", request.suite.split(","), request.metadata)
    with model_folder(request.model) as (pretrained, results_folder):
        folder = Path(request.output) if request.output else results_folder / request.suite
        require_own_results(folder)
        arguments = {"pretrained": pretrained, **simple_parse_args_string(request.model_args)}
        results = run(request, arguments, tasks)
    if results is None:  # not the first process
        return 0
    parameters = results["config"].get("model_num_parameters")
    write_results(results, folder, parameters)
    print(score_table(scores_of(results), parameters))
    print(f"results: {folder / RESULTS}, {folder / 'results.md'}")
    return 0


def run(request: Request, arguments: dict[str, Any], tasks: dict[str, Any]) -> dict[str, Any] | None:
    """lm-eval's results with its own record of model and machine; None on processes other than the first."""
    tracker = EvaluationTracker().general_config_tracker
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        lm = get_model(request.backend).create_from_arg_obj(arguments, {"batch_size": request.batch_size, "device": device})
    except (OSError, ImportError, ValueError) as error:
        reason = why_not(error, str(arguments["pretrained"]), "model") or " ".join(str(error).split())
        raise UserError(
            f"{request.model!r} cannot be opened by lm-eval's {request.backend!r}: {reason}; give a run's folder, one of its"
            " checkpoints, a folder with config.json, or user/name on the Hub"
        ) from error
    results: dict[str, Any] | None = simple_evaluate(
        model=lm,
        tasks=list(tasks.values()),
        task_manager=TaskManager(include_defaults=False),
        limit=request.limit,
        bootstrap_iters=0,  # errors are added in closed form
        log_samples=True,
    )
    if results is None:
        return None
    results["task_hashes"] = {
        task: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
        for task, samples in results["samples"].items()
    }
    add_errors(results, tasks, lm)
    named = arguments | {"pretrained": request.model}  # not where a checkpoint was exported to
    results["config"] |= {"model": request.backend, "model_args": named, "batch_size": request.batch_size, "device": device}
    tracker.log_experiment_args(request.backend, named, None, None, True)
    tracker.log_end_time()
    return results | asdict(tracker)


@contextlib.contextmanager
def model_folder(model: str) -> Iterator[tuple[str, Path]]:
    """What lm-eval opens for a run, a checkpoint, a folder or a Hub name, and where results go.

    A checkpoint, or the newest one of a run without a model yet, is exported to a temporary folder beside it.
    """
    path = Path(model)
    if (path / TRAINER_STATE).is_file():
        run_folder, checkpoint = RunFolder(str(path.parent.parent)), path
    elif (path / "recipe.yaml").is_file():
        run_folder = RunFolder(model)
        if run_folder.model.is_dir():
            yield str(run_folder.model), run_folder.evaluations
            return
        newest = newest_whole(run_folder.checkpoints)
        if newest is None:
            raise UserError(f"{model} has neither a model nor a whole checkpoint yet; wait for its first checkpoint")
        checkpoint = newest
    else:
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(f"{model} is a folder without config.json or recipe.yaml; give a run's folder or a saved model's")
        yield model, Path("evaluations") / model.strip("/").replace("/", "__")
        return
    if faults := find_faults(checkpoint):
        raise UserError(f"{checkpoint} is not whole ({'; '.join(faults)}); take another one")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=run_folder.path) as target:
        export_checkpoint(load_recipe(run_folder.path / "recipe.yaml"), checkpoint, Path(target))
        yield target, run_folder.evaluations / checkpoint.name
