"""Credentials in text: find them to refuse a recipe, hide them in everything that is written or printed.

Four signs identify a credential: the format that its issuer publishes, its place in a URL, the name before it, and a secret value
of this process (environment variables, the saved token of the Hub). Hashes, paths and numbers match none of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

HIDDEN = "***"
REMEDY = (
    "recipes are published with their runs and must hold no credential; take it out, and give it in the environment"
    " (HF_TOKEN or hf auth login for the Hub, WANDB_API_KEY for a tracker)"
)
SHORTEST = 8  # characters of a secret of the environment: a shorter one would hide ordinary words


class _Rule(NamedTuple):
    """One sign of a credential. `hide` returns a match unchanged that is not a credential."""

    kind: str
    pattern: re.Pattern[str]
    hide: Callable[[re.Match[str]], str]


def _shape(kind: str, prefix: str, rest: str) -> _Rule:
    """Return the rule for a token with a published prefix, which stays visible."""
    return _Rule(kind, re.compile(rf"(?<![A-Za-z0-9])({prefix}){rest}"), lambda found: found[1] + HIDDEN)


# Prefixes and alphabets as their issuers document them; lengths are lower bounds, since issuers lengthen tokens.
_SHAPES = [
    _Rule(
        "a private key",
        re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:.*?-----END [A-Z0-9 ]+-----|.*)", re.DOTALL),
        lambda found: HIDDEN,
    ),
    _shape("a Hugging Face token", r"hf_|api_org_", r"[A-Za-z0-9]{20,}"),
    _shape("an API key of the kind sk-", r"sk-(?:ant|proj|svcacct|admin|or-v1|None)-", r"[\w-]{16,}"),
    _shape("an API key of the kind sk-", r"sk-", r"[A-Za-z0-9]{20,}"),
    _shape("a Stripe key", r"[sr]k_(?:live|test)_", r"[A-Za-z0-9]{16,}"),
    _shape("a GitHub token", r"gh[opsru]_|github_pat_", r"\w{30,}"),
    _shape("a GitLab token", r"gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|soat)-", r"[\w-]{20,}"),
    _shape("an AWS access key", r"AKIA|ASIA", r"[A-Z0-9]{16}(?![A-Za-z0-9])"),
    _shape("a Google API key", r"AIza", r"[\w-]{35}"),
    _shape("a Google token", r"ya29\.|GOCSPX-", r"[\w-]{20,}"),
    _shape("a Slack token", r"xox[a-z]-|xapp-", r"[\w-]{10,}"),
    _shape("a JSON Web Token", r"eyJ", r"[\w-]{17,}(?:\.[\w-]*)*"),
    _shape("a Weights & Biases API key", r"wandb_v\d+_", r"\w{20,}"),
    _shape("an npm token", r"npm_", r"[A-Za-z0-9]{30,}"),
    _shape("a PyPI token", r"pypi-AgE", r"[\w-]{16,}"),
    _shape("a Docker token", r"dckr_pat_", r"[\w-]{20,}"),
    _shape("a Databricks token", r"dapi", r"[0-9a-f]{32}"),
    _shape("an NVIDIA API key", r"nvapi-", r"[\w-]{40,}"),
    _Rule(
        "a token of an Authorization header",
        re.compile(r"(?i)\b(Bearer |Authorization:? (?:Basic|Token) )(?=\S*\d)[\w.~+/-]{16,}=*"),
        lambda found: found[1] + HIDDEN,
    ),
]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = {"token", "secret", "password", "passwd", "passphrase", "apikey", "credential", "credentials"}
_SECRET_KEYS = {"api", "access", "secret", "private", "account", "encryption", "signing", "shared"}  # before the word key
# Before the word token: tokens of a vocabulary, or counts of them.
_NO_SECRET_TOKEN = {
    "bos", "eos", "pad", "unk", "sep", "cls", "mask", "eot", "eod", "bot", "start", "end", "begin", "stop", "prefix",
    "suffix", "middle", "image", "audio", "video", "special", "added", "think", "boundary", "newline", "fill", "next",
    "last", "first", "max", "min", "num", "per", "new",
}  # fmt: skip
# A variable whose name ends in one of these describes or locates a secret, but does not hold it.
_ABOUT_A_SECRET = {
    "path", "file", "dir", "folder", "url", "uri", "endpoint", "host", "port", "id", "name", "user", "username", "type",
    "length", "size", "limit", "count", "ttl", "expiry", "timeout", "seconds", "days", "parallelism", "budget", "enabled",
    "disabled",
}  # fmt: skip
_NO_SECRET = {"", "true", "false", "none", "null", "yes", "no", "on", "off", "disabled", "required", "optional", HIDDEN}
_QUERY_SECRETS = {"key", "sig", "signature", "auth", "awsaccesskeyid"}
_SIGNED_QUERY = ("x-amz-", "x-goog-")  # of a presigned URL

_VALUE = r"""'[^'\n]*'|"[^"\n]*"|[^\s,;&'")\]}]+"""


