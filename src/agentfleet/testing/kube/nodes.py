"""Fake nodes: their objects, their leases, and whether the control plane hears of them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import anyio

from agentfleet.errors import BackendRefused
from agentfleet.testing.kube.apiclient import ApiClient
from agentfleet.testing.kube.client import MERGE, STRATEGIC
from agentfleet.testing.kube.podrun import now

_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_PRESSURES = ("MemoryPressure", "DiskPressure", "PIDPressure")


@dataclass(slots=True)
class Node:
    """One node.

    Attributes:
        host: Its own address.
        gone: The control plane hears nothing of it, and it hears nothing of the control plane.
    """

    name: str
    host: str
    zone: str
    region: str
    capacity: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)
    gone: bool = False

    @property
    def path(self) -> str:
        """Its path below the API server."""
        return f"/api/v1/nodes/{self.name}"

    def object(self) -> dict[str, Any]:
        """What a kubelet registers."""
        labels = {
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
            "topology.kubernetes.io/zone": self.zone,
            "topology.kubernetes.io/region": self.region,
            **self.labels,
        }
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": labels},
            "status": self.status(),
        }

    def status(self) -> dict[str, Any]:
        """A node that is well."""
        conditions = [
            {"type": kind, "status": "False", "reason": f"KubeletHasNo{kind}", "message": "fake"} for kind in _PRESSURES
        ]
        conditions.append({"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "fake kubelet"})
        for condition in conditions:
            condition["lastHeartbeatTime"] = now()
        return {
            "capacity": self.capacity,
            "allocatable": self.capacity,
            "conditions": conditions,
            "addresses": [{"type": "InternalIP", "address": self.host}, {"type": "Hostname", "address": self.name}],
            "nodeInfo": {
                "kubeletVersion": "v1.20.2-fake",
                "kubeProxyVersion": "v1.20.2-fake",
                "containerRuntimeVersion": "fake://1",
                "operatingSystem": "linux",
                "architecture": "amd64",
                "osImage": "none",
                "kernelVersion": "none",
                "machineID": self.name,
                "systemUUID": self.name,
                "bootID": self.name,
            },
        }


class Nodes:
    """Keeps the objects and leases of nodes alive."""

    def __init__(self, nodes: Sequence[Node], api: ApiClient, *, lease_period: float, status_period: float) -> None:
        self.by_name = {node.name: node for node in nodes}
        self._api = api
        self._lease_period = lease_period
        self._status_period = status_period

    async def register(self) -> None:
        """Create all nodes and their leases, or take over those that exist."""
        first, *others = self.by_name.values()
        await self.register_one(first)  # if this is refused, so are all
        async with anyio.create_task_group() as tasks:
            for node in others:
                tasks.start_soon(self.register_one, node)

    async def register_one(self, node: Node) -> None:
        """Create a node and its lease, or take them over."""
        status, said = await self._api.send("POST", "/api/v1/nodes", node.object())
        if status not in {201, 409}:
            raise BackendRefused(
                f"the API server refuses node {node.name} with {status}: {said[:500]!r}; "
                "connect as one who may create it"
            )
        await self._report(node)
        await self._renew(node)

    async def keep(self) -> None:
        """Renew leases and report statuses, evenly over time, for ever."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._each, self._lease_period, self._renew)
            tasks.start_soon(self._each, self._status_period, self._report)

    async def _each(self, period: float, act: Callable[[Node], Coroutine[Any, Any, None]]) -> None:
        nodes = list(self.by_name.values())
        at_it: set[str] = set()

        async def once(node: Node) -> None:
            at_it.add(node.name)
            try:
                await act(node)
            finally:
                at_it.discard(node.name)

        async with anyio.create_task_group() as tasks:
            begun = anyio.current_time()
            while True:
                for index, node in enumerate(nodes):
                    await anyio.sleep(max(0.0, begun + period * (index + 1) / len(nodes) - anyio.current_time()))
                    if not node.gone and node.name not in at_it:
                        tasks.start_soon(once, node)
                begun = max(begun + period, anyio.current_time() - period)

    async def _report(self, node: Node) -> None:
        await self._api.send("PATCH", f"{node.path}/status", {"status": node.status()}, kind=STRATEGIC)

    async def _renew(self, node: Node) -> None:
        moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": node.name, "leaseDurationSeconds": 40, "renewTime": moment}
        status, _ = await self._api.send("PATCH", f"{_LEASES}/{node.name}", {"spec": spec}, kind=MERGE)
        if status == 404:
            lease = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": node.name},
                "spec": spec,
            }
            await self._api.send("POST", _LEASES, lease)

    async def remove(self) -> None:
        """Delete all nodes and leases."""
        async with anyio.create_task_group() as tasks:
            for node in self.by_name.values():
                tasks.start_soon(self._api.send, "DELETE", node.path)
                tasks.start_soon(self._api.send, "DELETE", f"{_LEASES}/{node.name}")
