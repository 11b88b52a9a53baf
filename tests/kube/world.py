"""A real control plane with fake nodes, and a fleet's manager upon it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.kube.permissions import grant

from agentfleet import AgentTemplate, Event, Fleet, FleetSpec, HealthPolicy, HttpCheck, MemoryJournal, RolloutPolicy
from agentfleet.backends.kubernetes import Connection, KubeConfig, KubernetesBackend
from agentfleet.kubespec import KubernetesOptions
from agentfleet.stores.leases import LeaseStore
from agentfleet.testing.kube import ControlPlane, FakeKubelet, KubeletOptions

HEALTH = HealthPolicy(checks=(HttpCheck(path="/status", period=1.0, timeout=1.0, failures=3),))


def spec(replicas: int, *, name: str = "agents", version: str = "1", **more: object) -> FleetSpec:
    """A fleet of small agents on Kubernetes."""
    template = AgentTemplate(
        command=("agent",),
        version=version,
        port=8080,
        cpu="10m",
        memory="16Mi",
        drain=5.0,
        kubernetes=KubernetesOptions(image="agent:{version}"),
    )
    given: dict[str, Any] = {"health": HEALTH, "rollout": RolloutPolicy(progress_deadline=60.0), **more}
    return FleetSpec(name=name, template=template, replicas=replicas, **given)


class Cluster:
    """One namespace of a plane, with nodes, and the managers that come and go."""

    def __init__(self, plane: ControlPlane, kubelet: FakeKubelet, namespace: str, connection: Connection) -> None:
        self.plane = plane
        self.kubelet = kubelet
        self.namespace = namespace
        self.connection = connection
        self.backend = KubernetesBackend(connection, namespace=namespace)
        self.journal = MemoryJournal()
        self.leases: LeaseStore | None = None
        """Where managers keep who leads; None, and they believe that they are alone."""

    @asynccontextmanager
    async def fleet(self, wanted: FleetSpec) -> AsyncIterator[Fleet]:
        """A manager of a fleet, who leads."""
        async with Fleet(wanted, backend=self.backend, journal=self.journal, leases=self.leases, seed=1) as fleet:
            if self.leases is not None:
                await fleet.leading(timeout=60)
            yield fleet

    def events(self, kind: str) -> list[Event]:
        """What was journaled of a kind."""
        return [event for event in self.journal.read() if event.kind == kind]

    def pods_of(self, fleet: Fleet) -> list[str]:
        """The pods of a fleet as the fake nodes call them."""
        return [f"{self.namespace}/{instance.id}" for instance in fleet.instances]

    async def objects(self, *plurals: str) -> dict[str, list[str]]:
        """Names of what exists in the namespace."""
        roots = {"deployments": "/apis/apps/v1", "replicasets": "/apis/apps/v1"}
        roots["poddisruptionbudgets"] = "/apis/policy/v1beta1"
        found = {}
        for plural in plurals:
            path = f"{roots.get(plural, '/api/v1')}/namespaces/{self.namespace}/{plural}"
            listed = await self.plane.api.get(path)
            found[plural] = [each["metadata"]["name"] for each in listed["items"]]
        return found


@asynccontextmanager
async def cluster(plane: ControlPlane, *, nodes: int = 3) -> AsyncIterator[Cluster]:
    """A namespace of its own, with nodes of its own."""
    async with FakeKubelet(plane.access, KubeletOptions(nodes=nodes, lease_period=2.0)) as kubelet:
        namespace = await plane.namespace()
        access = await grant(plane, namespace)  # managers are no administrators
        config = access.write(plane.folder / f"{namespace}.kubeconfig", namespace=namespace)
        async with Connection(KubeConfig(config), qps=500, burst=500) as connection:
            yield Cluster(plane, kubelet, namespace, connection)
        await plane.api.delete(f"/apis/apps/v1/namespaces/{namespace}/deployments")  # none comes back on others' nodes
