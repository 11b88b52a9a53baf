"""Managers that look at the past: what is there now is left alone, and nothing is done twice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.faulty import LEAST, SIZE, Faulty, deployed, impatient, on, resized, until, upgraded
from tests.kube.oracle import EndState, comes_to
from tests.kube.test_faults_operations import changed
from tests.kube.world import spec

from agentfleet.backends.kubernetes import backend, deploying
from agentfleet.backends.kubernetes.connection import Requests
from agentfleet.backends.kubernetes.sending import merge
from agentfleet.backends.kubernetes.standing import Standing, standing
from agentfleet.testing.kube import ControlPlane, drop_event

pytestmark = [pytest.mark.integration, pytest.mark.slow]

DEPLOYMENT_GONE = re.escape('"type":"DELETED","object":{"kind":"Deployment"')
POD_GONE = r'"type":"DELETED","object":\{"kind":"Pod"'


async def live(there: Faulty) -> list[Any]:
    """The pods that are not leaving, straight from the API server."""
    listed = await there.plane.api.get(f"/api/v1/namespaces/{there.namespace}/pods")
    return [each for each in listed["items"] if "deletionTimestamp" not in each["metadata"]]


def test_a_fleet_under_the_name_of_one_that_still_seems_to_be_there(plane: ControlPlane) -> None:
    """Scenarios 8, 11: the deletion of its namesake was never seen; what is made now is whole, and stays."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            unseen = there.proxy.inject(drop_event(DEPLOYMENT_GONE), times=None)
            await fleet.delete(timeout=60)
            await unseen.struck()
            await fleet.deploy(timeout=60)
            await comes_to(plane, there.namespace, _as_second(there), seconds=15)
            await anyio.sleep(3)  # the garbage collector takes what names an owner that is gone
            await comes_to(plane, there.namespace, _as_second(there), seconds=2)
            assert len(there.pods.created) == 2 * SIZE

    on(plane, test, like=deployed)


def _as_second(there: Faulty) -> EndState:
    """The same end, but for the number of the revision."""
    assert there.wanted is not None
    end = there.wanted.end
    template = end.template.replace('"agentfleet.io/revision": "1"', '"agentfleet.io/revision": "2"')
    names = '"name": "AGENTFLEET_REVISION", "value": '
    return replace(end, template=template.replace(f'{names}"1"', f'{names}"2"'))


def test_a_pod_that_took_the_name_of_another_is_not_ended_for_it(plane: ControlPlane) -> None:
    """Scenarios 8, 20: an action names the pod that it was decided on, not whoever has its name by now."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            victim = (await live(there))[0]
            name = victim["metadata"]["name"]
            path = f"/api/v1/namespaces/{there.namespace}/pods"
            await there.kubelet.unready(f"{there.namespace}/{name}")  # deleted, then, and not evicted
            await until(lambda: not fleet.view.members[name].instance.ready)
            there.proxy.inject(drop_event(f'"name":"{name}"'), times=None)
            body = {"gracePeriodSeconds": 0, "preconditions": {"uid": victim["metadata"]["uid"]}}
            await there.plane.api.delete(f"{path}/{name}", body)
            kept = ("name", "labels", "annotations")
            meta = {key: victim["metadata"][key] for key in kept if key in victim["metadata"]}
            meta["labels"] = {key: value for key, value in meta["labels"].items() if key != "pod-template-hash"}
            second = await there.plane.api.post(path, {"metadata": meta, "spec": victim["spec"]})
            assert second["metadata"]["uid"] != victim["metadata"]["uid"]
            await there.backend.stop("agents", name, grace=0)
            await anyio.sleep(1)
            (found,) = [each for each in await live(there) if each["metadata"]["name"] == name]
            assert found["metadata"]["uid"] == second["metadata"]["uid"]

    on(plane, test)


def test_a_manager_that_sees_everything_late_does_nothing_twice(plane: ControlPlane) -> None:
    """Scenarios 9, 12: it grows and shrinks a fleet while its own writes come back half a second late."""

    async def test(there: Faulty) -> None:
        async def delay(fleet: object) -> None:
            del fleet
            there.proxy.delay(0.25)  # each way

        await resized(there, delay)
        there.proxy.delay(0)
        await there.ends_as_without_faults()

    on(plane, test, like=resized)


def test_a_manager_that_has_missed_another_ones_rollout_does_not_undo_it(plane: ControlPlane) -> None:
    """Scenarios 10, 31: the first manager was blind while a second one upgraded; sighted again, it gives way."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as first:
            await first.deploy(timeout=60)
            there.pods.begin()
            there.proxy.half_open()
            await there.proxy.heal()  # what was open stays silent, new connections work
            async with there.fleet(spec(SIZE)) as second:
                await second.upgrade("2", timeout=60)
            there.proxy.cut()
            await until(lambda: {each.version for each in first.instances} == {"2"})
            await until(lambda: bool(there.events("fleet.foreign_change")))
            await anyio.sleep(2)
            await there.ends_as_without_faults()
            assert there.pods.least >= LEAST

    on(plane, test, leases=False, like=upgraded)


