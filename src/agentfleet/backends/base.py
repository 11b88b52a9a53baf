"""The port to where instances live, and the contract that every backend keeps.

A backend observes and acts; it decides nothing. One conformance suite (`tests/conformance`) holds each of them to it:

1. **Identity.** The caller chooses the instance's id. `create` with an id that exists changes nothing and succeeds, so
   a create whose answer was lost can be repeated. An id is never used again for another instance.
2. **Observation.** `watch` yields one `Snapshot` of everything that exists (also what an earlier manager created), then
   `Changed` and `Removed` in an order that respects each instance's own history. After a gap it yields a new
   `Snapshot`: whoever reads it must treat what is missing there as removed, and nothing else ever means "removed".
   Silence means nothing. The stream ends only when the backend is closed.
3. **Action.** An action returns once the engine has accepted it; its effect is seen in the watch. Actions on an
   instance that does not exist raise `InstanceGone`, except `stop`, which is then already done. Any action may be
   repeated. An engine that cannot be reached raises `BackendUnavailable`, one that refuses raises `BackendRefused`.
4. **Stop** drains: SIGTERM or its like, up to `grace` seconds to finish, then the kill. The instance is `DRAINING` in
   between and `Removed` after. `grace=0` kills at once.
5. **Restart** keeps id, slot and revision, adds one to `restarts`, and clears nothing else of the identity. It works on
   running and on exited instances.
6. **An exit** that nobody asked for is reported as `EXITED` with its code, and is left for the caller to deal with.
7. **Leaving** `async with backend` leaves no task, socket or file descriptor behind; whether instances outlive it is
   the backend's documented choice.

There are two kinds. A `Backend` makes each instance that it is told to. A `WorkloadBackend` is told what a whole fleet
should be, as a Kubernetes Deployment is, and keeps size and revision by itself; for it these clauses read otherwise:

1. Ids are its own; an instance comes with `slot=NO_SLOT`. `apply` may be repeated: it says what should be, not what
   to do. It raises `Outdated`, and changes nothing, where it would undo a size that its caller had not seen.
2. `watch` also yields `Ordered`, at first and whenever it changes: what the engine has been told, and by whom.
5. `restart` may end the instance and let another take its place.
6. The engine fills the places of instances that are gone, and may restart by itself what has exited.
8. `isolate` has the engine let go of an instance and keep it: it fills the place, sends no work there, shows
   `Instance.isolated`, and never ends it. `stop` does; `delete` leaves it.
9. One that is `Relocating` makes stand-ins. A stand-in has `Instance.stands_in_for`, counts for no size and gets no
   work. `exchange` makes it an ordinary instance, by the same id, and ends the other one; the size is never missed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from agentfleet.events import Event
from agentfleet.instances import Instance, Isolation, Node, Usage
from agentfleet.measures import Metric, Sample
from agentfleet.specs import AgentTemplate, FleetSpec


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything of one fleet that exists now, and the nodes it may run on."""

    instances: tuple[Instance, ...]
    nodes: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Changed:
    """An instance is new or looks different now."""

    instance: Instance


@dataclass(frozen=True, slots=True)
class Removed:
    """An instance does not exist any more."""

    id: str


@dataclass(frozen=True, slots=True)
class Edit:
    """A change by hand of what instances are made from."""

    by: str
    at: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """What an engine that keeps a fleet by itself has been told to keep."""

    replicas: int
    revision: int | None = None
    """The fleet's revision; None when what is run is not of the fleet's making."""
    paused: bool = False
    by: str | None = None
    """Who said so, when it was somebody else; `AUTOSCALER` for the engine's own."""
    absent: bool = False
    """Whether there is nothing that could be told: the engine does not know the fleet, or not any more."""
    edit: Edit | None = None
    """What somebody else has put into the instances' template since we told it last; None: it is ours."""
    trouble: str | None = field(default=None, compare=False)
    """Why the engine makes no instances, in its own words; None while it does."""


AUTOSCALER = "the cluster's autoscaler"
"""`Ordered.by` where the engine itself has set the size."""

Observation = Snapshot | Changed | Removed | Ordered


@dataclass(frozen=True, slots=True)
class Creation:
    """A request for one instance."""

    id: str
    fleet: str
    slot: int
    revision: int
    template: AgentTemplate
    avoid_nodes: tuple[str, ...] = ()
    """Nodes to stay away from if there is another choice."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What a whole fleet should be, for an engine that makes it so by itself."""

    spec: FleetSpec
    """The fleet as its user asks for it; size and template here go before those in it."""
    revision: int
    template: AgentTemplate
    replicas: int
    paused: bool = False
    """Whether its rollout is to stay where it is."""
    expendable: tuple[str, ...] = ()
    """Instances that are to go first when there are too many."""
    indifferent: bool = False
    """Whether any other instances may go as well: nothing is known of what they are busy with."""
    resting: int | None = None
    """The size to which a stopped fleet returns; None while it is not stopped."""
    same_size: bool = field(default=False, compare=False)
    """Whether this is not about the size: an engine that keeps another, on somebody else's word, refuses it with
    `Outdated`."""

    @property
    def fleet(self) -> str:
        """The fleet's name."""
        return self.spec.name


