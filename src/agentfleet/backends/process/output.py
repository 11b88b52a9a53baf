"""What instances write: one bounded file each, appended to by the process itself, so it survives the manager.

A pipe would end with the manager that reads it; a file does not. Its bound is kept by copy-truncate: when the file has
outgrown `limit` bytes, its newest half is written back. A line that arrives within the instant of the cut is lost (the
writer has the file open, so nothing else can be put in its place), and between two checks a file may exceed the bound.
All functions block; call them in a worker thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_CATCH_UP = 8  # rounds; who writes faster than we read is not waited for
_cutting = threading.Lock()  # a file cut by two threads at once would lose what either has not read


def open_for_append(path: Path) -> int:
    """A file descriptor that appends to `path`, which only this user may read."""
    return os.open(path, _APPEND, 0o600)


def note(path: Path, text: str) -> None:
    """Append one line of our own, as when a command could not be started."""
    descriptor = open_for_append(path)
    try:
        os.write(descriptor, f"agentfleet: {text}\n".encode())
    finally:
        os.close(descriptor)


def trim_all(paths: Iterable[Path], limit: int) -> int:
    """Trim each file that has outgrown `limit` bytes; returns how many there were."""
    return sum(trim(path, limit) for path in paths)


def trim(path: Path, limit: int) -> bool:
    """Keep the newest half of `limit` bytes, from the start of a line, if the file is larger than `limit`."""
    try:
        if path.stat().st_size <= limit:
            return False
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # removed with its instance
    try:
        with _cutting:
            size = os.fstat(descriptor).st_size
            if size > limit:  # else another thread has just cut it
                _cut(descriptor, size, limit // 2)
    finally:
        os.close(descriptor)
    return True


def _cut(descriptor: int, size: int, kept: int) -> None:
    data = _newest(descriptor, size, kept)
    for _ in range(_CATCH_UP):
        more = os.pread(descriptor, kept, size)  # what was written while we read
        if not more:
            break
        data += more
        size += len(more)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, data)


def tail(path: Path, lines: int, limit: int) -> list[str]:
    """The last `lines` lines of at most `limit` bytes, oldest first; none if nothing was written."""
    trim(path, limit)
    if lines <= 0:
        return []
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        text = _newest(descriptor, os.fstat(descriptor).st_size, limit).decode(errors="replace")
    finally:
        os.close(descriptor)
    # Not splitlines(): form feeds and Unicode separators are part of what an agent wrote, not ends of its lines.
    written = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in written[-lines:]]


def _newest(descriptor: int, size: int, wanted: int) -> bytes:
    """The last `wanted` of `size` bytes, less the line that they begin in the middle of (unless it is the only one)."""
    start = size - wanted
    if start <= 0:
        return os.pread(descriptor, size, 0)
    data = os.pread(descriptor, wanted + 1, start - 1)  # one byte before, to see whether a line begins at `start`
    _, newline, rest = data.partition(b"\n")
    return rest if newline and rest else data[1:]
