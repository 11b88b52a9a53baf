"""What one reader of an informer has not read yet: a slow reader costs memory per object, not per event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import anyio

from agentfleet.backends.kubernetes.informer_cache import Changed, Removed
from agentfleet.backends.kubernetes.objects import KubeObject
from agentfleet.errors import BackendUnavailable

__all__ = ["Closed", "Unread"]

ObjectT = TypeVar("ObjectT", bound=KubeObject)


class Closed(BackendUnavailable):
    """The informer was closed: nothing will come any more."""


class Unread(Generic[ObjectT]):
    """Changes by uid, in the order in which the objects first changed since they were read.

    Several changes of one object that nobody has read become one: from what was read to what is now. An object that
    came and went in between is told as `Removed`, so that its end is not lost.
    """

    def __init__(self) -> None:
        self._changes: dict[str, Changed[ObjectT] | Removed[ObjectT]] = {}
        self._news = anyio.Event()
        self._closed = False

    def add(self, changes: Sequence[Changed[ObjectT] | Removed[ObjectT]]) -> None:
        """Something has changed."""
        for change in changes:
            uid = change.object.metadata.uid
            unread = self._changes.get(uid)
            if unread is None or isinstance(change, Removed):
                self._changes[uid] = change
            else:
                before = unread.before if isinstance(unread, Changed) else unread.object
                self._changes[uid] = Changed(change.object, before)
        if changes and not self._news.is_set():
            self._news.set()

    def forget(self) -> None:
        """A snapshot says it all."""
        self._changes.clear()

    def close(self) -> None:
        """Nothing will come any more; what is unread can still be read."""
        self._closed = True
        self._news.set()

    async def next(self) -> Changed[ObjectT] | Removed[ObjectT] | None:
        """Wait for the next change; None when there will be none."""
        while not self._changes:
            if self._closed:
                return None
            self._news = anyio.Event()
            await self._news.wait()
        return self._changes.pop(next(iter(self._changes)))
