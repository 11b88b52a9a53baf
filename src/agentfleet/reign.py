"""When a fleet's loops run: from its opening to its end, or, where several managers share it, in the terms of each.

A manager without a lease has one `Runtime` for as long as it is open. With one there is a runtime for each term, made
when the term begins, so that it knows nothing but what the journal and the backend say then; between the terms another
one looks on, which shows the instances, and does and records nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import anyio
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskGroup, TaskStatus

from agentfleet.backends.base import Engine
from agentfleet.clock import Clock
from agentfleet.core.fence import Fence, NoFence
from agentfleet.core.leadership import LeaseDecision, LeasePolicy
from agentfleet.errors import AgentFleetError, Conflict, NotLeader, OperationRefused
from agentfleet.fencing import Standing, allows
from agentfleet.leadership import Leadership, Term
from agentfleet.loops import end_loops, only_error
from agentfleet.runtime import Runtime
from agentfleet.stores.leases import Forgetting, LeaseStore
from agentfleet.telemetry import Telemetry
from agentfleet.waiting import Waiting

log = logging.getLogger(__name__)

STATE = "state.leader"
"""Kind of the event that remembers who led last, in which epoch, and whether it left of its own accord."""


class Making(Protocol):
    """Makes a fleet's runtime; `standby` is one that only looks on."""

    def __call__(self, *, fence: Fence | None = None, standby: bool = False) -> Runtime:
        """See `Runtime`."""
        ...


