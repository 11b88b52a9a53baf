"""RECORD: follow a journal inside its process, in memory that does not grow with the distance behind.

A follower holds a position and at most one small batch; what it has not read yet stays in the journal's own storage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol, Self

import anyio
import anyio.lowlevel

from agentfleet.errors import JournalError
from agentfleet.events import Event

BATCH = 64
"""Events that a follower takes at once: it holds no more, and lets other tasks run in between."""


class Feed(Protocol):
    """What a follower needs of a journal."""

    @property
    def closed(self) -> bool:
        """Whether nothing can be read any more."""
        ...

    @property
    def trimmed(self) -> int:
        """Events up to this `seq` are gone, but for the last of each state."""
        ...

    @property
    def newest(self) -> int:
        """The `seq` of the newest event; 0 if there is none."""
        ...

    async def look(self) -> None:
        """Have `newest` and `trimmed` be as they are now, whoever else appends."""
        ...

    async def batch(self, after: int, limit: int) -> Sequence[Event]:
        """Up to `limit` kept events with `seq > after`, oldest first."""
        ...

    async def changed(self, after: int) -> None:
        """Wait until there is an event with `seq > after`, or the journal is closed."""
        ...


class Bell:
    """Wakes whoever waits for the next append; costs nothing while nobody waits."""

    __slots__ = ("_event", "_waiting")

    def __init__(self) -> None:
        self._event: anyio.Event | None = None
        self._waiting = 0

    def ring(self) -> None:
        """Wake everyone who waits now."""
        if self._event is not None:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        """Wait for the next ring."""
        if self._event is None or not self._waiting:
            self._event = anyio.Event()  # one that nobody waits for may belong to an event loop that has ended
        self._waiting += 1
        try:
            await self._event.wait()
        finally:
            self._waiting -= 1


class Follower:
    """An async iterator over a journal. It holds no resource, so that dropping it is as good as closing it.

    Cancelling a wait loses nothing: the next call continues where the last returned event was. One task at a time.
    """

    __slots__ = ("_batch", "_feed", "_fleet", "_position", "_seen_trim", "_stopped")

    def __init__(self, feed: Feed, *, fleet: str | None, after: int) -> None:
        self._feed = feed
        self._fleet = fleet
        self._position = after
        self._seen_trim = feed.trimmed  # what was gone before is not lost by this follower
        self._batch: deque[Event] = deque()
        self._stopped = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            JournalError: Events were trimmed before they were read here.
        """
        while not self._stopped:
            while self._batch:
                event = self._batch.popleft()
                self._position = event.seq
                if self._fleet is None or event.fleet == self._fleet:
                    return event
            await self._refill()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the iteration."""
        self._stopped = True
        self._batch.clear()

    async def _refill(self) -> None:
        await anyio.lowlevel.checkpoint()
        if self._feed.closed:
            self._stopped = True
            return
        found = await self._feed.batch(self._position, BATCH)
        self._check_trim()
        self._batch.extend(found)
        if not self._batch:
            await self._feed.changed(self._position)

    def _check_trim(self) -> None:
        before = max(self._position, self._seen_trim)
        self._seen_trim = max(self._seen_trim, self._feed.trimmed)
        if self._seen_trim > before:
            raise JournalError(
                f"this reader fell behind: events {before + 1} to {self._seen_trim} were trimmed before it read them "
                "(only the last of each state is kept); read faster, or raise the journal's limit"
            )
