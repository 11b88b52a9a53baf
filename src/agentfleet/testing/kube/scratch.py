"""A directory for one control plane, in memory where the system has that; none is left, even if we were killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

_PREFIX = "agentfleet-kube-"
_OWNER = ".owner"  # locked as long as the owner lives


class Scratch:
    """A temporary directory; what dead owners left behind is removed on the way.

    In memory, because etcd waits for the disk at every write, and on a busy disk that is most of the time it takes.
    """

    def __init__(self) -> None:
        memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes the directory below it, for this user alone
        base = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
        _sweep(base)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self._lock = _lock(self.path / _OWNER)

    def remove(self) -> None:
        """Remove the directory with all that is in it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        shutil.rmtree(self.path, ignore_errors=True)


def _sweep(base: Path) -> None:
    for place in base.glob(f"{_PREFIX}*"):
        owner = place / _OWNER
        if not owner.exists():
            continue  # just being made
        try:
            lock = _lock(owner)
        except OSError:
            continue  # another user's
        if lock is not None:
            lock.close()
            shutil.rmtree(place, ignore_errors=True)


def _lock(path: Path) -> IO[bytes] | None:
    """Lock a file for as long as it stays open; None if another process holds it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
