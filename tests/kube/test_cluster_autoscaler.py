"""A fleet that the cluster's own autoscaler scales: its size is given once, followed, and never taken back."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.test_backend import on, until
from tests.kube.world import Cluster, spec

from agentfleet import Fleet, FleetSpec, OperationRefused, QueueTarget, ScalingPolicy
from agentfleet.backends.base import AUTOSCALER, Ordered
from agentfleet.backends.kubernetes.objects import Deployment
from agentfleet.backends.kubernetes.pods import SOMEBODY, Written, ordered_of
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS, decode
from agentfleet.kubespec import ClusterAutoscaler
from agentfleet.specs import CpuTarget
from agentfleet.testing.kube import ControlPlane

POLICY = ScalingPolicy(min_replicas=2, max_replicas=9, targets=(CpuTarget(utilization=60),))


def autoscaled(replicas: int, *, version: str = "1", least: int = 2) -> FleetSpec:
    """A fleet with a scaling policy that the cluster carries out."""
    plain = spec(replicas, version=version, scaling=POLICY.replace(min_replicas=least))
    options = plain.template.kubernetes
    assert options is not None
    options = options.replace(autoscaler=ClusterAutoscaler(enabled=True))
    return plain.replace(template=plain.template.replace(kubernetes=options))


# ------------------------------------------------------------------------------------------------ whose word it is


def deployment(replicas: int, version: int, *managers: tuple[str, str, str], paused: bool = False) -> Deployment:
    """A Deployment of revision 1; its writers with subresource and time."""
    body: dict[str, Any] = {
        "metadata": {
            "name": "agents",
            "resourceVersion": str(version),
            "managedFields": [
                {"manager": manager, "subresource": subresource, "time": f"2026-11-05T11:00:{at}Z"}
                for manager, subresource, at in managers
            ],
        },
        "spec": {
            "replicas": replicas,
            "paused": paused,
            "template": {"metadata": {"labels": {"agentfleet.io/revision": "1"}}},
        },
    }
    return decode(DEPLOYMENTS.read, json.dumps(body).encode(), "test")


OURS = ("agentfleet", "", "00")
CASES = [
    (3, 10, (OURS,), False, None),
    (2, 9, (OURS,), False, None),  # older than our word
    (5, 10, (OURS,), False, AUTOSCALER),  # our apply, which does not say a size, met its size
    (5, 11, (OURS,), False, AUTOSCALER),  # servers before 1.22 do not say who used scale
    (5, 11, (OURS, ("kube-controller-manager", "scale", "07")), False, AUTOSCALER),
    (5, 11, (("kubectl", "", "00"), ("kube-controller-manager", "scale", "07")), False, AUTOSCALER),
    (5, 11, (OURS, ("kubectl", "scale", "07")), False, "kubectl"),
    (10, 11, (OURS,), False, SOMEBODY),  # more than the policy's most
    (0, 11, (OURS,), False, SOMEBODY),  # nor does it go below the least
    (5, 11, (OURS,), True, SOMEBODY),  # autoscalers pause nothing
]


@pytest.mark.parametrize(("replicas", "version", "managers", "paused", "by"), CASES)
def test_a_size_is_the_autoscalers_word_where_it_can_be(
    replicas: int, version: int, managers: tuple[tuple[str, str, str], ...], paused: bool, by: str | None
) -> None:
    ours = Written(Ordered(3, 1), 10, (2, 9))
    seen = ordered_of(deployment(replicas, version, *managers, paused=paused), ours)
    assert seen == Ordered(replicas, 1, paused, by)


def test_a_stopped_fleet_that_gets_a_size_was_started_by_somebody() -> None:
    ours = Written(Ordered(0, 1), 10, (2, 9))
    assert ordered_of(deployment(4, 11, OURS), ours).by == SOMEBODY


# ------------------------------------------------------------------------------------------------ on a cluster


class Scale:
    """A fleet's scale subresource, used as a HorizontalPodAutoscaler does."""

    def __init__(self, there: Cluster) -> None:
        self.there = there
        self.path = f"/apis/apps/v1/namespaces/{there.namespace}/deployments/agents"

    async def set(self, replicas: int) -> None:
        patch = {"spec": {"replicas": replicas}}
        await self.there.plane.api.patch(f"{self.path}/scale?fieldManager=kube-controller-manager", patch)

    async def get(self) -> int:
        found = await self.there.plane.api.get(f"{self.path}/scale")
        return int(found["spec"].get("replicas", 0))

    async def annotations(self) -> dict[str, str]:
        found: dict[str, str] = (await self.there.plane.api.get(self.path))["metadata"]["annotations"]
        return found


