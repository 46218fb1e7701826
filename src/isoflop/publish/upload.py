"""Calls to the Hub: checks before anything is sent, commits, and the client's errors as `UserError`.

Entered by `check_hub` before a run starts, and by `inspect_repository` and `commit` for a push. No message holds a token.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from isoflop.config.loading import load_recipe
from isoflop.config.recipe import Recipe, differences
from isoflop.publish.files import RECIPE, Files
from isoflop.publish.redaction import published_recipe
from isoflop.utils.credentials import hide_credentials
from isoflop.utils.errors import UserError

logger = logging.getLogger(__name__)
MAIN, CHECKPOINTS = "main", "checkpoints"  # branches
_BRANCHES = (MAIN, CHECKPOINTS)
_CREATED_BY_HUB = {".gitattributes"}  # in every repository from its first commit on
_SHOWN = 3  # differences or files named in an error


class HubSilent(UserError):
    """The Hub did not answer; the user's input may be correct."""


class Repository(NamedTuple):
    """Content of a repository before a push; empty if it does not exist."""

    private: bool | None = None
    commits: dict[str, str] = {}
    """Newest commit of each branch that pushes write to."""
    files: dict[str, set[str]] = {}
    """Paths in each of these branches."""
    tags: list[str] = []


def check_hub(repo_id: str, recipe: Recipe, key: str = "hub.repo_id") -> None:
    """Check, before a run starts, what would fail its push at the end.

    Raises `UserError` for an invalid name, a missing token or one without write permission, and a repository of something else.
    An unreachable Hub is only logged: it may answer by the end of the run.
    """
    try:
        inspect_repository(key, repo_id, recipe)
    except HubSilent as error:
        logger.info("%s = %r was not checked: %s", key, repo_id, error)


def inspect_repository(key: str, repo_id: str, recipe: Recipe, pushed: Sequence[str] = ()) -> Repository:
    """Return what is in a repository. Raises `UserError` if this run may not write to it.

    `key` is the option that named it; `pushed` are the tags that this command has pushed so far.
    """
    require_name(key, repo_id)
    if get_token() is None:
        raise UserError(
            f"{key} = {repo_id!r}: there is no token for the Hub here; run: hf auth login (or set HF_TOKEN), with a token that"
            f" may write, from {constants.ENDPOINT}/settings/tokens"
        )
    api = HfApi()
    with client_errors(key, repo_id, pushed):
        require_write(key, repo_id, api.whoami())
        try:
            refs = api.list_repo_refs(repo_id)
        except RepositoryNotFoundError:
            return Repository()
        heads = {
            branch.name: api.repo_info(repo_id, revision=branch.name) for branch in refs.branches if branch.name in _BRANCHES
        }
        found = Repository(
            private=next((bool(info.private) for info in heads.values()), None),
            commits={branch: str(info.sha) for branch, info in heads.items()},
            files={branch: {file.rfilename for file in info.siblings or []} for branch, info in heads.items()},
            tags=[tag.name for tag in refs.tags],
        )
        for branch in found.commits:
            require_own_branch(key, repo_id, found, branch, published_recipe(recipe))
    return found


def require_name(key: str, repo_id: str) -> None:
    """Raise `UserError` for a name that is not user/name."""
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(
            f"{key} = {repo_id!r} is not a name on the Hub; give user/name, in at most 96 letters, digits, '-', '_' and '.',"
            " without '--' and '..', no part beginning or ending with '-' or '.'"
        )


def require_write(key: str, repo_id: str, account: dict[str, Any]) -> None:
    """Raise `UserError` for a namespace outside the account and its organizations, and for a read-only token."""
    names = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
    if repo_id.split("/")[0].lower() not in [name.lower() for name in names]:
        raise UserError(
            f"{key} = {repo_id!r}: the token is that of {account['name']}, who is not {repo_id.split('/')[0]} nor in an"
            f" organization of that name; give {account['name']}/{repo_id.split('/')[1]}, or log in with another token"
        )
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            f"{key} = {repo_id!r}: the token can only read; make one that may write on {constants.ENDPOINT}/settings/tokens, then"
            " hf auth login (or set HF_TOKEN)"
        )


