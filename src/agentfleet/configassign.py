"""Which revision of a configuration each instance is to have: the newest, or while one is tried, that or its base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from agentfleet.configstore import ConfigStore
from agentfleet.core.configrollout import ConfigPhase
from agentfleet.errors import ConfigNotFound
from agentfleet.stores.config import ConfigRevision, RolloutRecord


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who is to have what, at one moment."""

    everyone: ConfigRevision | None = None
    """The revision of all that are not on trial."""
    trial: ConfigRevision | None = None
    """The revision of those that are."""
    members: frozenset[str] = frozenset()
    """The instances on trial."""

    def of(self, instance: str) -> ConfigRevision | None:
        """What an instance is to have; None: nothing, or what it has."""
        return self.trial if instance in self.members else self.everyone

    @property
    def revisions(self) -> tuple[ConfigRevision, ...]:
        """The one or two revisions that are out."""
        return tuple(each for each in (self.everyone, self.trial) if each is not None)


class Assignments:
    """An async iterator over what is assigned: first as it is, then whenever it has changed. One task at a time.

    It shows where things stand, not each step of the way: what changes twice between two looks is seen once.

    Args:
        store: Where revisions and rollouts are kept.
        key: The documents' key.
    """

    def __init__(self, store: ConfigStore, key: str) -> None:
        self._store, self._key = store, key
        self._seen: Assignment | None = None
        self._revision = 0
        self._version: int | None = None
        self._base: ConfigRevision | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Assignment:
        """The next assignment that differs from the last.

        Raises:
            ConfigError: The store cannot be reached or has gone back; iterating on tries again.
            DeadlineExceeded: It did not answer in time; likewise.
        """
        while True:
            if self._seen is not None:
                await self._store.changed(self._key, self._revision, self._version)
            found = await self._look()
            if found != self._seen:
                self._seen = found
                return found

    async def _look(self) -> Assignment:
        try:
            newest = await self._store.get(self._key)
        except ConfigNotFound:
            return Assignment()
        record = await self._store.rollout(self._key) if newest.rollout else None
        found = await self._assign(newest, record)
        # only now: what failed in between is looked at again
        self._revision = newest.revision
        self._version = (record.version if record is not None else 0) if newest.rollout else None
        return found

    async def _assign(self, newest: ConfigRevision, record: RolloutRecord | None) -> Assignment:
        if not newest.rollout:
            return Assignment(newest)
        if record is None or record.revision != newest.revision:
            return Assignment(await self._find(newest.base))
        if record.phase == ConfigPhase.COMPLETE:
            return Assignment(newest)
        return Assignment(await self._find(newest.base), newest, frozenset(record.trials))

    async def _find(self, number: int) -> ConfigRevision | None:
        if self._base is None or self._base.revision != number:
            try:
                self._base = await self._store.get(self._key, number)
            except ConfigNotFound:  # it is kept no longer: who has it keeps it
                self._base = None
        return self._base


def parcel(revision: ConfigRevision) -> bytes:
    """A revision as agents are sent it: a JSON object with its number and its document."""
    return f'{{"revision":{revision.revision},"document":{revision.text}}}'.encode()
