"""What a server's problem is, as an error of the library: the same that the manager itself would have raised."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from agentfleet.errors import (
    AccessDenied,
    AgentFleetError,
    BackendRefused,
    BackendUnavailable,
    Conflict,
    DeadlineExceeded,
    KeyReused,
    MissingExtra,
    NotFound,
    OperationRefused,
    SpecError,
)
from agentfleet.rest.base import Problem

_BY_KIND: Mapping[str, type[AgentFleetError]] = {
    "conflict": Conflict,
    "precondition-failed": Conflict,
    "precondition-required": SpecError,
    "refused": OperationRefused,
    "key-reused": KeyReused,
    "not-found": NotFound,
    "unauthenticated": AccessDenied,
    "forbidden": AccessDenied,
    "engine-refused": BackendRefused,
    "not-installed": MissingExtra,
    "deadline-exceeded": DeadlineExceeded,
}
AGAIN = frozenset({429, 502, 503, 504})
"""Statuses after which another manager, or the same one later, may say something else."""


def error_of(asked: str, status: int, body: bytes) -> AgentFleetError:
    """The error for an answer that is no success.

    Args:
        asked: What was asked, for the message.
        status: Of HTTP.
        body: A problem, or whatever a proxy in between makes of it.
    """
    try:
        problem = Problem.model_validate_json(body)
    except ValidationError:
        text = " ".join(body[:1000].decode(errors="replace").split())[:300] or "an empty answer"
        unknown = BackendUnavailable if status >= 500 or status == 429 else BackendRefused
        return unknown(f"{asked}: {status}: {text}")
    lines = [f"{asked}: {problem.detail}"]
    if len(problem.errors) > 1:
        lines += [f"  {each.field or '(the whole)'}: {each.message}" for each in problem.errors]
    kind = problem.type.rpartition(":")[2]
    other = BackendUnavailable if status >= 500 or status == 429 else SpecError
    return _BY_KIND.get(kind, other)("\n".join(lines))
