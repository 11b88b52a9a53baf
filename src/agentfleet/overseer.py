"""What a manager does all the time: keep its fleets in step with the store, tell how they stand, and share them."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import anyio
from anyio.abc import TaskGroup

from agentfleet.clock import Clock
from agentfleet.core.sharing import SharingMemory, SharingObserved, SharingPolicy, decide
from agentfleet.errors import BackendUnavailable, DeadlineExceeded
from agentfleet.fleet import Fleet
from agentfleet.loops import end_loops
from agentfleet.managed import RETRY, Managed
from agentfleet.operations import Operation
from agentfleet.reporting import Reporter
from agentfleet.selfmetrics import SelfMetrics
from agentfleet.stores.fleets import Attendance, FleetRecord, FleetRecords, UnreadFleet
from agentfleet.telemetry import Telemetry

log = logging.getLogger(__name__)

_OPENING = 16
"""Fleets that are opened at the same time."""
_BEAT = 5.0
"""Seconds between two times that a manager says that it is there."""
_FORGOTTEN = 3600.0
"""Seconds of silence after which a manager is forgotten."""
_ANSWERS = 15.0
"""Seconds without an answer of the store after which a manager is not ready for requests."""


@dataclass(frozen=True, slots=True)
class ManagerHealth:
    """How a manager is.

    Attributes:
        ready: Whether it can take requests: the store answers, and it is not leaving.
        reason: Why not.
        identity: Its name among the managers.
        leads: How many fleets it leads.
        stands_by: How many it stands by for.
        closed: Fleets that could not be opened, by name, and why.
        store_age: Seconds since the store answered last.
    """

    ready: bool
    reason: str | None
    identity: str
    leads: int
    stands_by: int
    closed: Mapping[str, str]
    store_age: float


class Overseer:
    """The loops of one manager.

    Args:
        records: Where fleets and operations are kept.
        make: Makes the fleet of a record, to be opened.
        identity: The manager's.
        about: What it tells the others of itself; JSON-ready.
        clock: Times it.
        telemetry: Where fleets that are no more are forgotten, and the manager's own metrics are.
        period: Seconds between two notes of how the fleets stand.
        sharing: When fleets are handed over; None: never, because this manager is alone.
    """

    def __init__(
        self,
        records: FleetRecords,
        make: Callable[[FleetRecord], Awaitable[Fleet]],
        *,
        identity: str,
        about: Mapping[str, Any],
        clock: Clock,
        telemetry: Telemetry,
        period: float,
        sharing: SharingPolicy | None,
    ) -> None:
        self.managed: dict[str, Managed] = {}
        """The fleets, by id."""
        self.peers: Mapping[str, Attendance] = {}
        """The managers of the store, as last seen; those that were killed stay for an hour."""
        self.moved = anyio.Event()
        """Set when news have come or an operation has ended; then it is another."""
        self._records = records
        self._make = make
        self._identity = identity
        self._about = about
        self._clock = clock
        self._telemetry = telemetry
        self._period = period
        self._sharing = sharing
        self._alone = sharing is None
        self._own = SelfMetrics(telemetry.registry)
        self._reporter = Reporter(records, self.managed.values, clock=clock, period=period, own=self._own)
        self._scopes: dict[str, anyio.CancelScope] = {}
        self._tasks: TaskGroup | None = None
        self._opening: anyio.CapacityLimiter | None = None
        self._answered_at = 0.0
        self._leaving = False

    async def __aenter__(self) -> Self:
        await self._records.ping()
        self._answered_at = self._clock.now()
        self._opening = anyio.CapacityLimiter(_OPENING)
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._follow, name="follow the store of fleets")
        self._tasks.start_soon(self._reporter.run, name="report how the fleets stand")
        self._tasks.start_soon(self._watch_itself, name="watch the manager itself")
        self._tasks.start_soon(self._share, name="share the fleets")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._tasks is not None, "open"
        self._leaving = True
        with anyio.move_on_after(1.0, shield=True), suppress(BackendUnavailable, DeadlineExceeded):
            await self._records.leave(self._identity)
        return await end_loops(self._tasks, kind, error, trace)

    def health(self) -> ManagerHealth:
        """How this manager is."""
        managed = self.managed.values()
        leads = sum(each.leads for each in managed)
        closed = {each.record.name: each.trouble for each in managed if each.trouble is not None}
        age = self._clock.now() - self._answered_at
        reason = None
        if self._tasks is None:
            reason = "it is not open"
        elif self._leaving:
            reason = "it is leaving"
        elif age > _ANSWERS:
            reason = f"the store of fleets has not answered for {age:.0f} s"
        open_ones = sum(each.fleet is not None for each in managed)
        return ManagerHealth(reason is None, reason, self._identity, leads, open_ones - leads, closed, age)

    def known(self, id: str) -> FleetRecord | UnreadFleet | None:
        """A fleet by its id or name; None if it is not known here."""
        found = self.managed.get(id) or next((each for each in self.managed.values() if each.record.name == id), None)
        return None if found is None else found.record

    async def _follow(self) -> None:
        """Take up what changes in the store, whenever it can be reached."""
        position, pause = 0, RETRY[0]
        while True:
            try:
                news = await self._records.news(position)
                self._answered_at, pause = self._clock.now(), RETRY[0]
                for record in news.fleets:
                    self._take(record)
                for operation in news.operations:
                    if operation.fleet in self.managed:
                        self.managed[operation.fleet].offer(operation)
                for id in news.gone:
                    self._drop(id)
                position = news.position
                self._beat()
                await self._records.changed(position)
            except (BackendUnavailable, DeadlineExceeded) as error:
                self._own.store_failed()
                log.warning("the store of fleets: %s; trying again", error)
                await self._clock.sleep(pause * (0.5 + random.random() / 2))  # noqa: S311 - jitter
                pause = min(RETRY[1], pause * 2)

    def _take(self, record: FleetRecord | UnreadFleet) -> None:
        known = self.managed.get(record.id)
        if known is not None:
            known.respec(record)
            return
        assert self._opening is not None, "open"
        managed = Managed(
            record,
            self._make,
            self._records,
            identity=self._identity,
            clock=self._clock,
            opening=self._opening,
            told=self._reporter.caught_up,
            ended=self._ended,
            alone=self._alone,
        )
        self.managed[record.id], scope = managed, anyio.CancelScope()
        self._scopes[record.id] = scope
        assert self._tasks is not None, "open"
        self._tasks.start_soon(self._keep, managed, scope, name=f"fleet {record.name}")

    async def _keep(self, managed: Managed, scope: anyio.CancelScope) -> None:
        with scope:
            await managed.run()

    def _drop(self, id: str) -> None:
        managed = self.managed.pop(id, None)
        if managed is not None:
            self._scopes.pop(id).cancel()
            self._telemetry.forget(managed.record.name)

    async def _watch_itself(self) -> None:
        """Measure how late the event loop is, and show what this manager does."""
        while True:
            due = anyio.current_time() + self._period
            await self._clock.sleep(self._period)
            self._look(max(0.0, anyio.current_time() - due), self._clock.now())

    async def _share(self) -> None:
        """Say that this manager is there, and hand over what another is to lead."""
        memory, policy = SharingMemory(), self._sharing or SharingPolicy()
        while True:
            leads = {id: each for id, each in self.managed.items() if each.leads}
            beats: dict[str, int] | None = None
            try:
                self.peers = await self._records.attend(self._identity, {"leads": len(leads), **self._about})
                beats = {identity: each.beats for identity, each in self.peers.items()}
                self._answered_at = self._clock.now()
            except (BackendUnavailable, DeadlineExceeded) as error:
                self._own.store_failed()
                log.warning("who else manages could not be read: %s", error)
            observed = SharingObserved(self._identity, leads if self._sharing is not None else (), beats)
            decision, memory = decide(policy, observed, memory, anyio.current_time())
            if decision.hand_over is not None:
                log.info("hands fleet %s over: %s", leads[decision.hand_over].record.name, decision.reasons[0])
                leads[decision.hand_over].hand_over()
            await self._clear(memory)
            await self._clock.sleep(min(_BEAT, policy.every) if leads else _BEAT)

    async def _clear(self, memory: SharingMemory) -> None:
        """Forget managers that have been silent for long; whoever is there after all says so again."""
        for identity, seen in memory.peers:
            if anyio.current_time() - seen.at > _FORGOTTEN and identity in self.peers:
                with suppress(BackendUnavailable, DeadlineExceeded):
                    await self._records.leave(identity)

    def _look(self, lag: float, now: float) -> None:
        health, waiting = self.health(), sum(each.waiting for each in self.managed.values())
        roles = {"leads": health.leads, "stands_by": health.stands_by, "closed": len(health.closed)}
        self._own.looked(roles, waiting, lag, now - self._answered_at)

    def _ended(self, operation: Operation) -> None:
        assert operation.finished_at is not None, "it has ended"
        seconds = operation.finished_at - operation.created_at
        self._own.ended(operation.kind, operation.status, max(0.0, seconds))
        self._beat()

    def _beat(self) -> None:
        moved, self.moved = self.moved, anyio.Event()
        moved.set()
