"""What a process has open and running, to see what a test leaves behind."""

from __future__ import annotations

from pathlib import Path

import psutil


def children() -> set[int]:
    """Processes below this one, but for those of a database server, which lasts for the session."""
    return {child.pid for child in psutil.Process().children(recursive=True) if _counts(child)}


def _counts(process: psutil.Process) -> bool:
    try:
        return process.name() != "postgres"
    except psutil.NoSuchProcess:  # a server's worker that has just ended is not left either
        return False


def descriptors() -> dict[str, str]:
    """Open descriptors by number, and what they are open on (sockets by inode, so a reused number is seen)."""
    found: dict[str, str] = {}
    folder = Path("/proc/self/fd")
    if not folder.exists():  # not Linux: nothing to compare
        return found
    for entry in folder.iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except FileNotFoundError:
            continue  # the descriptor of this very listing
    return found
