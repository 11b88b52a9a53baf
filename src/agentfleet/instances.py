"""What exists: instances, nodes, and what is known about them. Slim frozen dataclasses, no pydantic."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

NO_SLOT = -1
"""`Instance.slot` as engines show it that fill a fleet by themselves and know no places; the fleet finds one."""


class Phase(StrEnum):
    """Where an instance is in its life, as its backend sees it."""

    PENDING = "pending"
    """Asked for, not running yet."""
    RUNNING = "running"
    """The process runs; whether it works is the health verdict's business."""
    DRAINING = "draining"
    """Told to finish; it takes no new work and will be gone by its drain deadline."""
    EXITED = "exited"
    """The process has ended and can be restarted in place."""
    LOST = "lost"
    """Its node cannot be reached: it may or may not still run."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """Why an instance was set apart for examination, and for how long. Times are seconds since the epoch."""

    since: float
    reason: str
    until: float | None = None
    """When it is ended by itself; None is not before it is released."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One incarnation of an agent, as its backend last saw it. Times are seconds since the epoch."""

    id: str
    """Unique for ever; a replacement is another instance."""
    fleet: str
    slot: int
    """Which of the fleet's places it fills; its replacement fills the same."""
    revision: int
    version: str
    phase: Phase
    created_at: float
    started_at: float | None = None
    """Start of the present process; a restart in place moves it."""
    ready: bool = False
    """Whether the backend considers it able to work. Embedded backends: the process runs."""
    ready_at: float | None = None
    """When `ready` last became true."""
    node: str | None = None
    address: str | None = None
    """host:port of its HTTP endpoint, once known."""
    restarts: int = 0
    exit_code: int | None = None
    """Of the last process that ended; negative is the signal that killed it, None is unknown."""
    isolated: Isolation | None = None
    """Set while it is kept for examination only: no work, no place in the fleet."""
    trouble: str | None = None
    """Why it does not start, in the engine's words: no node takes it, its image cannot be had."""
    stands_in_for: str | None = None
    """The instance whose place it is to take; until then it is no member of the fleet, and no list shows it."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine that instances run on."""

    name: str
    ready: bool = True
    schedulable: bool = True
    zone: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What one instance uses, measured over the `window` seconds before `at`."""

    at: float
    cpu: float
    """Cores."""
    memory: int
    """Bytes resident."""
    window: float = 0.0


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """What an agent says of itself at GET /status."""

    state: str = "idle"
    """idle, busy or draining."""
    in_flight: int = 0
    queue_length: int = 0
    last_progress: float | None = None
    """Seconds since the agent last reported progress (a span, so that clocks need not agree)."""
    completed: int = 0
    failed: int = 0
    cause: str | None = None
    task: str | None = None
    config_revision: int | None = None
    version: str | None = None


class HealthState(StrEnum):
    """What is believed of an instance. Unknown is not unhealthy."""

    UNKNOWN = "unknown"
    """No evidence yet, as after a restart of the manager."""
    STARTING = "starting"
    """Never healthy so far, and within its start-up grace."""
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """Some failures, fewer than the threshold: still in service."""
    UNHEALTHY = "unhealthy"
    """Out of service, and a case for recovery."""
    DEAD = "dead"
    """The backend says that it has exited or is lost."""
