"""A queue fills and empties, and the fleet follows it: an hour of it, in virtual time, in about a second.

::

    python examples/scale_on_queue.py
"""

from __future__ import annotations

import anyio

from agentfleet import (
    AgentTemplate,
    Fleet,
    FleetSpec,
    HealthPolicy,
    HttpCheck,
    MemoryBackend,
    QueueTarget,
    ScalingPolicy,
    SystemClock,
)
from agentfleet.testing import run_virtual

EPOCH = 1_700_000_000.0
SPEC = FleetSpec(
    name="readers",
    template=AgentTemplate(command=["agent"], drain="5s"),
    replicas=2,
    scaling=ScalingPolicy(min_replicas=2, max_replicas=40, targets=[QueueTarget(length=5, source="backlog")]),
    health=HealthPolicy(checks=[HttpCheck(period="5s")]),
)


async def main() -> None:
    """Run the fleet for an hour on a backlog that is high for ten minutes."""
    clock = SystemClock(EPOCH)

    def backlog() -> int:
        """Tasks waiting: any function, also an async one that asks your broker, will do."""
        minute = (clock.now() - EPOCH) / 60
        return 150 if 5 <= minute < 15 else 4

    backend = MemoryBackend(clock=clock, seed=1)
    async with Fleet(SPEC, backend=backend, clock=clock, metrics={"backlog": backlog}, seed=1) as fleet:
        await fleet.deploy()
        for _ in range(12):
            await anyio.sleep(300)
            print(f"{(clock.now() - EPOCH) / 60:3.0f} min  backlog {backlog():3}  {len(fleet.instances):2} instances")
        for event in fleet.journal.read(fleet="readers"):
            if event.kind == "fleet.scaled":
                change = f"{event.data['from']:2} -> {event.data['to']:2}"
                print(f"{(event.at - EPOCH) / 60:5.1f} min  {change}  {event.reasons[0]['text']}")


if __name__ == "__main__":
    run_virtual(main)
