"""Who a kubeconfig's user acts as: `as` and what belongs to it, as the headers that kubectl sends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import quote

from agentfleet.errors import SpecError

__all__ = ["impersonation_of"]

_WHO = "as"
_MORE = ("as-uid", "as-groups", "as-user-extra")
_IN_NAMES = "!#$&'*+^`|"
"""What a header's name may hold besides letters, digits and "_.-~"; client-go escapes the rest."""


def impersonation_of(user: Mapping[str, object], context: str) -> tuple[tuple[str, str], ...]:
    """The headers with which each request is made as somebody else; none where the user acts as itself.

    Args:
        user: The user's entry in a kubeconfig.
        context: The context's name, for errors.

    Raises:
        SpecError: It cannot be said so. Nothing is left out: the user's own rights may be greater.
    """
    try:
        found = tuple(_headers(user))
    except ValueError as error:
        raise SpecError(f"context {context!r}: its user's {error}; correct the kubeconfig") from error
    if found and not user.get(_WHO):
        given = ", ".join(key for key in _MORE if user.get(key))
        raise SpecError(f"context {context!r}: its user has {given}, but no {_WHO}: say who to act as, or remove it")
    return found


def _headers(user: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for key, header in ((_WHO, "Impersonate-User"), ("as-uid", "Impersonate-Uid")):
        if user.get(key):
            yield header, _text(user[key], f"{key} must be a text")
    yield from (("Impersonate-Group", each) for each in _texts(user.get("as-groups"), "as-groups must be"))
    extra, rule = user.get("as-user-extra") or {}, "as-user-extra must be lists of texts by key"
    if not isinstance(extra, Mapping):
        raise ValueError(rule)  # noqa: TRY004 - of what is written in a file
    for key, values in extra.items():
        header = f"Impersonate-Extra-{quote(_text(key, rule), safe=_IN_NAMES)}"
        yield from ((header, each) for each in _texts(values, f"as-user-extra must have, as {key!r},"))


def _texts(value: object, rule: str) -> Iterator[str]:
    rule = f"{rule} a list of texts"
    if not isinstance(value, list | None):
        raise ValueError(rule)  # noqa: TRY004 - of what is written in a file
    yield from (_text(each, rule) for each in value or ())


def _text(value: object, rule: str) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{rule}, without line breaks and the like, not {value!r}")
    return value
