"""RECORD: the file under a JSON-lines journal: its lock, what a crash left behind, and its compaction.

The file holds whole lines of JSON in rising order of `seq`, the survivors of earlier compactions (the last event of
each state) first. Whatever instant the process dies at, the file is a valid journal, but for a last line cut short,
which the next opening removes.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

from agentfleet.errors import JournalError
from agentfleet.events import Event
from agentfleet.stores.lines import STATE

CHUNK = 1 << 20
_START = b'{"seq":'
_SEQ = re.compile(rb'\{"seq":(\d{1,18}),')
States = dict[tuple[str, str], tuple[int, bytes]]
"""The `seq` and line of the last event of each (fleet, state kind)."""


class Lock:
    """The right to write a journal, held by one process (and one journal object in it) at a time.

    The lock is a file of its own beside the journal, because compaction replaces the journal's file. The system frees
    it when the process dies, however it dies. The file stays, to be locked again.
    """

    __slots__ = ("_fd",)

    def __init__(self, path: Path) -> None:
        """Take the lock; raises `JournalError` naming the holder when another has it."""
        name = path.with_name(path.name + ".lock")
        self._fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(self._fd, 300, 0).decode(errors="replace") or "another process"
            os.close(self._fd)
            raise JournalError(
                f"{path} is being written by {holder}; give each manager a journal of its own, or stop that one"
            ) from error
        except OSError:
            os.close(self._fd)
            raise

    def release(self) -> None:
        """Let others write."""
        os.close(self._fd)


class Index:
    """Where to begin reading for a `seq`: the offset of a line every `step` bytes."""

    __slots__ = ("_offsets", "_seqs", "_step")

    def __init__(self, step: int) -> None:
        self._step = step
        self._seqs: list[int] = []
        self._offsets: list[int] = []

    def add(self, seq: int, offset: int) -> None:
        """Note that the line of `seq` begins at `offset`, if it is far enough from the last one noted."""
        if not self._offsets or offset - self._offsets[-1] >= self._step:
            self._seqs.append(seq)
            self._offsets.append(offset)

    def offset(self, seq: int) -> int:
        """An offset at or before the line of `seq`."""
        place = bisect_right(self._seqs, seq) - 1
        return self._offsets[place] if place >= 0 else 0

    def moved(self, start: int, by: int) -> Iterator[tuple[int, int]]:
        """The notes from offset `start` on, as they are once everything has moved `by` bytes."""
        for seq, place in zip(self._seqs, self._offsets, strict=True):
            if place >= start:
                yield seq, place + by

    def cut(self, offset: int) -> tuple[int, int] | None:
        """The first noted (`seq`, offset) at or after `offset`; None if there is none."""
        for seq, place in zip(self._seqs, self._offsets, strict=True):
            if place >= offset:
                return seq, place
        return None


class Scan:
    """What a journal's file holds, read once at opening."""

    __slots__ = ("at", "bad", "good", "index", "last", "size", "states", "torn", "trimmed")

    def __init__(self, step: int) -> None:
        self.index = Index(step)
        self.states: States = {}
        self.last = 0
        self.at = 0.0
        """When the last event happened, in seconds since the epoch."""
        self.trimmed = 0
        """The `seq` before the unbroken part at the end."""
        self.size = 0
        """Bytes of whole lines."""
        self.torn = 0
        """Bytes after them: a line that a crash cut short."""
        self.bad: list[bytes] = []
        """Lines that are no events: damage that is not ours."""
        self.good = 0

    def take(self, line: bytes) -> None:
        """Account for one whole line."""
        event = _event(line)
        if event is None or event.seq <= self.last:
            self.bad.append(line)
        else:
            if event.seq != self.last + 1:
                self.trimmed = event.seq - 1
            self.last, self.at = event.seq, event.at
            self.index.add(event.seq, self.size)
            if event.kind.startswith(STATE):
                self.states[event.fleet, event.kind] = (event.seq, line)
            self.good += 1
        self.size += len(line)


def _event(line: bytes) -> Event | None:
    """The event in a line that `encode` wrote; None for anything else, which the caller reports."""
    try:
        event = Event.from_json(line)
    except JournalError:
        return None
    start = _SEQ.match(line)
    whole = start is not None and int(start[1]) == event.seq and {type(event.fleet), type(event.kind)} == {str}
    return event if whole else None


def scan(fd: int, path: Path, step: int) -> Scan:
    """Read the whole file.

    Raises:
        JournalError: The file is something else than a journal; it is left as it is.
        OSError: It cannot be read.
    """
    head = os.pread(fd, len(_START), 0)
    if head != _START[: len(head)] and head.strip(b"\0"):
        raise JournalError(f"{path} is no journal: it begins with {head!r}; choose another path")
    found = Scan(step)
    rest = b""
    for rest in lines(fd, 0):
        if not rest.endswith(b"\n"):
            found.torn = len(rest)
            break
        found.take(rest)
    if found.bad and not found.good and not head.startswith(b"\0"):
        raise JournalError(f"{path} is no journal: it begins with {found.bad[0][:80]!r}; choose another path")
    return found


def drop_bad(fd: int, path: Path, step: int, bad: Iterable[bytes]) -> int:
    """Rewrite the file without its damaged lines, which go to a file ".damaged" beside it; returns a new append fd."""
    aside = os.open(
        path.with_name(path.name + ".damaged"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
    )
    try:
        write_all(aside, b"".join(bad))
    finally:
        os.close(aside)
    again, kept = Scan(step), []
    for line in lines(fd, 0):
        good = again.good
        again.take(line)
        if again.good > good:
            kept.append(line)
    return replace_file(path, kept, fd, os.fstat(fd).st_size, sync=False)


def number(line: bytes) -> int:
    """The `seq` of a line that was checked before, without decoding all of it."""
    return int(line[len(_START) : line.index(b",")])


def lines(fd: int, offset: int, chunk_size: int = CHUNK) -> Iterator[bytes]:
    """The lines from `offset` on, newlines included; the last one may lack its own."""
    rest = b""
    while chunk := os.pread(fd, chunk_size, offset):
        offset += len(chunk)
        whole = (rest + chunk).split(b"\n")
        rest = whole.pop()
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def write_all(fd: int, data: bytes) -> None:
    """Write every byte, however many calls it takes; raises `OSError`."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def replace_file(path: Path, head: Iterable[bytes], source: int, start: int, *, sync: bool) -> int:
    """Put `head` and the bytes of `source` from `start` in the place of `path`, all at once; returns a new append fd.

    Until the rename the old file is whole, after it the new one: a crash at any instant leaves one of the two.
    """
    draft = path.with_name(path.name + ".compact")
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        write_all(fd, b"".join(head))
        while chunk := os.pread(source, CHUNK, start):
            write_all(fd, chunk)
            start += len(chunk)
        if sync:
            os.fsync(fd)
        draft.replace(path)
    except OSError:
        os.close(fd)
        draft.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path)
    return fd


def sync_folder(path: Path) -> None:
    """Make the file's name itself survive a power loss."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
