"""What an informer counts, and when the server last told it anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["InformerMetrics", "LastWord"]


class LastWord:
    """When the server last said anything. May be asked in any thread, as metrics are; told in the event loop alone."""

    def __init__(self) -> None:
        self._now: Callable[[], float] | None = None
        self._begun_at = 0.0
        self._heard_at = float("-inf")

    def begin(self, before: LastWord | None = None) -> None:
        """From now on somebody listens; or goes on to, after they (or another, `before`) have heard nothing so far."""
        if self._now is None:
            self._now = asyncio.get_running_loop().time  # anyio's time, which cannot be asked in other threads
            self._begun_at = self._now()
        if before is not None and before._now is not None and before._heard_at < before._begun_at:
            self._begun_at = min(self._begun_at, before._begun_at)

    def heard(self) -> None:
        """It has said something now; whoever hears it although nobody listens any more was just about to end."""
        if self._now is not None:
            self._heard_at = self._now()

    def end(self) -> None:
        """Nobody listens any more."""
        self._now = None

    @property
    def age(self) -> float:
        """Seconds since it said anything; infinite while it has not, and when nobody listens."""
        now = self._now
        return float("inf") if now is None else now() - self._heard_at

    @property
    def silence(self) -> float | None:
        """The same, but of a server that has said nothing yet since somebody listens; None when nobody does."""
        now = self._now
        return None if now is None else now() - max(self._heard_at, self._begun_at)


@dataclass(slots=True)
class InformerMetrics:
    """What an informer has done since it was started."""

    lists: int = 0
    """Lists begun; the first and every relist."""
    relists: int = 0
    """Of these, all but the first."""
    pages: int = 0
    """Pages read."""
    watches: int = 0
    """Watches that began."""
    reconnects: int = 0
    """Of these, all but the first after a list."""
    expired: int = 0
    """Times that history was compacted away (410)."""
    events: int = 0
    """Events read, repeated ones included, bookmarks not."""
    bookmarks: int = 0
    """Bookmarks read."""
    failures: int = 0
    """Lists and watches that ended in an error."""
