"""How many agents a fleet may have by their own word: room for those that it has or will have, not for made-up ones.

An agent's token speaks for all agents of its fleet, so that it could make up as many as it likes. A fleet has room for
twice the greatest size that it is to have, and some; where that is taken, those that are gone are forgotten first.
"""

from __future__ import annotations

import anyio

from agentfleet.clock import Clock
from agentfleet.configacks import AckBook
from agentfleet.server.problems import later
from agentfleet.stores.fleets import FleetRecord, FleetRecords

_SPARE = 64
"""Agents more than twice the size: of a small fleet that is replaced over and over."""
_LOOK = 10.0
"""Seconds between two looks at which instances there are."""
_NEW = 60.0
"""Seconds after which an agent whose instance nobody has seen is taken for gone."""
_PER_TOKEN = 100
"""Agents for which one token's rate is enough; it grows with the room."""


def room_of(record: FleetRecord) -> int:
    """How many agents of a fleet are kept in mind."""
    policy = record.spec.scaling
    asked = record.status.get("replicas", 0)
    most = 0 if policy is None else policy.max_replicas
    return 2 * max(record.spec.replicas, most, asked if isinstance(asked, int) else 0) + _SPARE


def pace_of(record: FleetRecord) -> float:
    """How many times the rate of a single token the agents of a fleet may ask together, as they may share one."""
    return max(1.0, room_of(record) / _PER_TOKEN)


class Crowds:
    """Lets agents in that are known, that there is room for, or whose instance exists.

    Args:
        records: Where the instances are.
        clock: Dates what agents have said.
    """

    def __init__(self, records: FleetRecords, clock: Clock) -> None:
        self._records, self._clock = records, clock
        self._looking = anyio.Lock()
        self._seen: dict[str, tuple[float, frozenset[str]]] = {}

    async def admit(self, record: FleetRecord, book: AckBook, instance: str) -> None:
        """Let an agent in.

        Raises:
            Refusal: A 429: the fleet has no such instance, and no room for one more.
            BackendUnavailable, DeadlineExceeded: It cannot be told now.
        """
        room = room_of(record)
        if instance in book.known or len(book.known) < room:
            return
        async with self._looking:
            there = await self._look(record, book, room)
        if instance in there or len(book.known) < room:
            return
        raise later(
            429, "too-many-requests", f"cluster {record.name} has no instance {instance!r:.300}, and {room} agents", 10
        )

    async def _look(self, record: FleetRecord, book: AckBook, room: int) -> frozenset[str]:
        """The instances that there are; agents whose instance is gone are forgotten."""
        now = anyio.current_time()
        at, there = self._seen.get(record.id, (float("-inf"), frozenset[str]()))
        if now - at < _LOOK:
            return there
        rows = await self._records.instances(record.id, limit=2 * room)
        there = frozenset(row.instance_id for row in rows)
        self._seen = {id: seen for id, seen in self._seen.items() if now - seen[0] < _LOOK} | {record.id: (now, there)}
        wall = self._clock.now()
        for ack in tuple(book.known.values()):
            if ack.instance not in there and wall - ack.at > _NEW:
                book.forget(ack.instance)
        return there
