"""What is done to single pods on a real API server: isolated, evicted within the budget, and never a namesake."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.test_backend import on, until
from tests.kube.world import Cluster, spec

from agentfleet import Fleet, InstanceGone, MemoryJournal
from agentfleet.backends.kubernetes import naming, singles
from agentfleet.backends.kubernetes.errors import DisruptionBlocked
from agentfleet.backends.kubernetes.objects import Annotations, Meta, Pod
from agentfleet.backends.kubernetes.pods import instance_of
from agentfleet.instances import Isolation
from agentfleet.testing.kube import ControlPlane

SELECTOR = {"app.kubernetes.io/name": "agents", "app.kubernetes.io/instance": "agents"}


class Around:
    """What others see of a fleet."""

    def __init__(self, there: Cluster) -> None:
        self.api = there.plane.api
        self.space = f"/api/v1/namespaces/{there.namespace}"
        self.budget = f"/apis/policy/v1beta1/namespaces/{there.namespace}/poddisruptionbudgets/agents"

    async def pod(self, name: str) -> Any:
        return await self.api.get(f"{self.space}/pods/{name}")

    async def behind_service(self, holds: Callable[[set[str]], bool]) -> None:
        """Wait until the pods that the Service selects are as they should be.

        Its Endpoints stay empty here: they take no loopback addresses, which is what pods have on fake nodes.
        """
        selector = (await self.api.get(f"{self.space}/services/agents"))["spec"]["selector"]
        path = f"{self.space}/pods?labelSelector={naming.selector_text(selector)}"
        await self.api.wait(path, lambda found: holds({each["metadata"]["name"] for each in found["items"]}))

    async def allow(self, disruptions: int) -> None:
        """Change the fleet's budget behind its back; returns when the cluster has counted anew."""
        await self.api.patch(self.budget, {"spec": {"maxUnavailable": disruptions}})
        await self.api.wait(
            self.budget,
            lambda found: (
                found["status"].get("observedGeneration") == found["metadata"]["generation"]
                and found["status"].get("disruptionsAllowed") == disruptions
            ),
        )


def ids(fleet: Fleet) -> set[str]:
    return {instance.id for instance in fleet.instances}


# ------------------------------------------------------------------------------------------------ isolating


@pytest.mark.integration
@pytest.mark.slow
def test_an_isolated_pod_leaves_service_and_replica_set_and_stays(plane: ControlPlane) -> None:
    """Traffic leaves it, the ReplicaSet replaces it, it stays as it is until it is released; the size never moves."""

    async def test(there: Cluster) -> None:
        around = Around(there)
        async with there.fleet(spec(4)) as fleet:
            await fleet.deploy(timeout=60)
            odd = fleet.instances[0].id
            await around.behind_service(lambda names: len(names) == 4 and odd in names)
            uid = (await around.pod(odd))["metadata"]["uid"]
            await fleet.isolate(odd, reason="answers nonsense", keep="1h")
            assert odd not in fleet.endpoints()
            await until(lambda: len(fleet.instances) == 5 and fleet.status()["good"] == 4)
            await around.behind_service(lambda names: len(names) == 4 and odd not in names)
            pod = (await around.pod(odd))["metadata"]
            assert pod["uid"] == uid
            assert "ownerReferences" not in pod, "its ReplicaSet has let go of it"
            assert pod["labels"]["agentfleet.io/isolated"] == "true"
            assert pod["labels"]["app.kubernetes.io/name"] == "agents", "policies that select by it go on to hold"
            assert pod["annotations"]["agentfleet.io/isolated-reason"] == "answers nonsense"
            assert fleet.status()["desired"] == 4
            await fleet.scale(2)
            await until(lambda: fleet.status()["good"] == 2 and len(fleet.instances) == 3)
            assert odd in fleet.isolated
            await fleet.release(odd)
            await until(lambda: odd not in fleet.view.members)
            assert odd not in (await there.objects("pods"))["pods"]
            assert fleet.status()["good"] == 2
            assert not there.events("action.failed")

    on(plane, test)


@pytest.mark.integration
@pytest.mark.slow
def test_the_pod_itself_remembers_that_it_is_isolated(plane: ControlPlane) -> None:
    """A manager with an empty journal finds it isolated, with reason and expiry, ends it in time, and deletes all."""

    async def test(there: Cluster) -> None:
        async with there.fleet(spec(3)) as fleet:
            await fleet.deploy(timeout=60)
            first, second = (instance.id for instance in fleet.instances[:2])
            await fleet.isolate(first, reason="answers nonsense", keep=15)
            until_when = fleet.isolated[first].until
            await until(lambda: len(fleet.instances) == 4 and fleet.status()["good"] == 3)
            await fleet.isolate(second, reason="slow", keep=None)
            await until(lambda: len(fleet.instances) == 5 and fleet.status()["good"] == 3)
        there.journal = MemoryJournal()
        async with there.fleet(spec(3)) as fleet:
            await fleet.deploy(timeout=60)
            assert fleet.isolated[second] == Isolation(fleet.isolated[second].since, "slow", None)
            if first in fleet.isolated:  # else the takeover took longer than it had left
                assert fleet.isolated[first].until == pytest.approx(until_when, rel=0, abs=1e-3)
            await until(lambda: first not in fleet.view.members)
            assert second in fleet.isolated
            await fleet.delete(timeout=60)
        assert (await there.objects("pods"))["pods"] == []

    on(plane, test)


