"""A day in the life of a fleet in a few seconds: load that comes and goes, faults, upgrades, a new manager.

Everything is simulated in virtual time, so that what takes the fleet a day takes you a moment. Change the policy, the
faults or the load, and see what becomes of the availability.

::

    python examples/week_of_fleet_life.py          # one day
    python examples/week_of_fleet_life.py 7        # a week
"""

from __future__ import annotations

import math
import random
import sys

import anyio

from agentfleet import (
    AgentTemplate,
    Fleet,
    FleetSpec,
    HealthPolicy,
    HttpCheck,
    MemoryBackend,
    MemoryJournal,
    QueueTarget,
    RolloutFailed,
    RolloutPolicy,
    ScalingPolicy,
    SystemClock,
)
from agentfleet.testing import run_virtual

DAY = 86_400.0
SPEC = FleetSpec(
    name="researchers",
    template=AgentTemplate(command=["agent"], version="1.0", drain="10s"),
    replicas=6,
    health=HealthPolicy(checks=[HttpCheck(period="30s", timeout="5s")]),
    scaling=ScalingPolicy(min_replicas=4, max_replicas=16, targets=[QueueTarget(length=5)], period="1m"),
    rollout=RolloutPolicy(min_ready="90s"),
)


class Day:
    """The fleet's surroundings, and how well it did in them."""

    def __init__(self) -> None:
        self.clock = SystemClock(1_700_000_000.0)
        self.backend = MemoryBackend(clock=self.clock, seed=1, nodes=4)
        self.journal = MemoryJournal(limit=None)
        self.rng = random.Random(1)
        self.good = self.wanted = 0
        self.backend.behave(version="2.0", crash_after=30.0)  # this release is broken

    def manager(self) -> Fleet:
        """A manager; the next one goes on from the same journal."""
        return Fleet(SPEC, backend=self.backend, journal=self.journal, clock=self.clock, metrics={"queue": self.queue})

    def queue(self) -> float:
        """Tasks waiting: 20 at night, 80 at noon."""
        return 20 + 60 * max(0.0, math.sin(2 * math.pi * (anyio.current_time() / DAY - 0.25)))

    async def trouble(self) -> None:
        """Something goes wrong about every forty minutes."""
        faults = self.backend.faults
        while True:
            await anyio.sleep(self.rng.expovariate(1 / 2400))
            ids = [instance.id for instance in self.backend.instances(SPEC.name)]
            kind = self.rng.choice(["crash", "crash", "hang", "hang", "node"])
            if kind == "node":
                faults.partition(f"node-{self.rng.randint(1, 4)}", seconds=self.rng.uniform(60, 300))
            elif ids:
                getattr(faults, kind)(self.rng.choice(ids))

    async def sample(self, fleet: Fleet) -> None:
        """Count once a minute."""
        while True:
            await anyio.sleep(60.0)
            status = fleet.status()
            self.good += min(status["good"], status["desired"])
            self.wanted += status["desired"]

    async def live(self, number: int) -> None:
        """One manager's day, with an upgrade in the morning."""
        async with self.manager() as fleet, anyio.create_task_group() as tasks:
            tasks.start_soon(self.trouble)
            tasks.start_soon(self.sample, fleet)
            if fleet.state is None:
                await fleet.deploy()
            await anyio.sleep(DAY * 0.4)
            for version in ("2.0", f"1.{number + 1}") if number == 0 else (f"1.{number + 1}",):
                try:
                    await fleet.upgrade(version)
                    print(f"day {number}: upgraded to {version}")
                except RolloutFailed as error:
                    print(f"day {number}: {error}")
            await anyio.sleep(DAY * 0.55)
            print(f"day {number}: {fleet!r}")
            tasks.cancel_scope.cancel()


async def main(days: int) -> None:
    """Live, and say how it was."""
    day = Day()
    for number in range(days):
        await day.live(number)
    events = [event.kind for event in day.journal.read()]
    for kind in ("instance.exited", "instance.unhealthy", "instance.lost", "instance.recovered", "fleet.scaled"):
        print(f"{kind:20} {events.count(kind):4}")
    print(f"availability {day.good / day.wanted:.2%}")


if __name__ == "__main__":
    run_virtual(main, int(sys.argv[1]) if len(sys.argv) > 1 else 1)
