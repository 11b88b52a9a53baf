"""Doing many small things when they are due: one agenda for all of them, and workers that do what has to wait.

`Agenda` also measures its own lateness, because whoever judges others by time must know how late he is himself.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from agentfleet.clock import Clock

ItemT = TypeVar("ItemT")
JobT = TypeVar("JobT")

GRAIN = 1e-6
"""Seconds that due times may be early: dates have about a quarter of a microsecond of precision."""
_NOTICED = 0.1
"""Lateness in seconds from which the loop counts as stalled; less is the ordinary life of an event loop, and would add
up to excuses for everybody."""
_FAIR = 256
"""Jobs that a worker does without waiting before it lets others run."""


class Agenda(Generic[ItemT]):
    """What is due when; one heap and one wait, however much is on it.

    Args:
        clock: Where time comes from.
        pulse: Seconds between looks at the own lateness while `attentive()`.
    """

    def __init__(self, clock: Clock, *, pulse: float = 0.25) -> None:
        self._clock = clock
        self._pulse = pulse
        self._heap: list[tuple[float, int, ItemT]] = []
        self._number = itertools.count()
        self._nap: anyio.CancelScope | None = None
        self._since = 0.0
        self._until = math.inf
        self._stall = 0.0
        self._lags: deque[float] = deque(maxlen=1024)
        self._lag_max = 0.0

    def put(self, due: float, item: ItemT) -> None:
        """Have `item` handled at `due`, in seconds since the epoch. What is void by then is for the handler to know."""
        heapq.heappush(self._heap, (due, next(self._number), item))
        if self._nap is not None and due < self._until:
            self._nap.cancel()
            self._nap = None  # once is enough

    async def run(
        self, handle: Callable[[float, ItemT, float], None], handled: Callable[[], None], attentive: Callable[[], bool]
    ) -> None:
        """Handle what becomes due, for ever.

        Args:
            handle: Called with the due time, the item and the present time. Must not block.
            handled: Called when all that was due has been handled.
            attentive: Whether lateness matters just now, so that it is measured closely.
        """
        heap = self._heap
        while True:
            now = self._clock.now()
            while heap and heap[0][0] <= now + GRAIN:
                due, _, item = heapq.heappop(heap)
                handle(due, item, now)
            handled()
            until = heap[0][0] if heap else math.inf
            self._since = now
            self._until = min(until, now + self._pulse) if attentive() else until
            await self._wait(now)

    async def _wait(self, now: float) -> None:
        with anyio.CancelScope() as self._nap:
            if self._until < math.inf:
                await self._clock.sleep(self._until - now)
            else:
                await anyio.sleep_forever()
        self._nap = None
        now = self._clock.now()
        lag = now - self._until
        self._stall = self.stalled(now)
        self._until = math.inf
        if lag >= 0:  # else it was woken early
            self._lags.append(lag)
            self._lag_max = max(self._lag_max, lag)

    def stalled(self, now: float) -> float:
        """Seconds in which this event loop could not run, so far; including a stall that is only just ending.

        The wait that ended late counts as a whole, as it may have been late from its beginning.
        """
        return self._stall + now - self._since if now - self._until >= _NOTICED else self._stall

    def lag(self) -> tuple[float, float]:
        """Lateness in seconds: the 99th percentile of the last 1,024 waits, and the most ever."""
        lags = sorted(self._lags)
        return (lags[int(len(lags) * 0.99)] if lags else 0.0), self._lag_max


class Workers(Generic[JobT]):
    """As many tasks as the work keeps waiting, and never more than `limit`; a queue for the rest.

    Each worker wakes the next before it begins a job. If the job waits, the next one runs meanwhile; if it does not,
    the first does everything, and no task was started in vain.

    Args:
        work: What to do with a job. An exception ends the task group.
        limit: Jobs under way at any instant, at most.
    """

    def __init__(self, work: Callable[[JobT], Awaitable[None]], limit: int) -> None:
        self._work = work
        self._limit = limit
        self._group: TaskGroup | None = None
        self._queue: deque[JobT] = deque()
        self._parked: list[anyio.Event] = []
        self._started = 0
        self._waking = False
        self.outstanding = 0
        """Jobs under way."""

    @property
    def queued(self) -> int:
        """Jobs that wait for others to end."""
        return len(self._queue)

    def start(self, group: TaskGroup) -> None:
        """Work in this group, from now until it is cancelled."""
        self._group = group

    def put(self, job: JobT) -> None:
        """Queue a job; `wake` sees to it that it is done."""
        self._queue.append(job)

    def wake(self) -> None:
        """See to it that one more worker looks at the queue, unless that is so already."""
        if self._waking or not self._queue:
            return
        if self._parked:
            self._parked.pop().set()
        elif self._started < self._limit:
            assert self._group is not None
            self._started += 1
            self._group.start_soon(self._run)
        else:
            return  # all are busy, and each looks at the queue when it is done
        self._waking = True

    async def _run(self) -> None:
        queue = self._queue
        while True:
            self._waking = False
            done = 0
            while queue:
                job = queue.popleft()
                self.wake()
                self.outstanding += 1
                try:
                    await self._work(job)
                finally:
                    self.outstanding -= 1
                done += 1
                if done % _FAIR == 0:
                    await anyio.lowlevel.checkpoint()  # work that never waits must not keep all others waiting
            event = anyio.Event()
            self._parked.append(event)
            await event.wait()
