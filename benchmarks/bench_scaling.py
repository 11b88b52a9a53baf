"""What a scaling decision costs: over aggregates (whatever the fleet's size) and over samples of each instance.

Run it as a program to see a table; `run()` returns the rows. Every figure is the best of several rounds, so that other
programs on the machine disturb it least.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

from agentfleet.core.scaling import InstanceSamples, Memory, Observed, ResourceAggregate, Total, committed, decide
from agentfleet.core.scaling_samples import Member, Reading, Sample
from agentfleet.specs import CpuTarget, QueueTarget, ScalingPolicy

SIZES = (1_000, 10_000, 100_000)
NOW = 1_000_000.0


def _samples(size: int) -> InstanceSamples:
    """A fleet in which 2 % start, 1 % are pending, 1 % have no sample and the rest works."""
    members = [
        Member(
            f"agent-{i}", ready=i % 50 != 0, ready_changed_at=NOW - 900, started_at=NOW - (20 if i % 50 == 0 else 950)
        )
        for i in range(size)
    ]
    samples = {f"agent-{i}": Sample(500 + i % 300, at=NOW - 5, window=15) for i in range(size) if i % 100 != 7}
    return InstanceSamples(members, samples, 1000)


def _best(action: Callable[[], object], repeat: int = 30) -> float:
    """Seconds of one call, best of `repeat` rounds."""
    timer = timeit.Timer(action)
    number, _ = timer.autorange()
    number = max(1, number // 20)  # many short rounds: some of them run undisturbed
    return min(timer.repeat(repeat=repeat, number=number)) / number


def _full_memory(policy: ScalingPolicy, size: int, reading: Reading) -> Memory:
    """The memory of a fleet that has been deciding for half an hour."""
    memory = Memory()
    for turn in range(120):
        now = NOW - 1800 + turn * 15
        decision, memory = decide(policy, Observed(size, size, (reading,), ready=size), memory, now)
        memory = committed(policy, decision, memory, now)
    return memory


def _row(name: str, size: int, seconds: float, note: str) -> dict[str, Any]:
    return {"name": name, "size": size, "seconds": seconds, "per_item": seconds / size, "note": note}


def run() -> list[dict[str, Any]]:
    """One row per way of deciding and fleet size: name, size, seconds, per_item (seconds) and note."""
    rows = []
    for size in SIZES:
        cpu = ScalingPolicy(max_replicas=1_000_000, targets=(CpuTarget(utilization=70),))
        queue = ScalingPolicy(max_replicas=1_000_000, targets=(QueueTarget(length=5),))
        sums = ResourceAggregate.uniform(usage=size * 650, request=1000, ready=size - size // 50, unready=size // 50)
        samples = _samples(size)
        cases: tuple[tuple[str, ScalingPolicy, Reading, str], ...] = (
            ("decide over a CPU aggregate", cpu, sums, "independent of size"),
            ("decide over a queue length", queue, Total(size * 5200), "independent of size"),
            ("decide over samples", cpu, samples, "HPA-equal, one pass"),
        )
        for name, policy, reading, note in cases:
            memory = _full_memory(policy, size, sums if policy is cpu else reading)
            observed = Observed(size, size, (reading,), ready=size)

            def turn(policy: ScalingPolicy = policy, observed: Observed = observed, memory: Memory = memory) -> object:
                return decide(policy, observed, memory, NOW)

            rows.append(_row(name, size, _best(turn), note))
    return sorted(rows, key=lambda row: (row["name"], row["size"]))


def main() -> None:
    """Print the rows, and how each grows with the size."""
    first: dict[str, float] = {}
    print(f"{'what':32} {'instances':>10} {'per decision':>14} {'per instance':>14} {'growth':>8}  note")
    for row in run():
        base = first.setdefault(row["name"], row["seconds"])
        print(
            f"{row['name']:32} {row['size']:>10,} {row['seconds'] * 1e6:>11,.1f} µs {row['per_item'] * 1e9:>11,.1f} ns"
            f" {row['seconds'] / base:>7.1f}x  {row['note']}"
        )


if __name__ == "__main__":
    main()
