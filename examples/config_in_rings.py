"""Agents that subscribe to their configuration, and a rollout of it in rings: a good one arrives, a bad one goes back.

::

    python examples/config_in_rings.py

Four real agents, a manager and its REST API on this machine. The second document makes agents better, the third makes
them sick a second after they have taken it over: one of them has it, and all run the second one again.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import uvicorn

from agentfleet import (
    AgentTemplate,
    ConfigRollout,
    FleetManager,
    FleetSpec,
    HealthPolicy,
    HttpCheck,
    MemoryJournal,
    ProcessBackend,
    RecoveryPolicy,
)
from agentfleet.agent import Agent, Task
from agentfleet.client import FleetClient
from agentfleet.server import Admission, create_app
from agentfleet.stores.fleets_memory import MemoryFleets
from agentfleet.stores.tokens import MemoryTokens, new_token

RINGS = ConfigRollout(rings=(1, "50%", "100%"), bake="1s", confirm="1s")  # in earnest minutes


def be_an_agent() -> None:
    """One of the agents; where its configuration comes from is in its environment."""

    async def work(task: Task, agent: Agent) -> object:
        return {"answer": task.payload, "by": agent.config["model"]}

    agent = Agent(work)

    @agent.on_config
    async def judge(document: Mapping[str, Any]) -> None:
        if document["model"] == "poison":
            asyncio.get_running_loop().call_later(1.0, agent.unhealthy, "this model does not answer")
        else:
            agent.healthy()

    agent.run()


def spec(url: str, token_file: Path) -> FleetSpec:
    """Four agents that subscribe to their manager."""
    fetch = {"AGENTFLEET_CONFIG_URL": url, "AGENTFLEET_CONFIG_TOKEN_FILE": str(token_file)}
    return FleetSpec(
        name="researchers",
        template=AgentTemplate(command=["python", str(Path(__file__).resolve()), "agent"], env=fetch),
        replicas=4,
        health=HealthPolicy(checks=[HttpCheck(period="500ms", timeout="1s", failures=2)]),
        recovery=RecoveryPolicy(max_disrupted="50%"),
    )


async def use(address: str, admin: str, fleet: FleetSpec) -> None:
    """What a console or a pipeline does."""
    async with FleetClient(address, token=admin) as client:
        made = await client.create(fleet)
        await client.finished(made.operation_id, timeout="30s")
        settings = client.configuration
        await settings.publish("researchers", {"model": "small"}, reason="first")
        for model in ("large", "poison"):
            revision = (
                await settings.publish("researchers", {"model": model}, reason="try it", rollout=RINGS)
            ).revision
            async for event in client.stream("researchers", after=0, kinds=["config."]):
                if event.data.get("revision") != revision:
                    continue
                if event.kind in ("config.ring", "config.halted", "config.rolled_out", "config.rolled_back"):
                    why = f"  {event.reasons[0]['text']}" if event.kind == "config.halted" else ""
                    target = f" of {event.data['target']}" if event.kind == "config.ring" else ""
                    print(f"{model}: {event.kind}{target}{why}")
                if event.kind in ("config.rolled_out", "config.rolled_back"):
                    break
        newest = await settings.get("researchers")
        everybody = {str(newest.revision): 4}
        while (status := await settings.status("researchers")).counts != everybody:  # noqa: ASYNC110 - each says it by itself
            await anyio.sleep(0.1)
        print(f"revision {newest.revision} by {newest.author} restores {newest.restores}: {newest.document}")
        print("how many run which:", status.counts)


async def main() -> None:
    """Serve, use it, and end in good order."""
    with tempfile.TemporaryDirectory() as folder:
        admin, admin_record = new_token("ops", scopes=["admin"], fleets=["*"], now=0.0)
        told, agents_record = new_token("agents", scopes=["agent"], fleets=["researchers"], now=0.0)
        token_file = Path(folder) / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(told)
        backend = ProcessBackend(state_dir=Path(folder) / "agents")
        async with anyio.create_task_group() as tasks:
            async with backend, FleetManager(MemoryFleets(), backend=backend, journal=MemoryJournal()) as manager:
                app = create_app(
                    manager, tokens=MemoryTokens([admin_record, agents_record]), admission=Admission(engine="process")
                )
                server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
                tasks.start_soon(server.serve)
                while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                    await anyio.sleep(0.01)
                address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
                await use(address, admin, spec(f"{address}/api/v1/clusters/researchers", token_file))
            server.should_exit = True  # the manager has left, and so the agents' streams have ended


if __name__ == "__main__":
    be_an_agent() if sys.argv[1:] == ["agent"] else anyio.run(main)
