"""The election loop: one manager's part in leading one fleet. Works alone, over any store that can compare and set.

    async with Leadership("researchers", leases) as leadership:
        async for term in leadership.terms():
            with term.held():                      # cancelled when another has taken over
                await manage(fence=term)           # every write: with term.writing(timeout=5.0): await send()

`core.leadership` decides; this loop asks the store, keeps the time, and tells the writers. Leaving the block gives the
lease up, so that another manager leads within a second. Whoever must not act is told by `NotLeader`, at the moment of
acting: the term's deadline is compared with the clock at each use, so that no loop has to run for it to be over.
"""

from __future__ import annotations

import math
import random
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup

from agentfleet.clock import BootClock, Clock
from agentfleet.core.leadership import (
    Action,
    Failed,
    LeaseDecision,
    LeaseMemory,
    LeaseObserved,
    LeasePolicy,
    Looked,
    News,
    Refused,
    Wrote,
    decide,
)
from agentfleet.errors import AgentFleetError, BackendUnavailable, Conflict, DeadlineExceeded, NotLeader
from agentfleet.loops import end_loops
from agentfleet.stores.leases import LeaseStore, Telling

_SHORTEST = 0.001
"""Seconds to wait at least: a wait that the clock is too coarse to see would be repeated at once, for ever."""


class Term:
    """A span of leading, under one epoch. It is the `Fence` that writers are given.

    It may lapse and come back, when a renewal was late and nobody else has led meanwhile. Once it is over it stays so.
    """

    __slots__ = ("_clock", "_ended", "_scopes", "_sent", "_valid_until", "epoch", "identity", "name")

    def __init__(self, name: str, identity: str, epoch: int, valid_until: float, clock: Clock) -> None:
        self.name = name
        self.identity = identity
        self.epoch = epoch
        self._valid_until = valid_until
        self._clock = clock
        self._ended = anyio.Event()
        self._scopes: set[anyio.CancelScope] = set()
        self._sent: dict[object, float] = {}
        """Until when each write may still arrive whose answer is not known."""

    @property
    def valid_until(self) -> float:
        """When it lapses unless it is renewed before, on the leadership's clock."""
        return self._valid_until

    @property
    def left(self) -> float:
        """Seconds in which it may be acted upon for certain."""
        return 0.0 if self.over else max(0.0, self._valid_until - self._clock.now())

    @property
    def valid(self) -> bool:
        """Whether it may be acted upon now."""
        return self.left > 0

    @property
    def over(self) -> bool:
        """Whether it has ended for good."""
        return self._ended.is_set()

    def ensure(self) -> int:
        """The epoch; raises `NotLeader` if it may not be acted upon now."""
        self._need(0.0)
        return self.epoch

    def deadline(self, timeout: float, *, least: float = 0.1) -> float:
        """The deadline in seconds to send a write with: `timeout`, or less if the term lapses before.

        A write that is answered or given up by then cannot meet another leader's.

        Args:
            timeout: The deadline that it would have otherwise.
            least: Seconds that the write needs at least.

        Raises:
            NotLeader: The term is over or has lapsed, or lapses within `least` seconds.
        """
        return min(timeout, self._need(min(least, timeout)))

    @contextmanager
    def writing(self, timeout: float, *, least: float = 0.1) -> Iterator[float]:
        """Around one write: checks, cuts it off at `deadline`, and remembers one whose fate is not known.

        A cancellation waits for its answer, so that its fate is known. The lease is not given up before a write that
        got no answer can no longer arrive.

        Raises:
            NotLeader: Likewise; nothing was sent.
            DeadlineExceeded: It was cut off.
        """
        key, deadline = object(), self.deadline(timeout, least=least)
        now = self._clock.now()
        self._sent = {each: until for each, until in self._sent.items() if until > now}
        self._sent[key] = now + deadline
        try:
            with anyio.fail_after(deadline, shield=True):
                yield deadline
        except TimeoutError as error:
            if isinstance(error, DeadlineExceeded):
                raise
            raise DeadlineExceeded(
                f"{self.name}: a write took more than {deadline:.3g} s, its effect is unknown"
            ) from error
        except AgentFleetError as error:
            if not isinstance(error, BackendUnavailable):
                self._sent.pop(key, None)  # a refusal is an answer
            raise
        else:
            self._sent.pop(key, None)

    @contextmanager
    def held(self) -> Iterator[anyio.CancelScope]:
        """A block that is cancelled when the term is over; a lapse leaves it running, and refuses its writes."""
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            if self.over:
                scope.cancel()
            try:
                yield scope
            finally:
                self._scopes.discard(scope)

    async def ended(self) -> None:
        """Wait until the term is over."""
        await self._ended.wait()

    def __repr__(self) -> str:
        state = "over" if self.over else f"valid for {self.left:.1f} s" if self.valid else "lapsed"
        return f"<Term {self.epoch} of {self.name}: {state}>"

    def _need(self, least: float) -> float:
        if self.over:
            raise NotLeader(f"{self.name}: {self.identity} does not lead any more: epoch {self.epoch} is over")
        left = self._valid_until - self._clock.now()
        if left <= least:
            late = f"lapsed {-left:.1f} s ago" if left <= 0 else f"lapses in {left:.2f} s"
            raise NotLeader(
                f"{self.name}: the lease of {self.identity} {late} unless it is renewed (epoch {self.epoch}); "
                "try again when it is, or leave it to the next leader"
            )
        return left

    def _prolong(self, valid_until: float) -> None:
        self._valid_until = valid_until

    def _end(self) -> None:
        self._ended.set()
        for scope in self._scopes:
            scope.cancel()

    def _unsettled(self) -> float:
        return max(self._sent.values(), default=-math.inf)


