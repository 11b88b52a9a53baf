"""FleetView: everything known of one fleet, kept so that each change costs the same at any size.

Instances are sorted into buckets by revision and condition. Whoever decides reads counts (the buckets' sizes) and sums
(kept on each change) and picks from the buckets' ends; nobody walks the whole fleet.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from agentfleet.instances import AgentStatus, HealthState, Instance, Phase, Usage
from agentfleet.slots import Slots


class Condition(StrEnum):
    """What an instance is worth to its fleet just now, in the order in which it would be missed least."""

    DEAD = "dead"
    """Exited or lost."""
    SICK = "sick"
    """Runs, but its verdict is unhealthy."""
    PENDING = "pending"
    STARTING = "starting"
    """Runs, and was never healthy yet or is not ready at the moment."""
    UNKNOWN = "unknown"
    """Runs, and nothing is known of its health: serves, but proves nothing."""
    FRESH = "fresh"
    """Healthy for less than the rollout's min_ready."""
    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"
    """Leaving; it holds no place in the fleet any more."""
    ISOLATED = "isolated"
    """Kept for examination only: it holds no place, gets no work, and nothing repairs it."""


EXPENDABLE = (
    Condition.DEAD,
    Condition.SICK,
    Condition.PENDING,
    Condition.STARTING,
    Condition.UNKNOWN,
    Condition.FRESH,
    Condition.IDLE,
    Condition.BUSY,
)
"""The order in which instances are given up: what does not work, then what does not work yet, then idle before busy."""

SERVING = frozenset({Condition.UNKNOWN, Condition.FRESH, Condition.IDLE, Condition.BUSY})
"""Conditions in which work is sent to an instance."""

GOOD = frozenset({Condition.FRESH, Condition.IDLE, Condition.BUSY})
"""Conditions that are evidence of health."""

_ILL = (Condition.SICK, Condition.DEAD)
_PLACELESS = (None, Condition.DRAINING, Condition.ISOLATED)


@dataclass(slots=True)
class Member:
    """What the view knows of one instance."""

    instance: Instance
    condition: Condition | None = None
    """None before it was first sorted."""
    health: HealthState = HealthState.UNKNOWN
    healthy_since: float | None = None
    in_flight: int = 0
    queued: int = 0
    cpu: float | None = None
    memory: int | None = None
    config_revision: int | None = None
    latency: float | None = None
    """Seconds that its last successful probe took."""
    reported: bool = False
    """Whether its present process has said how much it has to do."""
    completed: int = 0
    """Tasks done, by its own word, since its process began."""
    failed: int = 0
    seen: bool = True
    """False while only our own create speaks for it."""
    leaving: bool = False
    """True once we told it to go, ahead of its backend saying so."""
    renewing: bool = False
    """True from when we told its process to start again until it has: it keeps its place and serves nobody."""
    ailments: int = 0
    """How often it has turned sick or exited of its own accord; a lost node is not its fault."""
    renewals: int = 0
    """How often we told its process to start again."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many instances of a revision (or of several) are in which condition; draining ones are apart."""

    dead: int = 0
    sick: int = 0
    pending: int = 0
    starting: int = 0
    unknown: int = 0
    fresh: int = 0
    idle: int = 0
    busy: int = 0

    @property
    def total(self) -> int:
        """All that hold a place in the fleet."""
        return self.dead + self.sick + self.pending + self.starting + self.unknown + self.available + self.fresh

    @property
    def available(self) -> int:
        """Proven healthy for at least min_ready."""
        return self.idle + self.busy

    @property
    def good(self) -> int:
        """Proven healthy."""
        return self.idle + self.busy + self.fresh

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.dead + other.dead,
            self.sick + other.sick,
            self.pending + other.pending,
            self.starting + other.starting,
            self.unknown + other.unknown,
            self.fresh + other.fresh,
            self.idle + other.idle,
            self.busy + other.busy,
        )


