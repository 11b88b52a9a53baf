"""A manager, the REST API in front of it, and a client that uses it, all in one program.

::

    python examples/rest_server.py

In earnest the server is `agentfleet serve` (docs/rest.md), on a database, with more than one manager.
"""

from __future__ import annotations

import anyio
import uvicorn

from agentfleet import AgentTemplate, FleetManager, MemoryBackend, MemoryJournal
from agentfleet.client import ClusterConfig, FleetClient
from agentfleet.errors import AccessDenied, Conflict
from agentfleet.server import Admission, create_app
from agentfleet.stores.fleets_memory import MemoryFleets
from agentfleet.stores.tokens import MemoryTokens, new_token

TEMPLATE = AgentTemplate(command=["python", "-m", "my_agent"], version="1.0", cpu="250m", memory="512Mi", port=8080)


async def use(address: str, admin: str, reader: str) -> None:
    """What a console or a pipeline does."""
    async with FleetClient(address, token=admin) as client:
        made = await client.create(ClusterConfig(cluster_name="researchers", min_replicas=2, max_replicas=10))
        print("created:", made.status, "then", (await client.finished(made.operation_id, timeout="1m")).status)

        once = await client.scale("researchers", 4, key="from-my-pipeline-17")
        again = await client.scale("researchers", 4, key="from-my-pipeline-17")
        print("asked twice, it is one operation:", once.operation_id == again.operation_id)
        await client.finished(once.operation_id, timeout="1m")

        deployed = await client.deploy("researchers", "1.1")
        print("deployed:", (await client.finished(deployed.operation_id, timeout="1m")).outcome["version"])

        first = await client.configuration.publish("researchers", {"model": "small"}, reason="first", expect=0)
        try:
            await client.configuration.publish("researchers", {"model": "tiny"}, reason="cheaper", expect=0)
        except Conflict:
            print("somebody published revision", first.revision, "first")

        async for event in client.stream("researchers", after=0, kinds=["rollout."]):
            print("event:", event.kind, event.data.get("version", ""))
            if event.kind == "rollout.completed" and event.data["version"] == "1.1":
                break
        audited = [entry async for entry in client.audit("researchers")]
        print("audited:", len(audited), "changes, the last by", audited[0].actor)

    async with FleetClient(address, token=reader) as client:
        try:
            await client.scale("researchers", 9)
        except AccessDenied as error:
            print("refused:", error)


async def main() -> None:
    """Serve, use it, and end in good order."""
    admin, admin_record = new_token("ops", scopes=["admin"], fleets=["*"], now=0.0)
    reader, reader_record = new_token("wall", scopes=["read"], fleets=["researchers"], now=0.0)
    backend = MemoryBackend(seed=1, start_delay=0.1)
    async with backend, FleetManager(MemoryFleets(), backend=backend, journal=MemoryJournal()) as manager:
        app = create_app(
            manager,
            tokens=MemoryTokens([admin_record, reader_record]),
            admission=Admission(engine="memory", template=TEMPLATE),
        )
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve)
            while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await anyio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            await use(f"http://127.0.0.1:{port}", admin, reader)
            server.should_exit = True


if __name__ == "__main__":
    anyio.run(main)