# ------------------------------------------------------------------------------------------------ ending


@pytest.mark.integration
@pytest.mark.slow
def test_a_ready_pod_is_ended_within_the_disruption_budget(plane: ControlPlane) -> None:
    """A used up budget keeps what works, and the error names it; what does not work it does not protect."""

    async def test(there: Cluster) -> None:
        around = Around(there)
        async with there.fleet(spec(4)) as fleet:
            await fleet.deploy(timeout=60)
            await around.allow(0)
            first, second = sorted(ids(fleet))[:2]
            with pytest.raises(DisruptionBlocked, match=r"budget agents.*Nothing was done; ask again"):
                await there.backend.stop("agents", first, grace=1.0)
            assert "deletionTimestamp" not in (await around.pod(first))["metadata"]
            await fleet.replace(first)
            await until(lambda: bool(there.events("action.failed")))
            (failed,) = there.events("action.failed")
            assert failed.data["error"] == "DisruptionBlocked"
            await until(lambda: first in fleet.endpoints())
            assert fleet.status()["good"] == 4, "it is back in service"

            await there.kubelet.unready(f"{there.namespace}/{second}")
            await until(lambda: not next(each for each in fleet.instances if each.id == second).ready)
            await there.backend.stop("agents", second, grace=1.0)
            await until(lambda: second not in fleet.view.members)
            await fleet.ready(timeout=60)

            await around.allow(1)
            await fleet.replace(first)
            await until(lambda: first not in fleet.view.members)
            await fleet.ready(timeout=60)

    on(plane, test)


@pytest.mark.integration
@pytest.mark.slow
def test_a_namesake_is_left_alone(plane: ControlPlane) -> None:
    """Whatever was decided on another pod of the same name is not done, and is told; ending it is then done already."""

    async def test(there: Cluster) -> None:
        around = Around(there)
        async with there.fleet(spec(2)) as fleet:
            await fleet.deploy(timeout=60)
            await around.allow(1)  # else it is the budget that keeps the pod
            name = min(ids(fleet))
            seen = there.backend._seen.pod(name)
            assert seen is not None
            other = "00000000-0000-0000-0000-000000000000"
            namesake = msgspec.structs.replace(seen, metadata=msgspec.structs.replace(seen.metadata, uid=other))
            apart = Isolation(since=0.0, reason="why")
            calls: list[tuple[Callable[[], Awaitable[None]], type[Exception]]] = [
                (lambda: singles.evict(there.connection, namesake, grace=1.0, minor=20), InstanceGone),
                (lambda: singles.delete(there.connection, namesake, grace=1.0), InstanceGone),
                (lambda: singles.isolate(there.connection, namesake, SELECTOR, apart), InstanceGone),
            ]
            for call, error in calls:
                with pytest.raises(error):
                    await call()
            await anyio.sleep(1)
            found = (await around.pod(name))["metadata"]
            assert found["uid"] == seen.metadata.uid
            assert "deletionTimestamp" not in found
            assert "agentfleet.io/isolated" not in found["labels"]
            with pytest.raises(InstanceGone):
                await there.backend.isolate("agents", "nobody", isolation=apart)
            await there.backend.stop("agents", "nobody", grace=1.0)

    on(plane, test)


# ------------------------------------------------------------------------------------------------ as pods are read


@pytest.mark.parametrize(
    ("labels", "notes", "isolation"),
    [
        ({}, None, None),
        ({naming.ISOLATED: "false"}, None, None),
        ({naming.ISOLATED: "true"}, None, Isolation(0.0, "")),
        (
            {naming.ISOLATED: "true"},
            Annotations(
                isolated_since="2026-11-05T11:00:00+00:00",
                isolated_until="2026-11-05T12:00:00.5Z",
                isolated_reason="slow",
            ),
            Isolation(1793876400.0, "slow", 1793880000.5),
        ),
        ({naming.ISOLATED: "true"}, Annotations(isolated_until="soon"), Isolation(0.0, "")),
    ],
)
def test_isolation_is_read_from_a_pod(
    labels: dict[str, str], notes: Annotations | None, isolation: Isolation | None
) -> None:
    pod = Pod(metadata=Meta(name="a", labels=labels, annotations=notes))
    assert instance_of(pod, "agents").isolated == isolation