def require_own_branch(key: str, repo_id: str, found: Repository, branch: str, recipe: Recipe) -> None:
    """Raise `UserError` for a branch that holds anything but an earlier push of a run with this recipe."""
    files = found.files[branch] - _CREATED_BY_HUB
    if not files:
        return
    remedy = "give another name, or delete that repository"
    if RECIPE not in files:
        raise UserError(f"{key} = {repo_id!r} holds {_some(sorted(files))}, which are not from a run; {remedy}")
    file = hf_hub_download(repo_id, RECIPE, revision=found.commits[branch])
    try:
        theirs = load_recipe(file)
    except UserError as error:
        raise UserError(f"{key} = {repo_id!r} holds a recipe that cannot be read here ({error}); {remedy}") from None
    if changed := differences(theirs.identity_fields(), recipe.identity_fields()):
        raise UserError(f"{key} = {repo_id!r} holds another run ({_some(changed)}); {remedy}")


def commit(repo_id: str, branch: str, files: Files, message: str, stale: Iterable[str] = ()) -> str:
    """Write files to a branch and delete stale ones in one commit; return the branch's newest commit.

    The client uploads large files before the commit, except those that the Hub has. Without a change there is no new commit.
    """
    operations: list[Any] = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in stale]
    return str(HfApi().create_commit(repo_id, operations, commit_message=message, revision=branch).oid)


@contextlib.contextmanager
def client_errors(key: str, repo_id: str, pushed: Sequence[str] = ()) -> Iterator[None]:
    """Turn the client's errors into a `UserError`, which names what was pushed before."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the Hub, of its storage, of the transport, of the client's own checks
        raise hub_error(error, key, repo_id, pushed) from None  # its chain may hold a token


def hub_error(error: BaseException, key: str, repo_id: str, pushed: Sequence[str] = ()) -> UserError:
    """Return what an error of the client means, and the remedy."""
    causes = _causes(error)
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    status = answer.response.status_code if answer else None
    transport = next((cause for cause in causes if isinstance(cause, HTTPError | ConnectionError | json.JSONDecodeError)), None)
    reasons = [answer.server_message or answer] if answer else dict.fromkeys([error, transport or error])
    reason = ": ".join(_one_line(str(reason)) for reason in reasons)
    done = f"published so far: {', '.join(pushed)}" if pushed else "nothing was published"
    remedy = f"{done}; the same command resumes, and sends what is missing"
    name, tokens = f"{key} = {repo_id!r}", f"{constants.ENDPOINT}/settings/tokens"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return HubSilent(f"{name}: HF_HUB_OFFLINE is set, so the Hub cannot be reached; unset it; {remedy}")
    if status == 401:
        return UserError(
            f"{name}: the Hub refuses the token ({reason}); make one that may write on {tokens}, then hf auth login (or set"
            f" HF_TOKEN, which comes first); {done}"
        )
    if status == 403:
        return UserError(
            f"{name}: the token has no permission for it ({reason}); give a name under your own account, or make a token that may"
            f" write there on {tokens}; {done}"
        )
    if status == 400:
        return UserError(f"{name}: the Hub rejects it ({reason}); fix that, then give the same command; {done}")
    if (transport and not answer) or status == 429 or (status or 0) >= 500:
        return HubSilent(f"{name}: {constants.ENDPOINT} does not answer ({reason}); {remedy}")
    return UserError(f"{name}: {type(error).__name__}: {reason}; {remedy}")


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and its causes, newest first."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def _one_line(text: str) -> str:
    """Return an error's text on one line, without credentials."""
    return " ".join(hide_credentials(text).split())


def _some(texts: list[str]) -> str:
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more
