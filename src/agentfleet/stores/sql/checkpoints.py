"""Carries SQLite's log over into its file, beside whoever writes.

In WAL mode a commit appends to a log, and the commit that makes it longer than a thousand pages carries all of it over
into the file and waits for the disk, twice: a third of a second now and then, for whoever happens to commit just then.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import suppress

_PERIOD = 0.5
"""Seconds between two looks at the log."""
_LONG = 4 * 2**20
"""Bytes that a log has before it is carried over."""
BACKSTOP = 16_384
"""Pages after which a commit does it nevertheless: 64 MiB."""


class Checkpoints:
    """Looks after one file in a thread of its own, until it is closed.

    Args:
        path: The database's.
        timeout: Seconds that a checkpoint waits for others, at most.
    """

    def __init__(self, path: str, *, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sqlite checkpoints", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it, and wait for it as long as a checkpoint may wait; may be repeated."""
        self._ended.set()
        self._thread.join(self._timeout)

    def _run(self) -> None:
        done: object = None
        while not self._ended.wait(_PERIOD):
            if (log := self._log()) is not None and log != done:
                with suppress(sqlite3.Error):  # what a commit meets, too, and tells; this tries again
                    self._carry_over()
                    done = log

    def _log(self) -> object:
        """How the log looks, if it is long. A log keeps its length when it begins anew."""
        try:
            found = os.stat(f"{self._path}-wal")  # noqa: PTH116 - no path is made of it twice a second
        except FileNotFoundError:
            return None
        return (found.st_mtime_ns, found.st_size) if found.st_size > _LONG else None

    def _carry_over(self) -> None:
        connection = sqlite3.connect(self._path, timeout=self._timeout)
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        finally:
            connection.close()
