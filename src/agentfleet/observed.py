"""A journal that shows its events to somebody else as well, such as the metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

from agentfleet.errors import JournalError
from agentfleet.events import Event


class Journal(Protocol):
    """The journal's port; spelled out because one port does not import another."""

    def append(self, event: Event) -> Event:
        """See `stores.journal.Journal`."""
        ...

    def read(self, *, fleet: str | None = None, after: int = 0) -> Sequence[Event]:
        """See `stores.journal.Journal`."""
        ...

    def last_state(self, fleet: str, kind: str) -> Event | None:
        """See `stores.journal.Journal`."""
        ...

    def last_states(self, fleet: str, prefix: str) -> Mapping[str, Event]:
        """See `stores.journal.Journal`."""
        ...

    def follow(self, *, fleet: str | None = None, after: int = 0) -> AsyncIterator[Event]:
        """See `stores.journal.Journal`."""
        ...


class ObservedJournal:
    """A journal that shows what is appended to it.

    Args:
        journal: Where events go.
        record: Shown each event as it was kept.
        failed: Called with the fleet of each event that could not be kept.
    """

    __slots__ = ("_failed", "_journal", "_record")

    def __init__(self, journal: Journal, record: Callable[[Event], None], failed: Callable[[str], None]) -> None:
        self._journal, self._record, self._failed = journal, record, failed

    def append(self, event: Event) -> Event:
        """See `Journal`."""
        try:
            recorded = self._journal.append(event)
        except JournalError:
            self._failed(event.fleet)
            raise
        self._record(recorded)
        return recorded

    def read(self, *, fleet: str | None = None, after: int = 0) -> Sequence[Event]:
        """See `Journal`."""
        return self._journal.read(fleet=fleet, after=after)

    def last_state(self, fleet: str, kind: str) -> Event | None:
        """See `Journal`."""
        return self._journal.last_state(fleet, kind)

    def last_states(self, fleet: str, prefix: str) -> Mapping[str, Event]:
        """See `Journal`."""
        return self._journal.last_states(fleet, prefix)

    def follow(self, *, fleet: str | None = None, after: int = 0) -> AsyncIterator[Event]:
        """See `Journal`."""
        return self._journal.follow(fleet=fleet, after=after)
