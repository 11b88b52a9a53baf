"""RECORD: a journal in memory, for tests, simulations and whoever needs no history after a restart.

Events are kept as their JSON lines: smaller than objects, safe from later changes, and exactly what a file would keep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice

from agentfleet.errors import NotLeader, SpecError
from agentfleet.events import Event
from agentfleet.stores.following import BATCH, Bell, Follower
from agentfleet.stores.lines import STATE, deposed, encode, numbered


class MemoryJournal:
    """A journal that keeps the newest `limit` events, and the last of each state, in memory.

    Args:
        limit: Events kept; None keeps all of them.

    Raises:
        SpecError: `limit` is no positive whole number.
    """

    __slots__ = ("_bell", "_epochs", "_last", "_limit", "_lines", "_states")

    def __init__(self, *, limit: int | None = 100_000) -> None:
        if limit is not None and limit < 1:
            raise SpecError(f"limit: must be a whole number of events from 1, or None for no limit; got {limit!r}")
        self._limit = limit
        self._lines: deque[bytes] = deque()
        self._states: dict[tuple[str, str], tuple[int, bytes]] = {}
        self._last = 0
        self._epochs: dict[str, int] = {}
        self._bell = Bell()

    def append(self, event: Event) -> Event:
        """Record one event and return it with its `seq`; raises like the port."""
        seq = self._last + 1
        line = encode(event, seq)
        if event.epoch:
            if event.epoch < (latest := self._epochs.get(event.fleet, 0)):
                raise NotLeader(deposed(event, latest))
            self._epochs[event.fleet] = event.epoch
        self._last = seq
        self._lines.append(line)
        if self._limit is not None and len(self._lines) > self._limit:
            self._lines.popleft()
        if event.kind.startswith(STATE):
            self._states[event.fleet, event.kind] = (seq, line)
        self._bell.ring()
        return numbered(event, seq)

    def read(self, *, fleet: str | None = None, after: int = 0) -> Sequence[Event]:
        """Kept events with `seq > after`, oldest first."""
        events = self._kept(after, self._last)
        return [event for event in events if event.fleet == fleet] if fleet is not None else events

    def last_state(self, fleet: str, kind: str) -> Event | None:
        """The newest event of a "state." kind, None if there never was one."""
        found = self._states.get((fleet, kind))
        return Event.from_json(found[1]) if found else None

    def last_states(self, fleet: str, prefix: str) -> Mapping[str, Event]:
        """The newest event of each "state." kind that begins so, by kind."""
        own = ((kind, line) for (name, kind), (_, line) in self._states.items() if name == fleet)
        return {kind: Event.from_json(line) for kind, line in own if kind.startswith(prefix)}

    def follow(self, *, fleet: str | None = None, after: int = 0) -> Follower:
        """Kept events after `after`, then new ones as they are appended; see the port."""
        return Follower(self, fleet=fleet, after=after)

    @property
    def closed(self) -> bool:
        """Never: memory needs no closing."""
        return False

    @property
    def trimmed(self) -> int:
        """Events up to this `seq` are gone, but for the last of each state."""
        return self._last - len(self._lines)

    @property
    def newest(self) -> int:
        """The `seq` of the newest event; 0 if there is none."""
        return self._last

    async def look(self) -> None:
        """Nothing to do: nobody else appends."""

    async def batch(self, after: int, limit: int) -> list[Event]:
        """Up to `limit` kept events with `seq > after`, oldest first."""
        return self._kept(after, limit)

    def _kept(self, after: int, limit: int) -> list[Event]:
        trimmed = self.trimmed
        lines: list[bytes] = []
        if after < trimmed:
            lines += [line for seq, line in sorted(self._states.values()) if after < seq <= trimmed][:limit]
        start = max(after - trimmed, 0)
        stop = min(start + limit - len(lines), len(self._lines))
        # an index into a deque costs its distance from the nearer end: fine for a batch, not for everything
        lines += (
            islice(self._lines, start, stop)
            if stop - start > BATCH
            else map(self._lines.__getitem__, range(start, stop))
        )
        return [Event.from_json(line) for line in lines]

    async def changed(self, after: int) -> None:
        """Wait until there is an event with `seq > after`."""
        if self._last <= after:
            await self._bell.wait()
