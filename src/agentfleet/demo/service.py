"""Who is in service, and who is not by the fleet's own doing: counted from what happened to the instances.

The governor's figures are not read here, because they are what is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from agentfleet.events import Event

REPAIRS = frozenset({"recovery.restart", "recovery.replace", "recovery.elsewhere"})
GONE = frozenset({"instance.exited", "instance.lost", "instance.removed"})


@dataclass
class Service:
    """A fleet as its instances' events tell of it.

    A slot is *taken* from when the fleet ends or restarts an instance there that ran (one that has crashed is not
    taken, its restart costs nobody anything), until an instance in it is ready again, or the fleet is not short of so
    many any more. One that is removed while the fleet has enough without it is not missed.
    """

    desired: int = 0
    ready: set[str] = field(default_factory=set)
    """Instances that are in service."""
    taken: dict[int, str] = field(default_factory=dict)
    """Slots that are out of service by the fleet's own doing, longest first, and the instance that was taken."""
    _revisions: dict[str, int] = field(default_factory=dict)
    _holders: dict[int, str] = field(default_factory=dict)
    _lives: dict[str, int] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)

    def is_all(self, revision: int) -> bool:
        """Whether as many as are wanted are in service, and all of one revision."""
        return len(self.ready) >= self.desired > 0 and {self._revisions.get(id) for id in self.ready} == {revision}

    def see(self, event: Event) -> None:
        """Take in one event."""
        kind, id, data = event.kind, event.instance, event.data
        if kind == "fleet.deployed":
            self.desired = data["replicas"]
        elif kind == "fleet.scaled":
            self.desired = data["to"]
        elif id is not None:
            self._see_instance(kind, id, data.get("slot", -1), event)
        short = max(0, self.desired - len(self.ready))
        for slot in list(self.taken)[: max(0, len(self.taken) - short)]:
            del self.taken[slot]

    def _see_instance(self, kind: str, id: str, slot: int, event: Event) -> None:
        if kind == "instance.created":
            self._holders[slot] = id
            self._revisions[id] = event.data["revision"]
        elif kind == "instance.started" and self._lives.get(id) != event.data["restarts"]:
            self._lives[id] = event.data["restarts"]  # else another manager has found the same process
            self._ended.discard(id)
        elif kind == "instance.ready":
            self.ready.add(id)
            if self._holders.get(slot) == id:
                self.taken.pop(slot, None)
        elif kind in ("demo.hurt", "instance.unhealthy"):
            self.ready.discard(id)
        elif kind in GONE:
            self.ready.discard(id)
            self._ended.add(id)
        elif kind in REPAIRS and id not in self._ended:
            self.ready.discard(id)
            self.taken.setdefault(slot, id)
        elif kind == "instance.removing" and id in self.ready:
            self.ready.discard(id)
            if len(self.ready) < self.desired:
                self.taken.setdefault(slot, id)


def follow(events: Iterable[Event]) -> Iterator[tuple[Event, Service]]:
    """Each event, and how the fleet is right after it."""
    service = Service()
    for event in events:
        service.see(event)
        yield event, service


def disruptions(events: Iterable[Event], budget: Callable[[int], int]) -> dict[str, int | None]:
    """The most that were taken at one instant, the budget then, and by how many any instant exceeded its own.

    A demo that takes nobody away proves nothing: what it exceeded its budget by is not known.
    """
    counts = [(len(service.taken), budget(service.desired)) for _, service in follow(events)]
    most, allowed = max(counts, key=lambda count: count[0], default=(0, 0))
    over = max((0, *(taken - limit for taken, limit in counts))) if most else None
    return {"max_concurrent": most, "budget": allowed, "over": over}
