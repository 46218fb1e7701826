"""`publish`: a finished run to `main` in one commit, its checkpoints to revisions."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe
from isoflop.train.run_folder import RunFolder
from isoflop.utils.errors import UserError
from isoflop.utils.html import html_table

if TYPE_CHECKING:
    from isoflop.publish.files import Files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A run and the repository that it goes to."""

    folder: RunFolder
    recipe: Recipe
    repo_id: str
    private: bool
    """Visibility of a new repository."""
    license: str | None = None
    """Overrides the recipe's `hub.license`."""
    key: str = "hub.repo_id"
    """Where `repo_id` was given, for error messages."""
    push_every: int | None = None
    """Only checkpoints of steps that this divides are pushed."""


@dataclass(frozen=True)
class PublishedFile:
    """A file of the repository."""

    path: str
    """In the repository."""
    origin: str
    """The local file, or `made for it`."""
    num_bytes: int


@dataclass(frozen=True)
class PublishResult:
    """What is in the repository after a push, or would be after a dry run."""

    repo_id: str
    url: str
    dry_run: bool
    revisions: tuple[str, ...] = ()
    """Checkpoints that were pushed, each a tag."""
    commit: str | None = None
    """Of `main`; None for an unfinished run and a dry run."""
    files: tuple[PublishedFile, ...] = ()
    """Of `main`; empty for an unfinished run."""
    card: str | None = None
    """Text of the model card on `main`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        rows = [[file.path, file.origin, f"{file.num_bytes:,}"] for file in self.files]
        return html_table(["to", "from", "bytes"], rows, caption=f"{self.url}, commit {self.commit or 'none'}")


def publish(
    run: str | Path,
    *,
    repo_id: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    checkpoints: bool = False,
    dry_run: bool = False,
) -> PublishResult:
    """Push a finished run, and with `checkpoints` its checkpoints, to the Hub.

    `repo_id`, `private` and `license` default to the recipe's `hub` section. A dry run sends nothing and asks the Hub nothing.
    Raises `UserError` for a folder without a run, an unfinished run without `checkpoints`, a repository that belongs to something
    else, and whatever the Hub refuses; the message names what was pushed before.
    """
    target = _target(run, repo_id, private, license)
    finished = target.folder.read_summary() is not None
    if not finished and not checkpoints:
        raise UserError(
            f"{run} is not finished: it has no summary.json; resume it with the command that started it, or push its checkpoints"
            " with --checkpoints"
        )
    from isoflop.publish.push import preview, push_checkpoints, push_run, repository_url  # these take seconds to import

    if dry_run:
        return preview(target, finished, checkpoints)
    tags = push_checkpoints(target) if checkpoints else []
    if checkpoints:
        logger.info("checkpoints: %s new", ", ".join(tags) or "none")
    if finished:
        return push_run(target, tags)
    return PublishResult(target.repo_id, repository_url(target.repo_id), dry_run, tuple(tags))


def _target(run: str | Path, repo_id: str | None, private: bool | None, license: str | None) -> Target:
    folder = RunFolder(str(run))
    if not (folder.path / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no recipe.yaml; give one that `isoflop pretrain` wrote")
    recipe = load_recipe(folder.path / "recipe.yaml")
    hub = recipe.hub
    key, name = ("--repo-id", repo_id) if repo_id else ("hub.repo_id", hub.repo_id)
    if name is None:
        raise UserError(f"--repo-id is not given, nor is hub.repo_id in {folder.path}/recipe.yaml; add --repo-id user/name")
    from isoflop.publish.upload import require_name

    require_name(key, name)
    return Target(folder, recipe, name, hub.private if private is None else private, license, key, hub.push_every)


def published_files(files: Files) -> tuple[PublishedFile, ...]:
    """Return path, origin and size of the files of a repository."""
    from isoflop.publish.files import size_bytes

    return tuple(
        PublishedFile(path, "made for it" if isinstance(content, bytes) else str(content), size_bytes(content))
        for path, content in files.items()
    )
