"""Requests to simulated agents: they take configuration, and answer or keep silent as their faults say. No sockets."""

from __future__ import annotations

import json
from collections.abc import Mapping

import anyio.lowlevel

from agentfleet.backends.memory.agent import Agent
from agentfleet.backends.memory.world import World
from agentfleet.errors import DeadlineExceeded
from agentfleet.signals.http import HttpError, Response


class MemoryNetwork:
    """What an HTTP client is to real agents (`agentfleet.signals.http.Requests`).

    A simulated agent answers PUT /config as `agentfleet.agent` does, and 404 to everything else: tasks are not
    simulated, load is (`MemoryBackend.load`).
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._places: dict[str, str] = {}
        self._configured: dict[tuple[str, str], int] = {}

    async def request(
        self,
        method: str,
        address: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,  # noqa: ARG002 - simulated agents ask for no token
        timeout: float,
    ) -> Response:
        """Answer one request.

        Raises:
            HttpError: Nobody listens at the address.
            DeadlineExceeded: The process is hung, or its node cannot be reached.
        """
        await anyio.lowlevel.checkpoint()
        self._world.advance()
        agent = self._agent_at(address)
        if agent is None or not agent.runs:
            raise HttpError(f"{method} {path} of {address}: connection refused", sent=False)
        slow = 0.0 if agent.condition is None else float("inf") if agent.condition.hung else agent.condition.slow
        if agent.lost or slow > timeout:
            await self._world.clock.sleep(timeout)
            raise DeadlineExceeded(f"{method} {path} of {address} was not answered within {timeout:g} s")
        if slow:
            await self._world.clock.sleep(slow)
        if (method, path) != ("PUT", "/config"):
            return Response(404, {}, b'{"error":"not simulated"}')
        return self._configure((agent.id, address), json.loads(body or b"{}")["revision"])

    def _configure(self, process: tuple[str, str], revision: int) -> Response:
        present = self._configured.get(process, 0)
        if revision < present:
            return Response(409, {}, json.dumps({"revision": present}).encode())
        self._configured[process] = revision
        return Response(200, {}, json.dumps({"revision": revision}).encode())

    def _agent_at(self, address: str) -> Agent | None:
        agent = self._world.agents.get(self._places.get(address, ""))
        if agent is None or agent.address != address:  # it has moved, or was never asked: look again
            self._places = {each.address: id for id, each in self._world.agents.items() if each.address is not None}
            agent = self._world.agents.get(self._places.get(address, ""))
        return agent
