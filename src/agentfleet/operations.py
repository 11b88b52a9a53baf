"""Operations: what people ask a managed fleet to do, durable from the moment it is accepted, done by whoever leads.

An operation is *accepted* when the store has it. The fleet's leader takes the operations of a fleet up in their order:
each is *running* from when the leader acts on it until its outcome is known, and then *succeeded* or *failed*. A leader
that dies leaves its running operations to the next one, which looks what has come of them (`resumable`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from agentfleet.errors import KeyReused, SpecError
from agentfleet.specbase import Count, Positive, Spec, Text
from agentfleet.specs import AgentTemplate, FleetSpec
from agentfleet.units import Duration


class Kind(StrEnum):
    """What is asked for."""

    CREATE = "create"
    """Bring a new fleet up, as its spec says."""
    APPLY = "apply"
    """Take another spec on."""
    DEPLOY = "deploy"
    """Roll out another version, or any other change of the template."""
    SCALE = "scale"
    ROLLBACK = "rollback"
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    START = "start"
    DELETE = "delete"
    RESTART = "restart"
    """One instance, as the following ones."""
    REPLACE = "replace"
    ISOLATE = "isolate"
    RELEASE = "release"


class Status(StrEnum):
    """How far an operation has come; see the module."""

    ACCEPTED = "accepted"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


OPEN = (Status.ACCEPTED, Status.RUNNING)
"""Of these something is still to come."""

NEXT: Mapping[Status, tuple[Status, ...]] = {
    Status.ACCEPTED: (Status.RUNNING, Status.FAILED),
    Status.RUNNING: (Status.RUNNING, Status.SUCCEEDED, Status.FAILED),
    Status.SUCCEEDED: (),
    Status.FAILED: (),
}
"""What may follow. Running may follow itself: what is known of its effect was written down."""

RESHAPING = (Kind.APPLY, Kind.DEPLOY, Kind.SCALE, Kind.ROLLBACK)
"""These ask for another template or size."""

_ONCE = (Kind.RESTART, Kind.REPLACE, Kind.ISOLATE, Kind.RELEASE)


def resumable(kind: Kind) -> bool:
    """Whether it may be done again when it is not known whether it was: it says what should be, not what to do."""
    return kind not in _ONCE


# ------------------------------------------------------------------------------------------------ arguments


class Nothing(Spec):
    """No arguments."""


class Apply(Spec):
    """The spec that is to hold from now on."""

    spec: FleetSpec


class Create(Apply):
    """A new fleet's."""

    namespace: Annotated[Text, Field(max_length=253)] = "default"
    """Where it lives; the Kubernetes namespace, by custom."""


class Deploy(Spec):
    """What changes of the template; at least one thing."""

    version: Text | None = None
    changes: Annotated[Mapping[str, Any], Field(max_length=100)] = Field(default_factory=dict)
    """Other fields of the template and their new values."""


class Scale(Spec):
    """The size asked for."""

    replicas: Count


class Rollback(Spec):
    """Where to."""

    revision: Positive | None = None
    """None is the last good one."""


class OfInstance(Spec):
    """Which instance."""

    instance: Text


class Replace(OfInstance):
    """How one is replaced."""

    elsewhere: bool = False
    """Whether the new one should run on another node."""


class Isolate(OfInstance):
    """How one is set apart."""

    reason: Annotated[Text, Field(max_length=1000)]
    keep: Duration | None = 3600.0
    """How long it stays; None is until it is released."""


ARGUMENTS: Mapping[Kind, type[Spec]] = {
    Kind.CREATE: Create,
    Kind.APPLY: Apply,
    Kind.DEPLOY: Deploy,
    Kind.SCALE: Scale,
    Kind.ROLLBACK: Rollback,
    Kind.PAUSE: Nothing,
    Kind.RESUME: Nothing,
    Kind.STOP: Nothing,
    Kind.START: Nothing,
    Kind.DELETE: Nothing,
    Kind.RESTART: OfInstance,
    Kind.REPLACE: Replace,
    Kind.ISOLATE: Isolate,
    Kind.RELEASE: OfInstance,
}
"""The model of each kind's arguments."""


