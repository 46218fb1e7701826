"""Resolve names on the Hub to commits, and explain the Hub's errors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from isoflop.utils.errors import UserError, nearest
from isoflop.utils.untrusted import MOST_SHOWN


def require_exists(key: str, name: str) -> None:
    """Refuse a name that looks like a local path and does not exist, before asking the Hub. Raises `UserError`."""
    path = Path(name)
    if path.exists() or not _looks_local(name):
        return
    beside = sorted(str(one) for one in path.parent.iterdir()) if path.parent.is_dir() else []
    hint = nearest(name, beside) if beside else f"; the folder {path.parent} is not there either"
    hint = hint if len(hint) < MOST_SHOWN else ""
    raise UserError(f"{key} = {name!r} is not there (working directory {Path.cwd()}){hint}")


def _looks_local(name: str) -> bool:
    """Return whether a name is a path, not user/name on the Hub: by its form, or inside a folder of runs or of prepared data."""
    if "://" in name:
        return False
    parts = Path(name).parts
    if name.startswith((".", "/", "~")) or len(parts) != 2:
        return len(parts) > 1 or name.startswith((".", "~"))
    folder = Path(parts[0])
    return folder.name == "runs" or any(any(folder.glob(f"*/{file}")) for file in ("recipe.yaml", "manifest.json"))


def hub_commit(key: str, name: str, revision: str | None, repo_type: Literal["dataset", "model"]) -> str:
    """Return the commit of a repository's branch or tag, which is then read and recorded; `key` is for the error."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().repo_info(name, revision=revision, repo_type=repo_type).sha)
    except Exception as error:  # errors of the client, of its transport, and of an invalid name
        reason = explain_hub_error(error, name, repo_type) or (
            f"{type(error).__name__}: {error}; check the name and the network, or give a local folder"
        )
        raise UserError(f"{key} = {name!r} at revision {revision or 'main'!r} cannot be reached: {reason}") from error


def explain_hub_error(
    error: BaseException, name: str, repo_type: Literal["dataset", "model"] = "dataset", gated: bool = False
) -> str | None:
    """Return reason and remedy where the Hub's answer caused an error, else None; `gated`: the caller knows that it is."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{name}"
    cause: BaseException | None = error
    while cause is not None:
        if gated or isinstance(cause, GatedRepoError):
            return (
                f"it is gated: accept its terms on {page} with your account, then make that account known here with"
                " hf auth login (or HF_TOKEN)"
            )
        if isinstance(cause, RevisionNotFoundError):
            return f"there is no such branch, tag or commit; {page}/tree/main lists them"
        if isinstance(cause, RepositoryNotFoundError):
            return f"{page} is not there, or private: check the name; for a private one, hf auth login"
        cause = cause.__cause__ or cause.__context__
    return None
