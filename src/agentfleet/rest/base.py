"""What all answers of the REST API have in common, and how errors are told (RFC 9457)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Self, cast

from pydantic import BaseModel, ConfigDict, Field

MEDIA_TYPE = "application/json"
PROBLEM_TYPE = "application/problem+json"
STREAM_TYPE = "text/event-stream"


class Answer(BaseModel):
    """Base of every answer. A client takes fields that it does not know without complaint: servers grow."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="null", defer_build=True)

    @classmethod
    def made(cls, **values: Any) -> Self:
        """An answer of values that are known to be right: lists of a thousand are not checked again."""
        return cast("Self", cls.model_construct(**values))


class FieldError(Answer):
    """One thing that is wrong with a request."""

    field: str
    """Which field, such as "scaling.min_replicas"; empty where it is the whole."""
    message: str
    """What is wrong, and the fix."""


class Problem(Answer):
    """Why a request was not done (RFC 9457, `application/problem+json`)."""

    type: str
    """Names the kind of problem: "urn:agentfleet:problem:" and a word that stays the same."""
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    """What happened, why, and what to do."""
    instance: str = ""
    """The request's id, as in its X-Request-Id."""
    errors: tuple[FieldError, ...] = ()
    """Each wrong field, where the request itself is wrong."""


Cursor = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,1024}$", max_length=1024)]
"""Where a page goes on. Opaque: take it from `next` of the page before."""


def date_of(seconds: float | None) -> datetime | None:
    """Seconds since the epoch as a date in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
