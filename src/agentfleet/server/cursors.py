"""Cursors of pages: opaque to clients, and checked when they come back.

A cursor says where a page of one list goes on. It grants nothing: what may be seen is decided anew for each page.
"""

from __future__ import annotations

import base64
import binascii
import json

from agentfleet.rest.base import FieldError
from agentfleet.server.problems import Refusal

_LONGEST = 1024


def cursor(what: str, after: str | int) -> str:
    """Where a list of `what` goes on."""
    said = json.dumps([what, after], separators=(",", ":"), ensure_ascii=True).encode()
    return base64.urlsafe_b64encode(said).decode().rstrip("=")


def text_after(what: str, given: str | None) -> str:
    """What a list goes on after, as text; the beginning without a cursor. Raises a 422 for one of something else."""
    found = _read(what, given)
    if found is None:
        return ""
    if not isinstance(found, str) or len(found) > _LONGEST or not found.isprintable():
        raise _wrong()
    return found


def number_after(what: str, given: str | None) -> int | None:
    """Likewise, as a number; None without a cursor."""
    found = _read(what, given)
    if found is not None and (type(found) is not int or not 0 <= found < 2**53):
        raise _wrong()
    return found


def _read(what: str, given: str | None) -> object:
    if given is None:
        return None
    try:
        padded = given.encode("ascii") + b"=" * (-len(given) % 4)
        if len(given) > _LONGEST:
            raise _wrong()
        kind, after = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise _wrong() from error
    if kind != what:
        raise _wrong()
    return after


def _wrong() -> Refusal:
    message = "is no cursor of this list; take it from `next` of the page before, or leave it out"
    return Refusal(422, "invalid", f"cursor: {message}", errors=[FieldError(field="cursor", message=message)])
