"""Following one key of a `ConfigStore`: each revision once and in order, whatever happens in between."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Self

import anyio.lowlevel

from agentfleet.errors import ConfigError
from agentfleet.stores.config import ConfigRevision

if TYPE_CHECKING:
    from agentfleet.configstore import ConfigStore

PAGE = 64
"""Revisions that are read at once."""


class ConfigWatch:
    """An async iterator over the revisions of one key. It holds no resource; dropping it is as good as closing it.

    However slow its reader, it gets each kept revision once and in order; it holds at most one page of them.
    Cancelling a wait loses nothing. One task at a time.
    """

    __slots__ = ("_key", "_page", "_position", "_stopped", "_store", "_told")

    def __init__(self, store: ConfigStore, key: str, after: int) -> None:
        self._store, self._key, self._position = store, key, after
        self._page: deque[ConfigRevision] = deque()
        self._stopped = False
        self._told = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ConfigRevision:
        """The next revision.

        Raises:
            ConfigError: The records went back, or dropped revisions that this reader has not read. Raised once for
                each such event; iterating on waits for the next revision above the last one read.
        """
        while not self._stopped:
            if self._page:
                revision = self._page.popleft()
                self._position = revision.revision
                return revision
            await anyio.lowlevel.checkpoint()
            await self._turn_page()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the iteration."""
        self._stopped = True
        self._page.clear()

    async def _turn_page(self) -> None:
        store, key, position = self._store, self._key, self._position
        records = store._records
        page = await store._ask(records.after(key, position, PAGE))
        if page:
            store._saw(key, page[-1].revision)
            missing = position and page[0].revision > position + 1 and not self._told
            if missing and await store._ask(records.find(key, position)) is None:
                self._told = True
                raise ConfigError(
                    f"this reader of {key!r} fell behind: revisions {position + 1} to {page[0].revision - 1} are kept "
                    "no longer; read faster, or keep more"
                )
            self._told = False
            self._page.extend(page)
            return
        newest = await store._newest(key)
        number = newest.revision if newest is not None else 0
        if number < position and not self._told:
            self._told = True
            store._saw(key, position)
            raise ConfigError(store._regressed(key, number))
        await records.changed(key, position)