class FleetView:
    """One fleet's instances and what is known of them.

    Args:
        min_ready: Seconds of health after which an instance counts as available.
        on_serving: Called with an instance's id whenever it begins or ceases to be worth sending work to, and when it
            is isolated.
    """

    def __init__(self, *, min_ready: float = 0.0, on_serving: Callable[[str], None] | None = None) -> None:
        self.members: dict[str, Member] = {}
        self.in_flight = 0
        self.queued = 0
        self.completed = 0
        """Tasks that this fleet's instances have reported as done while this view watched."""
        self.failed = 0
        self.informed = False
        """Whether any instance has ever said what it is busy with."""
        self._min_ready = min_ready
        self._on_serving = on_serving
        self._buckets: dict[int, dict[Condition, dict[str, None]]] = {}
        self.draining = 0
        """How many instances are leaving."""
        self.isolated: dict[str, None] = {}
        """Instances that are kept for examination and do not leave yet, in the order in which that was seen."""
        self.touched: set[str] | None = None
        """Instances that came, went or changed, but for their load and usage; None while nobody takes them out."""
        self._slots = Slots()
        self._ripening: list[tuple[float, str]] = []

    # ------------------------------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, id: str) -> bool:
        return id in self.members

    def counts(self, revision: int) -> Counts:
        """The conditions of one revision's instances."""
        bucket = self._buckets.get(revision)
        if bucket is None:
            return Counts()
        return Counts(*(len(bucket[condition]) for condition in EXPENDABLE))

    def total_counts(self) -> Counts:
        """The conditions of all instances that hold a place."""
        total = Counts()
        for revision in self._buckets:
            total += self.counts(revision)
        return total

    @property
    def revisions(self) -> tuple[int, ...]:
        """Revisions of which an instance holds a place, oldest first."""
        return tuple(sorted(self._buckets))

    def holder(self, slot: int) -> Member | None:
        """Who fills a slot now; draining and isolated instances fill none."""
        id = self._slots.holder(slot)
        return None if id is None else self.members[id]

    def expendable(self, revisions: Iterable[int], *, only: Iterable[Condition] = EXPENDABLE) -> Iterator[Member]:
        """Instances in the order in which they would be missed least; within one condition the newest first."""
        wanted = tuple(revisions)
        for condition in only:
            for revision in wanted:
                bucket = self._buckets.get(revision)
                if bucket is not None:
                    for id in reversed(bucket[condition]):
                        yield self.members[id]

    def serving(self) -> Iterator[Member]:
        """Instances that work may be sent to."""
        for bucket in self._buckets.values():
            for condition in filter(SERVING.__contains__, EXPENDABLE):  # a set's own order differs between processes
                for id in bucket[condition]:
                    yield self.members[id]

    def next_slots(self, count: int) -> list[int]:
        """The `count` lowest free slots; they are taken when instances are added to them."""
        return self._slots.lowest_free(count)

    # ------------------------------------------------------------------------------------------ changing

    def put(self, instance: Instance, *, seen: bool = True) -> Member:
        """Add an instance or take over how it looks now."""
        member = self.members.get(instance.id)
        if member is None:
            member = self.members[instance.id] = Member(instance, seen=seen)
        else:
            if (member.instance.started_at, member.instance.restarts) != (instance.started_at, instance.restarts):
                member.healthy_since = None  # another process: what the last one proved is void
                member.renewing = False
                self._set_load(member, 0, 0)
                member.completed = member.failed = 0
                member.reported = False
            if (member.instance.revision, member.instance.slot) != (instance.revision, instance.slot):
                self._move(member, None)  # relabelled from outside: it leaves its old places first
            member.instance = instance
            member.seen = member.seen or seen
        self._touch(instance.id)
        self._sort(member)
        return member

    def remove(self, id: str) -> Member | None:
        """Forget an instance; None when it is not known."""
        member = self.members.get(id)
        if member is None:
            return None
        self._set_load(member, 0, 0)
        self._move(member, None)
        del self.members[id]
        return member

    def drain(self, id: str) -> None:
        """Mark an instance as leaving, ahead of its backend saying so."""
        member = self.members.get(id)
        if member is not None:
            member.leaving = True
            self._sort(member)

    def renew(self, id: str) -> None:
        """Mark an instance as restarting in place, ahead of its backend saying so."""
        member = self.members.get(id)
        if member is not None:
            member.renewing = True
            member.renewals += 1
            self._sort(member)

    def keep(self, id: str) -> None:
        """Take back `drain` or `renew`, when telling the instance has failed."""
        member = self.members.get(id)
        if member is not None and (member.leaving or member.renewing):
            member.leaving = member.renewing = False
            self._sort(member)

    def judge(self, id: str, state: HealthState, now: float) -> bool:
        """Take over a health verdict; True when it changed the instance's condition."""
        member = self.members.get(id)
        if member is None:
            return False
        healthy = state in (HealthState.HEALTHY, HealthState.SUSPECT)
        if not healthy:
            member.healthy_since = None
        elif member.healthy_since is None:
            member.healthy_since = now
        member.health = state
        before = member.condition
        self._sort(member)
        return member.condition is not before

    def report(self, id: str, status: AgentStatus) -> None:
        """Take over what an agent says of itself."""
        member = self.members.get(id)
        if member is None:
            return
        self.informed = True
        self._set_load(member, status.in_flight, status.queue_length)
        self.completed += max(0, status.completed - member.completed)
        self.failed += max(0, status.failed - member.failed)
        member.completed, member.failed = status.completed, status.failed
        member.reported = True
        if member.config_revision != status.config_revision:
            member.config_revision = status.config_revision
            self._touch(id)
        if member.condition in (Condition.IDLE, Condition.BUSY):
            self._sort(member)

    def measure(self, id: str, usage: Usage) -> None:
        """Take over what an instance uses."""
        member = self.members.get(id)
        if member is not None:
            member.cpu, member.memory = usage.cpu, usage.memory

    def ripen(self, now: float) -> float | None:
        """Let instances that have been healthy for min_ready count as available.

        Returns:
            When the next one will, or None.
        """
        while self._ripening:
            since, id = self._ripening[0]
            if since + self._min_ready > now:
                return since + self._min_ready
            heapq.heappop(self._ripening)
            member = self.members.get(id)
            if member is not None and member.condition is Condition.FRESH and member.healthy_since == since:
                self._move(member, self._worth(member))
        return None

    # ------------------------------------------------------------------------------------------ sorting

    def _touch(self, id: str) -> None:
        if self.touched is not None:
            self.touched.add(id)

    def _set_load(self, member: Member, in_flight: int, queued: int) -> None:
        self.in_flight += in_flight - member.in_flight
        self.queued += queued - member.queued
        member.in_flight, member.queued = in_flight, queued

    def _worth(self, member: Member) -> Condition:
        return Condition.BUSY if member.in_flight else Condition.IDLE

    def _condition(self, member: Member) -> Condition:
        phase, health = member.instance.phase, member.health
        if member.leaving or (phase is Phase.DRAINING and not member.renewing):
            return Condition.DRAINING
        if member.instance.isolated is not None:
            return Condition.ISOLATED
        if phase in (Phase.EXITED, Phase.LOST) or health is HealthState.DEAD:
            return Condition.DEAD
        if phase is Phase.PENDING:
            return Condition.PENDING
        if member.renewing:
            return Condition.STARTING
        if health is HealthState.UNHEALTHY:
            return Condition.SICK
        if member.healthy_since is None or not member.instance.ready:
            return Condition.UNKNOWN if health is HealthState.UNKNOWN else Condition.STARTING
        fresh = self._min_ready and member.condition not in (Condition.IDLE, Condition.BUSY)
        return Condition.FRESH if fresh else self._worth(member)

    def _sort(self, member: Member) -> None:
        condition = self._condition(member)
        if condition is not member.condition:
            self._move(member, condition)

    def _move(self, member: Member, condition: Condition | None) -> None:
        """Put a member into another bucket, or into none (`condition=None`)."""
        before, id = member.condition, member.instance.id
        self._leave_bucket(member)
        member.condition = condition
        if condition in _ILL and before not in _ILL and not member.renewing and member.instance.phase is not Phase.LOST:
            member.ailments += 1
        self._touch(id)
        if condition is Condition.DRAINING:
            self.draining += 1
        elif condition is Condition.ISOLATED:
            self.isolated[id] = None
        elif condition is not None:
            bucket = self._buckets.get(member.instance.revision)
            if bucket is None:
                bucket = self._buckets[member.instance.revision] = {each: {} for each in EXPENDABLE}
            bucket[condition][id] = None
        if condition is Condition.FRESH and member.healthy_since is not None:
            heapq.heappush(self._ripening, (member.healthy_since, id))
        if (before in _PLACELESS) is not (condition in _PLACELESS):
            change = self._slots.leave if condition in _PLACELESS else self._slots.take
            change(member.instance.slot, id)
        turned = (before in SERVING) is not (condition in SERVING) or condition is Condition.ISOLATED
        if self._on_serving is not None and turned:
            self._on_serving(id)

    def _leave_bucket(self, member: Member) -> None:
        if member.condition is Condition.DRAINING:
            self.draining -= 1
        elif member.condition is Condition.ISOLATED:
            del self.isolated[member.instance.id]
        elif member.condition is not None:
            bucket = self._buckets[member.instance.revision]
            del bucket[member.condition][member.instance.id]
            if not any(bucket.values()):
                del self._buckets[member.instance.revision]
