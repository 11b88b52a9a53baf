"""Kubernetes Events on a real API server: taken, counted, and found where `kubectl describe` looks."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.test_backend import on, until
from tests.kube.world import Cluster, spec

from agentfleet.testing.kube import ControlPlane

pytestmark = [pytest.mark.integration, pytest.mark.slow]


async def told(there: Cluster, kind: str, name: str, uid: str) -> dict[str, dict[str, Any]]:
    """The Events of one object by reason, asked for as `kubectl describe` does."""
    about = {"involvedObject.kind": kind, "involvedObject.name": name, "involvedObject.uid": uid}
    fields = ",".join(f"{field}={value}" for field, value in about.items())
    listed = await there.plane.api.get(f"/api/v1/namespaces/{there.namespace}/events?fieldSelector={fields}")
    return {each["reason"]: each for each in listed["items"] if each.get("reportingComponent") == "agentfleet"}


def test_actions_are_events_of_their_objects(plane: ControlPlane) -> None:
    """The Deployment's are told from its first deployment on, a pod's on the pod; a repeat is counted."""

    async def test(there: Cluster) -> None:
        async with there.fleet(spec(3)) as fleet:
            await fleet.deploy(timeout=60)
            await fleet.scale(4)
            await fleet.ready(timeout=60)
            for _ in range(3):
                await fleet.pause()
                await fleet.resume()
            victim = fleet.instances[0].id
            pods = f"/api/v1/namespaces/{there.namespace}/pods"
            uid = (await there.plane.api.get(f"{pods}/{victim}"))["metadata"]["uid"]
            await there.kubelet.crash(f"{there.namespace}/{victim}")
            await until(lambda: bool(there.events("instance.exited")))
            await until(lambda: there.backend.announced.written >= 5 and there.backend.announced.counted >= 4)
            path = f"/apis/apps/v1/namespaces/{there.namespace}/deployments/agents"
            deployment = await there.plane.api.get(path)
            seen = await told(there, "Deployment", "agents", deployment["metadata"]["uid"])
            assert seen["Deployed"]["message"] == "3 instances of revision 1 are wanted"
            assert seen["Scaled"]["message"].startswith("size 3 becomes 4, by operator")
            assert seen["Paused"]["count"] == seen["Resumed"]["count"] == 3
            assert seen["Deployed"]["type"] == "Normal"
            assert seen["Deployed"]["eventTime"]
            with anyio.fail_after(20):
                while "Exited" not in await told(there, "Pod", victim, uid):  # noqa: ASYNC110 - it has no event
                    await anyio.sleep(0.1)
            exited = (await told(there, "Pod", victim, uid))["Exited"]
            assert exited["type"] == "Warning"
            assert exited["reportingInstance"]
            assert not there.backend.announced.lost

    on(plane, test)
