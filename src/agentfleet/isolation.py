"""Instances that are set apart for examination: who, since when, why, and when they end.

The book is the fleet's will, and is journaled as "state.isolated". Whoever is in it gets no work and holds no place, so
sizing fills its place; an engine that keeps fleets by itself is told to let go of it, again and again until it shows
that it has. Engines remember it too: what they show and the book does not know is taken over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from agentfleet.desk import Desk
from agentfleet.instances import Instance, Isolation
from agentfleet.sizing import Sizing
from agentfleet.state import FleetState
from agentfleet.view import Condition, Member

STATE = "state.isolated"
"""Kind of the event that holds the book."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One isolated instance."""

    isolation: Isolation
    over: bool = False
    """Whether it has been released or has expired: it is to end."""


class Isolations:
    """One fleet's book, and what is done about it.

    Args:
        desk: The fleet's working place.
        sizing: Tells the engine, where it must be told.
    """

    def __init__(self, desk: Desk, sizing: Sizing) -> None:
        self._desk = desk
        self._sizing = sizing
        self._entries: dict[str, Entry] = {}
        self._shown: set[str] = set()
        """Those that the engine itself shows as isolated."""
        self._failures = 0
        self._retry_at = 0.0

    def restore(self, data: Mapping[str, Any]) -> None:
        """Take over an earlier manager's book."""
        self._entries = {id: Entry(Isolation(**each["isolation"]), each["over"]) for id, each in data.items()}

    # ------------------------------------------------------------------------------------------ what is wanted

    def begin(self, member: Member, isolation: Isolation) -> None:
        """Set an instance apart: from now on it gets no work, and its place is free."""
        desk, instance = self._desk, member.instance
        self._enter(instance, isolation)
        self._sizing.vacate(instance.slot)  # whoever fills the place inherits its history
        desk.disruptions.emptied(instance.slot)
        desk.view.put(replace(instance, isolated=isolation))

    def release(self, member: Member, why: str, now: float) -> None:
        """Have an isolated instance end, with its drain."""
        id = member.instance.id
        entry = self._entries[id]
        if not entry.over:
            seconds = round(now - entry.isolation.since, 3)
            self._desk.record("instance.released", id, {"reason": why, "seconds": seconds})
            self._write({**self._entries, id: replace(entry, over=True)})

    # ------------------------------------------------------------------------------------------ what comes in

    def seen(self, instance: Instance) -> Instance:
        """An instance that the engine shows, as the book has it."""
        entry = self._entries.get(instance.id)
        if instance.isolated is not None:
            self._shown.add(instance.id)
            if entry is None:
                entry = self._enter(instance, instance.isolated)
        elif instance.id in self._shown:  # somebody has put it back into service behind our back
            self._desk.record("instance.released", instance.id, {"reason": "returned"})
            self.gone(instance.id)
            entry = None
        return instance if entry is None else replace(instance, isolated=entry.isolation)

    def gone(self, id: str) -> None:
        """The instance does not exist any more."""
        self._shown.discard(id)
        if id in self._entries:
            self._write({other: entry for other, entry in self._entries.items() if other != id})

    def accepted(self) -> None:
        """The engine took what it was told."""
        self._failures = 0

    def failed(self, now: float) -> None:
        """It did not; it is told again later, and later each time."""
        self._failures += 1
        self._retry_at = now + self._desk.spec.recovery.backoff.delay(self._failures)

    # ------------------------------------------------------------------------------------------ the turn

    def step(self, now: float) -> float | None:
        """Tell the engine what it does not know yet, and end those whose time is over.

        Returns:
            When there is something to do even if nothing changes; None if never.
        """
        desk, state = self._desk, self._desk.wanted
        dates: list[float] = []
        for id, entry in tuple(self._entries.items()):
            member = desk.view.members.get(id)
            if member is None:  # it ended while nobody managed the fleet
                self.gone(id)
                continue
            if member.condition is Condition.DRAINING or desk.acted_upon(id):
                continue
            why = _why_over(entry.isolation, state, now)
            if why is not None:
                self.release(member, why, now)
            ends = entry.over or why is not None
            if not ends and entry.isolation.until is not None:
                dates.append(entry.isolation.until)
            if not ends and (id in self._shown or not self._sizing.must_be_told):
                continue
            if now < self._retry_at:
                dates.append(self._retry_at)
            elif ends:
                desk.end(member, desk.drain_of(member.instance))
            else:
                desk.actuator.isolate(id, entry.isolation)
        return min(dates, default=None)

    def _enter(self, instance: Instance, isolation: Isolation) -> Entry:
        """First the event, then the book: nothing is done that no event tells of."""
        data = {"slot": instance.slot, "reason": isolation.reason, "until": isolation.until}
        self._desk.record("instance.isolated", instance.id, data)
        entry = Entry(isolation)
        self._write({**self._entries, instance.id: entry})
        return entry

    def _write(self, entries: dict[str, Entry]) -> None:
        self._desk.record(STATE, data={id: asdict(entry) for id, entry in entries.items()})
        self._entries = entries


def _why_over(isolation: Isolation, state: FleetState, now: float) -> str | None:
    """Why an isolated instance is to end, if nobody has released it."""
    if state.deleted:
        return "deleted"
    if not state.running:
        return "stopped"
    return "expired" if isolation.until is not None and now >= isolation.until else None
