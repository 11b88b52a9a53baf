"""Events as they happen, to any number of streams: read and written once, however many look on (WHATWG, HTML 9.2).

Whichever stream waits for more reads the journal for all of them; the others take what it found. So nothing runs while
nobody looks on, and no task needs to be kept.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

import anyio

from agentfleet.errors import JournalError, SpecError
from agentfleet.events import Event
from agentfleet.rest.answers import EventAnswer
from agentfleet.server.leaving import Leaving
from agentfleet.server.metrics import ApiMetrics, Lasting
from agentfleet.server.problems import later
from agentfleet.stores.following import Feed

log = logging.getLogger(__name__)

_KEPT = 4096
_BATCH = 256
RETRY_MS = 1000
_KIND = re.compile(r"[\w.:-]{1,200}")
INTERNAL = "state."
"""Kinds that are for managers alone."""


@dataclass(frozen=True, slots=True)
class _Line:
    seq: int
    fleet: str
    kind: str
    frame: bytes


class Hub:
    """The newest events of a journal, as frames of a stream.

    Args:
        journal: Followed from when the first stream is opened.

    Raises:
        SpecError: The journal cannot be followed.
    """

    def __init__(self, journal: object) -> None:
        if not hasattr(journal, "batch"):
            raise SpecError(
                f"journal: {type(journal).__name__} cannot be followed in batches, as those of this library"
            )
        self.journal: Feed = journal  # type: ignore[assignment]
        self._ring: deque[_Line] = deque(maxlen=_KEPT)
        self._position = -1
        """Of the last event that was read; below 0 before the first."""
        self._turn: anyio.Lock | None = None
        self._watchers = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A block in which a stream is open.

        The first one after a rest begins anew: what happened meanwhile is not read, unless it asks for that itself.
        """
        if self._watchers == 0:
            self._ring.clear()
            self._position = self.journal.newest
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    async def newest(self) -> int:
        """Place of the newest event."""
        await self.journal.look()
        if self._position < 0:
            self._position = self.journal.newest
        return max(self._position, self.journal.newest)

    async def after(self, position: int) -> tuple[list[_Line], int]:
        """Frames that follow a position, and how far they reach; waits until there is one."""
        if self._position < 0:
            self._position = self.journal.newest
        while True:
            if position < self._position:
                return await self._since(position)
            if self._turn is None:
                self._turn = anyio.Lock()
            async with self._turn:
                if position >= self._position:
                    await self._read()

    async def _read(self) -> None:
        """Read what is new; who waits for this takes it from the ring."""
        await self.journal.changed(self._position)
        found = await self.journal.batch(self._position, _BATCH)
        for event in found:
            self._ring.append(_line(event))
        if found:
            self._position = found[-1].seq
        elif self.journal.closed:
            raise JournalError("the journal is closed")

    async def _since(self, position: int) -> tuple[list[_Line], int]:
        oldest = self._ring[0].seq if self._ring else self._position + 1
        if position + 1 < oldest:  # further back than what is at hand
            found = [_line(event) for event in await self.journal.batch(position, _BATCH)]
            return found, found[-1].seq if found else oldest - 1
        recent = list(takewhile(lambda line: line.seq > position, reversed(self._ring)))
        return recent[::-1], self._position


def _line(event: Event) -> _Line:
    text = EventAnswer.of(event).model_dump_json()
    kind = event.kind if _KIND.fullmatch(event.kind) else "event"
    frame = f"id: {event.seq}\nevent: {kind}\ndata: {text}\n\n".encode("utf-8", "backslashreplace")
    return _Line(event.seq, event.fleet, event.kind, frame)