def test_an_upgrade_waits_for_a_size_that_was_not_seen_yet(plane: ControlPlane) -> None:
    """Scenarios 10, 23: somebody scales while the manager is blind; an upgrade does not undo that."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            there.proxy.half_open()
            await there.proxy.heal()  # what was open stays silent, new connections work
            path = f"/apis/apps/v1/namespaces/{there.namespace}/deployments/agents/scale"
            await plane.api.patch(f"{path}?fieldManager=kubectl", {"spec": {"replicas": SIZE + 3}})
            await fleet.upgrade("2", wait=False)
            await until(lambda: len(there.pods.good) == SIZE + 3)
            await anyio.sleep(2)
            there.proxy.cut()
            await until(lambda: {each.version for each in fleet.instances} == {"2"}, 90)
            await fleet.ready(timeout=60)
            assert fleet.status()["desired"] == SIZE + 3
            state = await there.outcome()
            assert (state.end.sizes, state.end.ready) == ((SIZE + 3,), SIZE + 3)
            assert '"agent:2"' in state.end.template

    on(plane, test)


@pytest.mark.parametrize("leases", [True, False])
def test_a_size_that_is_set_between_the_look_and_the_write_is_not_undone(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, leases: bool
) -> None:
    """Scenarios 10, 23: an upgrade looks at the size, somebody scales, and only then the upgrade is written."""
    scaled: list[int] = []

    async def test(there: Faulty) -> None:
        async def look(connection: Requests, namespace: str, fleet: str) -> Standing | None:
            found = await standing(connection, namespace, fleet)
            if armed and not scaled:
                scaled.append(SIZE + 3)
                path = f"/apis/apps/v1/namespaces/{there.namespace}/deployments/agents/scale"
                await plane.api.patch(f"{path}?fieldManager=kubectl", {"spec": {"replicas": SIZE + 3}})
            return found

        armed = False
        monkeypatch.setattr(backend, "standing", look)
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            armed = True
            await fleet.upgrade("2", timeout=90)
            assert scaled
            await until(lambda: {each.version for each in fleet.instances} == {"2"}, 90)
            await fleet.ready(timeout=60)
            assert fleet.status()["desired"] == SIZE + 3
            state = await there.outcome()
            assert (state.end.sizes, state.end.ready) == ((SIZE + 3,), SIZE + 3)
            assert "Outdated" in {event.data["error"] for event in there.events("action.failed")}

    on(plane, test, leases=leases)


SOMEWHERE = {
    "nodeAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 1, "preference": {"matchExpressions": [{"key": "moon", "operator": "Exists"}]}}
        ]
    }
}


@pytest.mark.parametrize("leases", [True, False])
@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_size_that_is_set_while_an_affinity_is_taken_away_leaves_no_fleet_paused(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, leases: bool, moment: str
) -> None:
    """Scenarios 10, 23: it takes two writes, and somebody scales before them, or between them."""
    struck: list[int] = []

    async def test(there: Faulty) -> None:
        async def strike() -> None:
            if armed and not struck:
                struck.append(SIZE + 3)
                path = f"/apis/apps/v1/namespaces/{there.namespace}/deployments/agents/scale"
                await plane.api.patch(f"{path}?fieldManager=kubectl", {"spec": {"replicas": SIZE + 3}})

        async def clear(to: Requests, path: str, patch: Mapping[str, Any]) -> bytes:
            if moment == "before":
                await strike()
            elif armed and not struck:  # what is put back is seen later than the half order, as when watches are slow
                there.proxy.inject(drop_event(r'"type":"MODIFIED","object":\{"kind":"Deployment".*"moon"'))
            answer = await merge(to, path, patch)
            await strike()
            return answer

        armed, wanted = False, spec(SIZE)
        monkeypatch.setattr(deploying, "merge", clear)
        async with there.fleet(changed(wanted, affinity=SOMEWHERE)) as fleet:
            await fleet.deploy(timeout=60)
            there.pods.begin()
            armed = True
            await fleet.upgrade(kubernetes=wanted.template.kubernetes, timeout=90)
            assert struck
            await until(lambda: {each.revision for each in fleet.instances} == {2}, 90)
            await fleet.ready(timeout=60)
            assert fleet.status()["desired"] == SIZE + 3
            state = await there.outcome()
            assert (state.end.sizes, state.end.ready) == ((SIZE + 3,), SIZE + 3)
            assert "affinity" not in state.end.template
            assert "Outdated" in {event.data["error"] for event in there.events("action.failed")}
            assert {event.data["what"] for event in there.events("fleet.foreign_change")} == {"scaled"}
            assert len((await there.objects("replicasets"))["replicasets"]) == 2, "none of what was half said"

    on(plane, test, leases=leases)


def test_an_event_that_was_lost_is_made_up_for_by_the_next_list(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenarios 9, 16: pods whose end was never seen hold up neither a shrinking nor a growing fleet for ever."""
    impatient(monkeypatch, relist_every=4.0)

    async def test(there: Faulty) -> None:
        async def lose(fleet: object) -> None:
            del fleet
            there.proxy.inject(drop_event(POD_GONE), times=None)
            there.proxy.inject(drop_event('"type":"ADDED","object":{"kind":"Pod"'.replace("{", r"\{")), times=3)

        await resized(there, lose)
        await there.ends_as_without_faults()

    on(plane, test, like=resized)
