"""The numbered places of a fleet: who fills each one, and which are free."""

from __future__ import annotations

import heapq


class Slots:
    """Who holds which slot. Of several in one slot the last to come holds it, and after it the one before."""

    def __init__(self) -> None:
        self._holders: dict[int, str] = {}
        self._rivals: dict[int, list[str]] = {}
        self._free: list[int] = []
        self._listed: set[int] = set()
        self._next = 0

    def holder(self, slot: int) -> str | None:
        """Who fills a slot now."""
        return self._holders.get(slot)

    def take(self, slot: int, id: str) -> None:
        """Let an instance fill a slot."""
        holder = self._holders.get(slot)
        if holder is not None:
            self._rivals.setdefault(slot, []).append(holder)
        self._holders[slot] = id
        for skipped in range(self._next, slot):
            self._list(skipped)
        self._next = max(self._next, slot + 1)

    def leave(self, slot: int, id: str) -> None:
        """Let an instance fill its slot no longer."""
        rivals = self._rivals.get(slot, [])
        if self._holders[slot] != id:
            rivals.remove(id)
        elif rivals:
            self._holders[slot] = rivals.pop()
        else:
            del self._holders[slot]
            self._list(slot)
        if not rivals:
            self._rivals.pop(slot, None)

    def lowest_free(self, count: int) -> list[int]:
        """The `count` lowest free slots; they are free until they are taken."""
        found: list[int] = []
        while len(found) < count and self._free:
            slot = heapq.heappop(self._free)
            self._listed.discard(slot)
            if slot not in self._holders:  # entries go stale when a slot is taken
                found.append(slot)
        for slot in found:
            self._list(slot)
        return [*found, *range(self._next, self._next + count - len(found))]

    def _list(self, slot: int) -> None:
        """Each slot is listed once, however often it is freed."""
        if slot not in self._listed:
            self._listed.add(slot)
            heapq.heappush(self._free, slot)