@pytest.mark.integration
@pytest.mark.slow
def test_the_clusters_autoscaler_owns_the_size(plane: ControlPlane) -> None:
    """First deployment, its changes, an upgrade in between, stop and start, and the next manager."""

    async def test(there: Cluster) -> None:
        scale = Scale(there)
        async with there.fleet(autoscaled(3)) as fleet:
            await fleet.deploy(timeout=60)
            assert await scale.get() == 3
            path = f"/apis/autoscaling/v2beta2/namespaces/{there.namespace}/horizontalpodautoscalers/agents"
            made = await there.plane.api.get(path)
            assert (made["spec"]["minReplicas"], made["spec"]["maxReplicas"]) == (2, 9)
            assert fleet.status()["desired"] == 3

            await scale.set(6)
            await until(lambda: fleet.status()["desired"] == 6)
            await fleet.ready(timeout=60)
            (scaled,) = there.events("fleet.scaled")
            assert (scaled.data["from"], scaled.data["to"], scaled.data["by"]) == (3, 6, "scaling")
            assert scaled.reasons[0]["code"] == "scaling.cluster"
            with pytest.raises(OperationRefused, match="min_replicas"):
                await fleet.scale(8)

            await fleet.upgrade(version="2", timeout=120)
            assert await scale.get() == 6, "what apply does not say must not return to its default"
            await scale.set(4)
            await until(lambda: fleet.status()["desired"] == 4 and len(fleet.instances) == 4)

            await fleet.stop(timeout=60)
            assert await scale.get() == 0
            assert (await scale.annotations())["agentfleet.io/replicas"] == "4"
            await fleet.start(timeout=60)
            assert await scale.get() == 4
            assert "agentfleet.io/replicas" not in await scale.annotations()
            assert len(there.events("fleet.scaled")) == 2, "each change is explained once"

        await scale.set(7)
        async with there.fleet(autoscaled(3, version="2")) as fleet:
            await until(lambda: fleet.status()["desired"] == 7)
            await fleet.deploy(timeout=60)
            assert await scale.get() == 7
            assert not there.events("fleet.foreign_change")
            assert not there.events("scaling.decision")
            assert not there.events("action.failed")

    on(plane, test)


@pytest.mark.integration
@pytest.mark.slow
def test_a_fleet_goes_over_to_the_clusters_autoscaler_and_back(plane: ControlPlane) -> None:
    """Its size stays what it is both times, and no autoscaler is left that nobody asks for."""

    async def test(there: Cluster) -> None:
        scale = Scale(there)
        seen: list[int] = []
        autoscalers = f"/apis/autoscaling/v2beta2/namespaces/{there.namespace}/horizontalpodautoscalers"

        async def watch() -> None:
            while True:
                seen.append(await scale.get())
                await anyio.sleep(0.02)

        async with there.fleet(spec(5)) as fleet:
            await fleet.deploy(timeout=60)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            async with there.fleet(autoscaled(5)) as fleet:
                await fleet.deploy(timeout=60)
                assert len((await there.plane.api.get(autoscalers))["items"]) == 1
                await fleet.upgrade(version="2", timeout=120)
                assert await scale.get() == 5
            async with there.fleet(spec(5, version="2")) as fleet:
                await fleet.deploy(timeout=60)
                with anyio.fail_after(20):
                    while (await there.plane.api.get(autoscalers))["items"]:  # noqa: ASYNC110 - it has no event
                        await anyio.sleep(0.1)
                await fleet.scale(6)
                await fleet.ready(timeout=60)
                assert await scale.get() == 6
            tasks.cancel_scope.cancel()
        assert set(seen) <= {5, 6}, "nobody has lost a place on the way"

    on(plane, test)


@pytest.mark.integration
@pytest.mark.slow
def test_the_real_autoscaler_keeps_the_policys_bounds(plane: ControlPlane) -> None:
    """It needs no metrics to raise a fleet to its least; it is followed, and nobody is called a stranger."""

    async def test(there: Cluster) -> None:
        async with there.fleet(autoscaled(2)) as fleet:
            await fleet.deploy(timeout=60)
        async with there.fleet(autoscaled(6, least=4)) as fleet:
            await fleet.deploy(timeout=60)
            assert fleet.status()["desired"] == 2, "what the spec says is the first size alone"
            await until(lambda: fleet.status()["desired"] == 4, 60)
            await fleet.ready(timeout=60)
            assert there.events("fleet.scaled")[0].reasons[0]["code"] == "scaling.cluster"
            assert not there.events("fleet.foreign_change")

    on(plane, test)


@pytest.mark.integration
@pytest.mark.slow
def test_an_autoscaler_that_nobody_told_of_is_not_fought_over_for_ever(plane: ControlPlane) -> None:
    """Scenario 23: ours wants 4, somebody's HPA wants 2; after a few rounds ours holds still and says why."""
    policy = ScalingPolicy(min_replicas=1, max_replicas=6, targets=(QueueTarget(length=5),), period=1.0)

    async def test(there: Cluster) -> None:
        scale = Scale(there)
        async with Fleet(
            spec(2, scaling=policy),
            backend=there.backend,
            journal=there.journal,
            metrics={"queue": lambda: 20.0},
        ) as fleet:
            await fleet.deploy(timeout=60)
            while not there.events("scaling.contested"):
                with anyio.fail_after(30):
                    while await scale.get() != 4:  # noqa: ASYNC110 - told, and not only decided
                        await anyio.sleep(0.1)
                await scale.set(2)
                await until(lambda: fleet.status()["desired"] == 2)
            deployment = await there.plane.api.get(scale.path)
            await anyio.sleep(5)
            assert (await there.plane.api.get(scale.path))["metadata"]["generation"] == (
                deployment["metadata"]["generation"]
            ), "nobody writes against anybody"
            assert fleet.status()["desired"] == 2
            assert len(there.events("scaling.contested")) == 1
            assert len(there.events("fleet.foreign_change")) == 4

    on(plane, test)
