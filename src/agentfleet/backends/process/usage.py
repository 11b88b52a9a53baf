"""CPU and memory of instances, their children included: one pass over the machine's processes serves all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from agentfleet.backends.process import system
from agentfleet.instances import Usage

_MIN_WINDOW = 0.5
"""Seconds. CPU time is counted in ticks of 10 ms: over a shorter window the quotient is noise."""


@dataclass(slots=True)
class _Total:
    cpu: float = 0.0
    memory: int = 0
    age: float = 0.0


@dataclass(frozen=True, slots=True)
class _Sample:
    taken: float
    total_cpu: float
    cpu: float
    window: float


class Meter:
    """Remembers each process's CPU time, so that the next call can say what was used in between.

    Not safe for concurrent calls; the backend lets in one at a time.
    """

    def __init__(self) -> None:
        self._samples: dict[int, _Sample] = {}

    def measure(self, leaders: Mapping[str, int], at: float) -> dict[str, Usage]:
        """Usage by instance id. Blocks for about 20 µs per process of the machine.

        Every instance leads a session of its own, so the processes of a session are the instance and its children.
        The first measurement of a process covers its whole life.

        Args:
            leaders: Pid of each instance's process.
            at: The date to put on the measurements, in seconds since the epoch.

        Returns:
            Those whose process still runs.
        """
        now = time.monotonic()
        totals: dict[int, _Total] = {pid: _Total() for pid in leaders.values()}
        alive = set()
        for info in system.scan():
            total = totals.get(info.session)
            if total is None or info.state == "Z":
                continue
            total.cpu += info.cpu
            total.memory += info.memory
            if info.pid == info.session:
                total.age = info.age
                alive.add(info.pid)
        result = {}
        for id, pid in leaders.items():
            if pid in alive:
                sample = self._sample(pid, totals[pid], now)
                result[id] = Usage(at=at, cpu=sample.cpu, memory=totals[pid].memory, window=sample.window)
        return result

    def forget(self, pid: int) -> None:
        """Drop what is remembered of a process that ended."""
        self._samples.pop(pid, None)

    def _sample(self, pid: int, total: _Total, now: float) -> _Sample:
        last = self._samples.get(pid)
        if last is not None and now - last.taken < _MIN_WINDOW:
            return last
        if last is None:
            window, used = max(total.age, 0.01), total.cpu
        else:
            # A child that ended unnoticed by its parent takes its time with it: never count that as negative use.
            window, used = now - last.taken, max(0.0, total.cpu - last.total_cpu)
        sample = _Sample(taken=now, total_cpu=total.cpu, cpu=used / window, window=window)
        self._samples[pid] = sample
        return sample
