"""Specs that the cluster cannot carry out: the rollout stops at its budget, says why, and going back heals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.faulty import LEAST, SIZE, Faulty, on, until
from tests.kube.world import spec

from agentfleet import Fleet, FleetSpec, RolloutFailed, RolloutPolicy, SpecError
from agentfleet.kubespec import EnvFrom, EnvSource, Volume
from agentfleet.testing.kube import ControlPlane
from agentfleet.testing.kube.behaviour import Behaviour

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NOWHERE = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "moon", "operator": "Exists"}]}]
        }
    }
}
WRONG: Mapping[str, Mapping[str, Any]] = {
    "node selector": {"node_selector": {"moon": "yes"}},
    "service account": {"service_account": "nobody"},
    "priority class": {"priority_class": "nothing"},
    "image": {"image": "agent:missing"},
    "secret": {"env": {"PASSWORD": EnvSource(secret="logins", key="password")}},
    "config map": {"env_from": (EnvFrom(config_map="words"),)},
    "storage": {"volumes": (Volume(name="data", path="/data", claim="disk"),)},
    "storage class": {"volumes": (Volume(name="data", path="/data", claim="classless"),)},
}
"""Options that the API server takes, and that no pod can be made or started with."""
WHY = {
    "node selector": "node affinity",
    "service account": "nobody",
    "priority class": "nothing",
    "image": "ImagePull",
    "secret": 'secret "logins" not found',
    "config map": 'configmap "words" not found',
    "storage": 'persistentvolumeclaim "disk" not found',
    "storage class": "unbound immediate PersistentVolumeClaims",
    "affinity": "node",
}
"""What an operator is told of each."""


def patient(**more: object) -> FleetSpec:
    """A fleet whose rollouts fail after a few seconds without progress, and stay as they are."""
    return spec(SIZE, rollout=RolloutPolicy(progress_deadline=8.0, **more))  # type: ignore[arg-type]


def changed(wanted: FleetSpec, **options: Any) -> FleetSpec:
    """The same fleet with other options."""
    assert wanted.template.kubernetes is not None
    kubernetes = wanted.template.kubernetes.replace(**options)
    return wanted.replace(template=wanted.template.replace(kubernetes=kubernetes))


async def claim_what_nobody_provides(there: Faulty) -> None:
    """A claim of a storage class that does not exist; the API server takes it, and it stays pending."""
    storage = {"requests": {"storage": "1Gi"}}
    claim = {"storageClassName": "nothing", "accessModes": ["ReadWriteOnce"], "resources": storage}
    path = f"/api/v1/namespaces/{there.namespace}/persistentvolumeclaims"
    await there.plane.api.post(path, {"metadata": {"name": "classless"}, "spec": claim})


async def stops_and_returns(there: Faulty, options: Mapping[str, Any], why: str) -> None:
    """An upgrade to such options fails within the budget, and the fleet ends as it was."""
    await there.kubelet.image("agent:missing", Behaviour(pull=None))
    await claim_what_nobody_provides(there)
    async with there.fleet(patient()) as fleet:
        await fleet.deploy(timeout=60)
        template = changed(patient(), **options).template
        before = await there.outcome()
        there.pods.begin()
        with pytest.raises(RolloutFailed, match=f"no progress.*{why}"):
            await fleet.upgrade(kubernetes=template.kubernetes, timeout=90)
        await fleet.ready(timeout=60)
        state = await there.outcome()
        assert there.pods.least >= LEAST
        assert state.end.template == before.end.template
        assert (state.end.sizes, state.end.ready) == ((SIZE,), SIZE)
        assert state.created - before.created <= 2 * 4, "surge and what was unavailable, there and back"


@pytest.mark.parametrize("what", WRONG)
def test_a_spec_that_no_pod_can_be_made_of_stops_at_the_budget_and_is_undone(plane: ControlPlane, what: str) -> None:
    """Scenario 24: no more than the budget is touched, and the fleet goes back by itself to what it was."""

    async def test(there: Faulty) -> None:
        await stops_and_returns(there, WRONG[what], WHY[what])

    on(plane, test)


def test_a_secret_that_comes_in_time_lets_the_rollout_go_on(plane: ControlPlane) -> None:
    """Scenario 24: the pods that waited for it start by themselves; none is made anew for it."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            there.pods.begin()
            needing = changed(spec(SIZE), **WRONG["secret"]).template
            await fleet.upgrade(kubernetes=needing.kubernetes, wait=False)
            await until(lambda: WHY["secret"] in {str(each.trouble).partition(": ")[2] for each in fleet.instances})
            secret = {"metadata": {"name": "logins"}, "stringData": {"password": "x"}}
            await plane.api.post(f"/api/v1/namespaces/{there.namespace}/secrets", secret)
            await until(lambda: {each.revision for each in fleet.instances} == {2})
            await fleet.ready(timeout=60)
            assert there.pods.least >= LEAST
            assert len(there.pods.created) == 2 * SIZE

    on(plane, test)


