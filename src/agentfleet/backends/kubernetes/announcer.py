"""Writes Kubernetes Events: best effort, bounded in memory and in calls, and never in anybody's way.

The limits are those of client-go's `record` package: 1,000 that wait (`maxQueuedEvents`); for each object 25 at
once and one more every 300 s (`defaultSpamBurst`, `defaultSpamQPS`); repeats are counted on the Event that is there,
found in a memory of 4,096 (`maxLruCacheEntries`). What exceeds them, or cannot be written, is lost, counted, and said
in the log. The journal has it all.
"""

from __future__ import annotations

import json
import logging
import socket
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import anyio

from agentfleet.backends.kubernetes.connection import MERGE_PATCH, Requests
from agentfleet.backends.kubernetes.errors import AlreadyExists, NotFound
from agentfleet.backends.kubernetes.limits import TokenBucket
from agentfleet.backends.kubernetes.notices import Notice, Regarding, body_of, message_about, notice_of, repeat_of
from agentfleet.errors import AgentFleetError
from agentfleet.events import Event

_log = logging.getLogger("agentfleet.backends.kubernetes")
_MOST_WAITING = 1000
_MOST_KNOWN = 4096
_BURST = 25
_REFILL = 300.0
_RATE = (10.0, 50)
"""Events a second, and at once: a share of what the connection may ask, so that actions need not wait behind them."""
_TIMEOUT = 5.0
_LAST_WORDS = 1.0
"""Seconds to write what still waits when the backend is closed."""
_EARLY = 16
"""Notices of one fleet that wait for its Deployment to exist."""
_EARLY_FLEETS = 256
"""Fleets of which some wait so; for one more, those of the fleet that has waited longest are lost."""


@dataclass(frozen=True, slots=True)
class Announced:
    """What became of the notices so far.

    Attributes:
        written: Events created.
        counted: Repeats counted on an Event that was there.
        limited: Lost because their object had too many.
        dropped: Lost because too many waited.
        failed: Lost because the API server did not take them.
        error: Why the last of these failed.
    """

    written: int = 0
    counted: int = 0
    limited: int = 0
    dropped: int = 0
    failed: int = 0
    error: str = ""

    @property
    def lost(self) -> int:
        """All that were not written."""
        return self.limited + self.dropped + self.failed


@dataclass(slots=True)
class _Budget:
    tokens: float
    at: float


@dataclass(slots=True)
class _Written:
    path: str
    count: int


