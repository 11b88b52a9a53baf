"""What the REST API answers of clusters, their instances, operations and events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from agentfleet.events import Event
from agentfleet.operations import Kind, Operation, Status
from agentfleet.rest.base import Answer, Cursor, date_of
from agentfleet.rest.clusters import Doing
from agentfleet.specs import FleetSpec
from agentfleet.stores.fleets import FleetRecord, InstanceRow, UnreadFleet

PHASES = Literal[
    "creating", "running", "scaling", "rolling", "paused", "degraded", "frozen", "stopped", "deleting", "unknown"
]
"""A cluster in one word; "unknown" where no manager has said yet."""


# ------------------------------------------------------------------------------------------------ accepted


class Accepted(Answer):
    """It is sure to be done. `operation_id` tells how far it has come: GET /api/v1/operations/{operation_id}."""

    cluster_id: str
    status: Doing
    operation_id: str


class Created(Accepted):
    """A new cluster is being made."""

    status: Literal["creating"] = "creating"


class Scaling(Accepted):
    """A cluster is getting another size."""

    status: Literal["scaling"] = "scaling"
    target_replicas: int


# ------------------------------------------------------------------------------------------------ clusters


class ClusterSummary(Answer):
    """A cluster in a list, as its manager last said that it stands."""

    id: str
    cluster_name: str
    namespace: str
    status: PHASES
    generation: int
    """Counts the specs it has had."""
    replicas: int
    """Instances wanted."""
    ready: int
    """Instances that work."""
    sick: int
    """Instances that do not, or not any more."""
    version: str | None
    created_at: datetime | None
    seen_at: datetime | None
    """When its manager said so; the rest is as of then."""
    leader: str | None
    """The manager that leads it."""

    @classmethod
    def listed(cls, record: FleetRecord | UnreadFleet) -> Self:
        """From what is kept."""
        return cls.made(**_summary(record))


class Revision(Answer):
    """A version of a cluster's template that was or is run."""

    number: int
    version: str
    image: str | None
    created_at: datetime | None
    cause: str
    """Why it exists: "deploy", "upgrade", …"""
    good: bool
    """Whether it was once rolled out completely."""
    current: bool
    """Whether it is the one that is wanted."""


class Revisions(Answer):
    """A cluster's kept revisions, oldest first."""

    items: tuple[Revision, ...]


class Cluster(ClusterSummary):
    """A cluster in full."""

    created_by: str
    spec: FleetSpec
    """As it is wanted by now: with the template and, without a scaling policy, the size that were asked for last."""
    running: bool
    """False when it was stopped."""
    paused: bool
    """Whether rollouts are held."""
    rollout: str | None
    """How far the last rollout has come."""
    revision: int | None
    """The one that is wanted."""
    config_revision: int
    """The configuration that is delivered; 0 is none."""
    counts: Mapping[str, int]
    """Instances by what they are: idle, busy, starting, unknown, sick, dead, draining, isolated."""
    epoch: int
    """The term of its leader."""

    @classmethod
    def of(cls, record: FleetRecord) -> Self:
        """From what is kept."""
        status = record.status
        counts = ("idle", "busy", "starting", "unknown", "sick", "dead", "draining", "isolated")
        return cls.made(
            **_summary(record),
            created_by=record.created_by,
            spec=record.wanted,
            running=bool(status.get("running", False)),
            paused=bool(status.get("paused", False)),
            rollout=status.get("rollout"),
            revision=status.get("revision"),
            config_revision=int(status.get("config_revision") or 0),
            counts={name: int(status.get(name, 0)) for name in counts},
            epoch=int(status.get("epoch", 0)),
        )


class ClusterPage(Answer):
    """Clusters by name."""

    items: tuple[ClusterSummary, ...]
    next: Cursor | None = None


class ClusterHealth(Answer):
    """How well a cluster is, as its manager last saw it."""

    cluster_id: str
    status: Literal["healthy", "degraded", "unhealthy", "stopped", "unknown"]
    phase: PHASES
    desired: int
    ready: int
    starting: int
    sick: int
    dead: int
    unknown: int
    available_percent: Annotated[float, Field(ge=0)]
    """Working instances, of those that are wanted."""
    reasons: tuple[str, ...]
    """Why it is not healthy."""
    seen_at: datetime | None
    age_seconds: float | None
    """How old all of this is."""

    @classmethod
    def of(cls, record: FleetRecord, now: float) -> Self:
        """From what is kept."""
        status, phase = record.status, _phase(record)
        desired, ready = int(status.get("desired", record.spec.replicas)), int(status.get("good", 0))
        sick, dead, unknown = (int(status.get(each, 0)) for each in ("sick", "dead", "unknown"))
        starting, age = int(status.get("starting", 0)), None
        if record.status_at is not None:
            age = max(0.0, round(now - record.status_at, 3))
        reasons = []
        if not status:
            reasons.append("no manager has seen it yet")
        if status.get("frozen"):
            reasons.append("so many instances are sick that nothing more is disrupted")
        if sick or dead:
            reasons.append(f"{sick} instances are sick and {dead} dead")
        if ready + unknown < desired and phase not in ("stopped", "deleting"):
            reasons.append(f"{ready + unknown} of {desired} instances work")
        share = 100.0 if not desired else round(100.0 * ready / desired, 2)
        return cls.made(
            cluster_id=record.id,
            status=_health(phase, bool(status), desired, ready + unknown, ill=bool(sick or dead)),
            phase=phase,
            desired=desired,
            ready=ready,
            starting=starting,
            sick=sick,
            dead=dead,
            unknown=unknown,
            available_percent=share,
            reasons=tuple(reasons),
            seen_at=date_of(record.status_at),
            age_seconds=age,
        )


