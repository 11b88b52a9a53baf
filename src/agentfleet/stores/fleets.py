"""RECORD: the port to where managers keep which fleets there are, what was asked of them, and how they stand.

What is wanted (`FleetRecord`, `Operation`) is written by anyone and acted on by the fleet's leader. What stands
(`FleetRecord.status`) is the leader's own picture, for those who look at another manager; nothing is decided from it.
What a leader writes goes through its fleet's fence: once a later epoch has written, an earlier one is `NotLeader`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from agentfleet.errors import RecordUnreadable, SpecError
from agentfleet.operations import Caller, Operation
from agentfleet.specs import AgentTemplate, FleetSpec


@dataclass(frozen=True, slots=True)
class FleetRecord:
    """One fleet that is to be.

    Attributes:
        id: A UUID, of this fleet and no later one of its name.
        name: Unique among the fleets of a store.
        namespace: Where it lives; the Kubernetes namespace, by custom.
        spec: As its user asks for it.
        generation: Counts the specs it has had, from 1.
        created_at: Seconds since the epoch.
        created_by: Who made it.
        deleting: Whether it is being deleted.
        status: How it stands, as its leader last said; empty before.
        status_at: When that was, in seconds since the epoch.
        asked: Place of the newest operation that asks for another template or size (`operations.RESHAPING`), 0 where
            none does; only `FleetRecords.find` says this, and the next.
        pending: Whether nobody has acted upon that one yet.
    """

    id: str
    name: str
    namespace: str
    spec: FleetSpec
    created_at: float
    created_by: str = ""
    generation: int = 1
    deleting: bool = False
    status: Mapping[str, Any] = field(default_factory=dict)
    status_at: float | None = None
    asked: int = field(default=0, compare=False)
    pending: bool = field(default=False, compare=False)

    @property
    def wanted(self) -> FleetSpec:
        """The spec with the template and the size that are wanted by now: that were deployed or scaled to last.

        As its leader last said. The size of a fleet with a scaling policy is the autoscaler's, and no part of its spec.

        Raises:
            RecordUnreadable: A newer version leads it, and has a template that this one cannot read.
        """
        told = self.status.get("wanted")
        if told is None or told["generation"] != self.generation:
            return self.spec  # nothing else was asked for, or nobody has acted upon this spec yet
        try:
            template = AgentTemplate.parse(told["template"], source=f"the template that is wanted of {self.name}")
        except SpecError as error:
            raise RecordUnreadable(f"fleet {self.name}: {error}") from error
        replicas = self.spec.replicas if self.spec.scaling is not None else told["replicas"]
        return self.spec.model_copy(update={"template": template, "replicas": replicas})


@dataclass(frozen=True, slots=True)
class UnreadFleet:
    """A fleet whose spec this version cannot read, because a newer one has written it. Otherwise as `FleetRecord`.

    Attributes:
        trouble: Why it cannot be read.
    """

    id: str
    name: str
    namespace: str
    created_at: float
    created_by: str
    generation: int
    deleting: bool
    status: Mapping[str, Any]
    status_at: float | None
    trouble: str


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """An instance, as it was last seen: a row of `agent_instances` (F18), and more."""

    instance_id: str
    status: str
    """Its condition; see `agentfleet.view.Condition`."""
    node_name: str | None = None
    cpu_usage: float | None = None
    """Cores."""
    memory_usage: float | None = None
    """Bytes."""
    last_heartbeat: datetime | None = None
    created_at: datetime | None = None
    version: str | None = None
    revision: int | None = None
    health: str | None = None
    restarts: int = 0
    config_revision: int | None = None
    """The configuration that it has acknowledged."""
    detail: str | None = None
    """Why it is what it is, as far as its engine or an operator has said."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What has changed in how a fleet stands, as its leader sees it.

    Attributes:
        fleet: Its id.
        epoch: In which this is told.
        status: How it stands, JSON-ready; None if as before.
        changed: Instances that are new or look different.
        gone: Ids of those that are there no more.
    """

    fleet: str
    epoch: int
    status: Mapping[str, Any] | None = None
    changed: Sequence[InstanceRow] = ()
    gone: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Attendance:
    """How often a manager has said that it is there, and what it told of itself last."""

    beats: int
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class News:
    """What has changed in a store of fleets.

    Attributes:
        position: Where to go on from.
        fleets: Fleets that are new or changed, but for their status.
        gone: Ids of fleets whose deletion was completed.
        operations: Operations that are new or changed, in their order; from position 0 the open ones alone. Those of a
            kind that this version does not know are left out.
    """

    position: int
    fleets: tuple[FleetRecord | UnreadFleet, ...] = ()
    gone: tuple[str, ...] = ()
    operations: tuple[Operation, ...] = ()


class FleetRecords(Protocol):
    """Where fleets and operations are kept. One contract suite (`tests/stores`) runs against every implementation.

    Every method may raise `BackendUnavailable` when the place cannot be reached, and `DeadlineExceeded` when it does
    not answer in time; whether a write was kept is then unknown. What asks for one fleet or operation, or changes it,
    raises `RecordUnreadable` where a newer version has written what this one cannot read; nothing was changed then.
    """

    async def create(self, record: FleetRecord, operation: Operation) -> Operation:
        """Keep a new fleet and the operation that makes it, both or neither; returns it as it is kept.

        With the key of an earlier request of the same actor nothing is kept, and the earlier operation is returned.

        Raises:
            OperationRefused: There is a fleet of this name, or the key was used for something else.
        """
        ...

    async def submit(
        self,
        operation: Operation,
        *,
        spec: FleetSpec | None = None,
        expect: int | None = None,
        asked: int | None = None,
    ) -> Operation:
        """Keep an operation on a fleet, and its new spec if it has one; returns it as it is kept. Keys as in `create`.

        Args:
            operation: `Kind.DELETE` also marks the fleet as being deleted: it takes nothing more from then on, except
                another `Kind.DELETE` if that one has failed.
            spec: The fleet's spec from now on; its generation rises.
            expect: The generation that this is based on; None takes any.
            asked: `FleetRecord.asked` of the state that this is based on; None takes any.

        Raises:
            NotFound: There is no such fleet.
            Conflict: Its generation is not `expect`, or another template or size was asked for since.
            OperationRefused: The fleet is being deleted or should have been, or the key was used for something else.
        """
        ...

    async def find(self, id: str) -> FleetRecord:
        """One fleet, by its id or its name; raises `NotFound`."""
        ...

    async def fleets(self, *, after: str = "", limit: int = 1000) -> Sequence[FleetRecord | UnreadFleet]:
        """Up to `limit` fleets whose names follow `after`, by name."""
        ...

    async def earlier(self, by: Caller) -> Operation | None:
        """What the same actor has asked for under the same key before, of whatever fleet; None without a key."""
        ...

    async def operation(self, id: str) -> Operation:
        """One operation; raises `NotFound`."""
        ...

    async def operations(self, fleet: str, *, before: int | None = None, limit: int = 100) -> Sequence[Operation]:
        """Up to `limit` operations of a fleet, newest first, that came before the place `before`.

        Those that this version cannot read are left out.
        """
        ...

    async def advance(self, operation: Operation) -> None:
        """Write down how far an operation has come, in its epoch; one that has ended stays as it is.

        Raises:
            NotLeader: A later epoch has written for this fleet.
        """
        ...

    async def report(self, pictures: Sequence[Picture], *, at: float) -> Sequence[str]:
        """Write down how fleets stand; each by itself is written as a whole.

        Args:
            pictures: One of each fleet.
            at: Now, in seconds since the epoch.

        Returns:
            Ids of the fleets that were left out, because a later epoch has written or they are gone.
        """
        ...

    async def epoch(self, fleet: str) -> int:
        """The latest epoch in which a fleet's leader has written, by the fleet's id; 0 where none has."""
        ...

    async def instances(
        self, fleet: str, *, after: str = "", limit: int = 1000, where: Mapping[str, str] | None = None
    ) -> Sequence[InstanceRow]:
        """Up to `limit` of a fleet's instances whose ids follow `after`, by id, as its leader has last seen them.

        Args:
            fleet: Its id.
            after: An instance's id.
            limit: At most so many.
            where: Values that fields of `InstanceRow` must have.
        """
        ...

    async def remove(self, id: str, operation: Operation) -> None:
        """Remove a fleet whose deletion is complete, with what was seen of it, and end the operation that asked for it.

        Raises:
            NotLeader: A later epoch has written for this fleet.
        """
        ...

    async def news(self, after: int) -> News:
        """What has changed since a position; from 0 all there is."""
        ...

    async def changed(self, after: int) -> None:
        """Wait until there is something after a position. May return early, never late."""
        ...

    async def attend(self, identity: str, about: Mapping[str, Any]) -> Mapping[str, Attendance]:
        """Say that a manager is there, and read which others have said so, it included.

        Args:
            identity: The manager's.
            about: What it tells of itself, JSON-ready.
        """
        ...

    async def leave(self, identity: str) -> None:
        """Forget a manager; one that is not known is no error."""
        ...

    async def ping(self) -> None:
        """Return if the place answers."""
        ...
