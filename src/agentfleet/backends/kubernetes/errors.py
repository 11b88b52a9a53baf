"""What a Kubernetes API server's refusals mean in agentfleet's own hierarchy. The one place that maps them.

Every class here is one of `agentfleet.errors`, so code that knows no Kubernetes handles it rightly::

    BackendUnavailable
    ├── Unreachable           no connection: the request certainly was not sent
    └── Overloaded            429, 503: asked to come back, perhaps in `retry_after` seconds
    BackendRefused
    ├── AlreadyExists         409 on a create: an object of that name is there
    ├── FieldConflict         409 on a server-side apply: another manager owns `fields`
    ├── Invalid               400, 422: `fields` names what is wrong
    ├── Unauthenticated       401, also with fresh credentials
    ├── Forbidden             403: the message names the permission that is missing
    └── DisruptionBlocked     429 on an eviction: a PodDisruptionBudget forbids it now
    Conflict
    └── Expired               410: the resource version or continue token is too old, list again
    InstanceGone
    ├── NotFound              404
    └── Replaced              409: another object has the name by now, the uid that was meant is gone
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping

import msgspec

from agentfleet.errors import (
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Conflict,
    DeadlineExceeded,
    InstanceGone,
)

__all__ = [
    "AlreadyExists",
    "DisruptionBlocked",
    "Expired",
    "FieldConflict",
    "Forbidden",
    "Invalid",
    "NotFound",
    "Overloaded",
    "Replaced",
    "Unauthenticated",
    "Unreachable",
    "error_of",
    "error_of_status",
    "retry_after_of",
]

_OTHER_UID = re.compile(r"UID in (the )?precondition")
"""Part of the server's message when a uid differs, to tell it from a version that does: the reason is the same."""
_SHOWN = 300
"""Characters of an answer that is no Status which are quoted in a message."""


class _Named:
    """Tracebacks show the name that users import, which is not in `agentfleet` itself."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__module__ = "agentfleet.backends.kubernetes"


class Unreachable(_Named, BackendUnavailable):
    """There is no connection to the server: the request certainly was not sent, and may be repeated whatever it is."""


class Overloaded(_Named, BackendUnavailable):
    """The server asked to be left alone for a while.

    Args:
        message: What was asked and what was answered.
        retry_after: Seconds the server wants to be left alone; None if it did not say.
        unserved: The request certainly was not carried out (429).
    """

    def __init__(self, message: str, retry_after: float | None = None, *, unserved: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.unserved = unserved


class AlreadyExists(_Named, BackendRefused):
    """An object of that name exists. Whether it is the one that was meant, its uid or labels tell."""


class _OfFields(_Named, BackendRefused):
    """A refusal that names fields.

    Args:
        message: What was asked and what was answered.
        fields: Paths of the fields, such as "spec.replicas".
    """

    def __init__(self, message: str, fields: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.fields = fields


class FieldConflict(_OfFields):
    """Another field manager owns what was to be applied; applying again changes nothing."""


class Invalid(_OfFields):
    """The server's validation refused the object; nothing was changed."""


class Unauthenticated(_Named, BackendRefused):
    """The server does not know who asks, also after the credentials were read anew."""


class Forbidden(_Named, BackendRefused):
    """Who asks may not do this: a permission is missing, or an admission rule forbids it."""


class DisruptionBlocked(_Named, BackendRefused):
    """An eviction would break a PodDisruptionBudget now. Ask again when the fleet has recovered."""


class Expired(_Named, Conflict):
    """The history that was asked for is compacted away: list again."""


class NotFound(_Named, InstanceGone):
    """The object, or the kind of object, does not exist."""


class Replaced(_Named, InstanceGone):
    """Another object has the name by now: the one whose uid was meant is gone."""


class StatusCause(msgspec.Struct, frozen=True, gc=False):
    """One of several causes of a refusal."""

    reason: str = ""
    message: str = ""
    field: str = ""


class StatusDetails(msgspec.Struct, frozen=True, rename="camel"):
    """What a refusal is about."""

    name: str = ""
    kind: str = ""
    causes: tuple[StatusCause, ...] | None = ()
    retry_after_seconds: int = 0


class Status(msgspec.Struct, frozen=True):
    """The body of every refusal of an API server, and of a watch's ERROR event."""

    code: int | None = None
    reason: str = ""
    message: str = ""
    details: StatusDetails | None = None


_read_status = msgspec.json.Decoder(Status).decode


def error_of(call: str, code: int, headers: Mapping[str, str], body: bytes) -> BackendError | DeadlineExceeded:
    """The error for an answer that is no success.

    Args:
        call: What was asked ("GET /api/v1/pods"), for the message.
        code: The HTTP status.
        headers: The answer's headers, in any case-insensitive mapping.
        body: The answer's body, a Status or whatever a proxy in between makes of it.
    """
    try:
        status = _read_status(body)
    except msgspec.DecodeError:  # not from an API server: HTML from a load balancer, say
        text = " ".join(body[: 4 * _SHOWN].decode(errors="replace").split())[:_SHOWN]
        status = Status(message=text or "an empty answer")
    wait = retry_after_of(headers)
    return error_of_status(call, msgspec.structs.replace(status, code=code), wait)


def error_of_status(call: str, status: Status, retry_after: float | None = None) -> BackendError | DeadlineExceeded:
    """The error for a Status, as answers and watches carry it; `retry_after` in seconds, from the header."""
    code, reason = status.code or 0, status.reason
    details = status.details or StatusDetails()
    causes = details.causes or ()
    message = f"{call}: {code} {reason}".rstrip() + (f": {status.message}" if status.message else "")
    if retry_after is None and details.retry_after_seconds:
        retry_after = float(details.retry_after_seconds)
    fields = tuple(cause.field for cause in causes if cause.field)
    if code == 409:
        return _conflict(message, reason, causes, fields)
    budget = next((cause for cause in causes if cause.reason == "DisruptionBudget"), None)
    if code == 429 and budget is not None:
        why = f" {budget.message}." if budget.message else ""
        return DisruptionBlocked(f"{message}{why} Nothing was done; ask again when more of its pods are ready")
    # "too large resource version" is a 504 with a wait: the server waits for its own cache
    if code in (429, 503) or (code in (408, 504) and retry_after is not None):
        return Overloaded(message, retry_after, unserved=code == 429)
    if code in (408, 504):
        return DeadlineExceeded(f"{message}; it may have been done nevertheless")
    if code in (400, 422):
        return Invalid(message, fields)
    if code == 401:
        message += "; check the user of the kubeconfig's context, or the service account"
    unknown = BackendUnavailable if code >= 500 or not code else BackendRefused
    return _BY_CODE.get(code, unknown)(message)


_BY_CODE: Mapping[int, type[BackendError]] = {401: Unauthenticated, 403: Forbidden, 404: NotFound, 410: Expired}


def _conflict(message: str, reason: str, causes: tuple[StatusCause, ...], fields: tuple[str, ...]) -> BackendError:
    if reason == "AlreadyExists":
        return AlreadyExists(message)
    if any(cause.reason == "FieldManagerConflict" for cause in causes):
        return FieldConflict(message, fields)
    if _OTHER_UID.search(message):
        return Replaced(message)
    return Conflict(f"{message}; observe the object again and decide again")


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or a date; None if there is none to be read."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        return max(0.0, date.timestamp() - time.time())