def names_credential(name: str) -> bool:
    """Return whether a name is a credential's: `HF_TOKEN`, `--api-key`, `auth.password`; not `tokens` or `eos_token`."""
    *before, last = [word.lower() for word in _WORD.findall(name)] or [""]
    previous = before[-1] if before else ""
    if last == "key":
        return previous in _SECRET_KEYS
    return last in _SECRET_WORDS and not (last == "token" and previous in _NO_SECRET_TOKEN)


def _hide_value(found: re.Match[str]) -> str:
    """Hide `value` after `name` and separator, where the name is a credential's."""
    value = found["value"].strip("'\"")
    if not names_credential(found["name"]) or value.lower() in _NO_SECRET or value.startswith(("$", "<", "-")):
        return found[0]
    return found["before"] + found["value"].replace(value, HIDDEN)


def _hide_value_in_prose(found: re.Match[str]) -> str:
    """Like `_hide_value`, in prose: `FLOPs per token: 8,178,892,800` and `a token: 3 bytes` are not credentials."""
    prose = found["name"].lower() in ("token", "secret", "credential", "credentials") and not re.search(r"['\"]", found[0])
    random = len(found["value"]) >= SHORTEST and re.search(r"\d", found["value"]) and re.search(r"[A-Za-z]", found["value"])
    return found[0] if prose and not random else _hide_value(found)


def _hide_user(found: re.Match[str]) -> str:
    """Hide the user information of a URL: a user with a password, or, over HTTP, a token."""
    scheme, user, host = found.groups()
    return f"{scheme}{HIDDEN}@{host}" if ":" in user or ("http" in scheme.lower() and user != "git") else found[0]


def _hide_parameter(found: re.Match[str]) -> str:
    name = found["name"].lower()
    secret = name in _QUERY_SECRETS or name.startswith(_SIGNED_QUERY) or names_credential(found["name"])
    return f"{found['before']}{HIDDEN}" if secret else found[0]


_IN_A_URL = [
    _Rule("a credential in a URL", re.compile(r"([A-Za-z][\w+.-]*://)([^/?#\s@'\"<>]+)@([\w.\[-])"), _hide_user),
    _Rule("a credential in a URL", re.compile(r"(?P<before>[?&](?P<name>[\w.-]+)=)[^&#\s'\"<>]+"), _hide_parameter),
]
_NAMED = [
    _Rule("a credential by its name", re.compile(rf"(?P<before>(?<![\w.-])(?P<name>[\w.-]+)=)(?P<value>{_VALUE})"), _hide_value),
    _Rule("a credential by its name", re.compile(rf"(?P<before>(?<!\S)(?P<name>--?[\w-]+)\s+)(?P<value>{_VALUE})"), _hide_value),
]
# As in YAML, JSON and messages. Prose and code have this form too ("the secret: ..."), so that it is hidden, but never refused.
_LOOSELY_NAMED = _Rule(
    "a credential by its name",
    re.compile(rf"""(?P<before>(?<![\w.-])(?P<name>[\w.-]+)["']?\s?[:=]\s*)(?P<value>{_VALUE})"""),
    _hide_value_in_prose,
)


def find_credential(text: str) -> str | None:
    """Return the kind of a credential in `text`, without its value; None where there is none."""
    return _find(text, _certain_rules())


def find_in_tree(tree: Any) -> str | None:
    """Return `key holds kind` for the first credential in a tree of mappings and lists; the key itself is shown without one."""
    rules = _certain_rules()
    for names, text in _texts(tree, ()):
        if kind := _find(text, rules):
            return f"{_hide('.'.join(names), rules)} holds {kind}"
    return None


