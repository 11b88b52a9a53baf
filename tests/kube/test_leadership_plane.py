"""Two managers of one fleet on a real API server: who is cut off is followed, and what it sends late is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.permissions import grant
from tests.kube.world import Cluster, cluster, spec

from agentfleet import Fleet, MemoryJournal, NotLeader
from agentfleet.backends.kubernetes import Connection, KubeConfig, KubernetesBackend
from agentfleet.backends.kubernetes.guard import EPOCH, Guard
from agentfleet.backends.kubernetes.lease import KubernetesLeases
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS
from agentfleet.core.fence import NoFence
from agentfleet.core.leadership import LeaseRecord
from agentfleet.errors import BackendUnavailable, Conflict
from agentfleet.testing.kube import ControlPlane

pytestmark = [pytest.mark.integration, pytest.mark.slow]


class CutLeases(KubernetesLeases):
    """Leases until this manager is cut off from them."""

    cut = False

    async def get(self, name: str, *, timeout: float) -> LeaseRecord | None:
        self._check()
        return await super().get(name, timeout=timeout)

    async def create(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        self._check()
        return await super().create(name, record, timeout=timeout)

    async def update(self, name: str, record: LeaseRecord, *, timeout: float) -> LeaseRecord:
        self._check()
        return await super().update(name, record, timeout=timeout)

    def _check(self) -> None:
        if self.cut:
            raise BackendUnavailable("cut off")


@asynccontextmanager
async def manager(
    there: Cluster, journal: MemoryJournal, identity: str
) -> AsyncIterator[tuple[Fleet, CutLeases, KubernetesBackend]]:
    """A manager with connections of its own: one for the fleet, one for the lease."""
    access = await grant(there.plane, there.namespace)
    config = access.write(there.plane.folder / f"{there.namespace}-{identity}.kubeconfig", namespace=there.namespace)
    async with (
        Connection(KubeConfig(config), qps=500, burst=500) as connection,
        Connection(KubeConfig(config)) as to_leases,
    ):
        leases = CutLeases(to_leases, there.namespace)
        backend = KubernetesBackend(connection, namespace=there.namespace)
        async with Fleet(spec(6), backend=backend, journal=journal, leases=leases, identity=identity) as fleet:
            yield fleet, leases, backend


async def epoch_of(there: Cluster) -> str:
    deployment = await there.plane.api.get(DEPLOYMENTS.path(there.namespace, "agents"))
    return str(deployment["metadata"]["annotations"].get(EPOCH))


def test_another_follows_a_leader_that_is_cut_off(plane: ControlPlane) -> None:
    async def test() -> None:
        journal = MemoryJournal()
        with anyio.fail_after(150):
            async with cluster(plane) as there, manager(there, journal, "one") as (first, way, _):
                await first.leading(timeout=20)
                await first.deploy(timeout=60)
                assert await epoch_of(there) == "1"
                ids = {instance.id for instance in first.instances}
                async with manager(there, journal, "two") as (second, _, _):
                    with pytest.raises(NotLeader, match="does not lead"):
                        await second.scale(3)
                    await anyio.sleep(2.0)  # a little of an ordinary life
                    before = await there.plane.api.get(DEPLOYMENTS.path(there.namespace, "agents"))
                    stale = first._runtime.backend
                    assert isinstance(stale, KubernetesBackend)
                    late = stale._guards["agents"]
                    way.cut = True
                    cut = anyio.current_time()
                    await second.leading(timeout=10)
                    taken = anyio.current_time() - cut
                    await second.scale(8)
                    await second.ready(timeout=60)
                    print(f"followed after {taken:.1f} s")
                    assert taken < 10
                    assert await epoch_of(there) == "2"
                    assert ids < {instance.id for instance in second.instances}
                    assert not first.leads

                    late._fence = _Passing(1)  # as a leader that was stopped between its last check and its write
                    scale = DEPLOYMENTS.path(there.namespace, "agents", "scale")
                    body = json.dumps({"spec": {"replicas": 1}}).encode()
                    with pytest.raises(NotLeader, match="in epoch 2 by now"):
                        await late.request(
                            "PATCH", scale, body=body, content_type="application/merge-patch+json", query={}
                        )
                    old = {"metadata": {"resourceVersion": before["metadata"]["resourceVersion"]}}
                    with pytest.raises(Conflict):
                        await there.connection.request(
                            "PATCH",
                            scale,
                            body=json.dumps({**old, "spec": {"replicas": 1}}).encode(),
                            content_type="application/merge-patch+json",
                        )
                    deployment = await there.plane.api.get(DEPLOYMENTS.path(there.namespace, "agents"))
                    assert deployment["spec"]["replicas"] == 8
                    assert len(second.instances) == 8

                    way.cut = False
                    await second.upgrade(version="2", timeout=90)  # its many status updates are no conflict for long
                left = anyio.current_time()
                await first.leading(timeout=20)
                print(f"followed a graceful one after {anyio.current_time() - left:.1f} s")
                assert anyio.current_time() - left < 4.5  # one that crashed is waited for longer
                assert first.state is not None
                assert first.state.template.version == "2"
                with anyio.fail_after(20):
                    while await epoch_of(there) != "3":  # noqa: ASYNC110 - it has no event
                        await anyio.sleep(0.1)
                await first.delete(timeout=60)

    anyio.run(test)


class _Passing(NoFence):
    """A fence that lets everything through in a given epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch


def test_a_write_goes_on_when_only_the_status_has_moved_the_version(plane: ControlPlane) -> None:
    async def test() -> None:
        with anyio.fail_after(100):
            async with cluster(plane) as there, there.fleet(spec(2)) as fleet:
                await fleet.deploy(timeout=60)
                path = DEPLOYMENTS.path(there.namespace, "agents")
                guard = Guard(there.connection, there.namespace, "agents", _Passing(4))
                merge = {"content_type": "application/merge-patch+json", "query": {"fieldManager": "agentfleet"}}
                await guard.request("PATCH", path, body=b'{"metadata":{"annotations":{"note":"1"}}}', **merge)  # type: ignore[arg-type]
                await there.connection.request(
                    "PATCH",
                    path,
                    body=b'{"metadata":{"annotations":{"note":"2"}}}',
                    content_type="application/merge-patch+json",
                )
                await guard.request("PATCH", path, body=b'{"metadata":{"annotations":{"note":"3"}}}', **merge)  # type: ignore[arg-type]
                deployment = await there.plane.api.get(path)
                assert deployment["metadata"]["annotations"]["note"] == "3"
                assert deployment["metadata"]["annotations"][EPOCH] == "4"
                older = Guard(there.connection, there.namespace, "agents", _Passing(3))
                with pytest.raises(NotLeader):
                    await older.request("PATCH", path, body=b"{}", **merge)  # type: ignore[arg-type]

    anyio.run(test)
