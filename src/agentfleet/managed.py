"""One fleet in one manager: opened with its lease and, while this manager leads it, given what was asked of it."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

import anyio
from anyio.abc import TaskGroup

from agentfleet import carrying
from agentfleet.clock import Clock
from agentfleet.errors import (
    AgentFleetError,
    BackendUnavailable,
    DeadlineExceeded,
    JournalError,
    NotLeader,
    RecordUnreadable,
)
from agentfleet.fleet import Fleet
from agentfleet.loops import only_error
from agentfleet.operations import Kind, Operation, Status, resumable, understood
from agentfleet.portrait import Portrait, picture
from agentfleet.specs import FleetSpec
from agentfleet.stores.fleets import FleetRecord, FleetRecords, InstanceRow, Picture, UnreadFleet

log = logging.getLogger(__name__)

RETRY = (0.2, 10.0)
"""Seconds before the first repetition of what has failed, and the most before any."""
_ASIDE = 2.0
"""Seconds that a manager stands aside at most after it has handed a fleet over; others take a free lease within one."""
_GLANCE = 0.25
"""Seconds between two looks at whether another leads what was handed over."""
_PAGE = 1000
_AWAY = (BackendUnavailable, DeadlineExceeded)
"""What a store raises that cannot be reached now."""
_T = TypeVar("_T")
Ended = Callable[[Operation], None]
"""Told of an operation whose outcome is known."""


class Managed:
    """A fleet that this manager knows of.

    Args:
        record: What is wanted; `respec` when that changes.
        make: Makes the fleet, to be opened here.
        records: Where operations are kept.
        identity: This manager's.
        clock: Times it.
        opening: Limits how many fleets are opened at the same time.
        told: Waits until the store knows how the fleet stands now.
        ended: Told of each operation that has ended here.
        alone: Whether no other manager can lead the fleet, so that there is no lease to count epochs.
    """

    def __init__(
        self,
        record: FleetRecord | UnreadFleet,
        make: Callable[[FleetRecord], Awaitable[Fleet]],
        records: FleetRecords,
        *,
        identity: str,
        clock: Clock,
        opening: anyio.CapacityLimiter,
        told: Callable[[], Awaitable[None]],
        ended: Ended,
        alone: bool,
    ) -> None:
        self.record = record
        self.fleet: Fleet | None = None
        """The fleet, while it is open."""
        self.trouble: str | None = None
        """Why it is not open."""
        self._make = make
        self._records = records
        self._identity = identity
        self._clock = clock
        self._opening = opening
        self._told = told
        self._ended = ended
        self._alone = alone
        self._epoch = 0
        self._generation = 0
        """Of the spec that the fleet was opened with."""
        self._open: dict[str, Operation] = {}
        self._taken: set[str] = set()
        """Ids of those that were taken up in this term."""
        self._asked = anyio.Event()
        self._changed = anyio.Event()
        self._portrait: Portrait | None = None
        self._status: object = None
        self._rest = 0.0

    @property
    def leads(self) -> bool:
        """Whether this manager acts for the fleet now."""
        return self.fleet is not None and self.fleet.leads

    @property
    def waiting(self) -> int:
        """Operations that are known and not ended."""
        return len(self._open)

    def offer(self, operation: Operation) -> None:
        """Take note of an operation that is new or has changed."""
        if operation.open:
            self._open[operation.id] = operation
            self._asked.set()
        else:
            self._open.pop(operation.id, None)

    def respec(self, record: FleetRecord | UnreadFleet) -> None:
        """Take over what is wanted now; a fleet with another spec is opened anew, and its instances stay.

        With one that this version cannot read it is closed, so that a manager that can leads it.
        """
        before, self.record = self.record, record
        if _wanted(record) != _wanted(before):
            self._changed.set()
        elif not self._changed.is_set():  # the fleet that is open, or being opened, is as this one says, too
            self._generation = record.generation

    def hand_over(self) -> None:
        """Let another manager lead: the fleet is closed, and opened again when another has had time to take it."""
        self._rest = _ASIDE
        self._changed.set()

    async def run(self) -> None:
        """Keep the fleet open until cancelled."""
        pause = RETRY[0]
        while True:
            await self._stand_aside(self._rest)
            self._rest, self._changed = 0.0, anyio.Event()
            if isinstance(self.record, UnreadFleet):
                self.trouble = self.record.trouble
                log.warning("fleet %s stays closed: %s", self.record.name, self.trouble)
                await self._changed.wait()
                continue
            opened_at = math.inf
            try:
                async with self._opened(self.record) as fleet, anyio.create_task_group() as tasks:
                    opened_at = self._clock.now()
                    tasks.start_soon(self._lead, fleet)
                    await self._changed.wait()
                    tasks.cancel_scope.cancel()
                pause = RETRY[0]
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, the other fleets go on
                self._note(error)
            if self._clock.now() - opened_at > RETRY[1]:  # it held for a while, so what failed is something else
                pause = RETRY[0]
            with anyio.move_on_after(pause * (0.5 + random.random() / 2)):  # noqa: S311 - jitter
                await self._changed.wait()
            pause = min(RETRY[1], pause * 2)

    async def _stand_aside(self, seconds: float) -> None:
        """Let another take what was handed over; from then on this manager is needed, should that one leave at once."""
        until = self._clock.now() + seconds
        while (left := until - self._clock.now()) > 0:
            await self._clock.sleep(min(_GLANCE, left))
            with suppress(*_AWAY), anyio.move_on_after(max(_GLANCE, left)):  # the store may take longer
                if await self._records.epoch(self.record.id) > self._epoch:
                    return

    @asynccontextmanager
    async def _opened(self, record: FleetRecord) -> AsyncIterator[Fleet]:
        async with AsyncExitStack() as stack:
            self._generation = record.generation
            made = await self._make(record)  # may wait for an engine, and must not take others' places meanwhile
            async with self._opening:
                fleet = await stack.enter_async_context(made)
            self.fleet, self.trouble = fleet, None
            try:
                yield fleet
            finally:
                self.fleet = self._portrait = None

    def _note(self, error: Exception) -> None:
        """One fleet's failure must not end the others: it is told, and the fleet is opened again."""
        cause = only_error(error) if isinstance(error, BaseExceptionGroup) else error
        self.trouble = f"{type(cause or error).__name__}: {cause or error}"
        expected = isinstance(cause, AgentFleetError)
        log.log(
            logging.WARNING if expected else logging.ERROR,
            "fleet %s was closed and will be opened again: %s",
            self.record.name,
            self.trouble,
            exc_info=None if expected else error,
        )

    # ------------------------------------------------------------------------------------------ leading

    async def _lead(self, fleet: Fleet) -> None:
        """Carry out what was asked, in the terms that this manager leads."""
        pause = RETRY[0]
        while True:
            await fleet.leading()
            async with anyio.create_task_group() as term:
                term.start_soon(self._until_deposed, fleet, term)
                try:
                    await self._take_over(fleet)
                    pause = RETRY[0]
                    await self._carry_out(fleet, term)
                except NotLeader as error:
                    if fleet.leads:  # and the store says otherwise: it may take a while until the lease says so, too
                        log.warning("fleet %s is led here, but the store refuses it: %s", self.record.name, error)
                        pause = min(RETRY[1], pause * 2)
                    term.cancel_scope.cancel()
            self._portrait = None
            await self._clock.sleep(pause)

    async def _until_deposed(self, fleet: Fleet, term: TaskGroup) -> None:
        await fleet.deposed()
        term.cancel_scope.cancel()

    async def _take_over(self, fleet: Fleet) -> None:
        """Write once in this epoch, so that nobody writes in an earlier one any more, and see what is written."""
        self._epoch = fleet.epoch
        if self._alone:  # where managers shared the fleet before, it goes on from the last of them
            self._epoch = await self._until_kept(lambda: self._records.epoch(self.record.id))
        first = Picture(self.record.id, self._epoch, picture(fleet, self._identity, self._generation))
        if await self._until_kept(lambda: self._records.report([first], at=self._clock.now())):
            raise NotLeader(f"{self.record.name}: another manager has taken over, or the fleet is gone")
        rows: list[InstanceRow] = []
        while page := await self._until_kept(partial(self._page, rows[-1].instance_id if rows else "")):
            rows += page
        self._portrait, self._status = Portrait(fleet.view, rows), first.status

    async def _page(self, after: str) -> Sequence[InstanceRow]:
        return await self._records.instances(self.record.id, after=after, limit=_PAGE)

    async def _carry_out(self, fleet: Fleet, term: TaskGroup) -> None:
        """Take up each open operation once in this term, in their order."""
        self._taken = set()
        while True:
            self._asked = anyio.Event()
            if self._changed.is_set():  # the fleet is about to be opened anew, as its new spec says
                await anyio.sleep_forever()
            self._taken &= self._open.keys()  # one that has ended is not taken up again: it is read first
            new = sorted((each for id, each in self._open.items() if id not in self._taken), key=lambda each: each.seq)
            for operation in new:
                self._taken.add(operation.id)
                await self._take_up(fleet, operation, term)
            if not new:
                await self._asked.wait()

    async def _take_up(self, fleet: Fleet, known: Operation, term: TaskGroup) -> None:
        """State what an operation wants, and have its end waited for beside the others."""
        try:
            operation = await self._fresh(known.id)
        except RecordUnreadable as error:
            log.warning("%s; it is left to a manager that can", error)
            return
        if not operation.open:
            self.offer(operation)
            return
        if not understood(operation):
            log.warning(
                "operation %s (%s) of fleet %s asks for what this version does not know; it is left to a newer manager",
                operation.id,
                operation.kind,
                operation.name,
            )
            return
        if operation.status is Status.RUNNING and not resumable(operation.kind):
            await self._fail(fleet, operation, OutcomeUnknown())
            return
        try:
            if not operation.outcome.get("begun"):
                operation = await self._begin(fleet, operation)
        except (NotLeader, JournalError):
            raise  # left as it is, for whoever leads next
        except (AgentFleetError, ValueError) as error:
            await self._fail(fleet, operation, error)
            return
        term.start_soon(self._finish, fleet, operation)

    async def _begin(self, fleet: Fleet, operation: Operation) -> Operation:
        if operation.kind is Kind.ROLLBACK:
            target = carrying.target_of(fleet, operation)
            operation = await self._write(fleet, operation, Status.RUNNING, revision=target)
        elif not resumable(operation.kind):
            operation = await self._write(fleet, operation, Status.RUNNING)
        outcome = await carrying.begin(fleet, operation)
        return await self._write(fleet, operation, Status.RUNNING, begun=True, **outcome)

    async def _finish(self, fleet: Fleet, operation: Operation) -> None:
        """Wait for the end of an operation, and write down which one it was; whoever leads next waits on."""
        with suppress(NotLeader):
            try:  # a journal that takes nothing (a deletion is said here) is no end of an operation
                outcome = await self._until_kept(lambda: carrying.finish(fleet, operation), passing=(JournalError,))
            except NotLeader:
                raise
            except AgentFleetError as error:
                await self._fail(fleet, operation, error)
            else:
                await self._succeed(fleet, operation, outcome)

    async def _succeed(self, fleet: Fleet, operation: Operation, outcome: carrying.Outcome) -> None:
        if operation.kind is not Kind.DELETE:
            await self._told()  # whoever hears that it is done looks next
            self._ended(await self._write(fleet, operation, Status.SUCCEEDED, **outcome))
            return
        ended = self._in_term(fleet, operation.moved(Status.SUCCEEDED, self._clock.now()))
        await self._until_kept(lambda: self._records.remove(self.record.id, ended))
        self._ended(ended)

    async def _fail(self, fleet: Fleet, operation: Operation, error: Exception) -> None:
        told = {"error": type(error).__name__, "message": str(error)[:4000]}
        if operation.status is Status.ACCEPTED:
            operation = operation.moved(Status.RUNNING, self._clock.now())
        self._ended(await self._write(fleet, operation, Status.FAILED, **told))

    async def _write(self, fleet: Fleet, operation: Operation, status: Status, **outcome: object) -> Operation:
        """Write down how far an operation has come, however long the store takes; raises `NotLeader`."""
        moved = self._in_term(fleet, operation.moved(status, self._clock.now(), **outcome))
        await self._until_kept(lambda: self._records.advance(moved))
        self.offer(moved)
        return moved

    def _in_term(self, fleet: Fleet, operation: Operation) -> Operation:
        """The operation as the fleet's present leader writes it; raises `NotLeader` if that is not this manager."""
        if not fleet.leads:
            raise NotLeader(f"{fleet.name}: this manager does not lead any more")
        return replace(operation, epoch=self._epoch)

    async def _fresh(self, id: str) -> Operation:
        return await self._until_kept(lambda: self._records.operation(id))

    async def _until_kept(
        self, call: Callable[[], Awaitable[_T]], *, passing: tuple[type[AgentFleetError], ...] = _AWAY
    ) -> _T:
        """Ask the store, again and again while it cannot be reached; ends with the term at the latest."""
        pause = RETRY[0]
        while True:
            try:
                return await call()
            except RecordUnreadable:
                raise  # it will not be otherwise as long as this version runs
            except passing as error:
                log.warning("fleet %s: %s; trying again", self.record.name, error)
            await self._clock.sleep(pause * (0.5 + random.random() / 2))  # noqa: S311 - jitter
            pause = min(RETRY[1], pause * 2)

    # ------------------------------------------------------------------------------------------ looking

    @property
    def rate(self) -> float:
        """How many of its instances' rows should be written anew in a second."""
        return 0.0 if self._portrait is None or not self.leads else self._portrait.rate

    def look(self, now: float, *, share: float = 1.0) -> tuple[Picture, Callable[[], None]] | None:
        """What has changed in how the fleet stands, and what to call when that is written; None if nothing has.

        Args:
            now: Seconds since the epoch.
            share: Of `rate` that may be written.
        """
        fleet, portrait = self.fleet, self._portrait
        if fleet is None or portrait is None or not fleet.leads:
            return None
        status = picture(fleet, self._identity, self._generation)
        changed, gone = portrait.changes(now, share=share)
        news = None if status == self._status else status
        if news is None and not (changed or gone):
            return None

        def written() -> None:
            self._status = status
            portrait.told(changed, gone)

        return Picture(self.record.id, self._epoch, news, changed, gone), written


class OutcomeUnknown(AgentFleetError):
    """The outcome of an operation that its leader did not live to tell."""

    def __init__(self) -> None:
        super().__init__(
            "the manager that was doing this ended before it could tell what came of it; look at the instance, and ask "
            "again if it was not done"
        )


def _wanted(record: FleetRecord | UnreadFleet) -> FleetSpec | str:
    return record.spec if isinstance(record, FleetRecord) else record.trouble
