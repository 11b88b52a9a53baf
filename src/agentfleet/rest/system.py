"""What the REST API answers of itself: managers, and who has changed what."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from agentfleet.rest.base import Answer, Cursor


class Alive(Answer):
    """The process lives."""

    status: Literal["alive"] = "alive"


class Ready(Answer):
    """It takes requests."""

    status: Literal["ready"] = "ready"
    identity: str


class ManagerAnswer(Answer):
    """One manager, as it says itself or as the others last saw it."""

    identity: str
    here: bool
    """Whether it is the one that answers."""
    ready: bool | None = None
    reason: str | None = None
    """Why it is not ready."""
    leads: int | None = None
    stands_by: int | None = None
    closed: Mapping[str, str] = {}
    """Clusters that it could not open, and why."""
    store_age_seconds: float | None = None
    """Time since its store answered last."""
    about: Mapping[str, Any] = {}
    """What it tells the others of itself."""


class Managers(Answer):
    """The managers that share the clusters."""

    items: tuple[ManagerAnswer, ...]


class AuditAnswer(Answer):
    """One change that somebody asked for, done or not."""

    seq: int
    at: datetime
    actor: str
    credential: str
    """Which token, by its id; never the token."""
    origin: str
    """The address that it came from."""
    request_id: str
    method: str
    path: str
    cluster: str | None
    operation_id: str | None
    status: int
    """What was answered."""
    detail: str
    hash: str
    previous: str


class AuditPage(Answer):
    """The audit, newest first."""

    items: tuple[AuditAnswer, ...]
    next: Cursor | None = None


class AuditVerified(Answer):
    """Whether the audit is as it was written."""

    ok: bool
    checked: int
    detail: str | None = None