class Reign:
    """Opens a fleet's runtime, and with a lease has it act only while this manager leads.

    Args:
        make: Makes a runtime.
        backend: Opened for as long as this is, where there are leases.
        leases: Where the lease is kept; None: this manager is alone.
        identity: How other managers see this one; the host's name by default.
        policy: The lease's time spans.
        clock: Times the lease; the machine's own, which counts its sleep too, when omitted.
        telemetry: Told when this manager leads, and shown what the backend counts.
        before: Called when a term has begun, before anything is read from the journal.
    """

    def __init__(
        self,
        make: Making,
        *,
        backend: Engine,
        leases: LeaseStore | None,
        identity: str | None,
        policy: LeasePolicy | None,
        clock: Clock | None,
        telemetry: Telemetry,
        before: Callable[[], Awaitable[None]],
    ) -> None:
        self._make = make
        self._backend = backend
        self._telemetry = telemetry
        self._before = before
        self._leadership: Leadership | None = None
        self.runtime = make() if leases is None else make(fence=Standing(self._refusal), standby=True)
        self._clock = self.runtime.clock
        self._poll = float((policy or LeasePolicy()).poll)
        self._waiting = Waiting(self.runtime.name)
        self._removing = leases if isinstance(leases, Forgetting) else None
        self._request = float((policy or LeasePolicy()).request)
        self._deleted = False
        """Whether the fleet was when this manager led last: nobody needs its lease then."""
        self._stack = AsyncExitStack()
        self._pause: anyio.CancelScope | None = None
        self._opened = self._leaving = self._acting = False
        if leases is not None:
            self._leadership = Leadership(
                self.runtime.name,
                leases,
                identity=identity,
                policy=policy,
                clock=clock,
                on_decision=self._decided,
            )

    @property
    def leads(self) -> bool:
        """Whether the fleet may be acted upon now."""
        if self._leadership is None:
            return self._acting
        return self._acting and allows(self.runtime.fence)

    async def until_leading(self, seconds: float | None) -> None:
        """Wait until this manager leads; raises like `Waiting.within`."""
        if not self._opened:
            self.runtime.check_open()
        await self._waiting.until(lambda: self.leads, seconds, "this manager leads")

    async def until_deposed(self) -> None:
        """Wait until this manager does not lead; raises like `Waiting.within`."""
        if not self._opened:
            self.runtime.check_open()
        await self._waiting.until(lambda: not self.leads, None, "this manager leads no more")

    async def __aenter__(self) -> Self:
        if self._leadership is None:
            async with AsyncExitStack() as stack:
                stack.enter_context(self._telemetry.measuring(self._backend))
                await stack.enter_async_context(self.runtime)
                self._stack = stack.pop_all()
            self._opened = self._acting = True
            return self
        if self._opened:
            self.runtime.check_open()
            raise OperationRefused(f"fleet {self.runtime.name} is open already")
        self._opened = True
        last = self.runtime.journal.last_state(self.runtime.name, STATE)
        self._leadership.begin_above(0 if last is None else last.data["epoch"])
        async with AsyncExitStack() as stack:
            stack.enter_context(self._telemetry.measuring(self._backend))
            await stack.enter_async_context(self._backend)
            stack.push_async_callback(self._remove_lease)
            await stack.enter_async_context(self._leadership)  # left when the loops have ended: the lease goes last
            tasks = anyio.create_task_group()
            await tasks.__aenter__()
            stack.push_async_exit(partial(self._end, tasks))
            await tasks.start(self._run, self._leadership)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._waiting.close()
        if self._leadership is None:
            self._acting = False
            return await self._stack.__aexit__(kind, error, trace)
        try:
            return await self._stack.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            cause = only_error(group)
            if isinstance(cause, AgentFleetError):  # one loop has ended the fleet: its error is what users can catch
                raise cause from group
            raise
        finally:
            self.runtime.fence = NoFence()  # nothing runs any more; whoever asks is told that the fleet is closed

    async def _end(
        self,
        tasks: TaskGroup,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        """Let the loops end; what they are writing gets its answer first."""
        self._leaving = True
        if self._pause is not None:
            self._pause.cancel()
        if isinstance(error, anyio.get_cancelled_exc_class()):
            return await end_loops(tasks, kind, error, trace)
        await tasks.__aexit__(None, None, None)
        return None

    async def _remove_lease(self) -> None:
        """The lease of a fleet that was deleted goes, too, unless somebody holds it, who removes it in turn."""
        if not self._deleted or self._removing is None:
            return
        name, timeout = self.runtime.name, self._request
        try:
            with anyio.fail_after(2 * timeout, shield=True):  # also for a store that keeps no deadlines
                left = await self._removing.get(name, timeout=timeout)
                if left is not None and left.holder is None:
                    await self._removing.remove(name, left, timeout=timeout)
        except Conflict:
            return  # somebody has taken it meanwhile
        except (AgentFleetError, OSError) as error:  # TimeoutError is an OSError
            why = str(error) or f"no answer within {2 * timeout:g} s"
            log.warning("the lease of fleet %s stays, though the fleet was deleted: %s", name, why)

    # ------------------------------------------------------------------------------------------ the terms

    async def _run(self, leadership: Leadership, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        terms = leadership.terms()
        started = False
        while True:
            term: Term | None = None
            async with self.runtime:  # it looks on
                if not started:
                    task_status.started()
                    started = True
                with self._pausable():
                    term = await anext(terms, None)
            while term is not None and not term.over and not self._leaving:
                await self._lead(term)
            if self._leaving or term is None:
                return
            self.runtime = self._make(fence=Standing(self._refusal), standby=True)

    async def _lead(self, term: Term) -> None:
        """Act until the term is over, or this manager leaves."""
        runtime = self._make(fence=term)
        with self._pausable():
            try:
                await self._before()
                self._note_beginning(runtime, term)
                try:
                    async with runtime:
                        try:
                            with self._pausable():
                                self._seat(runtime, term)
                                await term.ended()
                        finally:  # before those hear of its end who wait for something in it
                            self._acting = False
                            self._waiting.beat()
                finally:  # also when it is cancelled, as on SIGTERM
                    if self._leaving and term.valid:
                        self._note_leaving(runtime, term)
            except NotLeader:  # it has lapsed for long, or was refused; what is known is old by now: learn it anew
                await self._clock.sleep(self._poll)
                while not (term.valid or term.over):
                    await self._clock.sleep(self._poll)
            finally:
                state = runtime.desk.state
                self._deleted = state is not None and state.deleted
                self._acting = False
                self._waiting.beat()
                self._telemetry.leave(runtime.name)
                self._telemetry.set_leading(runtime.name, 0)

    def _seat(self, runtime: Runtime, term: Term) -> None:
        self.runtime = runtime
        self._acting = True
        self._telemetry.set_leading(runtime.name, term.epoch)
        self._waiting.beat()

    @contextmanager
    def _pausable(self) -> Iterator[None]:
        """A block that leaving the fleet breaks off; of nested ones the inner one."""
        outer = self._pause
        with anyio.CancelScope() as scope:
            self._pause = scope
            if self._leaving:
                scope.cancel()
            try:
                yield
            finally:
                self._pause = outer

    def _decided(self, decision: LeaseDecision) -> None:
        del decision
        self._waiting.beat()

    def _refusal(self) -> NotLeader:
        """Why nothing may be done here now."""
        assert self._leadership is not None
        try:
            self._leadership.check()
        except NotLeader as error:
            return error
        return NotLeader(
            f"{self.runtime.name}: {self._leadership.identity} is taking over the fleet; await fleet.leading() first"
        )

    # ------------------------------------------------------------------------------------------ the record

    def _note_beginning(self, runtime: Runtime, term: Term) -> None:
        last = runtime.journal.last_state(runtime.name, STATE)
        if last is not None and last.data["epoch"] == term.epoch and last.data["identity"] == term.identity:
            return
        if last is not None and last.data["leads"]:
            told = {"identity": last.data["identity"], "epoch": last.data["epoch"], "by": term.identity}
            runtime.record("manager.deposed", data=told)
        runtime.record(STATE, data={"identity": term.identity, "epoch": term.epoch, "leads": True})
        runtime.record("manager.leads", data={"identity": term.identity, "epoch": term.epoch})

    def _note_leaving(self, runtime: Runtime, term: Term) -> None:
        runtime.record(STATE, data={"identity": term.identity, "epoch": term.epoch, "leads": False})
        runtime.record("manager.left", data={"identity": term.identity, "epoch": term.epoch})
