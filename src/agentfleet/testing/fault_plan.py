"""A plan of faults: what goes wrong when, as data that can be generated, shrunk, printed and run again.

Instances and nodes are named by number, because nobody knows their ids when the plan is made: number 7 of 5 is the
third oldest that exists at that time. Every fault ends, and `FaultPlan.run` returns when the last one has, so that
what remains is to see whether the fleet recovers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentfleet.backends.memory import MemoryBackend
from agentfleet.clock import Clock

InstanceFault = Literal["crash", "hang", "slow", "unhealthy", "stall"]
NodeFault = Literal["partition", "node_down"]
EngineFault = Literal["unavailable", "lag", "slow_actions"]
CountedFault = Literal["lose_events", "double_events", "reorder_events", "conflict", "refuse", "lose_reply"]
FaultKind = InstanceFault | NodeFault | EngineFault | CountedFault | Literal["gap"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        at: Seconds after the plan's start.
        kind: The method of `MemoryBackend.faults`.
        target: Number of the instance or node, counted around.
        count: Events or actions concerned, where the kind counts.
        seconds: How long it lasts; of "lag" and "slow_actions" the latency, and they last until the plan has ended.
    """

    at: float
    kind: FaultKind
    target: int = 0
    count: int = 1
    seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Faults in any order."""

    faults: tuple[Fault, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds from its start until the last fault has ended."""
        return max((fault.at + _lasts(fault) for fault in self.faults), default=0.0)

    async def run(self, backend: MemoryBackend, fleet: str, clock: Clock) -> None:
        """Make the faults happen to one fleet, each at its time; return when all have ended and nothing is wrong."""
        began = clock.now()
        for fault in sorted(self.faults, key=lambda fault: fault.at):
            await clock.sleep(began + fault.at - clock.now())
            _inject(fault, backend, fleet)
        await clock.sleep(began + self.duration - clock.now())
        backend.faults.clear()


def _lasts(fault: Fault) -> float:
    match fault.kind:
        case "crash" | "gap":
            return 0.0
        case _:
            return fault.seconds


def _inject(fault: Fault, backend: MemoryBackend, fleet: str) -> None:
    match fault.kind:
        case "crash" | "hang" | "slow" | "unhealthy" | "stall":
            _inject_instance(fault, backend, fleet)
        case "partition" | "node_down":
            nodes = backend.nodes
            if nodes:
                getattr(backend.faults, fault.kind)(nodes[fault.target % len(nodes)].name, seconds=fault.seconds)
        case "unavailable":
            backend.faults.unavailable(seconds=fault.seconds)
        case "lag" | "slow_actions":
            getattr(backend.faults, fault.kind)(fault.seconds)
        case "gap":
            backend.faults.gap(fleet=fleet)
        case "lose_events" | "double_events" | "reorder_events":
            getattr(backend.faults, fault.kind)(fault.count, fleet=fleet)
        case "conflict" | "refuse" | "lose_reply":
            getattr(backend.faults, fault.kind)(times=fault.count)


def _inject_instance(fault: Fault, backend: MemoryBackend, fleet: str) -> None:
    instances = backend.instances(fleet)
    if not instances:
        return
    id = instances[fault.target % len(instances)].id
    match fault.kind:
        case "crash":
            backend.faults.crash(id)
        case "slow":
            backend.faults.slow(fault.seconds, id, seconds=fault.seconds)
        case _:
            getattr(backend.faults, fault.kind)(id, seconds=fault.seconds)
