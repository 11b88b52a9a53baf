"""One watcher's stream: a snapshot, then what changes; a new snapshot after every gap."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import TYPE_CHECKING, Self

import anyio

from agentfleet.backends.base import Changed, Observation, Removed

if TYPE_CHECKING:
    from agentfleet.backends.memory.world import World

BUFFER = 1_000
"""Events that a slow reader may fall behind, beyond twice the fleet's size, before it gets a snapshot instead."""


class Watch:
    """An async iterator of observations of one fleet. It owns no task: its reader drives the simulation.

    `put` costs O(1). Faults of observation (lost, doubled, delayed, reordered events) live here, because the engine
    knows the truth and only the telling goes wrong.
    """

    def __init__(self, world: World, fleet: str, number: int) -> None:
        self.fleet = fleet
        self.number = number
        self._world = world
        self._buffer: deque[tuple[float, Observation]] = deque()
        self._held: list[Changed | Removed] = []
        self._wake: anyio.Event | None = None
        self._waits_until = math.inf
        self._rng = random.Random(f"{world.seed}/watch/{fleet}")  # noqa: S311 - a simulation, not a secret
        self._relist = True
        self._relist_at = math.inf
        self._held_until = math.inf
        self.lag = world.lag
        """Seconds by which events reach the reader late."""
        self.lose = 0
        self.double = 0
        self.hold = 0
        self.closed = False

    # -------------------------------------------------------------------------------------------- the world tells

    def put(self, at: float, event: Changed | Removed) -> None:
        """Queue one event, unless a snapshot that includes it is due anyway."""
        if self._relist:
            return
        if not self._world.available:
            self.gap()
        elif self.lose > 0:
            self.lose -= 1
            self._relist_at = min(self._relist_at, at + self._world.resync)
            self.wake()
        elif self.hold > 0:
            self.hold -= 1
            self._held.append(event)
            if self.hold == 0:
                self._shuffle(at)
            self.wake()
        else:
            self._queue(at, event)

    def reorder(self, count: int, until: float) -> None:
        """Hold the next `count` events, and tell them in another order at the latest at time `until`."""
        self.hold, self._held_until = count, until
        self.wake()

    def gap(self) -> None:
        """Forget what was not read yet: the reader gets a snapshot next."""
        self._buffer.clear()
        self._held.clear()
        self.hold = 0
        self._relist, self._relist_at, self._held_until = True, math.inf, math.inf
        self.wake()

    def wake(self) -> None:
        """Let the reader look again."""
        if self._wake is not None:
            self._wake.set()

    def expect(self, at: float) -> None:
        """Something will happen at time `at`: a reader that waits for longer looks again."""
        if at < self._waits_until:
            self.wake()

    def close(self) -> None:
        """End the stream."""
        self.closed = True
        self._buffer.clear()
        self.wake()

    def _queue(self, at: float, event: Changed | Removed) -> None:
        if len(self._buffer) > 2 * self._world.size(self.fleet) + BUFFER:
            self.gap()
            return
        for _ in range(2 if self.double > 0 else 1):
            self._buffer.append((at + self.lag, event))
        self.double = max(0, self.double - 1)
        self.wake()

    def _shuffle(self, at: float) -> None:
        """Tell the held events in a random order that keeps each instance's own."""
        held, self._held, self.hold, self._held_until = self._held, [], 0, math.inf
        queues: dict[str, deque[Changed | Removed]] = {}
        turns = []
        for event in held:
            id = event.id if isinstance(event, Removed) else event.instance.id
            queues.setdefault(id, deque()).append(event)
            turns.append(id)
        self._rng.shuffle(turns)
        for id in turns:
            self._queue(at, queues[id].popleft())

    # -------------------------------------------------------------------------------------------- the reader asks

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Observation:
        while True:
            now = self._world.advance()
            if self.closed:
                raise StopAsyncIteration
            seen = self._take(now)
            if seen is not None:
                return seen
            await self._wait(now)

    async def aclose(self) -> None:
        """Stop watching. May be called again."""
        self._world.unwatch(self)
        self.close()

    def _take(self, now: float) -> Observation | None:
        if not self._world.available:
            return None
        if self._held and self._held_until <= now:
            self._shuffle(now)
        if self._relist_at <= now:
            self.gap()
        if self._relist:
            self._relist = False
            return self._world.snapshot(self.fleet)
        if self._buffer and self._buffer[0][0] <= now:
            return self._buffer.popleft()[1]
        return None

    async def _wait(self, now: float) -> None:
        """Until something is told, or the time has come for something to happen."""
        due = self._world.next_due(self.fleet)
        if self._world.available:  # else its return is what happens next, and that wakes the reader
            due = min(due, self._relist_at, self._held_until if self._held else math.inf)
            if self._buffer:
                due = min(due, self._buffer[0][0])
        self._wake, self._waits_until = anyio.Event(), due
        try:
            with anyio.move_on_after(due - now):
                await self._wake.wait()
        finally:
            self._wake, self._waits_until = None, math.inf