def understood(operation: Operation) -> bool:
    """Whether this version knows all that is asked for: it was valid when it was kept, by whichever version."""
    try:
        asked = ARGUMENTS[operation.kind].parse(dict(operation.arguments))
    except SpecError:
        return False
    return not isinstance(asked, Deploy) or asked.changes.keys() <= AgentTemplate.model_fields.keys()


# ------------------------------------------------------------------------------------------------ the record


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        actor: A person's or a program's name, for the audit.
        origin: Where from, such as an address.
        key: An idempotency key: the same actor's request with the same key is the same operation.
    """

    actor: str = "operator"
    origin: str = ""
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, as it is kept.

    Attributes:
        id: A UUID.
        seq: Its place among all operations, from 1; 0 while it is not kept.
        fleet: Id of the fleet.
        name: Name of the fleet, which outlives it.
        kind: What is asked for.
        arguments: As `ARGUMENTS` has them, JSON-ready.
        by: Who asked.
        created_at: Seconds since the epoch, as the following dates.
        status: How far it has come.
        started_at: When a leader took it up.
        finished_at: When its outcome was known.
        outcome: What is known of its effect, JSON-ready: "revision", "held", "error", "message".
        epoch: Of the leader that wrote it last.
    """

    id: str
    fleet: str
    name: str
    kind: Kind
    arguments: Mapping[str, Any]
    by: Caller
    created_at: float
    seq: int = 0
    status: Status = Status.ACCEPTED
    started_at: float | None = None
    finished_at: float | None = None
    outcome: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0

    @property
    def open(self) -> bool:
        """Whether something is still to come of it."""
        return self.status in OPEN

    @property
    def fingerprint(self) -> str:
        """Equal for equal requests: what a repeated idempotency key must match. A new fleet's id is not part of one."""
        about = self.name if self.kind is Kind.CREATE else self.fleet
        said = json.dumps([about, self.kind, self.arguments], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(said.encode()).hexdigest()

    def same(self, fleet: str, kind: Kind, arguments: Mapping[str, Any]) -> Operation:
        """This operation, for who asks for it again under its key, whatever has become of the fleet since.

        Args:
            fleet: The fleet's id or name.
            kind: What is asked for.
            arguments: As `ARGUMENTS` has them for the kind.

        Raises:
            KeyReused: It is another request.
            SpecError: The arguments are not usable.
        """
        if kind is self.kind and fleet in (self.fleet, self.name):
            asked = replace(self, arguments=ARGUMENTS[kind].parse(dict(arguments)).to_dict())
            if asked.fingerprint == self.fingerprint:
                return self
        raise reused(self.by)

    def moved(self, status: Status, now: float, **outcome: Any) -> Operation:
        """The operation one step further.

        Raises:
            ValueError: `status` cannot follow; a bug.
        """
        if status not in NEXT[self.status]:
            raise ValueError(f"operation {self.id} is {self.status}: {status} cannot follow")
        ended = status not in OPEN
        return replace(
            self,
            status=status,
            started_at=self.started_at if self.started_at is not None else now,
            finished_at=now if ended else None,
            outcome={**self.outcome, **outcome},
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, for those who asked."""
        return {
            "id": self.id,
            "cluster_id": self.fleet,
            "cluster_name": self.name,
            "kind": str(self.kind),
            "arguments": dict(self.arguments),
            "status": str(self.status),
            "actor": self.by.actor,
            "created_at": self.created_at,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "outcome": dict(self.outcome),
        }


def reused(by: Caller) -> KeyReused:
    """The refusal of a key that stands for another request."""
    return KeyReused(
        f"the idempotency key {by.key!r:.100} was used for another request; use a new key for each request"
    )
