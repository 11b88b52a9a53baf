"""Tasks for a fleet: sent to the least loaded agent, each of them once, and counted.

::

    python examples/dispatch_tasks.py
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import anyio

from agentfleet import AgentTemplate, Dispatcher, Fleet, FleetSpec, HealthPolicy, HttpCheck, ProcessBackend

AGENT = Path(__file__).with_name("echo_agent.py")
SPEC = FleetSpec(
    name="echoes",
    template=AgentTemplate(command=["python", str(AGENT)], port=8080, drain="2s"),
    replicas=3,
    health=HealthPolicy(checks=[HttpCheck(path="/status", period="1s")]),
)


async def main() -> None:
    """Send sixty tasks, one of them twice, and restart an agent on the way."""
    with tempfile.TemporaryDirectory() as state:
        async with Fleet(SPEC, backend=ProcessBackend(state_dir=state)) as fleet, fleet.dispatcher() as dispatcher:
            await fleet.deploy()
            done: Counter[str | None] = Counter()

            async def send(dispatcher: Dispatcher, number: int) -> None:
                result = await dispatcher.submit(f"task-{number}", {"number": number})
                assert result.ok
                assert result.value == {"number": number}
                done[result.instance] += 1

            async with anyio.create_task_group() as tasks:
                for number in range(30):
                    tasks.start_soon(send, dispatcher, number)
            await fleet.restart(next(iter(fleet.endpoints())))
            async with anyio.create_task_group() as tasks:
                for number in range(30, 60):
                    tasks.start_soon(send, dispatcher, number)
            print(f"{done.total()} tasks done by {len(done)} agents, {dispatcher.depth} open")

            again = await dispatcher.submit("task-7", {"number": 7})
            sent = sum(event.kind == "task.assigned" for event in fleet.journal.read(fleet="echoes"))
            print(f"task-7 again: {again.value} from what is kept, {sent - 60} tasks were sent more than once")


if __name__ == "__main__":
    anyio.run(main)
