"""The nouns of an agent: the task it is given, and the failure it may answer with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentfleet.errors import AgentFleetError


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work.

    Attributes:
        id: Chosen by who sent it; the same id is never run twice at once, nor again once it has succeeded here.
        payload: Any JSON value.
        attempt: 1 for the first try, one more each time the task was handed on.
    """

    id: str
    payload: Any
    attempt: int = 1


class TaskFailed(AgentFleetError):
    """Raised by `Agent.fail`: the task has failed for a named cause, and the agent itself is well."""

    def __init__(self, cause: str, error: str = "") -> None:
        super().__init__(error or cause)
        self.cause = cause
