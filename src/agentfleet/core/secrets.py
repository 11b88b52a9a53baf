"""DECIDE: whether a configuration document holds a secret where it should hold the name of one.

A secret is named, never written: `{"$secret": "openai-key"}`. Who reads the document looks the name up where secrets
are kept (a mounted Secret, an environment variable, a vault); documents are stored, journaled and shown to people.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from agentfleet.core.documents import Place, Problem, write_path

REFERENCE = "$secret"
"""The one key of an object that names a secret."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET = frozenset(("password", "passwd", "pwd", "passphrase", "secret", "token", "credential", "apikey"))
_MANY = frozenset(("passwords", "passphrases", "secrets", "credentials", "apikeys"))  # "tokens" are mostly counted
_KEYS = frozenset(("api", "private", "access", "secret", "signing", "encryption"))
_TOKENS = frozenset(("api", "access", "auth", "bearer", "refresh", "session"))
_AUTHORIZATION = re.compile(r"(?i)(bearer|basic|token|apikey|digest|negotiate)\s+\S|\S{20}")
"""What the header holds; a field of its name may also say how access is decided, as in "rbac"."""
_URL = re.compile(r"://[^\s/?#@:]*:(?P<password>[^\s/?#]+)@")
_BLANK = re.compile(r"\$\{\w+\}|\$\(\w+\)|\{\w*\}|<\w+>|\*+")
"""In the place of a password: it is filled in later."""
_HOW = f'looks like a secret, and documents are stored and shown: name it instead, {{"{REFERENCE}": "its name"}}'
_HOW_URL = (
    "holds a password in a URL, and documents are stored and shown: leave it out of the URL, and name it in a field of "
    f'its own, {{"{REFERENCE}": "its name"}}'
)


def find_secrets(document: Any) -> Iterator[Problem]:
    """Fields that hold what looks like a secret, and references that are none. Never tells what they hold."""
    yield from _visit(document, ())


def is_secret(name: str) -> bool:
    """Whether a field of this name holds a secret: by its last word, as in "api_key", "dbPassword", "auth-token-2"."""
    words = _words(name)
    return _is_one(words) or _are_many(words)


def _words(name: str) -> list[str]:
    """The words of a name in lower case, without a number at its end."""
    words = [word.lower() for word in _WORD.findall(name)]
    while words and words[-1].isdigit():
        words.pop()
    return words


def _is_one(words: list[str]) -> bool:
    return bool(words) and (words[-1] in _SECRET or (words[-1] == "key" and _qualified(words, _KEYS)))


def _are_many(words: list[str]) -> bool:
    if not words:
        return False
    keys = words[-1] == "keys" and _qualified(words, _KEYS)
    return words[-1] in _MANY or keys or (words[-1] == "tokens" and _qualified(words, _TOKENS))


def _qualified(words: list[str], by: frozenset[str]) -> bool:
    return len(words) > 1 and words[-2] in by


def _visit(value: Any, place: Place) -> Iterator[Problem]:
    if isinstance(value, dict):
        if REFERENCE in value:
            yield from _check(value, place)
            return
        named = _named_value(value)
        for key, item in value.items():
            here = (*place, key)
            if key == named or _gives_away(key, item):
                yield Problem(write_path(here), _HOW)
            else:
                yield from _visit(item, here)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _visit(item, (*place, number))
    elif isinstance(value, str) and any(not _BLANK.fullmatch(each["password"]) for each in _URL.finditer(value)):
        yield Problem(write_path(place), _HOW_URL)


def _gives_away(name: str, item: Any) -> bool:
    """Whether a field's name says that it is secret, and it holds something."""
    words = _words(name)
    if words and words[-1] == "authorization":
        return any(isinstance(each, str) and _AUTHORIZATION.match(each.strip()) for each in _leaves(item))
    if _are_many(words) and isinstance(item, int | float):
        return False  # how many there are, or may be
    return (_is_one(words) or _are_many(words)) and any(_holds(each) for each in _leaves(item))


def _named_value(value: dict[str, Any]) -> str | None:
    """The key of a secret that is written as a pair: {"name": "OPENAI_API_KEY", "value": "..."}."""
    lower = {key.lower(): key for key in value}
    names = [value[lower[each]] for each in ("name", "key") if each in lower]
    if not any(isinstance(name, str) and is_secret(name) for name in names):
        return None
    key = lower.get("value")
    return key if key is not None and any(map(_holds, _leaves(value[key]))) else None


def _holds(leaf: Any) -> bool:
    return not isinstance(leaf, bool) and leaf is not None and leaf != ""


def _leaves(item: Any) -> Iterator[Any]:
    """All that stands in a value, but for references."""
    if isinstance(item, dict):
        for each in () if REFERENCE in item else item.values():
            yield from _leaves(each)
    elif isinstance(item, list):
        for each in item:
            yield from _leaves(each)
    else:
        yield item


def _check(value: dict[str, Any], place: Place) -> Iterator[Problem]:
    name = value[REFERENCE]
    if len(value) > 1:
        yield Problem(write_path(place), f'must hold nothing but "{REFERENCE}", or no "{REFERENCE}"')
    elif not isinstance(name, str) or not name.strip():
        yield Problem(write_path((*place, REFERENCE)), "must be the name of a secret, a string")