class Places:
    """Counts what stays open for long (streams, say), all together and by who has it.

    Args:
        what: Is counted, in the plural; also the label of the limit.
        most: At most so many.
        each: Of these, those of one credential.
        metrics: Told of each.
    """

    def __init__(self, what: Lasting, most: int, each: int, metrics: ApiMetrics) -> None:
        self._what, self._most, self._each, self._metrics = what, most, each, metrics
        self._open: Counter[str] = Counter()

    @property
    def open(self) -> int:
        """How many are open now."""
        return self._open.total()

    def check(self, who: str) -> None:
        """Raise a 503 or 429 if there is no place for one more."""
        if self.open >= self._most:
            self._metrics.limited(self._what)
            raise later(503, "unavailable", f"{self._most} {self._what} are open; ask another manager, or later", 5)
        if self._open[who] >= self._each:
            self._metrics.limited(self._what)
            raise later(429, "too-many-requests", f"this token has {self._open[who]} {self._what} open; close one", 5)

    @contextmanager
    def taken(self, who: str) -> Iterator[None]:
        """A block during which one is open."""
        self._open[who] += 1
        self._metrics.lasting(self._what, 1)
        try:
            yield
        finally:
            self._open[who] -= 1
            self._metrics.lasting(self._what, -1)
            if not self._open[who]:
                del self._open[who]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events a stream is for.

    Attributes:
        after: Where it goes on.
        fleet: Name of a fleet.
        kinds: Beginnings of kinds; none is all.
        seconds: After which it ends.
        beat: Seconds of silence after which it gives a sign of life.
    """

    after: int
    fleet: str
    kinds: tuple[str, ...]
    seconds: float
    beat: float


async def frames(
    hub: Hub, wanted: Wanted, leaving: Leaving, still: Callable[[], Awaitable[bool]]
) -> AsyncIterator[bytes]:
    """The frames of one stream, until its time is over, the server leaves, or who asked may not any more.

    Args:
        hub: Where they come from.
        wanted: Which.
        leaving: Ends it.
        still: Whether who asked may still see this; asked at each sign of life, and after each so many frames.
    """
    try:
        await hub.journal.look()
        with hub.watched():
            async for frame in _frames(hub, wanted, leaving, still):
                yield frame
    except JournalError as error:  # who reads goes on from where it was, here or at another manager
        log.warning("a stream of events has ended: %s", error)


async def _frames(
    hub: Hub, wanted: Wanted, leaving: Leaving, still: Callable[[], Awaitable[bool]]
) -> AsyncIterator[bytes]:
    position, end = wanted.after, anyio.current_time() + wanted.seconds
    # its place first of all: who loses the stream before anything has happened goes on from there, not "from now on"
    yield f"retry: {RETRY_MS}\nid: {position}\n\n".encode()
    if position < (trimmed := hub.journal.trimmed):
        data = f'{{"after":{position},"trimmed":{trimmed}}}'
        yield f"event: journal.trimmed\ndata: {data}\n\n".encode()
        position = trimmed
    checked_at = anyio.current_time()
    while not leaving.begun and (now := anyio.current_time()) < end:
        found = await _next(hub, position, min(wanted.beat, end - now), leaving)
        if anyio.current_time() - checked_at >= wanted.beat:
            checked_at = anyio.current_time()
            if not await still():
                return
        if found is None:
            yield b": still here\n\n"
            continue
        lines, position = found
        chosen = b"".join(line.frame for line in lines if _fits(line, wanted))
        if chosen:
            yield chosen


async def _next(hub: Hub, position: int, seconds: float, leaving: Leaving) -> tuple[list[_Line], int] | None:
    found: tuple[list[_Line], int] | None = None
    failed: JournalError | None = None
    with anyio.move_on_after(seconds):
        async with anyio.create_task_group() as tasks:

            async def leave() -> None:
                await leaving.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(leave)
            try:
                found = await hub.after(position)
            except JournalError as error:  # raised outside, so that it is no group
                failed = error
            tasks.cancel_scope.cancel()
    if failed is not None:
        raise failed
    return found


def _fits(line: _Line, wanted: Wanted) -> bool:
    if line.fleet != wanted.fleet or line.kind.startswith(INTERNAL):
        return False
    return not wanted.kinds or line.kind.startswith(wanted.kinds)
