"""The health monitor without a fleet: it watches two agents over HTTP and says when its belief about one changes.

::

    python examples/health_monitor_alone.py
"""

from __future__ import annotations

import time

import anyio

from agentfleet import HealthMonitor, HealthPolicy, HealthState, HttpCheck, Instance, Phase
from agentfleet.agent import Agent, Settings, Task


async def work(task: Task, agent: Agent) -> object:
    """Return what was sent."""
    return task.payload


def seen(id: str, address: str) -> Instance:
    """An instance as your own inventory knows it."""
    now = time.time()
    return Instance(id, "mine", 0, 1, "1", Phase.RUNNING, created_at=now, started_at=now, address=address)


async def main() -> None:
    """Make one of two agents sick, and well again."""
    policy = HealthPolicy(checks=[HttpCheck(path="/health", period="200ms", failures=3, successes=2)], startup="5s")
    first, second = (Agent(work, settings=Settings(port=0)) for _ in range(2))
    async with first, second, HealthMonitor(policy) as monitor:
        changes = monitor.changes()
        monitor.observe(seen("first", first.address))
        monitor.observe(seen("second", second.address))
        with anyio.fail_after(8):
            well = 0
            async for change in changes:
                why = "; ".join(str(reason) for reason in change.verdict.reasons)
                print(f"{change.id:6} {change.previous:9} -> {change.verdict.state:9} {why}")
                if change.verdict.state is HealthState.HEALTHY:
                    well += 1
                    if well == 2:
                        second.unhealthy("its key was revoked")
                    elif well == 3:
                        break
                elif change.verdict.state is HealthState.UNHEALTHY:
                    second.healthy()
        statistics = monitor.statistics()
        print(f"{statistics.instances} instances, {statistics.failures} failed probes")


if __name__ == "__main__":
    anyio.run(main)
