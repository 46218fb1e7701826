"""What a name on the Hub stands for now."""

from __future__ import annotations

from typing import Literal

from isoflop.errors import UserError


def hub_commit(key: str, name: str, revision: str | None, repo_type: Literal["dataset", "model"]) -> str:
    """The commit of a repository's branch or tag, so that what is read is what the manifest names; `key` is for the error."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().repo_info(name, revision=revision, repo_type=repo_type).sha)
    except Exception as error:  # the client's own errors, its transport's, and a name that is not valid
        raise UserError(
            f"{key} = {name!r} at revision {revision or 'main'!r} cannot be reached: {type(error).__name__}: {error};"
            " check the name and the network; where it is gated, accept the terms on its page, then hf auth login;"
            " or give a local folder"
        ) from error
