"""Holds the simulated engine that keeps fleets by itself to the contract, in virtual time on both event loops."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agentfleet import AgentTemplate, FleetSpec, MemoryBackend
from agentfleet.backends.memory import MemoryDeployments
from agentfleet.testing import run_virtual

from .workload_clauses import CLAUSES, FLEET, Clause


class MemoryWorld:
    """A `MemoryDeployments` on a simulated cluster."""

    deadline = 600.0

    def __init__(self) -> None:
        self.cluster = MemoryBackend(seed=7)
        self.backend = MemoryDeployments(self.cluster)

    def spec(self, replicas: int, version: str) -> FleetSpec:
        template = AgentTemplate(command=("agent",), version=version, drain=2.0)
        return FleetSpec(name=FLEET, template=template, replicas=replicas)

    async def scale_by_hand(self, replicas: int) -> None:
        self.backend.kept(FLEET).scale(replicas, by="kubectl")

    async def remove_by_hand(self, id: str) -> None:
        await self.cluster.stop(FLEET, id, grace=0.0)

    @asynccontextmanager
    async def unreachable(self) -> AsyncIterator[None]:
        self.cluster.faults.unavailable()
        yield
        self.cluster.faults.available()


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_the_simulated_engine_keeps_the_contract(clause: Clause, loop: str) -> None:
    async def run() -> None:
        world = MemoryWorld()
        async with world.backend:
            await clause(world)
        assert not world.backend.kept(FLEET).watchers
        assert not world.cluster.watchers

    run_virtual(run, backend=loop)
