"""The book of disruptions under way: which slots are out of service by our own doing, oldest first.

`core.governor` decides on their number; the book knows which they are, so that a decision costs what is asked and not
what is under way. Each entry is journaled by itself ("state.disruption.N"), and a new manager reads the book back.

Beside the book stand the instances at risk: in service, but given something on trial that may put them out of it. They
take from the same budget for the moments in which that shows, and are not journaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from agentfleet.core.governor import Cause


@dataclass(frozen=True, slots=True)
class InFlight:
    """A disruption that is not over."""

    slot: int
    cause: Cause
    since: float
    """In seconds, by the fleet's clock."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {"cause": self.cause.value, "since": self.since}

    @classmethod
    def from_dict(cls, slot: int, data: Mapping[str, Any]) -> InFlight:
        """Read back `to_dict`."""
        return cls(slot, Cause(data["cause"]), data["since"])


class Disruptions:
    """One fleet's book.

    Args:
        on_change: Told each slot that enters (with its entry) or leaves (with None).
    """

    def __init__(self, on_change: Callable[[int, InFlight | None], object]) -> None:
        self._entries: dict[int, InFlight] = {}
        self._empty: dict[int, None] = {}
        self._risks: dict[int, float] = {}
        self._on_change = on_change

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        """The slots, oldest disruption first."""
        return iter(self._entries)

    def __contains__(self, slot: object) -> bool:
        return slot in self._entries

    def entries(self) -> tuple[InFlight, ...]:
        """What is in the book, oldest first."""
        return tuple(self._entries.values())

    def begin(self, slot: int, cause: Cause, now: float) -> None:
        """Enter a slot; one that is in the book keeps its place."""
        if slot not in self._entries:
            self._entries[slot] = entry = InFlight(slot, cause, now)
            self._on_change(slot, entry)

    def end(self, slots: Iterable[int]) -> None:
        """Strike out slots; those that are not in the book are passed over."""
        for slot in slots:
            if self._entries.pop(slot, None) is not None:
                self._empty.pop(slot, None)
                self._on_change(slot, None)

    def keep_newest(self, count: int) -> None:
        """Strike out the oldest beyond `count`."""
        self.end(list(islice(self._entries, max(0, len(self._entries) - count))))

    def emptied(self, slot: int) -> None:
        """Note that the instance in a slot leaves or has left; whoever fills it next ends the disruption."""
        if slot in self._entries:
            self._empty[slot] = None

    def unfilled(self, is_empty: Callable[[int], bool]) -> list[int]:
        """The slots whose place waits to be filled, oldest first; costs what was emptied, not what is in the book."""
        self._empty = {slot: None for slot in self._empty if is_empty(slot)}
        return list(self._empty)

    # ------------------------------------------------------------------------------------------ at risk

    def risk(self, slot: int, until: float) -> None:
        """Note that the instance in a slot may fall out of service by our own doing, until then at most."""
        self._risks[slot] = until

    def risk_until(self, slot: int, until: float) -> None:
        """Note that it may no longer after then, if that is earlier than was thought."""
        if slot in self._risks:
            self._risks[slot] = min(self._risks[slot], until)

    def safe(self, slot: int) -> None:
        """Note that it has not, or that it has, and is somebody else's case now."""
        self._risks.pop(slot, None)

    def at_risk(self, now: float) -> int:
        """How many instances may fall out of service now."""
        self._risks = {slot: until for slot, until in self._risks.items() if until > now}
        return len(self._risks)

    def restore(self, entries: Iterable[InFlight]) -> None:
        """Take over an earlier manager's book."""
        self._entries = {entry.slot: entry for entry in sorted(entries, key=lambda entry: entry.since)}
        self._empty = dict.fromkeys(self._entries)
