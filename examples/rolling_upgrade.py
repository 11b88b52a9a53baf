"""A good upgrade and a bad one, on a simulated cluster in virtual time: the bad one goes back by itself.

::

    python examples/rolling_upgrade.py
"""

from __future__ import annotations

from collections import Counter

from agentfleet import (
    AgentTemplate,
    Fleet,
    FleetSpec,
    HealthPolicy,
    HttpCheck,
    MemoryBackend,
    RolloutFailed,
    RolloutPolicy,
    SystemClock,
)
from agentfleet.testing import run_virtual

SPEC = FleetSpec(
    name="writers",
    template=AgentTemplate(command=["agent"], version="1.0.0", drain="5s"),
    replicas=40,
    health=HealthPolicy(checks=[HttpCheck(period="5s", timeout="2s")], startup="10s"),
    rollout=RolloutPolicy(max_surge="25%", max_unavailable="25%", min_ready="5s", progress_deadline="2m"),
)


async def main() -> None:
    """Upgrade to 2.0.0, which works, and to 3.0.0, which does not."""
    clock = SystemClock(1_700_000_000.0)
    backend = MemoryBackend(clock=clock, seed=1)
    backend.behave(version="3.0.0", unhealthy_after=2.0)
    async with Fleet(SPEC, backend=backend, clock=clock, seed=1) as fleet:
        await fleet.deploy()
        began = clock.now()
        revision = await fleet.upgrade(version="2.0.0")
        print(f"revision {revision.number} is rolled out after {clock.now() - began:.0f} s; good: {revision.good}")
        try:
            await fleet.upgrade(version="3.0.0")
        except RolloutFailed as error:
            print(error)
        await fleet.ready()
        print(dict(Counter(instance.version for instance in fleet.instances)))
        for event in fleet.journal.read(fleet="writers"):
            if event.kind.startswith("rollout."):
                print(f"{event.at - began:6.1f} s  {event.kind}", *(reason["text"] for reason in event.reasons))


if __name__ == "__main__":
    run_virtual(main)
