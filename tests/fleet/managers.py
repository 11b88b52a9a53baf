"""A platform to test managers in: one store, one journal, one simulated cluster, and managers that come and go."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import anyio
from tests.fleet.test_leadership_fleet import CutLeases
from tests.fleet.world import EPOCH, Crash

from agentfleet import BackendUnavailable, FleetSpec, MemoryBackend, MemoryJournal, SystemClock
from agentfleet.core.sharing import SharingPolicy
from agentfleet.manager import FleetManager
from agentfleet.operations import Caller, Kind, Operation
from agentfleet.stores.fleets import FleetRecord, Picture
from agentfleet.stores.fleets_memory import MemoryFleets
from agentfleet.stores.leases import MemoryLeases


async def until(holds: Callable[[], bool], seconds: float = 600.0) -> None:
    """Wait, in virtual time, for something that has no event."""
    with anyio.fail_after(seconds):
        while not holds():  # noqa: ASYNC110
            await anyio.sleep(0.1)


class Store(MemoryFleets):
    """Fleets and operations, with the troubles of real stores."""

    def __init__(self) -> None:
        super().__init__()
        self.down = False
        self.writes = 0
        """Of managers: how far operations have come, how fleets stand, removals."""
        self.dies_at: tuple[int, str] | None = None
        """At which write, and "before" or "after" it, the manager that writes dies; once."""
        self.died = 0
        self.reports = 0

    async def news(self, after: int) -> Any:
        self._reach()
        return await super().news(after)

    async def changed(self, after: int) -> None:
        self._reach()
        await super().changed(after)

    async def create(self, record: FleetRecord, operation: Operation) -> Operation:
        self._reach()
        return await super().create(record, operation)

    async def submit(
        self,
        operation: Operation,
        *,
        spec: FleetSpec | None = None,
        expect: int | None = None,
        asked: int | None = None,
    ) -> Operation:
        self._reach()
        return await super().submit(operation, spec=spec, expect=expect, asked=asked)

    async def attend(self, identity: str, about: Mapping[str, Any]) -> Any:
        self._reach()
        return await super().attend(identity, about)

    async def leave(self, identity: str) -> None:
        self._reach()
        await super().leave(identity)

    async def operation(self, id: str) -> Operation:
        self._reach()
        return await super().operation(id)

    async def advance(self, operation: Operation) -> None:
        await self._write(lambda: MemoryFleets.advance(self, operation))

    async def remove(self, id: str, operation: Operation) -> None:
        await self._write(lambda: MemoryFleets.remove(self, id, operation))

    async def report(self, pictures: Sequence[Picture], *, at: float) -> Sequence[str]:
        self._reach()
        self.reports += 1
        return await super().report(pictures, at=at)

    def kept(self, id: str) -> Operation:
        """An operation as it stands, whatever is down."""
        return self._operations[id]

    def status(self, fleet: str) -> Mapping[str, Any]:
        """How a fleet stands."""
        return self._fleets[fleet].status

    def seen(self, fleet: str) -> list[str]:
        """Ids of a fleet's instances."""
        return sorted(self._instances[fleet])

    def _reach(self) -> None:
        if self.down:
            raise BackendUnavailable("simulated: the store is down")

    async def _write(self, act: Callable[[], Awaitable[None]]) -> None:
        self._reach()
        self.writes += 1
        dies = self.dies_at if self.dies_at is not None and self.dies_at[0] == self.writes else None
        if dies is not None:
            self.died += 1
            if dies[1] == "after":
                await act()
            raise Crash
        await act()


class Platform:
    """What managers share, and the managers."""

    def __init__(self) -> None:
        self.clock = SystemClock(EPOCH)
        self.store = Store()
        self.journal = MemoryJournal()
        self.leases = MemoryLeases()
        self.backend = MemoryBackend(seed=1, clock=self.clock)
        self.done: Counter[str] = Counter()
        """Actions that reached the engine, by name."""

    @asynccontextmanager
    async def manager(self, identity: str = "m1", **more: Any) -> AsyncIterator[FleetManager]:
        """A manager that lives as long as the block; if it ends by an error, its lease is left behind."""
        leases = CutLeases(self.leases)
        given: dict[str, Any] = {"backend": self.backend, "leases": leases, **more}
        try:
            async with FleetManager(
                self.store, journal=self.journal, clock=self.clock, identity=identity, **given
            ) as made:
                try:
                    yield made
                except BaseException:
                    leases.cut = True
                    raise
        except BaseExceptionGroup as group:
            died, rest = group.split(Crash)
            if died is not None:
                raise Crash from group
            assert rest is not None
            raise

    def managers(self) -> Managers:
        return Managers(self)

    async def ask(self, manager: FleetManager, kind: Kind, **arguments: Any) -> Operation:
        """An operation on the fleet "a", and how it ended."""
        asked = await manager.request("a", kind, arguments, by=Caller("ann", key=uuid.uuid4().hex))
        return await manager.finished(asked.id, timeout=3600)

    def kinds(self, *kinds: str) -> list[str]:
        """Events of these kinds, by kind, in their order."""
        return [each.kind for each in self.journal.read() if each.kind in kinds]


class Managers:
    """Managers in tasks of their own, which may be killed."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.alive: dict[str, FleetManager] = {}
        self._ends: dict[str, anyio.Event] = {}
        self._leases: dict[str, CutLeases] = {}
        self._scopes: dict[str, anyio.CancelScope] = {}
        self._tasks = anyio.create_task_group()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        for end in self._ends.values():
            end.set()
        return await self._tasks.__aexit__(kind, error, trace)

    async def start(self, identity: str, **more: Any) -> FleetManager:
        """Another manager, open."""
        await self._tasks.start(self._run, identity, more)
        return self.alive[identity]

    async def _run(self, identity: str, more: Mapping[str, Any], *, task_status: Any) -> None:
        leases = self._leases[identity] = CutLeases(self.platform.leases)
        end = self._ends[identity] = anyio.Event()
        with anyio.CancelScope() as scope:
            self._scopes[identity] = scope
            async with self.platform.manager(identity, **{"leases": leases, **more}) as made:
                self.alive[identity] = made
                task_status.started()
                await end.wait()
        self.alive.pop(identity, None)

    def kill(self, identity: str) -> None:
        """End one without a word: its leases stay held, and nothing that it does from now on counts."""
        self._leases[identity].cut = True
        self._scopes[identity].cancel()

    def leave(self, identity: str) -> None:
        """Have one leave in good order."""
        self._ends[identity].set()


QUICK = SharingPolicy(settle=5.0, every=0.5)
