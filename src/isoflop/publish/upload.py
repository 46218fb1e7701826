"""The Hub's side of publishing: what is checked before anything is sent, commits, and the client's errors in plain words.

Entered by `check_hub` before a run starts, by `look` before a push and by `commit` for it. No message holds a token.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from isoflop.credentials import hide_credentials
from isoflop.errors import UserError
from isoflop.publish.files import RECIPE, Files
from isoflop.publish.redaction import published_recipe
from isoflop.recipe import Recipe, differences
from isoflop.recipe_file import load_recipe

MAIN, CHECKPOINTS = "main", "checkpoints"  # branches
_OURS = (MAIN, CHECKPOINTS)
_OF_THE_HUB = {".gitattributes"}  # in every repository from its first commit on
_SHOWN = 3  # differences or files named in an error


class HubSilent(UserError):
    """The Hub did not answer: nothing that the user wrote is wrong."""


class Repository(NamedTuple):
    """What a name on the Hub holds before a push; empty where nothing is there."""

    private: bool | None = None
    commits: dict[str, str] = {}
    """The newest commit of each branch that is written to."""
    files: dict[str, set[str]] = {}
    """The files there."""
    tags: list[str] = []


def check_hub(repo_id: str, recipe: Recipe, key: str = "hub.repo_id") -> None:
    """Hold against the Hub, before a run starts, what its last step would fail on.

    Raises `UserError` for an invalid name, no token or one that may not write, and a repository of something else. Where the Hub
    does not answer a line says so: it may by the time the run ends.
    """
    try:
        look(key, repo_id, recipe)
    except HubSilent as error:
        print(f"{key} = {repo_id!r} was not checked: {error}", flush=True)


def look(key: str, repo_id: str, recipe: Recipe, published: Sequence[str] = ()) -> Repository:
    """What is in a repository that this run may write to. Raises `UserError` where it may not.

    `key` is what the user set, `published` what this command has pushed by now.
    """
    require_name(key, repo_id)
    if get_token() is None:
        raise UserError(
            f"{key} = {repo_id!r}: there is no token for the Hub here; run: hf auth login (or set HF_TOKEN), with a token that"
            f" may write, from {constants.ENDPOINT}/settings/tokens"
        )
    api = HfApi()
    with plain_errors(key, repo_id, published):
        require_write(key, repo_id, api.whoami())
        try:
            refs = api.list_repo_refs(repo_id)
        except RepositoryNotFoundError:
            return Repository()
        heads = {branch.name: api.repo_info(repo_id, revision=branch.name) for branch in refs.branches if branch.name in _OURS}
        there = Repository(
            private=next((bool(info.private) for info in heads.values()), None),
            commits={branch: str(info.sha) for branch, info in heads.items()},
            files={branch: {file.rfilename for file in info.siblings or []} for branch, info in heads.items()},
            tags=[tag.name for tag in refs.tags],
        )
        for branch in there.commits:
            require_ours(key, repo_id, there, branch, published_recipe(recipe))
    return there


def require_name(key: str, repo_id: str) -> None:
    """Refuse what is not user/name."""
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
    """Refuse a namespace that is neither the account's nor one of its organizations', and a token that can only read."""
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


def require_ours(key: str, repo_id: str, there: Repository, branch: str, recipe: Recipe) -> None:
    """Refuse a branch that holds something else than an earlier push of a run with this recipe."""
    files = there.files[branch] - _OF_THE_HUB
    if not files:
        return
    remedy = "give another name, or delete that repository"
    if RECIPE not in files:
        raise UserError(f"{key} = {repo_id!r} holds {_some(sorted(files))}, which no run has put there; {remedy}")
    file = hf_hub_download(repo_id, RECIPE, revision=there.commits[branch])
    try:
        theirs = load_recipe(file)
    except UserError as error:
        raise UserError(f"{key} = {repo_id!r} holds a recipe that cannot be read here ({error}); {remedy}") from None
    if changed := differences(theirs.trajectory(), recipe.trajectory()):
        raise UserError(f"{key} = {repo_id!r} holds another run ({_some(changed)}); {remedy}")


def commit(repo_id: str, branch: str, files: Files, message: str, stale: Iterable[str] = ()) -> str:
    """Put files on a branch in one commit, and take stale ones away; returns the branch's commit.

    Large files are sent before it, those that the Hub has are not; where nothing changed there is no new commit.
    """
    operations: list[Any] = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in stale]
    return str(HfApi().create_commit(repo_id, operations, commit_message=message, revision=branch).oid)


@contextlib.contextmanager
def plain_errors(key: str, repo_id: str, published: Sequence[str] = ()) -> Iterator[None]:
    """Turn the client's many errors into one `UserError`, which says what was published before it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the Hub, of its storage, of the transport, of the client's own checks
        raise explain(error, key, repo_id, published) from None  # its chain may hold a token


def explain(error: BaseException, key: str, repo_id: str, published: Sequence[str] = ()) -> UserError:
    """What an error of the client means, and what to do."""
    causes = _causes(error)
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    status = answer.response.status_code if answer else None
    transport = next((cause for cause in causes if isinstance(cause, HTTPError | ConnectionError | json.JSONDecodeError)), None)
    reasons = [answer.server_message or answer] if answer else dict.fromkeys([error, transport or error])
    told = ": ".join(_one_line(str(reason)) for reason in reasons)
    done = f"published so far: {', '.join(published)}" if published else "nothing was published"
    onwards = f"{done}; the same command goes on, and sends what is missing"
    name, tokens = f"{key} = {repo_id!r}", f"{constants.ENDPOINT}/settings/tokens"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return HubSilent(f"{name}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it; {onwards}")
    if status == 401:
        return UserError(
            f"{name}: the Hub refuses the token ({told}); make one that may write on {tokens}, then hf auth login (or set"
            f" HF_TOKEN, which comes first); {done}"
        )
    if status == 403:
        return UserError(
            f"{name}: the token has no permission for it ({told}); give a name under your own account, or make a token that may"
            f" write there on {tokens}; {done}"
        )
    if status == 400:
        return UserError(f"{name}: the Hub does not take it ({told}); mend that, then give the same command; {done}")
    if (transport and not answer) or status == 429 or (status or 0) >= 500:
        return HubSilent(f"{name}: {constants.ENDPOINT} does not answer ({told}); {onwards}")
    return UserError(f"{name}: {type(error).__name__}: {told}; {onwards}")


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what led to it, newest first."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def _one_line(text: str) -> str:
    """The text of an error, without line breaks and without any credential."""
    return " ".join(hide_credentials(text).split())


def _some(texts: list[str]) -> str:
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more
