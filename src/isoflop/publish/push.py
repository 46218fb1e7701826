"""Pushes of a run: `main` in one commit, and a dry run of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from huggingface_hub import HfApi, constants

from isoflop.checkpoint.folder import list_checkpoints, step_of
from isoflop.publish.card import UNKNOWN_LICENSE, license_of, model_card
from isoflop.publish.checkpoints import push_checkpoints
from isoflop.publish.files import CARD, Files, run_files, size_bytes
from isoflop.publish.publishing import PublishResult, Target, published_files
from isoflop.publish.sections import remote_code
from isoflop.publish.upload import MAIN, client_errors, commit, inspect_repository

__all__ = ["preview", "push_checkpoints", "push_run", "repository_url"]
logger = logging.getLogger(__name__)


def repository_url(repo_id: str) -> str:
    """Return a repository's page."""
    return f"{constants.ENDPOINT}/{repo_id}"


def push_run(target: Target, pushed: Sequence[str] = ()) -> PublishResult:
    """Push a finished run to `main` in one commit. Raises `UserError`, which names the tags `pushed` before."""
    repo_id, recipe = target.repo_id, target.recipe
    repository = inspect_repository(target.key, repo_id, recipe, pushed)
    files = files_of(target, repository.tags)
    logger.info("%s: %d files, %s bytes", repo_id, len(files), f"{sum(map(size_bytes, files.values())):,}")
    with client_errors(target.key, repo_id, pushed):
        if repository.private is None:
            HfApi().create_repo(repo_id, private=target.private, exist_ok=True)
        elif repository.private != target.private:
            visibility = "private" if repository.private else "public"
            logger.info("%s stays %s: change that in its settings on the Hub", repo_id, visibility)
        oid = commit(repo_id, MAIN, files, f"{target.folder.path.resolve().name}, {recipe.model.model_type}")
    news = "is up to date" if oid == repository.commits.get(MAIN) else f"commit {oid[:8]}"
    logger.info("%s: %s", repository_url(repo_id), news)
    logger.info('open it: AutoModelForCausalLM.from_pretrained("%s"%s)', repo_id, remote_code(recipe))
    return PublishResult(repo_id, repository_url(repo_id), False, tuple(pushed), oid, published_files(files), _text(files[CARD]))


def files_of(target: Target, tags: list[str]) -> Files:
    """Return all files of a finished run's repository; log what is missing for a complete one."""
    if license_of(target.recipe, target.license) == UNKNOWN_LICENSE:
        logger.info("license: %s; name one with --license, e.g. --license apache-2.0", UNKNOWN_LICENSE)
    steps = [tag for tag in tags if tag.removeprefix("step-").isdecimal()]
    card = model_card(target.folder, target.repo_id, target.license, steps)
    return {CARD: str(card).encode()} | run_files(target.folder, target.recipe)


def preview(target: Target, finished: bool, checkpoints: bool) -> PublishResult:
    """Return what a push would put on the Hub, without asking the Hub."""
    every, listed = target.push_every or 1, list_checkpoints(target.folder.checkpoints) if checkpoints else []
    tags = [path.name for path in listed if step_of(path) % every == 0]
    files = files_of(target, tags) if finished else {}
    card = _text(files[CARD]) if finished else None
    url = repository_url(target.repo_id)
    return PublishResult(target.repo_id, url, True, tuple(tags), None, published_files(files), card)


def _text(content: object) -> str:
    return content.decode() if isinstance(content, bytes) else ""