class Engine(Protocol):
    """What both kinds of backends can do. See the module's contract."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...

    def watch(self, fleet: str) -> AsyncIterator[Observation]:
        """Observe one fleet: a snapshot, then what changes. Close the iterator (`aclose`) to stop watching."""
        ...

    async def stop(self, fleet: str, id: str, *, grace: float) -> None:
        """Drain for up to `grace` seconds, then kill. Already gone is success."""
        ...

    async def restart(self, fleet: str, id: str, *, grace: float) -> None:
        """End the instance's process (drained like `stop`) and start it again in place."""
        ...

    async def usage(self, fleet: str) -> Mapping[str, Usage]:
        """What each instance uses now; instances that could not be measured are absent."""
        ...

    async def logs(self, fleet: str, id: str, *, lines: int = 100) -> Sequence[str]:
        """The last lines the instance wrote, oldest first."""
        ...

    def credential(self, fleet: str, id: str) -> str | None:
        """The bearer token that the instance accepts for work and configuration; None where it asks for none."""
        ...


class Backend(Engine, Protocol):
    """Where instances live that are made one by one."""

    async def create(self, creation: Creation) -> None:
        """Bring one instance into being; does nothing if its id exists."""
        ...


@runtime_checkable
class WorkloadBackend(Engine, Protocol):
    """Where a fleet lives that an engine keeps by itself."""

    async def apply(self, workload: Workload) -> None:
        """Have the fleet be so: size, revision, paused or not. Returns when the engine has accepted it."""
        ...

    async def isolate(self, fleet: str, id: str, *, isolation: Isolation) -> None:
        """Let go of an instance, which stays as it is; raises `InstanceGone` when there is none."""
        ...

    async def delete(self, fleet: str) -> None:
        """Have nothing left of the fleet; already gone is success."""
        ...


# What an engine may be able to do besides; whoever can has the method.


@runtime_checkable
class ConfigKeeping(Protocol):
    """An engine that can keep a fleet's configuration document where instances read it."""

    async def configure(self, spec: FleetSpec, revision: int, document: Any) -> None:
        """Keep this document, if the spec asks for that; may be repeated.

        Raises:
            SpecError: The engine cannot hold it.
            BackendError: As any action.
        """
        ...


@runtime_checkable
class Announcing(Protocol):
    """An engine that can show its own users what a fleet does and why."""

    def announce(self, event: Event) -> None:
        """Take on an event of the journal; returns at once and raises nothing. Best effort."""
        ...


@runtime_checkable
class SizeKeeping(Protocol):
    """An engine that may scale a fleet by itself, when the fleet's spec leaves that to it."""

    def keeps_size(self, spec: FleetSpec) -> bool:
        """Whether the size of this fleet is the engine's to decide while the fleet runs."""
        ...


@runtime_checkable
class Relocating(Protocol):
    """An engine that places instances by itself, and can have one replaced away from its node nevertheless."""

    async def stand_in(self, fleet: str, id: str, *, away_from: str) -> None:
        """Begin a stand-in for an instance, of its revision, on any node but this one. Its watch shows it.

        A call that is repeated may make another one, which is to be discarded.

        Raises:
            InstanceGone: There is no such instance, or the engine keeps it no longer.
            BackendError: As any action.
        """
        ...

    async def exchange(self, fleet: str, id: str, stand_in: str, *, grace: float) -> None:
        """Have a stand-in take the place of its instance, and end that one as `stop` does.

        Raises:
            InstanceGone: One of the two is gone, or they do not belong together.
            BackendError: As any action; the stand-in may have become a member.
        """
        ...

    async def discard(self, fleet: str, stand_in: str) -> None:
        """End a stand-in. Already gone is success; one that is a member by now is left alone."""
        ...


@runtime_checkable
class Measured(Protocol):
    """An engine that counts what it does itself, and knows how well it sees."""

    @property
    def measures(self) -> Mapping[str, Metric]:
        """What it may show, by name: counters, and gauges whose largest value is the worst. Always the same."""
        ...

    def samples(self) -> Iterable[Sample]:
        """All of it as it is now; asked in any thread, also while the engine is not open."""
        ...


def own(backend: Engine, what: str) -> Any:
    """The "prober" or "network" of a backend whose instances have no sockets (a simulation); None of any other."""
    make = getattr(backend, what, None)
    return make() if make is not None else None
