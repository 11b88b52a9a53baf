"""RECORD: the journal, an append-only list of events, and the port that every journal implements.

A journal also keeps, per fleet, the last event of each kind under `state.` ("state.fleet", "state.scaling", …): from
these a restarted manager takes up where its predecessor fell, however far the history has been trimmed.

A journal that several managers may write at the same time refuses what a deposed one still has to tell: once it holds
an event of a fleet in a leader's epoch, one in an older epoch is `NotLeader`. Events without an epoch are anybody's.

What comes back is what JSON keeps: tuples in `data` return as lists, and changing `data` after the append, or in an
event that was read, changes nothing recorded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from agentfleet.events import Event


class Journal(Protocol):
    """Where events are kept. Appends are ordered; `append` returns when the event survives the process's death."""

    def append(self, event: Event) -> Event:
        """Record one event and return it with its `seq`. Does not wait on the network, so it is not async.

        Raises:
            JournalError: The event could not be recorded.
            NotLeader: A later leader has recorded events of this fleet already.
        """
        ...

    def read(self, *, fleet: str | None = None, after: int = 0) -> Sequence[Event]:
        """Kept events with `seq > after`, oldest first."""
        ...

    def last_state(self, fleet: str, kind: str) -> Event | None:
        """The newest event of a "state." kind, None if there never was one."""
        ...

    def last_states(self, fleet: str, prefix: str) -> Mapping[str, Event]:
        """The newest event of each kind that begins so, by kind; as `last_state`, and of many at once."""
        ...

    def follow(self, *, fleet: str | None = None, after: int = 0) -> AsyncIterator[Event]:
        """Kept events after `after`, then new ones as they are appended, without loss or repetition.

        Raises:
            JournalError: The history was trimmed past this reader before it read it; the message says what is
                missing. Raised once; iterating on continues with what is kept.
        """
        ...
