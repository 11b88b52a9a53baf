"""One thing that several use at once: opened for the first of them, closed after the last."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

__all__ = ["Shared"]


class Shared:
    """Counts the users of something, and opens and closes it for them, one at a time.

    What is open may hold task groups, which are closed by the task that opened them: its user should go last.

    Args:
        open: Opens it; if that fails, or is cancelled, nothing is left open.
        close: Closes it, also when it is cancelled meanwhile.
    """

    def __init__(self, open: Callable[[], Awaitable[None]], close: Callable[[], Awaitable[None]]) -> None:
        self._open = open
        self._close = close
        self._users = 0
        self._lock = anyio.Lock()

    async def enter(self) -> None:
        """Be one of the users, once it is open; raises what opening it raises, and the next one tries again."""
        async with self._turn():
            if not self._users:
                await self._open()
            self._users += 1

    async def leave(self) -> None:
        """Be none any more; the last one closes it, and who comes meanwhile waits, and opens it again."""
        lock = self._turn()
        # Else one would be counted for ever. It is not long: whoever has the lock neither opens nor closes what we use.
        with anyio.CancelScope(shield=True):
            await lock.acquire()
        try:
            self._users -= 1
            if not self._users:
                await self._close()
        finally:
            lock.release()

    def _turn(self) -> anyio.Lock:
        """The lock; a new one whenever it is free, because one that was waited for belongs to its event loop."""
        if not self._lock.locked():
            self._lock = anyio.Lock()
        return self._lock
