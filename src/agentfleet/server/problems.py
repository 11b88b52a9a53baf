"""What goes wrong, as an answer: `application/problem+json` (RFC 9457), with each wrong field named.

The one place that maps errors of the library to statuses of HTTP.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from starlette.responses import Response

from agentfleet.errors import (
    AgentFleetError,
    BackendRefused,
    BackendUnavailable,
    ConfigConflict,
    ConfigError,
    ConfigInvalid,
    ConfigNotFound,
    Conflict,
    DeadlineExceeded,
    InstanceGone,
    JournalError,
    KeyReused,
    MissingExtra,
    NotFound,
    NotLeader,
    OperationRefused,
    SpecError,
)
from agentfleet.rest.base import PROBLEM_TYPE, FieldError, Problem
from agentfleet.rest.clusters import FORMS

log = logging.getLogger(__name__)

URN = "urn:agentfleet:problem:"
RETRY_AFTER = 1
"""Seconds after which to try again what may work soon."""
_LINE = re.compile(r'^\s*(?P<field>(?:[\w.\-\[\]]|"(?:[^"\\]|\\.)*")+…?|\(the whole\)): (?P<message>.+)$')
"""A field's name as `core.documents.write_path` writes it, where names that are no plain words are JSON strings."""
_WORD = re.compile(r"^(?P<field>[a-z][\w.]*) (?=\(|must|is|has)")
_UNKNOWN = re.compile(r"^unknown field '(?P<field>[^']+)'")
_MOST = 50

TITLES: Mapping[str, str] = {
    "malformed": "The request cannot be read",
    "unauthenticated": "Who asks is not known",
    "forbidden": "This token may not do that",
    "not-found": "There is no such thing",
    "method-not-allowed": "This cannot be done to it",
    "not-acceptable": "No answer in a form that is accepted",
    "timeout": "The request was not sent in time",
    "refused": "Its present state forbids it",
    "conflict": "Somebody else was first",
    "precondition-failed": "It is not what was expected",
    "too-large": "The request is too large",
    "unsupported-media-type": "The request is in no form that is taken",
    "invalid": "The request is wrong",
    "key-reused": "The idempotency key was used for another request",
    "precondition-required": "Say which state the change is based on",
    "too-many-requests": "Too many requests",
    "headers-too-large": "The headers are too large",
    "internal": "A bug in the server",
    "not-installed": "An optional part is not installed",
    "engine-refused": "The engine said no",
    "unavailable": "Not now",
    "deadline-exceeded": "It took too long",
}
"""Every kind of problem, and what it is called."""


