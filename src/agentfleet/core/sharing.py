"""Which of several managers should lead which fleet, so that they share the work: by rendezvous hashing.

Each fleet has one owner among the managers that are there: the one whose hash with the fleet's id is the highest
(Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996). All managers come to the same result
without a word, and when one comes or goes only its own fleets move. A manager that leads a fleet of another's hands it
over, one at a time, when that one has been there for a while. The lease decides who leads; this only says who should.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from agentfleet.core.reason import Reason


@dataclass(frozen=True, slots=True)
class SharingPolicy:
    """When fleets are handed over. Times are seconds.

    Attributes:
        settle: How long a manager must have been there before it is given anything.
        every: Time between two hand-overs by one manager.
        again: How long a fleet that came back is kept from the manager that did not take it.
        alive: Silence after which a manager counts as gone.
    """

    settle: float = 30.0
    every: float = 2.0
    again: float = 3600.0
    alive: float = 15.0


@dataclass(frozen=True, slots=True)
class SharingObserved:
    """What one manager sees.

    Attributes:
        identity: Its own.
        leads: Ids of the fleets that it leads.
        beats: How often each manager has said that it is there, by identity, its own included; None where that could
            not be read, which says nothing of anybody.
    """

    identity: str
    leads: Collection[str]
    beats: Mapping[str, int] | None


@dataclass(frozen=True, slots=True)
class Seen:
    """A manager, as another remembers it, for as long as the store does."""

    beats: int
    since: float
    """Since when it is there; meaningless while it is silent."""
    at: float
    """When it was last heard."""


@dataclass(frozen=True, slots=True)
class SharingMemory:
    """What outlives a decision; dates are of the manager's own clock."""

    peers: tuple[tuple[str, Seen], ...] = ()
    handed: tuple[tuple[str, str, float], ...] = ()
    """Fleets that were handed over: to whom, and when."""
    last: float | None = None
    """When the last one was."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "peers": [[id, seen.beats, seen.since, seen.at] for id, seen in self.peers],
            "handed": [list(each) for each in self.handed],
            "last": self.last,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SharingMemory:
        """Read back `to_dict`."""
        peers = tuple((id, Seen(beats, since, at)) for id, beats, since, at in data["peers"])
        return cls(peers, tuple((fleet, to, at) for fleet, to, at in data["handed"]), data["last"])


@dataclass(frozen=True, slots=True)
class SharingDecision:
    """What to hand over now, and who is there."""

    hand_over: str | None
    """Id of a fleet."""
    alive: tuple[str, ...]
    """The managers that are there, this one included."""
    reasons: tuple[Reason, ...]


def owner(fleet: str, managers: Collection[str]) -> str:
    """Who should lead a fleet, of managers of whom there is one at least."""
    return max(managers, key=lambda identity: (hashlib.sha256(f"{identity}\0{fleet}".encode()).digest(), identity))


def decide(
    policy: SharingPolicy, observed: SharingObserved, memory: SharingMemory, now: float
) -> tuple[SharingDecision, SharingMemory]:
    """Say which fleet to hand over, if any.

    Args:
        policy: The time spans.
        observed: Who says that he is there, and what this manager leads.
        memory: From the last decision.
        now: This process's monotonic time in seconds.

    Returns:
        The decision, and the memory for the next one.
    """
    peers = _heard(policy, observed, dict(memory.peers), now)
    handed = tuple(each for each in memory.handed if now - each[2] < policy.again)
    memory = replace(memory, peers=tuple(sorted(peers.items())), handed=handed)
    heard = sorted(id for id, seen in peers.items() if now - seen.at < policy.alive and id != observed.identity)
    alive = (observed.identity, *heard)
    if observed.beats is None:
        reason = Reason("sharing.blind", "who else is there could not be read: everybody keeps what he has")
        return SharingDecision(None, alive, (reason,)), memory
    if memory.last is not None and now - memory.last < policy.every:
        return SharingDecision(None, alive, (Reason("sharing.paced", "a fleet was handed over just now"),)), memory
    settled = [id for id in alive if id == observed.identity or now - peers[id].since >= policy.settle]
    came_back = {(fleet, to) for fleet, to, _ in handed}
    for fleet in sorted(observed.leads):
        to = owner(fleet, alive)
        if to != observed.identity and to in settled and (fleet, to) not in came_back:
            reason = Reason("sharing.hand_over", f"{to} is to lead this fleet", {"managers": len(alive)})
            memory = replace(memory, handed=(*handed, (fleet, to, now)), last=now)
            return SharingDecision(fleet, alive, (reason,)), memory
    return SharingDecision(None, alive, (Reason("sharing.kept", "nothing is to be handed over"),)), memory


def _heard(policy: SharingPolicy, observed: SharingObserved, peers: dict[str, Seen], now: float) -> dict[str, Seen]:
    """What is known of each manager now, by this manager's own clock."""
    if observed.beats is None:  # not to have read is not to have been silent
        return {id: replace(seen, at=now) for id, seen in peers.items()}
    found: dict[str, Seen] = {}
    for id, beats in observed.beats.items():
        seen = peers.get(id)
        if seen is None or beats == seen.beats:
            found[id] = Seen(beats, now, now) if seen is None else seen
        else:
            found[id] = Seen(beats, seen.since if now - seen.at < policy.alive else now, now)
    return found
