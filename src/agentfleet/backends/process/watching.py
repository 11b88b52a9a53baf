"""Observers of one fleet: a snapshot, then what changes, without bound on how slowly they may read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import anyio

from agentfleet.backends.base import Changed, Observation, Removed, Snapshot

_SLACK = 1024


class Watcher:
    """An async iterator over one fleet's observations; see the contract in `backends.base`.

    A reader that keeps up sees every change. For one that falls behind, only the last observation of each instance is
    kept, so the buffer never holds much more than twice the instances seen since it last read.

    Args:
        snapshot: Called when the first observation is read, so that nothing lies between snapshot and changes.
    """

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self._started = False
        self._ended = False
        self._buffer: deque[Changed | Removed] = deque()
        self._limit = _SLACK
        self._news = anyio.Event()

    def __aiter__(self) -> Watcher:
        """Itself."""
        return self

    async def __anext__(self) -> Observation:
        """The next observation; waits for one. Ends after `aclose` and when the backend is closed."""
        await anyio.lowlevel.checkpoint()
        if not self._started and not self._ended:
            self._started = True
            return self._snapshot()
        while not self._buffer:
            if self._ended:
                raise StopAsyncIteration
            self._news = anyio.Event()
            await self._news.wait()
        return self._buffer.popleft()

    async def aclose(self) -> None:
        """Stop watching; what was not read is dropped."""
        self._buffer.clear()
        self.end()

    def end(self) -> None:
        """No more will come; what is buffered can still be read."""
        self._ended = True
        self._news.set()

    def put(self, observation: Changed | Removed) -> None:
        """Add an observation (called by the backend)."""
        if not self._started or self._ended:
            return  # the snapshot will tell, or nobody reads any more
        self._buffer.append(observation)
        if len(self._buffer) > self._limit:
            self._coalesce()
        self._news.set()

    def _coalesce(self) -> None:
        latest: dict[str, Changed | Removed] = {}
        for observation in self._buffer:
            key = observation.instance.id if isinstance(observation, Changed) else observation.id
            latest.pop(key, None)  # so that the last word of each also keeps its place in time
            latest[key] = observation
        self._buffer = deque(latest.values())
        self._limit = 2 * len(latest) + _SLACK