class Refusal(Exception):
    """A request that is answered by a problem.

    Args:
        status: Of HTTP.
        kind: Key of `TITLES`.
        detail: What happened, why, and what to do.
        errors: Each wrong field.
        headers: Added to the answer.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})


def later(status: int, kind: str, detail: str, seconds: float = RETRY_AFTER) -> Refusal:
    """A refusal that says when to try again."""
    return Refusal(status, kind, detail, headers={"Retry-After": str(max(1, round(seconds)))})


_SAID: Mapping[int, str] = {
    503: "something that this needs cannot be reached now, or another manager leads; the server's log has more",
    504: "something that this needs did not answer in time; it may have been done. The server's log has more",
}
"""What is said of what is out of reach: its addresses, users and errors are nobody's business but the operator's."""

_KINDS: Sequence[tuple[type[AgentFleetError], int, str]] = (
    # the first that fits; subclasses before what they are
    (KeyReused, 422, "key-reused"),
    (ConfigInvalid, 422, "invalid"),
    (SpecError, 422, "invalid"),
    (ConfigNotFound, 404, "not-found"),
    (NotFound, 404, "not-found"),
    (InstanceGone, 404, "not-found"),
    (ConfigConflict, 409, "conflict"),
    (Conflict, 409, "conflict"),
    (NotLeader, 503, "unavailable"),
    (OperationRefused, 409, "refused"),
    (DeadlineExceeded, 504, "deadline-exceeded"),
    (BackendUnavailable, 503, "unavailable"),
    (JournalError, 503, "unavailable"),
    (ConfigError, 503, "unavailable"),
    (BackendRefused, 502, "engine-refused"),
    (MissingExtra, 501, "not-installed"),
)


def refusal_of(error: AgentFleetError, *, conditional: bool = False) -> Refusal:
    """An error of the library as a refusal.

    Args:
        error: What was raised.
        conditional: Whether the request said which state it is based on (If-Match, If-None-Match): a
            conflict is then a 412.
    """
    status, kind = next(((s, k) for each, s, k in _KINDS if isinstance(error, each)), (500, "internal"))
    if status == 409 and kind == "conflict" and conditional:
        status, kind = 412, "precondition-failed"
    if status == 500:
        return Refusal(500, "internal", "an error that should not come here; the server's log has it")
    errors = fields_of(str(error)) if status == 422 else ()
    if kind == "key-reused":
        errors = (FieldError(field="Idempotency-Key", message=str(error)),)
    if status in (503, 504):
        log.warning("answers %d: %s: %s", status, type(error).__name__, error)
        return Refusal(status, kind, _SAID[status], headers={"Retry-After": str(RETRY_AFTER)})
    return Refusal(status, kind, str(error), errors=errors)


def fields_of(message: str) -> tuple[FieldError, ...]:
    """The fields that a message names: one on each line "field: what is wrong", or the word that it begins with."""
    lines = message.splitlines()
    candidates = lines[1:] if len(lines) > 1 else lines
    found = [_named(match["field"], match["message"]) for match in map(_LINE.match, candidates) if match]
    if not found and (word := _WORD.match(message)):
        found = [FieldError(field=word["field"], message=message)]
    return tuple(found[:_MOST])


def _named(field: str, message: str) -> FieldError:
    """What is wrong with a field; one that is not known is named itself, not what it stands in."""
    field = "" if field == "(the whole)" else field
    if (unknown := _UNKNOWN.match(message)) is not None:
        return FieldError(field=".".join(filter(None, (field, unknown["field"]))), message=message)
    word = None if field else _WORD.match(message)
    return FieldError(field=field if word is None else word["field"], message=message)


def invalid(errors: Iterable[Mapping[str, object]]) -> Refusal:
    """What pydantic and FastAPI found wrong with a request, as a refusal.

    What is asked of a path that cannot exist is not found; everything else is a wrong field.
    """
    found = list(_told(errors))
    if any(place == "path" for place, _ in found):
        return Refusal(404, "not-found", "there is nothing at this path")
    if any(place == "malformed" for place, _ in found):
        return Refusal(400, "malformed", f"the body is no JSON: {found[0][1].message}")
    listed = tuple(error for _, error in found[:_MOST])
    detail = "; ".join(f"{each.field or 'the request'}: {each.message}" for each in listed[:5])
    return Refusal(422, "invalid", detail, errors=listed)


def _told(errors: Iterable[Mapping[str, object]]) -> Iterator[tuple[str, FieldError]]:
    for error in errors:
        loc = error.get("loc")
        assert isinstance(loc, Sequence), "pydantic says where"
        message = str(error.get("msg", "is wrong"))
        if error.get("type") == "json_invalid":
            yield "malformed", FieldError(field="", message=message)
            continue
        where, *place = loc or ("body",)
        parts = [str(part)[:80] for part in place if part not in FORMS]
        field = ".".join(parts)
        yield str(where), _named(field, message)


def problem_of(refusal: Refusal, request_id: str) -> Response:
    """The answer that a refusal is."""
    problem = Problem(
        type=URN + refusal.kind,
        title=TITLES[refusal.kind],
        status=refusal.status,
        detail=_printable(refusal.detail)[:4000],
        instance=f"urn:uuid:{request_id}",
        errors=tuple(FieldError(field=each.field, message=_printable(each.message)[:1000]) for each in refusal.errors),
    )
    return Response(
        problem.model_dump_json(), status_code=refusal.status, media_type=PROBLEM_TYPE, headers=refusal.headers
    )


def _printable(text: str) -> str:
    """Text that UTF-8 can write, whatever was asked."""
    return text.encode("utf-8", "backslashreplace").decode()
