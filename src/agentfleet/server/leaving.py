"""Whether the server is about to end, for those who would otherwise wait or stream on."""

from __future__ import annotations

import anyio


class Leaving:
    """Set once. May be made and asked outside an event loop."""

    def __init__(self) -> None:
        self._event: anyio.Event | None = None
        self.begun = False

    def begin(self) -> None:
        """From now on streams end, long waits return, and the server is not ready."""
        self.begun = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        """Return when it has begun."""
        if self.begun:
            return
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()