def _health(phase: str, seen: bool, desired: int, working: int, *, ill: bool) -> str:
    if not seen:
        return "unknown"
    if phase in ("stopped", "deleting"):
        return "stopped"
    if phase == "frozen" or (desired and working == 0):
        return "unhealthy"
    return "degraded" if ill or working < desired else "healthy"


def _phase(record: FleetRecord | UnreadFleet) -> str:
    return "deleting" if record.deleting else str(record.status.get("phase", "unknown"))


def _summary(record: FleetRecord | UnreadFleet) -> dict[str, Any]:
    status, asked = record.status, record.spec.replicas if isinstance(record, FleetRecord) else 0
    return {
        "id": record.id,
        "cluster_name": record.name,
        "namespace": record.namespace,
        "status": _phase(record),
        "generation": record.generation,
        "replicas": int(status.get("desired", asked)),
        "ready": int(status.get("good", 0)),
        "sick": int(status.get("sick", 0)) + int(status.get("dead", 0)),
        "version": status.get("version"),
        "created_at": date_of(record.created_at),
        "seen_at": date_of(record.status_at),
        "leader": status.get("leader"),
    }


def revisions_of(record: FleetRecord) -> Revisions:
    """A cluster's kept revisions."""
    status = record.status
    made = [
        Revision.made(
            number=each["number"],
            version=each["version"],
            image=each.get("image"),
            created_at=date_of(each["created_at"]),
            cause=each["cause"],
            good=each["good"],
            current=each["number"] == status.get("revision"),
        )
        for each in status.get("revisions", ())
    ]
    return Revisions.made(items=tuple(made))


# ------------------------------------------------------------------------------------------------ instances


class Instance(Answer):
    """An instance, as it was last seen."""

    instance_id: str
    status: str
    """pending, starting, fresh, idle, busy, unknown, sick, dead, draining or isolated."""
    node_name: str | None
    cpu_usage: float | None
    """Cores."""
    memory_usage: float | None
    """Bytes."""
    last_heartbeat: datetime | None
    created_at: datetime | None
    version: str | None
    revision: int | None
    health: str | None
    restarts: int
    config_revision: int | None
    """The configuration that it has acknowledged."""
    detail: str | None
    """Why it is what it is, as far as anybody has said."""

    @classmethod
    def of(cls, row: InstanceRow) -> Self:
        """From what is kept."""
        return cls.made(**{name: getattr(row, name) for name in cls.model_fields})


class InstancePage(Answer):
    """Instances by id."""

    items: tuple[Instance, ...]
    next: Cursor | None = None


class Logs(Answer):
    """The last lines that an instance wrote, oldest first."""

    instance_id: str
    lines: tuple[str, ...]


# ------------------------------------------------------------------------------------------------ operations and events


class OperationAnswer(Answer):
    """How far something that was asked for has come."""

    id: str
    cluster_id: str
    cluster_name: str
    kind: Kind
    arguments: Mapping[str, Any]
    status: Status
    actor: str
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    outcome: Mapping[str, Any]
    """What is known of its effect; of a failure "error" and "message"."""

    @property
    def open(self) -> bool:
        """Whether something is still to come of it."""
        return self.status in (Status.ACCEPTED, Status.RUNNING)

    @classmethod
    def of(cls, operation: Operation) -> Self:
        """From what is kept."""
        dates = {name: date_of(getattr(operation, name)) for name in ("created_at", "started_at", "finished_at")}
        said = operation.to_dict() | dates | {"kind": operation.kind, "status": operation.status}
        return cls.made(**said)


class OperationPage(Answer):
    """Operations, newest first."""

    items: tuple[OperationAnswer, ...]
    next: Cursor | None = None


class EventAnswer(Answer):
    """One thing that happened to a cluster, or was decided about it."""

    seq: int
    """Its place; streams are resumed by it."""
    at: datetime
    cluster_name: str
    kind: str
    instance: str | None = None
    data: Mapping[str, Any] = {}
    reasons: tuple[Mapping[str, Any], ...] = ()
    """Why, most decisive first: each with code, text and numbers."""
    epoch: int = 0

    @classmethod
    def of(cls, event: Event) -> Self:
        """From a journal's."""
        return cls.made(
            seq=event.seq,
            at=date_of(event.at),
            cluster_name=event.fleet,
            kind=event.kind,
            instance=event.instance,
            data=event.data,
            reasons=event.reasons,
            epoch=event.epoch,
        )

    @classmethod
    def trimmed(cls, data: str) -> Self:
        """What a stream says where some of what was missed is kept no longer."""
        told = json.loads(data)
        now = datetime.now(UTC)
        return cls(seq=int(told["trimmed"]), at=now, cluster_name="", kind="journal.trimmed", data=told)


class EventPage(Answer):
    """Events in their order, or newest first where that was asked for."""

    items: tuple[EventAnswer, ...]
    next: Cursor | None = None
    """Where to go on; null at the end. What happens later comes `after` the last one's `seq`."""
