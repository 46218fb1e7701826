"""The command `publish`: a finished run to `main` in one commit, its checkpoints to revisions.

Entered by `publish` (scripts/publish.py), and by `publish_run` where the recipe names a repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants

from isoflop.checkpoint.folder import list_checkpoints, step_of
from isoflop.errors import UserError
from isoflop.publish.card import UNKNOWN_LICENSE, license_of, model_card
from isoflop.publish.checkpoints import publish_checkpoints
from isoflop.publish.files import CARD, Files, has_tensorboard, run_files, size_bytes
from isoflop.publish.sections import remote_code
from isoflop.publish.upload import MAIN, commit, look, plain_errors, require_name
from isoflop.recipe import Recipe
from isoflop.recipe_file import load_recipe
from isoflop.run_folder import RunFolder
from isoflop.tables import table


class Request(NamedTuple):
    """What is published, and where to; the fields are those of scripts/publish.py."""

    run: str
    repo_id: str | None = None
    """The recipe's `hub.repo_id` where not given; so are `private` and `license`."""
    private: bool | None = None
    license: str | None = None
    checkpoints: bool = False
    dry_run: bool = False


def publish(request: Request) -> int:
    """Publish a run, or show what would be; returns the exit code. Raises `UserError`, which says what was published before."""
    folder = RunFolder(request.run)
    if not (folder.path / "recipe.yaml").is_file():
        raise UserError(f"{request.run} is no run's folder: it has no recipe.yaml; give one that scripts/pretrain.py wrote")
    recipe = load_recipe(folder.path / "recipe.yaml")
    key, repo_id = ("--repo-id", request.repo_id) if request.repo_id else ("hub.repo_id", recipe.hub.repo_id)
    if repo_id is None:
        raise UserError(f"--repo-id is not given, nor is hub.repo_id in {folder.path}/recipe.yaml; add --repo-id user/name")
    require_name(key, repo_id)
    finished = folder.finished() is not None
    if not finished and not request.checkpoints:
        raise UserError(
            f"{request.run} is not finished: it has no summary.json; let the command that began it go on to the end, or push the"
            " checkpoints that are there with --checkpoints"
        )
    private = recipe.hub.private if request.private is None else request.private
    if request.dry_run:
        return show(folder, recipe, repo_id, request, finished)
    tags: list[str] = []
    if request.checkpoints:
        tags = publish_checkpoints(folder, recipe, repo_id, private, recipe.hub.push_every, request.license, key)
        print(f"checkpoints: {', '.join(tags) or 'none'} new", flush=True)
    if finished:
        publish_run(folder, recipe, repo_id, private, request.license, key, tags)
    return 0


def publish_run(
    folder: RunFolder,
    recipe: Recipe,
    repo_id: str,
    private: bool,
    license: str | None = None,
    key: str = "hub.repo_id",
    published: Sequence[str] = (),
) -> None:
    """Put a finished run on `main` in one commit, and print where it is. Raises `UserError`, which names what was `published`."""
    there = look(key, repo_id, recipe, published)
    files = files_of(folder, recipe, repo_id, license, there.tags)
    print(f"{repo_id}: {len(files)} files, {sum(map(size_bytes, files.values())):,} bytes", flush=True)
    with plain_errors(key, repo_id, published):
        if there.private is None:
            HfApi().create_repo(repo_id, private=private, exist_ok=True)
        elif there.private != private:
            print(f"{repo_id} stays {'private' if there.private else 'public'}: that is changed in its settings on the Hub")
        oid = commit(repo_id, MAIN, files, f"{folder.path.resolve().name}, {recipe.model.model_type}")
    news = "is whole, nothing was new" if oid == there.commits.get(MAIN) else f"commit {oid[:8]}"
    opening = f'AutoModelForCausalLM.from_pretrained("{repo_id}"{remote_code(recipe)})'
    print(f"{constants.ENDPOINT}/{repo_id}: {news}\nopen it: {opening}", flush=True)


def files_of(folder: RunFolder, recipe: Recipe, repo_id: str, license: str | None, tags: list[str]) -> Files:
    """All files of a finished run's repository; prints what the run lacks for a whole one."""
    if license_of(recipe, license) == UNKNOWN_LICENSE:
        print(f"license: {UNKNOWN_LICENSE}; name one with --license, e.g. --license apache-2.0")
    if not has_tensorboard():
        print("logs/: not made, tensorboard is not installed; for the curves on the Hub: pip install tensorboard")
    steps = [tag for tag in tags if tag.removeprefix("step-").isdecimal()]
    return {CARD: str(model_card(folder, repo_id, license, steps)).encode()} | run_files(folder, recipe)


def show(folder: RunFolder, recipe: Recipe, repo_id: str, request: Request, finished: bool) -> int:
    """Print what would be published, without asking the Hub."""
    every, listed = recipe.hub.push_every or 1, list_checkpoints(folder.checkpoints) if request.checkpoints else []
    tags = [path.name for path in listed if step_of(path) % every == 0]
    rows = [[f"{repo_id}, revision {tag}", "model files", ""] for tag in tags]
    card = ""
    if finished:
        files = files_of(folder, recipe, repo_id, request.license, tags)
        rows += [[f"{repo_id}/{path}", _origin(content), f"{size_bytes(content):,}"] for path, content in files.items()]
        content = files[CARD]
        card = content.decode() if isinstance(content, bytes) else ""
    print(table(["to", "from", "bytes"], rows))
    print(f"\n{card}\ndry run: nothing was sent, and nothing written")
    return 0


def _origin(content: Path | bytes) -> str:
    return "made for it" if isinstance(content, bytes) else str(content)
