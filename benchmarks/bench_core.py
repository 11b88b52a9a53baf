"""What one event costs a fleet of any size: the view and the decisions on it; and what one instance costs in memory.

The law under test: cost follows change, not size. Each row gives the cost of one event; the ratio against the smallest
fleet is in the note. Times are CPU seconds, so that other work on the machine does not count.

Run: `python benchmarks/bench_core.py`
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

from agentfleet.core import governor, recovery, rollout
from agentfleet.core.governor import Cause, Disruption, GovernorMemory, GovernorObserved
from agentfleet.core.recovery import Ailment, Case, RecoveryMemory
from agentfleet.core.rollout import RolloutObserved, begin
from agentfleet.disruptions import Disruptions, InFlight
from agentfleet.instances import AgentStatus, HealthState, Instance, Phase
from agentfleet.specs import RecoveryPolicy, RolloutPolicy
from agentfleet.view import Counts, FleetView

SIZES = (1_000, 10_000, 100_000)
EVENTS = 1_000
ROUNDS = 7
NOW = 1_700_000_000.0
RECOVERY = RecoveryPolicy()
ROLLOUT = RolloutPolicy()


def make(slot: int, *, started_at: float = NOW) -> Instance:
    """An instance as a backend shows it, with strings of its own."""
    return Instance(
        id=f"researchers-{slot}-{slot * 2_654_435_761 % 2**32:08x}",
        fleet="researchers",
        slot=slot,
        revision=1 + slot % 2,
        version="1",
        phase=Phase.RUNNING,
        created_at=NOW + slot / 1000,
        started_at=started_at,
        ready=True,
        ready_at=started_at,
        node=f"node-{slot % 100}",
        address=f"10.{slot >> 16 & 255}.{slot >> 8 & 255}.{slot & 255}:8080",
    )


def make_view(size: int) -> FleetView:
    """A fleet of healthy instances of two revisions."""
    view = FleetView()
    for slot in range(size):
        instance = make(slot)
        view.put(instance)
        view.judge(instance.id, HealthState.HEALTHY, NOW)
    return view


def take_turn(view: FleetView, member_id: str, size: int, memory: GovernorMemory) -> GovernorMemory:
    """What a fleet computes on one event: an instance falls sick, everything is decided, and it is well again."""
    view.judge(member_id, HealthState.UNHEALTHY, NOW)
    slot = view.members[member_id].instance.slot
    counts = view.total_counts()
    observed = RolloutObserved(size, view.counts(2), view.counts(1))
    rollout.decide(ROLLOUT, observed, begin(2, NOW), NOW)
    recovery.decide(RECOVERY, Case(Ailment.SICK, NOW), RecoveryMemory(), NOW)
    asked = (Disruption(slot, Cause.RECOVERY, serving=False),)
    seen = GovernorObserved(size, counts.good, counts.sick + counts.dead, asked=asked)
    _, memory = governor.decide(RECOVERY, seen, memory, NOW)
    view.judge(member_id, HealthState.HEALTHY, NOW)
    return memory


class Bench:
    """One fleet and the actions that are measured on it; each takes the ids of the instances that it happens to."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.view = make_view(size)
        self.slots = {id: member.instance.slot for id, member in self.view.members.items()}
        self.later = {id: make(slot, started_at=NOW + 1) for id, slot in self.slots.items()}
        self.book = Disruptions(lambda _slot, _entry: None)
        self.book.restore(InFlight(slot, Cause.RECOVERY, NOW) for slot in range(RECOVERY.budget(size) - 1))
        self.actions: dict[str, tuple[Callable[[Sequence[str]], None], int]] = {
            "view.put": (self.put, EVENTS),
            "view.judge": (self.judge, 2 * EVENTS),
            "view.report": (self.report, EVENTS),
            "recovery.decide": (self.decide_recovery, EVENTS),
            "rollout.decide": (self.decide_rollout, EVENTS),
            "governor.decide": (self.decide_governor, EVENTS),
            "governor.decide, budget in flight": (self.decide_governor_full, EVENTS),
            "event: judge twice and decide all": (self.turn, EVENTS),
        }

    def put(self, ids: Sequence[str]) -> None:
        """The backend shows another process in the same place."""
        for id in ids:
            before = self.view.members[id].instance
            self.view.put(self.later[id])
            self.later[id] = before

    def judge(self, ids: Sequence[str]) -> None:
        """Each falls sick, and each is healthy again."""
        for state in (HealthState.UNHEALTHY, HealthState.HEALTHY):
            for id in ids:
                self.view.judge(id, state, NOW)

    def report(self, ids: Sequence[str]) -> None:
        """Each becomes busy or idle."""
        for number, id in enumerate(ids):
            self.view.report(id, AgentStatus(in_flight=number % 2, queue_length=number))

    def decide_recovery(self, ids: Sequence[str]) -> None:
        """A first failure."""
        case = Case(Ailment.SICK, NOW)
        for _ in ids:
            recovery.decide(RECOVERY, case, RecoveryMemory(), NOW)

    def decide_rollout(self, ids: Sequence[str]) -> None:
        """Half-way through a rollout."""
        observed = RolloutObserved(self.size, Counts(idle=self.size // 2), Counts(idle=self.size // 2))
        memory = begin(2, NOW)
        for _ in ids:
            rollout.decide(ROLLOUT, observed, memory, NOW)

    def decide_governor(self, ids: Sequence[str]) -> None:
        """One request, nothing under way."""
        for id in ids:
            asked = (Disruption(self.slots[id], Cause.RECOVERY, serving=False),)
            governor.decide(RECOVERY, GovernorObserved(self.size, self.size - 1, 1, asked=asked), GovernorMemory(), NOW)

    def decide_governor_full(self, ids: Sequence[str]) -> None:
        """One request, the whole budget but one under way."""
        book, good = self.book, self.size - len(self.book) - 1
        for id in ids:
            slot = self.slots[id]
            asked = (Disruption(slot, Cause.RECOVERY, serving=False),)
            book.keep_newest(governor.surviving(len(book), self.size, good))
            known = frozenset((slot,)) if slot in book else frozenset[int]()
            decision, _ = governor.decide(
                RECOVERY, GovernorObserved(self.size, good, 1, len(book), known, asked), GovernorMemory(), NOW
            )
            for request in decision.begun:
                book.begin(request.slot, request.cause, NOW)
                book.end((request.slot,))

    def turn(self, ids: Sequence[str]) -> None:
        """What a fleet computes on one event."""
        memory = GovernorMemory()
        for id in ids:
            memory = take_turn(self.view, id, self.size, memory)


def time_rows(size: int) -> list[dict[str, Any]]:
    """The cost of each action on one fleet: the median of some rounds."""
    bench = Bench(size)
    rng = random.Random(size)
    names = list(bench.slots)
    rows = []
    for name, (act, count) in bench.actions.items():
        spent = []
        for _ in range(ROUNDS):
            ids = rng.sample(names, EVENTS)
            gc.collect()
            start = time.process_time()
            act(ids)
            spent.append(time.process_time() - start)
        seconds = statistics.median(spent)
        rows.append({"name": name, "size": size, "seconds": seconds, "per_item": seconds / count, "note": ""})
    return rows


def memory_row(size: int) -> dict[str, Any]:
    """Bytes of one instance in the view: its Instance with its strings, its Member, and its share of the indexes."""
    gc.collect()
    tracemalloc.start()
    start = time.process_time()
    before = tracemalloc.get_traced_memory()[0]
    view = make_view(size)
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(view) == size
    row = {"name": "view memory", "size": size, "seconds": time.process_time() - start}
    return {**row, "per_item": used / size, "note": "bytes an instance"}


def storm_row(size: int) -> dict[str, Any]:
    """A whole budget asked for in one decision."""
    asked = tuple(Disruption(slot, Cause.OPERATOR, serving=True) for slot in range(RECOVERY.budget(size)))
    start = time.process_time()
    decision, _ = governor.decide(RECOVERY, GovernorObserved(size, size, 0, asked=asked), GovernorMemory(), NOW)
    seconds = time.process_time() - start
    assert len(decision.admitted) == len(asked)
    return {
        "name": "governor.decide, all asked at once",
        "size": size,
        "seconds": seconds,
        "per_item": seconds / len(asked),
        "note": f"{len(asked)} requests",
    }


def slots_row(size: int) -> dict[str, Any]:
    """Free slots found after the whole fleet has left."""
    view = make_view(size)
    for id in list(view.members):
        view.remove(id)
    start = time.process_time()
    view.next_slots(size)
    seconds = time.process_time() - start
    return {"name": "view.next_slots, all", "size": size, "seconds": seconds, "per_item": seconds / size, "note": ""}


def run() -> list[dict[str, Any]]:
    """All rows; `per_item` is in seconds, for memory in bytes."""
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        rows += [*time_rows(size), storm_row(size), slots_row(size), memory_row(size)]
    smallest = {row["name"]: row["per_item"] for row in rows if row["size"] == SIZES[0]}
    for row in rows:
        ratio = f"x{row['per_item'] / smallest[row['name']]:.2f}"
        row["note"] = f"{ratio} {row['note']}".strip()
    return rows


def main() -> None:
    """Print the table."""
    print(f"{'what':36} {'size':>8} {'one item':>14}  note")
    for row in sorted(run(), key=lambda row: row["name"]):
        one = f"{row['per_item']:.0f} bytes" if "bytes" in row["note"] else f"{row['per_item'] * 1e6:.2f} us"
        print(f"{row['name']:36} {row['size']:>8} {one:>14}  {row['note']}")


if __name__ == "__main__":
    main()
