"""The README's lines, with an agent that is really there: bring a fleet up, upgrade it, and see what happened.

::

    python examples/quickstart.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import anyio

from agentfleet import (
    AgentTemplate,
    Fleet,
    FleetSpec,
    HealthPolicy,
    HttpCheck,
    ProcessBackend,
    QueueTarget,
    RecoveryPolicy,
    ScalingPolicy,
)

AGENT = Path(__file__).with_name("echo_agent.py")

SPEC = FleetSpec(
    name="echoes",
    template=AgentTemplate(command=["python", str(AGENT)], version="1.4.0", cpu="250m", memory="128Mi", port=8080),
    replicas=3,
    scaling=ScalingPolicy(min_replicas=3, max_replicas=20, targets=[QueueTarget(length=5)]),
    health=HealthPolicy(checks=[HttpCheck(path="/status", period="2s", failures=5)]),
    recovery=RecoveryPolicy(max_disrupted="10%"),
)


async def main() -> None:
    """Deploy, upgrade, and print every event until the upgrade is complete."""
    with tempfile.TemporaryDirectory() as state:  # leave `state_dir` out to keep it where it survives this program
        async with Fleet(SPEC, backend=ProcessBackend(state_dir=state)) as fleet:
            await fleet.deploy()
            print(fleet.report())
            await fleet.upgrade(version="1.5.0")
            async for event in fleet.events():
                if event.kind.startswith("state."):
                    continue  # what the next manager would start from
                print(event.kind, event.instance or "", *(reason["text"] for reason in event.reasons))
                if event.kind == "rollout.completed" and event.data["version"] == "1.5.0":
                    break
            print(fleet.report())


if __name__ == "__main__":
    anyio.run(main)
