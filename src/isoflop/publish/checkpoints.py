"""Checkpoints on the Hub: each a model that opens by `revision="step-N"`, pushed while the run goes on.

`python -m isoflop.publish.checkpoints RUN` pushes what the repository of the run's recipe lacks; exit code 0, or 2 with one line
on stderr. A checkpoint is a commit on the branch `checkpoints`, and then a tag on it: a tag never stands for half a model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from isoflop import cost
from isoflop.checkpoint.folder import find_faults, held, list_checkpoints, read_trainer_state, step_of
from isoflop.disk import lock
from isoflop.errors import UserError, is_disk_full, run_command
from isoflop.export import export_checkpoint
from isoflop.publish.card import license_of
from isoflop.publish.files import CARD, RECIPE, Files, model_files, read_metrics
from isoflop.publish.redaction import published_recipe
from isoflop.publish.sections import remote_code
from isoflop.publish.upload import CHECKPOINTS, MAIN, Repository, commit, look, plain_errors
from isoflop.recipe import Recipe
from isoflop.recipe_file import load_recipe, to_yaml
from isoflop.run_folder import RunFolder


def publish_checkpoints(
    folder: RunFolder,
    recipe: Recipe,
    repo_id: str,
    private: bool,
    every: int | None = None,
    license: str | None = None,
    key: str = "hub.repo_id",
) -> list[str]:
    """Push every whole checkpoint (of steps that `every` divides) without a tag in the repository; returns the new tags.

    Exports one after the other beside the checkpoints, in fp32: 4 bytes a parameter of disk, and of memory. Raises `UserError`.
    """
    pushed: list[str] = []
    with one_push(folder) as aside:
        there = look(key, repo_id, recipe)
        for path in list_checkpoints(folder.checkpoints):
            if path.name in there.tags or (every is not None and step_of(path) % every):
                continue
            if files := export(folder, recipe, path, aside / path.name, repo_id, license):
                with plain_errors(key, repo_id, pushed):
                    there = push(repo_id, there, path.name, files, private)
                pushed.append(path.name)
                print(f"pushed {repo_id}, revision {path.name}", flush=True)
            shutil.rmtree(aside, ignore_errors=True)
    return pushed


@contextmanager
def one_push(folder: RunFolder) -> Iterator[Path]:
    """A folder for exports, for one push of a run at a time; what a killed one left there is deleted."""
    aside = folder.path / ".publish.partial"
    with lock(folder.path / "publish.lock", f"the push of {folder.path}", "wait for that push"):
        shutil.rmtree(aside, ignore_errors=True)
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def push(repo_id: str, there: Repository, name: str, files: Files, private: bool) -> Repository:
    """Commit one checkpoint and tag it; returns what is there now."""
    api = HfApi()
    if not there.commits:
        api.create_repo(repo_id, private=private, exist_ok=True)
    if CHECKPOINTS not in there.commits:
        api.create_branch(repo_id, branch=CHECKPOINTS, exist_ok=True)  # holds what `main` does
    before = there.files.get(CHECKPOINTS, there.files.get(MAIN, set()))
    oid = commit(repo_id, CHECKPOINTS, files, name, stale=before - set(files) - {".gitattributes"})
    api.create_tag(repo_id, tag=name, revision=oid, exist_ok=True)
    return there._replace(commits=there.commits | {CHECKPOINTS: oid}, files=there.files | {CHECKPOINTS: set(files)})


def export(folder: RunFolder, recipe: Recipe, checkpoint: Path, target: Path, repo_id: str, license: str | None) -> Files | None:
    """A checkpoint's files for its revision; None where it is broken, which is said, or retention took it meanwhile."""
    try:
        with held(checkpoint):
            if faults := find_faults(checkpoint):
                print(f"{checkpoint} is broken ({'; '.join(faults)}): not pushed", file=sys.stderr, flush=True)
                return None
            export_checkpoint(recipe, checkpoint, target)
            card = checkpoint_card(folder, recipe, checkpoint, repo_id, license)
    except FileNotFoundError:
        if checkpoint.exists():
            raise
        return None
    except Exception as error:  # safetensors and torch wrap the system's
        if not is_disk_full(error):
            raise
        needed = 4 * cost.parameters(recipe.model)
        raise UserError(f"{target}: {' '.join(str(error).split())}; free {needed:,} bytes there, then push again") from None
    return model_files(target) | {CARD: card.encode(), RECIPE: to_yaml(published_recipe(recipe)).encode()}


def checkpoint_card(folder: RunFolder, recipe: Recipe, checkpoint: Path, repo_id: str, license: str | None) -> str:
    """Which step this is, and how good it was then; without a validation loss where none is written yet."""
    step, steps = step_of(checkpoint), recipe.training.num_steps(cost.parameters(recipe.model))
    row = next((row for row in read_metrics(folder) if row["step"] == step), read_trainer_state(checkpoint)["row"])
    losses = f"training loss {row['loss']:.4f}"
    losses += f", validation loss {row['val_loss']:.4f}" if row["val_loss"] is not None else ""
    return f"""---
library_name: transformers
license: {license_of(recipe, license)}
pipeline_tag: text-generation
---

# {repo_id.split("/")[-1]}, step {step:,}

A checkpoint of the run `{folder.path.resolve().name}`, after {step:,} of {steps:,} optimizer steps and {row["tokens"]:,} tokens:
{losses} (nats per token). Open it by `from_pretrained("{repo_id}", revision="step-{step}"{remote_code(recipe)})`.
"""


def main(argv: list[str]) -> int:
    """Push the checkpoints of a run to where its recipe says."""
    parser = argparse.ArgumentParser(prog="python -m isoflop.publish.checkpoints", description="Push a run's new checkpoints.")
    parser.add_argument("run", help="a run's folder, e.g. runs/quickstart")
    arguments = parser.parse_args(argv)
    recipe = load_recipe(Path(arguments.run) / "recipe.yaml")
    if recipe.hub.repo_id is None:
        raise UserError(f"hub.repo_id is not given in {arguments.run}/recipe.yaml; use scripts/publish.py with --repo-id")
    publish_checkpoints(RunFolder(arguments.run), recipe, recipe.hub.repo_id, recipe.hub.private, recipe.hub.push_every)
    return 0


if __name__ == "__main__":
    os.environ.pop("ISOFLOP_REFUSED", None)  # the training run's own word to its launcher, should that have started this
    run_command(lambda: main(sys.argv[1:]))