def test_an_affinity_that_no_node_satisfies_leaves_no_trace(plane: ControlPlane) -> None:
    """Scenario 24: as the others."""

    async def test(there: Faulty) -> None:
        await stops_and_returns(there, {"affinity": NOWHERE}, WHY["affinity"])

    on(plane, test)


def test_reverting_the_spec_by_hand_heals_too(plane: ControlPlane) -> None:
    """Scenarios 24, 26: nothing is rolled back by itself; deploying the spec from before is enough."""

    async def test(there: Faulty) -> None:
        good = patient(auto_rollback=False)
        async with there.fleet(good) as fleet:
            await fleet.deploy(timeout=60)
        there.pods.begin()
        async with there.fleet(changed(good, affinity=NOWHERE)) as fleet:
            with pytest.raises(RolloutFailed):
                await fleet.deploy(timeout=60)
        async with there.fleet(good) as fleet:
            await fleet.deploy(timeout=60)
            assert fleet.status()["good"] == SIZE
        assert there.pods.least >= LEAST
        state = await there.outcome()
        assert (state.end.sizes, state.end.ready) == ((SIZE,), SIZE)

    on(plane, test)


def test_a_field_that_cannot_change_is_refused_by_name_and_harms_nobody(plane: ControlPlane) -> None:
    """Scenarios 25, 26: another selector is refused by the server; the instances stay, and reverting is enough."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
        there.pods.begin()
        async with there.fleet(changed(spec(SIZE), selector={"app": "other"})) as fleet:
            await fleet.deploy(wait=False)
            await until(lambda: bool(there.events("action.failed")))
            (failed, *_) = there.events("action.failed")
            assert "selector" in str(failed.data)
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            assert fleet.status()["good"] == SIZE
            await fleet.upgrade("2", timeout=60)
        assert there.pods.least >= LEAST
        assert len(there.pods.created) <= 3 * SIZE

    on(plane, test)


def test_a_size_of_a_billion_is_refused_before_anybody_is_asked(plane: ControlPlane) -> None:
    """Scenario 26: the API server would take it; it is never told, and the size that is there can still be changed."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            before = await there.outcome()
            with pytest.raises(SpecError, match="replicas must be .* to 1,000,000"):
                await fleet.scale(10**9)
            await anyio.sleep(2)
            assert await there.outcome() == before
            await fleet.scale(SIZE + 2)
            await fleet.ready(timeout=60)
            assert len(there.pods.created) == SIZE + 2

    on(plane, test)


def test_a_fleet_that_is_to_be_smaller_than_its_work_ends_none_of_it(plane: ControlPlane) -> None:
    """Scenario 26: the idle go at once; of the busy as many as must get no more work, and end when theirs is done."""

    async def test(there: Faulty) -> None:
        wanted = spec(SIZE)
        await there.kubelet.image("agent:*", Behaviour(start=3.0))  # longer than a scale-down takes
        async with there.fleet(wanted.replace(template=wanted.template.replace(drain=120.0))) as fleet:
            await fleet.deploy(timeout=60)
            everybody = there.pods_of(fleet)
            busy, idle = everybody[2:], everybody[:2]
            await there.kubelet.busy(*busy)
            await until(lambda: fleet.status()["busy"] == len(busy))
            await fleet.scale(SIZE - 4)
            await until(lambda: not {*idle} & {*there.pods_of(fleet)})
            await until(lambda: fleet.status()["good"] == SIZE - 4)
            await anyio.sleep(3)  # nothing but their own work may end them
            work = {pod.name: pod.in_flight for pod in await there.kubelet.pods() if pod.name in everybody}
            assert work == dict.fromkeys(busy, 1)
            assert len(list(fleet.view.serving())) == SIZE - 4
            await there.kubelet.busy(*busy, in_flight=0)
            await fleet.ready(timeout=60)
            await until(lambda: len(there.pods_of(fleet)) == SIZE - 4)
            assert not await there.kubelet.killed_busy()
            assert len(there.pods.created) <= SIZE + 4, "a server without deletion costs begins others in their place"

    on(plane, test)


def test_of_two_specs_in_one_second_one_wins_whole(plane: ControlPlane) -> None:
    """Scenario 26: two upgrades at once, with another size: the last one is what runs, and nothing is half."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            there.pods.begin()

            async def lose(fleet: Fleet) -> None:
                with pytest.raises(RolloutFailed, match="another revision"):
                    await fleet.upgrade("2", timeout=60)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lose, fleet)
                await anyio.sleep(0.2)
                await fleet.upgrade("3", timeout=60)
            await until(lambda: {each.version for each in fleet.instances} == {"3"})
            await fleet.ready(timeout=60)
            assert there.pods.least >= LEAST
            assert len((await there.objects("deployments"))["deployments"]) == 1

    on(plane, test)