def hide_credentials(text: str) -> str:
    """Replace every credential in `text` by `***`, after its published prefix if it has one. Idempotent."""
    return _hide(text, _all_rules())


def hide_in_command(words: list[str]) -> list[str]:
    """Hide credentials in the words of a command: within a word, and in the word after an option such as `--token`."""
    rules = _all_rules()
    return [
        _hide_named(word, rules) if not _is_option(before) or word.startswith("-") else HIDDEN
        for before, word in zip(["", *words], words, strict=False)
    ]


def hide_in_tree(tree: Any) -> Any:
    """Hide credentials in every string and key of a JSON tree, and every value whose key names a credential."""
    return _hide_tree(tree, _certain_rules())


def _hide_tree(tree: Any, rules: list[_Rule]) -> Any:
    if isinstance(tree, dict):
        return {_hide_tree(key, rules): _hide_member(key, value, rules) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_hide_tree(value, rules) for value in tree]
    return _hide(tree, rules) if isinstance(tree, str) else tree


def _hide_member(key: Any, value: Any, rules: list[_Rule]) -> Any:
    holds = isinstance(key, str) and isinstance(value, str | int | float) and names_credential(key)
    return HIDDEN if holds and str(value).lower() not in _NO_SECRET else _hide_tree(value, rules)


def _is_option(word: str) -> bool:
    return word.startswith("-") and "=" not in word and names_credential(word)


def _hide_named(word: str, rules: list[_Rule]) -> str:
    """Hide credentials in a word of a command: all after `name=`, with spaces and commas, where the name is a credential's."""
    name, equals, value = word.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", name) and names_credential(name) and value.lower() not in _NO_SECRET:
        return f"{name}={HIDDEN}"
    return _hide(word, rules)


def _hide(text: str, rules: list[_Rule]) -> str:
    """Apply the rules until nothing changes: a hidden character may have preceded another credential."""
    hidden = text
    for rule in rules:
        hidden = rule.pattern.sub(rule.hide, hidden)
    return hidden if hidden == text else _hide(hidden, rules)


def _find(text: str, rules: list[_Rule]) -> str | None:
    for rule in rules:
        if any(rule.hide(found) != found[0] for found in rule.pattern.finditer(text)):
            return rule.kind
    return None


def _texts(tree: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every value of a tree as text, and every key, with the path of keys to it."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            below = (*names, str(key))
            yield below, str(key)
            yield from _texts(value, below)
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _texts(value, (*names, str(number)))
    elif tree is not None:
        yield names, str(tree)  # YAML reads a numeric password as a number


def _certain_rules() -> list[_Rule]:
    return [*_secrets_of_the_process(), *_SHAPES, *_IN_A_URL, *_NAMED]


def _all_rules() -> list[_Rule]:
    return [*_certain_rules(), _LOOSELY_NAMED]


def _secrets_of_the_process() -> list[_Rule]:
    """Return a rule for each secret of this process, longest first: plain, and as escaped in URLs and JSON."""
    kinds = dict(_secrets())
    forms = {form: kind for value, kind in kinds.items() for form in (value, quote(value, safe=""), json.dumps(value)[1:-1])}
    longest_first = sorted(forms, key=len, reverse=True)
    return [_Rule(forms[form], re.compile(re.escape(form)), lambda found: HIDDEN) for form in longest_first]


def _secrets() -> Iterator[tuple[str, str]]:
    """Yield each secret value of the environment and the Hub's saved token, with its kind."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and value.lower() not in _NO_SECRET and _holds_secret(name) and not os.path.exists(value):
            yield value, f"the value of the environment variable {name}"
    if len(saved := _saved_token()) >= SHORTEST:
        yield saved, "the saved token of the Hub"


def _holds_secret(variable: str) -> bool:
    """Return whether an environment variable's name contains a credential's name, and does not end in where to find it."""
    words = _WORD.findall(variable)
    about = bool(words) and words[-1].lower() in _ABOUT_A_SECRET
    return not about and any(names_credential("_".join(words[: end + 1])) for end in range(len(words)))


def _saved_token() -> str:
    """Return the token that `hf auth login` saved, where huggingface_hub reads it; empty where there is none."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))
    file = Path(os.environ.get("HF_TOKEN_PATH", os.path.join(home, "token"))).expanduser()
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
