"""Checkpoints on the Hub: each opens as a model with `revision="step-N"`; they are pushed during training too.

`python -m isoflop.publish.checkpoints RUN` pushes the checkpoints that the repository of the run's recipe lacks. Its exit code is
0, or 2 with one line on stderr. A checkpoint is a commit on the branch `checkpoints`, then a tag on it: a tag always names a
complete model.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from isoflop.checkpoint.folder import list_checkpoints, read_locked, read_trainer_state, step_of, verify
from isoflop.config.loading import load_recipe, to_yaml
from isoflop.plan import cost
from isoflop.publish.card import license_of
from isoflop.publish.files import CARD, RECIPE, Files, model_files, read_metrics
from isoflop.publish.publishing import Target
from isoflop.publish.redaction import published_recipe
from isoflop.publish.sections import remote_code
from isoflop.publish.upload import CHECKPOINTS, MAIN, Repository, client_errors, commit, inspect_repository
from isoflop.train.export import export_checkpoint
from isoflop.train.run_folder import RunFolder
from isoflop.utils.command import run_command
from isoflop.utils.errors import UserError, is_disk_full
from isoflop.utils.io import lock
from isoflop.utils.output import log_to_console

logger = logging.getLogger("isoflop.publish.checkpoints")  # also where this module is `__main__`


def push_checkpoints(target: Target) -> list[str]:
    """Push every complete checkpoint that has no tag in the repository; return the new tags.

    Exports one after the other beside the checkpoints, in fp32: 4 bytes per parameter of disk and of memory. Raises `UserError`.
    """
    pushed: list[str] = []
    with push_lock(target.folder) as exports:
        repository = inspect_repository(target.key, target.repo_id, target.recipe)
        for path in list_checkpoints(target.folder.checkpoints):
            if path.name in repository.tags or step_of(path) % (target.push_every or 1):
                continue
            if files := export(target, path, exports / path.name):
                with client_errors(target.key, target.repo_id, pushed):
                    repository = push(target, repository, path.name, files)
                pushed.append(path.name)
                logger.info("pushed %s, revision %s", target.repo_id, path.name)
            shutil.rmtree(exports, ignore_errors=True)
    return pushed


@contextmanager
def push_lock(folder: RunFolder) -> Iterator[Path]:
    """Allow one push of a run at a time, and yield a folder for its exports; delete what a killed push left there."""
    exports = folder.path / ".publish.partial"
    with lock(folder.path / "publish.lock", f"the push of {folder.path}", "wait for that push"):
        shutil.rmtree(exports, ignore_errors=True)
        try:
            yield exports
        finally:
            shutil.rmtree(exports, ignore_errors=True)


def push(target: Target, repository: Repository, name: str, files: Files) -> Repository:
    """Commit one checkpoint and tag the commit; return the repository's new content."""
    api, repo_id = HfApi(), target.repo_id
    if not repository.commits:
        api.create_repo(repo_id, private=target.private, exist_ok=True)
    if CHECKPOINTS not in repository.commits:
        api.create_branch(repo_id, branch=CHECKPOINTS, exist_ok=True)  # starts with the files of `main`
    before = repository.files.get(CHECKPOINTS, repository.files.get(MAIN, set()))
    oid = commit(repo_id, CHECKPOINTS, files, name, stale=before - set(files) - {".gitattributes"})
    api.create_tag(repo_id, tag=name, revision=oid, exist_ok=True)
    commits, paths = repository.commits | {CHECKPOINTS: oid}, repository.files | {CHECKPOINTS: set(files)}
    return repository._replace(commits=commits, files=paths)


def export(target: Target, checkpoint: Path, export_folder: Path) -> Files | None:
    """Return a checkpoint's files for its revision; None if it is damaged (logged) or was deleted meanwhile."""
    recipe = target.recipe
    try:
        with read_locked(checkpoint):
            if faults := verify(checkpoint):
                logger.warning("%s is damaged (%s): not pushed", checkpoint, "; ".join(faults))
                return None
            export_checkpoint(recipe, checkpoint, export_folder)
            card = checkpoint_card(target, checkpoint)
    except FileNotFoundError:
        if checkpoint.exists():
            raise
        return None
    except Exception as error:  # safetensors and torch wrap the system's errors
        if not is_disk_full(error):
            raise
        needed = 4 * cost.parameters(recipe.model)
        reason = " ".join(str(error).split())
        raise UserError(f"{export_folder}: {reason}; free {needed:,} bytes there, then push again") from None
    return model_files(export_folder) | {CARD: card.encode(), RECIPE: to_yaml(published_recipe(recipe)).encode()}


def checkpoint_card(target: Target, checkpoint: Path) -> str:
    """Return a checkpoint's card: its step and losses; without a validation loss if that step has none."""
    recipe, repo_id = target.recipe, target.repo_id
    step, steps = step_of(checkpoint), recipe.training.num_steps(cost.parameters(recipe.model))
    row = next((row for row in read_metrics(target.folder) if row["step"] == step), read_trainer_state(checkpoint)["row"])
    run = target.folder.path.resolve().name
    losses = f"training loss {row['loss']:.4f}"
    losses += f", validation loss {row['val_loss']:.4f}" if row["val_loss"] is not None else ""
    return f"""---
library_name: transformers
license: {license_of(recipe, target.license)}
pipeline_tag: text-generation
---

# {repo_id.split("/")[-1]}, step {step:,}

A checkpoint of the run `{run}`, after {step:,} of {steps:,} optimizer steps and {row["tokens"]:,} tokens:
{losses} (nats per token). Open it by `from_pretrained("{repo_id}", revision="step-{step}"{remote_code(recipe)})`.
"""


def main(argv: list[str]) -> int:
    """Push a run's checkpoints to the repository of its recipe."""
    log_to_console()
    parser = argparse.ArgumentParser(prog="python -m isoflop.publish.checkpoints", description="Push a run's new checkpoints.")
    parser.add_argument("run", help="a run's folder, e.g. runs/quickstart")
    arguments = parser.parse_args(argv)
    recipe = load_recipe(Path(arguments.run) / "recipe.yaml")
    hub = recipe.hub
    if hub.repo_id is None:
        raise UserError(f"hub.repo_id is not given in {arguments.run}/recipe.yaml; use `isoflop publish` with --repo-id")
    push_checkpoints(Target(RunFolder(arguments.run), recipe, hub.repo_id, hub.private, push_every=hub.push_every))
    return 0


if __name__ == "__main__":
    os.environ.pop("ISOFLOP_REFUSED", None)  # only the training run reports to its launcher
    run_command(lambda: main(sys.argv[1:]))
