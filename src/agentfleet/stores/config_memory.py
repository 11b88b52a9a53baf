"""RECORD: configuration documents in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from agentfleet.errors import ConfigConflict, SpecError
from agentfleet.stores.config import ConfigRevision
from agentfleet.stores.following import Bell


class MemoryConfig:
    """Revisions in memory: the newest `keep` of each key.

    Args:
        keep: Revisions kept of each key, from 1.
        revisions: What is kept from the start, such as what a journal remembers; per key in rising order.

    Raises:
        SpecError: `keep` is less than 1.
    """

    __slots__ = ("_bells", "_keep", "_kept")

    def __init__(self, *, keep: int = 1000, revisions: Iterable[ConfigRevision] = ()) -> None:
        if keep < 1:
            raise SpecError(f"keep: must be at least 1 revision; got {keep}")
        self._keep = keep
        self._kept: dict[str, list[ConfigRevision]] = {}
        self._bells: dict[str, Bell] = {}
        for revision in revisions:
            self._kept.setdefault(revision.key, []).append(revision)

    async def append(self, revision: ConfigRevision, *, expect: int) -> None:
        """Keep a revision if `expect` is the newest; raises `ConfigConflict` otherwise."""
        kept = self._kept.get(revision.key, [])
        newest = kept[-1].revision if kept else 0
        if newest != expect:
            raise ConfigConflict(
                f"{revision.key!r} is at revision {newest}, not {expect}: another writer was first; "
                "read the newest revision, merge your change into it, and publish again"
            )
        self._kept[revision.key] = [*kept[-(self._keep - 1) :], revision] if self._keep > 1 else [revision]
        if revision.key in self._bells:
            self._bells.pop(revision.key).ring()

    async def newest(self, key: str) -> ConfigRevision | None:
        """The newest revision of a key."""
        kept = self._kept.get(key)
        return kept[-1] if kept else None

    async def find(self, key: str, revision: int) -> ConfigRevision | None:
        """One revision, None if it is not kept."""
        found = self._after(key, revision - 1, 1)
        return found[0] if found and found[0].revision == revision else None

    async def after(self, key: str, revision: int, limit: int) -> Sequence[ConfigRevision]:
        """Up to `limit` revisions greater than `revision`, oldest first."""
        return self._after(key, revision, limit)

    async def keys(self) -> Sequence[str]:
        """Every key that has a revision, sorted."""
        return sorted(self._kept)

    async def changed(self, key: str, revision: int) -> None:
        """Wait until the newest revision of a key is greater than `revision`."""
        kept = self._kept.get(key)
        if not kept or kept[-1].revision <= revision:
            await self._bells.setdefault(key, Bell()).wait()

    def _after(self, key: str, revision: int, limit: int) -> list[ConfigRevision]:
        kept = self._kept.get(key, [])
        start = bisect_right(kept, revision, key=lambda item: item.revision)
        return kept[start : start + limit]
