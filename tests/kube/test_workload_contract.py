"""Holds Kubernetes to the contract of engines that keep fleets by themselves, on a real control plane."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.conformance.workload_clauses import CLAUSES, FLEET, Clause
from tests.kube.faulty import Faulty, on
from tests.kube.world import spec

from agentfleet import FleetSpec
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS, PODS
from agentfleet.testing.kube import Behaviour, ControlPlane

pytestmark = [pytest.mark.integration, pytest.mark.slow]


class KubeWorld:
    """A namespace of the plane, behind a proxy."""

    deadline = 60.0

    def __init__(self, there: Faulty) -> None:
        self.there = there
        self.backend = there.backend

    def spec(self, replicas: int, version: str) -> FleetSpec:
        return spec(replicas, name=FLEET, version=version)

    async def scale_by_hand(self, replicas: int) -> None:
        path = DEPLOYMENTS.path(self.there.namespace, FLEET, "scale")
        await self.there.plane.api.patch(f"{path}?fieldManager=kubectl", {"spec": {"replicas": replicas}})

    async def remove_by_hand(self, id: str) -> None:
        await self.there.plane.api.delete(PODS.path(self.there.namespace, id), {"gracePeriodSeconds": 0})

    @asynccontextmanager
    async def unreachable(self) -> AsyncIterator[None]:
        await self.there.proxy.refuse()
        self.there.proxy.cut()
        yield
        await self.there.proxy.accept()


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.__name__)
def test_kubernetes_keeps_the_contract(plane: ControlPlane, clause: Clause) -> None:
    async def test(there: Faulty) -> None:
        await there.kubelet.image("agent:*", Behaviour(start=1.0))  # no container runs in an instant
        async with anyio.create_task_group(), there.backend:
            await clause(KubeWorld(there))

    on(plane, test)
