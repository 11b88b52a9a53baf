"""What can go wrong with a control plane under test."""

from __future__ import annotations

from agentfleet.errors import AgentFleetError


class AssetsMissing(AgentFleetError, FileNotFoundError):
    """The programs of a control plane were not found; the message says where they were looked for."""


class PlaneFailed(AgentFleetError):
    """A program of the control plane did not start, died, or did not obey; the message ends with its log."""


class ApiRefused(AgentFleetError):
    """The API server answered no.

    Attributes:
        status: The HTTP status.
        reason: The machine-readable reason of the answer ("NotFound", "Conflict"); empty when it gave none.
    """

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
