"""What a name on the Hub stands for now, and why it cannot be had."""

from __future__ import annotations

from typing import Literal

from isoflop.errors import UserError


def hub_commit(key: str, name: str, revision: str | None, repo_type: Literal["dataset", "model"]) -> str:
    """The commit of a repository's branch or tag, so that what is read is what the manifest names; `key` is for the error."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().repo_info(name, revision=revision, repo_type=repo_type).sha)
    except Exception as error:  # the client's own errors, its transport's, and a name that is not valid
        reason = why_not(error, name, repo_type) or (
            f"{type(error).__name__}: {error}; check the name and the network, or give a local folder"
        )
        raise UserError(f"{key} = {name!r} at revision {revision or 'main'!r} cannot be reached: {reason}") from error


def why_not(
    error: BaseException, name: str, repo_type: Literal["dataset", "model"] = "dataset", gated: bool = False
) -> str | None:
    """Reason and remedy, where the Hub's own answer is behind an error; `gated` where the caller knows it is."""
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
