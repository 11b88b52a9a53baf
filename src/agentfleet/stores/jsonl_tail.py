"""RECORD: read a JSON-lines journal while another process writes it, by looking at the file once in a while."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio.lowlevel

from agentfleet.clock import Clock, SystemClock
from agentfleet.errors import JournalError, SpecError
from agentfleet.events import Event

_CHUNK = 1 << 16


class JournalTail:
    """An async iterator over a journal's file; needs no lock and changes nothing.

    Use it as `async with JsonlJournal.tail(path) as events`, which frees the file at the end. A file that does not
    exist yet is waited for. Only whole lines are read, and the reader holds on to the file it reads, so that neither a
    crash nor a compaction of the writer loses or repeats an event.

    Args:
        path: The journal's file.
        fleet: Only this fleet's events; None for all.
        after: Only events with a greater `seq`.
        follow: Whether to wait for more at the end; otherwise the iteration ends there.
        period: Seconds between two looks at the file.
        clock: What to wait on.

    Raises:
        SpecError: `period` is not more than zero.
    """

    __slots__ = (
        "_clock",
        "_events",
        "_fd",
        "_fleet",
        "_follow",
        "_offset",
        "_path",
        "_period",
        "_position",
        "_switched",
    )

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fleet: str | None = None,
        after: int = 0,
        follow: bool = True,
        period: float = 0.2,
        clock: Clock | None = None,
    ) -> None:
        if not period > 0:
            raise SpecError(f"period: must be more than 0 seconds; got {period}")
        self._path = Path(path)
        self._fleet, self._follow, self._period = fleet, follow, period
        self._clock: Clock = clock if clock is not None else SystemClock()
        self._position = after
        self._offset = 0
        self._fd: int | None = None
        self._switched = False
        self._events: deque[bytes] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            JournalError: A line is damaged, the file cannot be read, or events were trimmed before they were read
                here. Raised once for each; iterating on continues behind it.
        """
        while True:
            while self._events:
                event = self._decode(self._events.popleft())
                if event is not None:
                    return event
            await anyio.lowlevel.checkpoint()
            if not self._look():
                if not self._follow:
                    raise StopAsyncIteration
                await self._clock.sleep(self._period)

    async def aclose(self) -> None:
        """Free the file."""
        self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _decode(self, line: bytes) -> Event | None:
        event = Event.from_json(line)
        if event.seq <= self._position:
            return None
        before, self._position = self._position, event.seq
        if self._switched:
            self._switched = False
            if before and event.seq > before + 1:
                self._events.appendleft(line)
                self._position = event.seq - 1
                raise JournalError(
                    f"this reader fell behind: {self._path} was trimmed before it read events {before + 1} to "
                    f"{event.seq - 1} (of which only the last of each state may be kept)"
                )
        return event if self._fleet is None or event.fleet == self._fleet else None

    def _look(self) -> bool:
        """Take the next lines; False when there are none now."""
        try:
            replaced = self._open()
            if self._fd is None:
                return False
            if self._take():
                return True
            if replaced:  # seen before the last read, so nothing can have been added to the old file since
                self._close()
                self._switched = True
                return True
        except OSError as error:
            raise JournalError(f"the journal {self._path} cannot be read: {error.strerror or error}") from error
        return False

    def _open(self) -> bool:
        """Have the file open if it exists; True when the one that is open is no longer the journal."""
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                self._offset = 0
                return False
            now, held = self._path.stat(), os.fstat(self._fd)
        except FileNotFoundError:
            return False  # not there yet, or taken away: more can only come from a new file
        return (now.st_ino, now.st_dev) != (held.st_ino, held.st_dev) or held.st_size < self._offset

    def _take(self) -> bool:
        assert self._fd is not None
        size = _CHUNK
        while True:
            chunk = os.pread(self._fd, size, self._offset)
            end = chunk.rfind(b"\n") + 1
            if end:
                self._offset += end
                self._events.extend(chunk[: end - 1].split(b"\n"))
                return True
            if len(chunk) < size:
                return False  # at the end, or before the rest of a line that is being written
            size *= 2

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
