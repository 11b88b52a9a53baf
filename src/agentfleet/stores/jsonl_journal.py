"""RECORD: a journal in one file of JSON lines, which survives the death of its process at any instant.

Each event is one `write` to a file opened for appending: whole in the system's hands, or not there. With `fsync` it
also survives a power loss, at the price of the disk's latency on each append.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from agentfleet.errors import JournalError, SpecError
from agentfleet.events import Event
from agentfleet.stores import jsonl_file as files
from agentfleet.stores.following import Bell, Follower
from agentfleet.stores.jsonl_tail import JournalTail
from agentfleet.stores.lines import STATE, encode, numbered

_RECENT = 1024
_STEP = 1 << 16


class JsonlJournal:
    """The journal in a file. One object in one process writes it; any number of processes may `tail` it.

    When the file would exceed `limit_bytes` it is compacted to its newest half and the last event of each state. That
    rewrites up to half the limit, once per half a limit of events. Use from one event loop at a time.

    Args:
        path: The file; made if missing, its folder must exist. Beside it appear `.lock`, for an instant `.compact`,
            and `.damaged` if lines had to be set aside.
        limit_bytes: Size at which the file is compacted, from 4 KiB; one event may take a quarter of it.
        fsync: Whether each append waits until the disk has it.

    Raises:
        SpecError: `limit_bytes` is too small.
        JournalError: Another process (or object) writes this journal, the file is no journal, or it cannot be used.
    """

    __slots__ = (
        "_bell", "_compact_at", "_dirty", "_fd", "_fsync", "_index", "_last", "_limit", "_lock", "_path", "_recent",
        "_size", "_states", "_step", "_trimmed", "closed",
    )  # fmt: skip

    tail: ClassVar = JournalTail
    """`JsonlJournal.tail(path)` reads a journal that another process writes."""

    def __init__(self, path: str | os.PathLike[str], *, limit_bytes: int = 64 << 20, fsync: bool = False) -> None:
        if limit_bytes < 4096:
            raise SpecError(f"limit_bytes: must be at least 4096 bytes; got {limit_bytes}")
        self._path = Path(path)
        self._limit, self._fsync = limit_bytes, fsync
        self._step = min(_STEP, limit_bytes // 16)
        self._recent: deque[bytes] = deque(maxlen=_RECENT)
        self._bell = Bell()
        self._dirty = False
        self.closed = False
        """Whether `close` was called; followers then end."""
        try:
            self._lock = files.Lock(self._path)
        except OSError as error:
            raise self._failed("opened", error) from error
        try:
            self._open()
        except OSError as error:
            self._lock.release()
            raise self._failed("opened", error) from error
        except JournalError:
            self._lock.release()
            raise

    def append(self, event: Event) -> Event:
        """Record one event and return it with its `seq`.

        Raises:
            JournalError: It was not recorded: the disk is full, the event is not JSON-ready or too large, or the
                journal is closed. With `fsync`, also when it is written but may not survive a power loss.
        """
        self._check_open()
        seq = self._last + 1
        line = encode(event, seq)
        if len(line) * 4 > self._limit:
            raise JournalError(
                f"event {event.kind!r} takes {len(line)} bytes, more than a quarter of the journal's limit"
            )
        trouble = self._make_room(len(line))
        self._write(line)
        self._account(event, seq, line)
        if trouble is not None:
            self.append(Event(event.at, "", "journal.compaction_failed", data={"error": str(trouble)}))
        if self._fsync:
            self._sync(seq)
        return numbered(event, seq)

    def read(self, *, fleet: str | None = None, after: int = 0) -> Sequence[Event]:
        """Kept events with `seq > after`, oldest first."""
        # the fleet's name is looked for in the bytes first: decoding is what costs
        plain = fleet is not None and fleet.isascii() and fleet.isprintable()  # what may be escaped in two ways is not
        mark = b'"fleet":' + json.dumps(fleet).encode() if plain else b""
        events = [Event.from_json(line) for line in self._lines_after(after, None) if mark in line]
        return events if fleet is None else [event for event in events if event.fleet == fleet]

    def last_state(self, fleet: str, kind: str) -> Event | None:
        """The newest event of a "state." kind, None if there never was one."""
        found = self._states.get((fleet, kind))
        return Event.from_json(found[1]) if found else None

    def last_states(self, fleet: str, prefix: str) -> Mapping[str, Event]:
        """The newest event of each "state." kind that begins so, by kind."""
        own = ((kind, line) for (name, kind), (_, line) in self._states.items() if name == fleet)
        return {kind: Event.from_json(line) for kind, line in own if kind.startswith(prefix)}

    def follow(self, *, fleet: str | None = None, after: int = 0) -> Follower:
        """Kept events after `after`, then new ones as they are appended; see the port. Ends when closed."""
        return Follower(self, fleet=fleet, after=after)

    def close(self) -> None:
        """Free the file and its lock. Followers end; a second call does nothing."""
        if not self.closed:
            self.closed = True
            os.close(self._fd)
            self._lock.release()
            self._bell.ring()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def trimmed(self) -> int:
        """Events up to this `seq` are gone, but for the last of each state."""
        return self._trimmed

    @property
    def newest(self) -> int:
        """The `seq` of the newest event; 0 if there is none."""
        return self._last

    async def look(self) -> None:
        """Nothing to do: nobody else appends."""

    async def batch(self, after: int, limit: int) -> list[Event]:
        """Up to `limit` kept events with `seq > after`, oldest first."""
        return [Event.from_json(line) for line in self._lines_after(after, limit)]

    async def changed(self, after: int) -> None:
        """Wait until there is an event with `seq > after`, or the journal is closed."""
        if self._last <= after and not self.closed:
            await self._bell.wait()

    def _lines_after(self, after: int, limit: int | None) -> list[bytes]:
        self._check_open()
        behind = self._last - after
        if after >= self._trimmed and behind <= len(self._recent):
            start = len(self._recent) - max(behind, 0)
            return list(islice(self._recent, start, None if limit is None else start + limit))
        # Read in the loop's own thread: a batch comes from the page cache in well under a millisecond, and a worker
        # thread would let virtual time run on meanwhile.
        try:
            found = files.lines(self._fd, self._index.offset(after + 1), _STEP)
            return list(islice((line for line in found if files.number(line) > after), limit))
        except OSError as error:
            raise self._failed("read", error) from error

    def _open(self) -> None:
        self._path.with_name(self._path.name + ".compact").unlink(missing_ok=True)  # of a crash while compacting
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o644)
        try:
            if self._fsync:
                files.sync_folder(self._path)
            self._take_up()
        except (OSError, JournalError):
            os.close(self._fd)
            raise

    def _take_up(self) -> None:
        """Continue where the last writer ended, and put right what its crash left."""
        found = first = files.scan(self._fd, self._path, self._step)
        if found.torn:
            os.ftruncate(self._fd, found.size)
        if found.bad:
            old, self._fd = self._fd, files.drop_bad(self._fd, self._path, self._step, found.bad)
            os.close(old)
            found = files.scan(self._fd, self._path, self._step)
        self._index, self._states, self._size = found.index, found.states, found.size
        self._last, self._trimmed = found.last, found.trimmed
        self._compact_at = max(self._limit, self._size)
        if first.torn or first.bad:
            data = {"torn_bytes": first.torn, "damaged_lines": len(first.bad)}
            # dated like the last event before it: when the damage was done is not known
            self.append(Event(found.at, "", "journal.repaired", data=data))

    def _account(self, event: Event, seq: int, line: bytes) -> None:
        self._index.add(seq, self._size)
        self._size += len(line)
        self._last = seq
        self._recent.append(line)
        if event.kind.startswith(STATE):
            self._states[event.fleet, event.kind] = (seq, line)
        self._bell.ring()

    def _write(self, line: bytes) -> None:
        written = 0
        try:
            if self._dirty:
                os.ftruncate(self._fd, self._size)
                self._dirty = False
            written = os.write(self._fd, line)
        except OSError as error:
            self._undo()
            raise self._failed("written", error) from error
        if written != len(line):
            self._undo()
            raise JournalError(f"{self._path} took only {written} of {len(line)} bytes: is the disk full?")

    def _undo(self) -> None:
        """Take back part of a line, so that the next one does not continue it."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            self._dirty = True  # the caller raises already; the next append tries again before it writes

    def _sync(self, seq: int) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            # the line stays and its number is used: a reader may have seen it
            raise JournalError(f"event {seq} is written but may not survive a power loss: {error}") from error

    def _make_room(self, size: int) -> OSError | None:
        """Compact if `size` more bytes are too many. Returns why that failed: the record itself goes on meanwhile."""
        if self._size + size <= self._compact_at:
            return None
        try:
            self._compact()
        except OSError as error:
            self._compact_at = self._size + size + self._limit // 4
            return error
        # States alone may fill the file (very many fleets): wait until it has doubled, or each append would compact.
        self._compact_at = max(self._limit, 2 * self._size)
        return None

    def _compact(self) -> None:
        if self._dirty:
            os.ftruncate(self._fd, self._size)
            self._dirty = False
        seq, start = self._index.cut(self._size - self._limit // 2) or (1, 0)
        head = [line for number, line in sorted(self._states.values()) if number < seq]
        fd = files.replace_file(self._path, head, self._fd, start, sync=self._fsync)
        os.close(self._fd)
        self._fd = fd
        index, offset = files.Index(self._step), 0
        for line in head:
            index.add(files.number(line), offset)
            offset += len(line)
        for number, place in self._index.moved(start, offset - start):
            index.add(number, place)
        self._index, self._size = index, self._size - start + offset
        self._trimmed = max(self._trimmed, seq - 1)

    def _check_open(self) -> None:
        if self.closed:
            raise JournalError(f"{self._path} is closed")

    def _failed(self, what: str, error: OSError) -> JournalError:
        return JournalError(f"the journal {self._path} cannot be {what}: {error.strerror or error}")
