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
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from agentfleet.instances import Instance, Node, Usage
from agentfleet.specs import AgentTemplate


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


Observation = Snapshot | Changed | Removed


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


class Backend(Protocol):
    """Where instances live. See the module's contract."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...

    def watch(self, fleet: str) -> AsyncIterator[Observation]:
        """Observe one fleet: a snapshot, then what changes. Close the iterator (`aclose`) to stop watching."""
        ...

    async def create(self, creation: Creation) -> None:
        """Bring one instance into being; does nothing if its id exists."""
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
