"""One whole turn of a fleet after one change, and what an instance costs in memory, at three sizes.

The turn is the real one: the observer takes in an exit, the turn decides, the governor is asked, the restart is handed
to an actuator that only counts, and the events go to a journal in memory.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import tracemalloc
from dataclasses import replace

from agentfleet.actuator import Actuator
from agentfleet.backends.base import Changed, Creation
from agentfleet.core.health import HealthMemory, Probed, Seen, Verdict
from agentfleet.core.health import decide as judge
from agentfleet.core.reason import Reason
from agentfleet.desk import Desk
from agentfleet.events import Event
from agentfleet.instances import HealthState, Instance, Phase
from agentfleet.observer import Observer
from agentfleet.recovery import Recovery
from agentfleet.sizing import Sizing
from agentfleet.specs import AgentTemplate, FleetSpec, HealthPolicy, HttpCheck
from agentfleet.state import first_state
from agentfleet.stores.memory_journal import MemoryJournal
from agentfleet.turn import Turn
from agentfleet.view import FleetView

SIZES = (1_000, 10_000, 100_000)
ROUNDS = 300
NOW = 1_700_000_000.0


class CountingActuator(Actuator):
    """Accepts every action, does nothing, and is done at once."""

    def __init__(self) -> None:
        self.busy: dict[str, str] = {}
        self.count = 0

    def create(self, creation: Creation) -> None:
        """Count it."""
        self.count += 1

    def stop(self, id: str, *, grace: float) -> None:
        """Count it."""
        self.count += 1

    def restart(self, id: str, *, grace: float) -> None:
        """Count it."""
        self.count += 1


class _Clock:
    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("a turn never sleeps")


def _spec(size: int) -> FleetSpec:
    template = AgentTemplate(command=["agent"], cpu="250m", memory="512Mi", port=8080)
    return FleetSpec(name="bench", template=template, replicas=size, health=HealthPolicy(checks=[HttpCheck()]))


def _instance(number: int) -> Instance:
    return Instance(
        id=f"bench-{number}-{number:08x}",
        fleet="bench",
        slot=number,
        revision=1,
        version="1",
        phase=Phase.RUNNING,
        created_at=NOW - 1000 + number * 1e-6,
        started_at=NOW - 999 + number * 1e-6,
        ready=True,
        ready_at=NOW - 999 + number * 1e-6,
        node=f"node-{number % 20}",
        address=f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:8080",
    )


def _fleet(size: int) -> tuple[Turn, Observer, _Clock]:
    """A healthy fleet of `size`, in its steady state."""
    spec, clock, journal = _spec(size), _Clock(), MemoryJournal(limit=1000)

    def record(
        kind: str, instance: str | None = None, data: dict[str, object] | None = None, reasons: tuple[Reason, ...] = ()
    ) -> None:
        written = tuple(reason.to_dict() for reason in reasons)
        journal.append(Event(clock.at, "bench", kind, instance, data or {}, written))

    desk = Desk(spec, FleetView(), CountingActuator(), record, random.Random(0))
    turn = Turn(desk, Recovery(spec.recovery), Sizing(desk))
    observer = Observer(desk, turn, clock, watch_health=lambda _: None, forget_health=lambda _: None)
    desk.state = first_state(spec.template, size, NOW)
    healthy = Verdict(HealthState.HEALTHY, NOW, (), None)
    for number in range(size):
        desk.view.put(_instance(number))
        observer.judged(f"bench-{number}-{number:08x}", healthy, None)
    turn.take(clock.at)
    return turn, observer, clock


def _one_turn(size: int) -> float:
    """Median seconds from the observation of one exit to the restart being handed out."""
    turn, observer, clock = _fleet(size)
    gc.collect()
    gc.freeze()
    spans = []
    for number in range(ROUNDS):
        clock.at += 1.0
        instance = _instance(number)
        dead = Changed(replace(instance, phase=Phase.EXITED, exit_code=1, ready=False))
        began = time.perf_counter()
        observer.take(dead)
        turn.take(clock.at)
        spans.append(time.perf_counter() - began)
        observer.take(Changed(replace(instance, started_at=clock.at, restarts=1)))
        observer.judged(instance.id, Verdict(HealthState.HEALTHY, clock.at, (), None), None)
        turn.take(clock.at)
    gc.unfreeze()
    return statistics.median(spans)


def _bytes_per_instance(size: int) -> float:
    """Instance, view and health memory, with all indexes."""
    policy = HealthPolicy(checks=[HttpCheck()])
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    view = FleetView()
    memories: dict[str, HealthMemory] = {}
    for number in range(size):
        instance = _instance(number)
        member = view.put(instance)
        started = instance.started_at or NOW
        verdict, memory = judge(policy, Seen(Phase.RUNNING, NOW, started, 0, True), HealthMemory(), NOW)
        verdict, memory = judge(policy, Probed(0, True, NOW + 1, 0.001, 0.0, None, None), memory, NOW + 1)
        memories[member.instance.id] = memory
        view.judge(member.instance.id, verdict.state, NOW + 1)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used / size


def run() -> list[dict[str, object]]:
    """The figures."""
    rows: list[dict[str, object]] = []
    for size in SIZES:
        seconds = _one_turn(size)
        note = "one exit seen, decided, restart handed out, journaled"
        rows.append({"name": "whole turn", "size": size, "seconds": seconds, "per_item": None, "note": note})
    for size in SIZES:
        used = _bytes_per_instance(size)
        note = "bytes: instance, view with indexes, health memory (goal: < 1024)"
        rows.append({"name": "memory per instance", "size": size, "seconds": None, "per_item": used, "note": note})
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