class Announcer:
    """Writes what is journaled about actions as Events. Use it as an async context manager.

    Args:
        connection: How the API server is asked.
        find: The object that an instance (or with None the fleet) is; None while there is no such object.
        reporter: Who says it; by default this host's name, which in a cluster is the manager's pod.
        rate: Events a second in the long run, and at once, for all objects together.
    """

    def __init__(
        self,
        connection: Requests,
        find: Callable[[str, str | None], Regarding | None],
        *,
        reporter: str | None = None,
        rate: tuple[float, int] = _RATE,
    ) -> None:
        self._connection = connection
        self._find = find
        self._reporter = reporter or socket.gethostname() or "agentfleet"
        self._bucket = TokenBucket(*rate)
        self._waiting: deque[tuple[Notice, Regarding]] = deque()
        self._early: OrderedDict[str, deque[Notice]] = OrderedDict()
        self._budgets: OrderedDict[str, _Budget] = OrderedDict()
        self._known: OrderedDict[tuple[str, ...], _Written] = OrderedDict()
        self._came = anyio.Event()
        self._idle = anyio.Event()
        self._stack = AsyncExitStack()
        self.announced = Announced()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            tasks.start_soon(self._run, name="announce")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with anyio.move_on_after(_LAST_WORDS):
                await self.idle()
        finally:  # also when the manager is cancelled meanwhile
            await self._stack.__aexit__(None, None, None)
            if self._waiting:
                self._lose("dropped", len(self._waiting))
                self._waiting.clear()

    async def idle(self) -> None:
        """Wait until nothing waits to be written."""
        while self._waiting:
            self._idle = anyio.Event()
            await self._idle.wait()

    def announce(self, event: Event) -> None:
        """Take on an event of the journal; returns at once, raises nothing, and ignores what is no action."""
        notice = notice_of(event)
        if notice is None:
            return
        regarding = self._find(notice.fleet, notice.instance) or self._find(notice.fleet, None)
        if regarding is None:
            self._wait(notice)
        else:
            self._put(notice, regarding)

    def _wait(self, notice: Notice) -> None:
        """Keep a notice until there is a Deployment to tell it about."""
        early = self._early.setdefault(notice.fleet, deque())
        if len(early) >= _EARLY:
            self._lose("dropped")
            return
        early.append(notice)
        if len(self._early) > _EARLY_FLEETS:
            self.deleted(next(iter(self._early)))

    def appeared(self, fleet: str, regarding: Regarding) -> None:
        """Say that a fleet's Deployment exists: what was to be told before is told about it."""
        for notice in self._early.pop(fleet, ()):
            self._put(notice, regarding)

    def deleted(self, fleet: str) -> None:
        """Say that there will be no Deployment of this fleet: the next one of its name is another's."""
        early = self._early.pop(fleet, ())
        if early:
            self._lose("dropped", len(early))

    def _put(self, notice: Notice, regarding: Regarding) -> None:
        if not self._allowed(regarding.uid):
            self._lose("limited")
        elif len(self._waiting) >= _MOST_WAITING:
            self._lose("dropped")
        else:
            self._waiting.append((notice, regarding))
            self._came.set()

    def _allowed(self, uid: str) -> bool:
        """Take one of an object's tokens."""
        now = anyio.current_time()
        budget = self._budgets.setdefault(uid, _Budget(_BURST, now))
        self._budgets.move_to_end(uid)
        if len(self._budgets) > _MOST_KNOWN:
            self._budgets.popitem(last=False)
        budget.tokens = min(float(_BURST), budget.tokens + (now - budget.at) / _REFILL)
        budget.at = now
        if budget.tokens < 1.0:
            return False
        budget.tokens -= 1.0
        return True

    def _lose(self, how: str, count: int = 1) -> None:
        if not self.announced.lost:
            _log.warning(
                "Kubernetes Events are being lost (%s); the journal has them all, and the backend's `announced` counts",
                self.announced.error if how == "failed" else how,
            )
        self.announced = replace(self.announced, **{how: getattr(self.announced, how) + count})

    # ------------------------------------------------------------------------------------------ writing

    async def _run(self) -> None:
        while True:
            self._came = anyio.Event()
            while self._waiting:
                await self._bucket.take()
                notice, regarding = self._waiting[0]
                try:
                    await self._write(notice, regarding)
                except AgentFleetError as error:  # an outage or an unreadable token loses Events, and nothing else
                    self.announced = replace(self.announced, error=str(error))
                    self._lose("failed")
                self._waiting.popleft()
            self._idle.set()
            await self._came.wait()

    async def _write(self, notice: Notice, regarding: Regarding) -> None:
        key = (regarding.uid, notice.reason, str(notice.warning), message_about(notice, regarding))
        known = self._known.get(key)
        if known is not None and await self._repeat(notice, known):
            self._known.move_to_end(key)
            return
        body = body_of(notice, regarding, self._reporter)
        path = f"/api/v1/namespaces/{regarding.namespace}/events"
        with suppress(AlreadyExists):  # its name is the journal's position: a repeated request makes no second one
            await self._connection.request(
                "POST", path, body=json.dumps(body).encode(), timeout=_TIMEOUT, idempotent=True
            )
        self._known[key] = _Written(f"{path}/{body['metadata']['name']}", 1)
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        self.announced = replace(self.announced, written=self.announced.written + 1)

    async def _repeat(self, notice: Notice, known: _Written) -> bool:
        """Count a repeat; False when the Event is gone, as they go after an hour."""
        try:
            await self._connection.request(
                "PATCH",
                known.path,
                body=json.dumps(repeat_of(notice, known.count + 1)).encode(),
                content_type=MERGE_PATCH,
                timeout=_TIMEOUT,
            )
        except NotFound:
            return False
        known.count += 1
        self.announced = replace(self.announced, counted=self.announced.counted + 1)
        return True