class Terms:
    """Terms one by one, for `async for`: the next one comes when the one before is over."""

    def __init__(self, following: Callable[[Term | None], Awaitable[Term | None]]) -> None:
        self._following = following
        self._last: Term | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Term:
        self._last = await self._following(self._last)
        if self._last is None:
            raise StopAsyncIteration
        return self._last


class Leadership:
    """Stands for one lease, and leads when it holds it.

    Args:
        name: The lease's name, by custom the fleet's.
        leases: Where it is kept.
        identity: How others see this manager; a random end makes it this process's own. The host's name by default,
            which in a pod is the pod's.
        policy: The time spans.
        clock: A monotonic clock that no one sets; the machine's own by default.
        rng: Draws the jitter.
        on_decision: Told each decision, before it is carried out.

    Leaving the block ends the term, waits for writes whose fate is unknown (`Term.writing`), and gives the lease up.
    """

    def __init__(
        self,
        name: str,
        leases: LeaseStore,
        *,
        identity: str | None = None,
        policy: LeasePolicy | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        on_decision: Callable[[LeaseDecision], None] | None = None,
    ) -> None:
        self.name = name
        self.policy = LeasePolicy() if policy is None else policy
        self.identity = socket.gethostname() if identity is None else identity
        self.decision: LeaseDecision | None = None
        self._leases = leases
        self._clock: Clock = BootClock() if clock is None else clock
        self._rng = random.Random() if rng is None else rng  # noqa: S311 - jitter
        self._on_decision = on_decision
        self._memory = LeaseMemory()
        self._news: News | None = None
        self._term: Term | None = None
        self._began = anyio.Event()
        self._tasks: TaskGroup | None = None
        self._left = False
        self._told_of = anyio.Event()
        """Set when the lease was given up since the last rest."""

    def begin_above(self, epoch: int) -> None:
        """Lead in greater epochs than this one only, also if the lease that tells of it was deleted."""
        self._memory = replace(self._memory, highest=max(self._memory.highest, epoch))

    @property
    def term(self) -> Term | None:
        """The term that is held, also while it is lapsed."""
        return self._term

    @property
    def leads(self) -> bool:
        """Whether this manager may act now."""
        return self._term is not None and self._term.valid

    @property
    def holder(self) -> str | None:
        """Who was last seen to hold the lease."""
        return None if self.decision is None else self.decision.holder

    def check(self) -> Term:
        """The term, if it may be acted upon now; raises `NotLeader` otherwise."""
        if self._term is None:
            who = f"{self.holder} does" if self.holder else "nobody is known to"
            raise NotLeader(f"{self.name}: {self.identity} does not lead; {who}")
        self._term.ensure()
        return self._term

    def terms(self) -> Terms:
        """Each term from now on, the present one included, for `async for`; ends when the leadership does."""
        return Terms(self._next_after)

    async def _next_after(self, last: Term | None) -> Term | None:
        """The first term after `last`, None if the leadership has ended."""
        if last is not None:
            await last.ended()
        while self._term is None and not self._left:
            await self._began.wait()
        return self._term

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise RuntimeError("a Leadership is entered once; make another")
        self.identity = f"{self.identity}-{secrets.token_hex(5)}"  # here, so that a forked process has its own
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._tasks is not None
        try:
            return await end_loops(self._tasks, kind, error, trace)
        finally:
            await self._leave()

    # ---------------------------------------------------------------------------------------- the loop

    async def _run(self) -> None:
        async with anyio.create_task_group() as tasks:
            if isinstance(self._leases, Telling):
                tasks.start_soon(self._listen, self._leases)
            while True:
                await self._turn(leaving=False)

    async def _listen(self, leases: Telling) -> None:
        """Take note of each lease of this name that is given up, also of one that is while the store is being asked."""
        while True:
            try:
                await leases.given_up(self.name)
            except (AgentFleetError, OSError):  # it is found by looking, then
                await self._clock.sleep(float(self.policy.poll))
            else:
                self._told_of.set()

    async def _turn(self, *, leaving: bool) -> bool:
        """Decide and carry it out; False when nothing is left to do."""
        observed = LeaseObserved(self.identity, self._news, self._rng.random(), leaving)
        decision, self._memory = decide(self.policy, observed, self._memory, self._clock.now())
        self._news = None
        self._told(decision)
        if decision.action is Action.DONE:
            return False
        if decision.action is Action.HOLD:
            await self._rest(max(_SHORTEST, decision.wake - self._clock.now()))
        else:
            self._news = None if decision.write is None else Refused()  # if it is cut off, look what has come of it
            self._news = await self._ask(decision)
        return True

    async def _rest(self, seconds: float) -> None:
        """Wait, or until a lease that another holds is given up, where the store tells that."""
        if not isinstance(self._leases, Telling) or self._memory.epoch is not None or self._left:
            await self._clock.sleep(seconds)
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._until_told, tasks.cancel_scope)
            await self._clock.sleep(seconds)
            tasks.cancel_scope.cancel()
        if self._told_of.is_set():
            self._told_of = anyio.Event()
            self._memory = replace(self._memory, due=-math.inf)  # look now

    async def _until_told(self, rest: anyio.CancelScope) -> None:
        await self._told_of.wait()
        rest.cancel()

    async def _ask(self, decision: LeaseDecision) -> News:
        timeout = float(self.policy.request)
        sent_at = self._clock.now()
        try:
            with anyio.fail_after(timeout):
                if decision.write is None:
                    return Looked(await self._leases.get(self.name, timeout=timeout))
                write = self._leases.update if decision.write.version else self._leases.create
                return Wrote(await write(self.name, decision.write, timeout=timeout), sent_at)
        except Conflict:
            return Refused()
        except (AgentFleetError, OSError) as error:  # TimeoutError is an OSError
            return Failed(str(error)[:500] or f"no answer within {timeout:g} s")

    def _told(self, decision: LeaseDecision) -> None:
        self.decision = decision
        term = self._term
        if term is not None and term.epoch != decision.epoch:
            self._end()
        if decision.epoch is not None and not self._left:
            if self._term is None:
                self._term = Term(self.name, self.identity, decision.epoch, decision.valid_until, self._clock)
                began, self._began = self._began, anyio.Event()
                began.set()
            else:
                self._term._prolong(decision.valid_until)
        if self._on_decision is not None:
            self._on_decision(decision)

    def _end(self) -> None:
        if self._term is not None:
            self._term._end()
            self._term = None

    async def _leave(self) -> None:
        """End the term, let what was sent arrive or die, and give the lease up."""
        term = self._term
        self._left = True
        self._began.set()
        self._end()
        longest = 2 * self.policy.request + self.policy.renew_deadline  # writes die by then, and the answer is due
        with anyio.move_on_after(longest, shield=True):
            if term is not None:
                await self._clock.sleep(term._unsettled() - self._clock.now())
            while await self._turn(leaving=True):
                pass
