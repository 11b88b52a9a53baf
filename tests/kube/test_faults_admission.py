"""Admission webhooks between a fleet and its pods: those that refuse them, and those that change them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.faulty import LEAST, SIZE, Faulty, on, until, upgraded
from tests.kube.webhooks import Patch, changing, refusing
from tests.kube.world import spec

from agentfleet import Fleet, RolloutFailed, RolloutPolicy
from agentfleet.testing.kube import ControlPlane

pytestmark = [pytest.mark.integration, pytest.mark.slow]

UNSIGNED = "nobody has signed this image"
CLOSED = "this namespace takes no pods"


def images(pod: Mapping[str, Any]) -> set[str]:
    """What its containers run."""
    return {each["image"] for each in pod["spec"]["containers"]}


def unsigned(pod: Mapping[str, Any]) -> str | None:
    """Refuses the second version alone."""
    return UNSIGNED if "agent:2" in images(pod) else None


def closed(pod: Mapping[str, Any]) -> str | None:
    """Refuses everything, as the label of a namespace does that forbids what runs there already."""
    del pod
    return CLOSED


def injected(pod: Mapping[str, Any]) -> Patch | None:
    """What service meshes and vaults do: an annotation, a variable, and a container before the agent's own."""
    if "sidecar:1" in images(pod):
        return None  # a webhook is asked again whenever its own changes are written back
    sidecar = {"name": "sidecar", "image": "sidecar:1", "ports": [{"containerPort": 15_000}]}
    return [
        {"op": "add", "path": "/metadata/annotations/webhook.example.com~1injected", "value": "yes"},
        {"op": "add", "path": "/spec/containers/0/env/-", "value": {"name": "INJECTED", "value": "yes"}},
        {"op": "add", "path": "/spec/containers/0", "value": sidecar},
    ]


async def whole(fleet: Fleet, version: str) -> None:
    """All instances are of that version and good; a controller that was refused takes its time to try again."""
    await until(lambda: {each.version for each in fleet.instances} == {version} and fleet.status()["good"] == SIZE, 90)


def test_a_webhook_that_refuses_a_version_stops_its_rollout(plane: ControlPlane) -> None:
    """Scenario 22: within the budget, with the webhook's own words; the fleet returns, and later the version works."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE, rollout=RolloutPolicy(progress_deadline=8.0))) as fleet:
            await fleet.deploy(timeout=60)
            async with refusing(plane, there.namespace, unsigned) as webhook:
                there.pods.begin()
                with pytest.raises(RolloutFailed, match=f"no progress.*{UNSIGNED}"):
                    await fleet.upgrade("2", timeout=90)
                await whole(fleet, "1")
                await fleet.ready(timeout=60)
                assert set(webhook.refused) == {"agent:2"}
                assert there.pods.least >= LEAST
                assert len(there.pods.created) <= SIZE + (SIZE - LEAST), "only what was unavailable is made again"
            await fleet.upgrade("2", timeout=90)
            await whole(fleet, "2")
            assert there.pods.least >= LEAST

    on(plane, test)


def test_a_namespace_that_takes_no_pods_costs_nobody_who_runs(plane: ControlPlane) -> None:
    """Scenario 22: not even when one of them goes meanwhile, and when all is allowed again the fleet is whole."""

    async def test(there: Faulty) -> None:
        policy = RolloutPolicy(progress_deadline=8.0, max_surge=2, max_unavailable=0)
        async with there.fleet(spec(SIZE, rollout=policy)) as fleet:
            await fleet.deploy(timeout=60)
            async with refusing(plane, there.namespace, closed):
                there.pods.begin()
                lost = fleet.instances[0].id
                await plane.api.delete(f"/api/v1/namespaces/{there.namespace}/pods/{lost}")
                with pytest.raises(RolloutFailed, match=f"no progress.*{CLOSED}"):
                    await fleet.upgrade("2", timeout=90)
                await anyio.sleep(5)  # recovery has its say, too
                assert {each.version for each in fleet.instances} == {"1"}
                assert lost not in {each.id for each in fleet.instances}
                assert (there.pods.least, len(there.pods.created)) == (SIZE - 1, SIZE), "nobody else was touched"
            await whole(fleet, "1")
            assert len(there.pods.created) == SIZE + 1
            await fleet.upgrade("3", timeout=90)
            await whole(fleet, "3")

    on(plane, test)


def writes(there: Faulty) -> int:
    """How often managers have told the cluster what should be: all but leases and Events."""
    told = [path for method, path in there.proxy.requests() if method != "GET"]
    return sum("/leases" not in path and "/events" not in path for path in told)


async def changes(there: Faulty) -> int:
    """How often the Deployment has changed but for its status, as the server counts it; what it refused is none."""
    found = await there.plane.api.get(f"/apis/apps/v1/namespaces/{there.namespace}/deployments/agents")
    counted: int = found["metadata"]["generation"]
    return counted


@pytest.mark.parametrize("deployments", [False, True], ids=["pods", "deployments"])
def test_a_webhook_that_changes_pods_is_no_tug_of_war(plane: ControlPlane, deployments: bool) -> None:
    """Scenario 22: it changes pods, or their template; the same pods are made, by as few changes as without it."""
    changed: list[int] = []

    async def counted(there: Faulty) -> None:
        await upgraded(there)
        changed.append(await changes(there))

    async def test(there: Faulty) -> None:
        async with changing(plane, there.namespace, injected, deployments=deployments) as webhook:
            await counted(there)
            async with there.fleet(spec(SIZE)) as fleet:  # another manager, who wrote nothing of it
                await fleet.ready(timeout=60)
                await anyio.sleep(2)
                before = writes(there)
                await anyio.sleep(5)  # whoever pulls at the other end would do it now
                assert writes(there) == before
            assert changed[1] <= changed[0]
            state = await there.outcome()
            assert (state.end.sizes, state.end.ready) == ((SIZE,), SIZE)
            assert (state.created, state.deleted) == (2 * SIZE, SIZE)
            assert there.pods.least >= LEAST
            listed = await plane.api.get(f"/api/v1/namespaces/{there.namespace}/pods")
            assert all("sidecar:1" in images(pod) for pod in listed["items"])
            assert webhook.changed
            assert not there.events("fleet.foreign_change")

    on(plane, test, like=counted)
