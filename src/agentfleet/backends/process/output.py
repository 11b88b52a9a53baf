"""What instances write: one bounded file each, appended to by the process itself, so it survives the manager.

A pipe would end with the manager that reads it; a file does not. Its bound is kept by copy-truncate: when the file has
outgrown `limit` bytes, its newest half is written back. Lines that arrive within that instant (microseconds) may be
lost, and between two checks a file may exceed the bound. All functions block; call them in a worker thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


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
        kept = _newest(descriptor, limit // 2)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, kept)
    finally:
        os.close(descriptor)
    return True


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
        text = _newest(descriptor, limit).decode(errors="replace")
    finally:
        os.close(descriptor)
    # Not splitlines(): form feeds and Unicode separators are part of what an agent wrote, not ends of its lines.
    written = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in written[-lines:]]


def _newest(descriptor: int, size: int) -> bytes:
    """The last `size` bytes, less the line that they begin in the middle of (unless it is the only one)."""
    start = os.fstat(descriptor).st_size - size
    if start <= 0:
        return os.pread(descriptor, size, 0)
    data = os.pread(descriptor, size + 1, start - 1)  # one byte before, to see whether a line begins at `start`
    _, newline, rest = data.partition(b"\n")
    return rest if newline and rest else data[1:]
