"""Instances that are replaced away from their nodes, on a real control plane with its own scheduler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.faulty import Faulty, on, until
from tests.kube.test_fencing import Passing
from tests.kube.world import HEALTH, spec

from agentfleet import Fleet, FleetSpec, NotLeader, RecoveryPolicy, RolloutPolicy
from agentfleet.backends.kubernetes import KubernetesBackend, naming, standins
from agentfleet.backends.kubernetes.guard import Guard
from agentfleet.backends.kubernetes.resources import DEPLOYMENTS, PODS
from agentfleet.specs import Backoff
from agentfleet.testing.kube import ApiRefused, Behaviour, ControlPlane, NoAnswer, Reset

pytestmark = [pytest.mark.integration, pytest.mark.slow]

AWAY = RecoveryPolicy(
    restarts=0, replacements=1, elsewhere=1, cooldown=1.0, settle=10.0, backoff=Backoff(initial=0.5, limit=2.0)
)
"""The second attempt goes away from the node."""
AT_ONCE = AWAY.replace(replacements=0)
SIZE = 3
STAND_INS = f"labelSelector={naming.STAND_IN}%3Dtrue"


SOON = HEALTH.replace(startup=5.0)
"""So that a manager that takes over does not wait for long whether one that does not answer is only starting."""


def wanted(recovery: RecoveryPolicy = AWAY, **more: object) -> FleetSpec:
    given: dict[str, Any] = {"recovery": recovery, "health": SOON, **more}
    return spec(SIZE, **given)


async def pods(there: Faulty, query: str = "") -> dict[str, Any]:
    """What there is, by name, but for what leaves."""
    found = await there.plane.api.get(f"{PODS.path(there.namespace)}?{query}")
    return {each["metadata"]["name"]: each for each in found["items"] if "deletionTimestamp" not in each["metadata"]}


async def stand_in(there: Faulty) -> Any:
    """The one that is made, once it is there."""
    with anyio.fail_after(60):
        while not (found := await pods(there, STAND_INS)):  # noqa: ASYNC110 - it has no event
            await anyio.sleep(0.1)
    (only,) = found.values()
    return only


async def none_left(
    there: Faulty, *, size: int = SIZE, seconds: float = 30.0, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Wait until there are so many pods, all of them of a ReplicaSet, and some are gone."""
    found: dict[str, Any] = {}
    with anyio.move_on_after(seconds):
        while True:
            found = await pods(there, f"labelSelector={naming.FLEET}%3Dagents")
            owned = [each for each in found.values() if "ownerReferences" in each["metadata"]]
            kinds = [each["metadata"]["ownerReferences"][0]["kind"] for each in owned]
            if kinds == ["ReplicaSet"] * size == ["ReplicaSet"] * len(found) and found.keys().isdisjoint(without):
                return found
            await anyio.sleep(0.2)
    told = ("labels", "annotations", "ownerReferences")
    raise AssertionError({name: [each["metadata"].get(key) for key in told] for name, each in found.items()})


async def fill(there: Faulty, *nodes: int, cpu: str) -> None:
    """Put something on nodes that takes so much of their 64 CPUs, in a namespace of its own."""
    space = await there.plane.namespace()
    for node in nodes:
        takes = {"requests": {"cpu": cpu, "memory": "200Gi"}}
        container = {"name": "filler", "image": "filler:1", "resources": takes}
        said = {"nodeName": f"node-{node}", "containers": [container]}
        await there.plane.api.post(PODS.path(space), {"metadata": {"generateName": "filler-"}, "spec": said})


def on_node(fleet: Fleet, node: str) -> list[str]:
    return sorted(each.id for each in fleet.instances if each.node == node)


async def sicken(there: Faulty, fleet: Fleet, id: str) -> None:
    """It answers nobody any more, neither its manager nor its kubelet."""
    await there.kubelet.hang(f"{there.namespace}/{id}")
    await there.kubelet.unready(f"{there.namespace}/{id}")
    await until(lambda: id not in fleet.endpoints())


# ------------------------------------------------------------------------------------------------ it is done


def test_one_that_is_sick_again_and_again_on_a_node_is_replaced_on_another(plane: ControlPlane) -> None:
    """A plain replacement comes back to the emptiest node; the next one does not, and no pod is made in vain."""

    async def test(there: Faulty) -> None:
        await fill(there, 1, 2, cpu="50")
        async with there.fleet(wanted()) as fleet:
            await fleet.deploy(timeout=60)
            first = on_node(fleet, "node-0")[0]
            before = {each.id for each in fleet.instances}
            await sicken(there, fleet, first)
            await until(lambda: {each.id for each in fleet.instances} - before != set())
            (second,) = {each.id for each in fleet.instances} - before
            await until(lambda: second in fleet.endpoints() and first not in fleet.view.members)
            assert second in on_node(fleet, "node-0"), "the scheduler likes this node best"
            slot = fleet.view.members[second].instance.slot
            made, others = len(there.pods.created), {each.id for each in fleet.instances} - {second}
            await sicken(there, fleet, second)
            there.pods.begin()
            await until(lambda: bool(there.events("elsewhere.ready")), 120)
            (ready,) = there.events("elsewhere.ready")
            third = ready.data["by"]
            await until(lambda: third in fleet.endpoints() and second not in fleet.view.members)
            found = await none_left(there)
            assert set(found) == others | {third}
            assert found[third]["spec"]["nodeName"] != "node-0"
            assert fleet.view.members[third].instance.slot == slot, "its place, and its history"
            assert naming.STAND_IN not in found[third]["metadata"]["labels"]
            labels = [{**each["metadata"]["labels"]} for each in found.values()]
            assert all(each == labels[0] for each in labels)
            assert len(there.pods.created) == made + 1, "the ReplicaSet has made none of its own"
            assert there.pods.least >= SIZE - 1, "none but the sick one was ever missing"
            assert not there.events("action.failed")
            await fleet.scale(SIZE + 1)
            await fleet.ready(timeout=60)
            await fleet.upgrade("2", timeout=60)
            await none_left(there, size=SIZE + 1)

    on(plane, test)


def test_an_operator_has_one_that_works_replaced_elsewhere(plane: ControlPlane) -> None:
    """It serves until the other is ready; not even a budget of nothing is touched. The size is never missed."""

    async def test(there: Faulty) -> None:
        await fill(there, 1, 2, cpu="50")
        await there.kubelet.image("agent:*", Behaviour(start=1.0))
        async with there.fleet(wanted()) as fleet:
            await fleet.deploy(timeout=60)
            id = on_node(fleet, "node-0")[0]
            there.pods.begin()
            await fleet.replace(id, elsewhere=True)
            made = await stand_in(there)
            assert id in fleet.endpoints()
            assert made["metadata"]["name"] not in {each.id for each in fleet.instances}
            assert fleet.status()["good"] == SIZE
            selector = naming.selector_text((await deployment(there))["spec"]["selector"]["matchLabels"])
            assert made["metadata"]["name"] not in await pods(there, f"labelSelector={selector.replace('=', '%3D')}")
            await until(lambda: made["metadata"]["name"] in fleet.endpoints() and id not in fleet.view.members)
            found = await none_left(there)
            assert found[made["metadata"]["name"]]["spec"]["nodeName"] != "node-0"
            assert there.pods.least == SIZE
            assert not there.events("action.failed")

    on(plane, test)


async def deployment(there: Faulty) -> Any:
    return await there.plane.api.get(DEPLOYMENTS.path(there.namespace, "agents"))


def test_several_are_exchanged_at_once(plane: ControlPlane) -> None:
    """Each for its own: the ReplicaSet, which knows nothing of that, ends none of the others in between."""

    async def test(there: Faulty) -> None:
        recovery = AT_ONCE.replace(max_disrupted=4, freeze_below=0.0)
        async with there.fleet(spec(8, recovery=recovery)) as fleet:
            await fleet.deploy(timeout=60)
            sick = sorted(each.id for each in fleet.instances)[:4]
            before = {id: fleet.view.members[id].instance for id in sick}
            well = {each.id for each in fleet.instances} - set(sick)
            await there.kubelet.image("agent:*", Behaviour(start=1.0))  # no container runs in an instant
            await there.kubelet.unready(*(f"{there.namespace}/{id}" for id in sick))
            await there.kubelet.hang(*(f"{there.namespace}/{id}" for id in sick))
            await until(lambda: len(there.events("elsewhere.ready")) == 4, 120)
            await until(lambda: len(fleet.endpoints()) == 8)
            new = {each.data["by"] for each in there.events("elsewhere.ready")}
            assert set(await none_left(there, size=8)) == well | new
            for event in there.events("elsewhere.ready"):
                assert event.instance is not None
                instance = fleet.view.members[event.data["by"]].instance
                assert instance.slot == before[event.instance].slot
                assert instance.node != before[event.instance].node

    on(plane, test)


@pytest.mark.parametrize("skip", [0, 1], ids=["of the stand-in", "of the exchange"])
def test_an_answer_that_is_lost(plane: ControlPlane, skip: int) -> None:
    """What was done is not done twice: a second stand-in is ended, an exchange goes on."""

    async def test(there: Faulty) -> None:
        async with there.fleet(wanted(AT_ONCE)) as fleet:
            await fleet.deploy(timeout=60)
            sick = fleet.instances[0].id
            await there.kubelet.image("agent:*", Behaviour(start=1.0))
            there.proxy.inject(Reset(done=True), method="POST|PATCH", path=r"/pods(/[^/]+)?(\?|$)", skip=skip)
            await sicken(there, fleet, sick)
            await until(lambda: sick not in fleet.view.members and len(fleet.endpoints()) == SIZE)
            found = await none_left(there)
            ready = there.events("elsewhere.ready")[-1]
            assert found[ready.data["by"]]["spec"]["nodeName"] != ready.data["node"]

    on(plane, test)


# ------------------------------------------------------------------------------------------------ it cannot be done


@pytest.mark.parametrize("asked", [False, True], ids=["by recovery", "by an operator"])
def test_where_no_other_node_has_room(plane: ControlPlane, asked: bool) -> None:
    """Recovery takes what room there is, an operator is told; nothing is left of the attempt."""

    async def test(there: Faulty) -> None:
        await fill(there, 1, cpu="64")
        async with there.fleet(wanted(AT_ONCE)) as fleet:
            await fleet.deploy(timeout=60)
            id = on_node(fleet, "node-0")[0]
            if asked:
                await fleet.replace(id, elsewhere=True)
            else:
                await sicken(there, fleet, id)
            await until(lambda: bool(there.events("elsewhere.failed")), 60)
            (failed,) = there.events("elsewhere.failed")
            assert failed.instance == id
            assert failed.data["then"] == ("kept" if asked else "replaced")
            assert "nodes are available" in failed.reasons[0]["text"]
            await fleet.ready(timeout=60)
            await none_left(there)
            await until(lambda: len(fleet.endpoints()) == SIZE)
            assert (id in fleet.view.members) is asked
            assert {each.node for each in fleet.instances} == {"node-0"}

    on(plane, test, nodes=2)


def test_one_that_does_not_become_ready_in_time(plane: ControlPlane) -> None:
    async def test(there: Faulty) -> None:
        soon = RolloutPolicy(progress_deadline=15.0)
        async with there.fleet(wanted(AT_ONCE, rollout=soon)) as fleet:
            await fleet.deploy(timeout=60)
            id = fleet.instances[0].id
            await there.kubelet.image("agent:*", Behaviour(ready=None))
            await sicken(there, fleet, id)
            await stand_in(there)
            await there.kubelet.image("agent:*", None)
            await until(lambda: bool(there.events("elsewhere.failed")), 60)
            assert there.events("elsewhere.failed")[0].reasons[0]["code"] == "elsewhere.late"
            await until(lambda: id not in fleet.view.members and len(fleet.endpoints()) == SIZE)
            await none_left(there)

    on(plane, test)


def test_a_template_that_names_its_node(plane: ControlPlane) -> None:
    """It cannot be kept away from there: it is refused before anything is made."""

    async def test(there: Faulty) -> None:
        plain = wanted(AT_ONCE)
        kubernetes = plain.template.kubernetes
        assert kubernetes is not None
        bound = kubernetes.replace(raw={"spec": {"nodeName": "node-0"}})
        async with there.fleet(plain.replace(template=plain.template.replace(kubernetes=bound))) as fleet:
            await fleet.deploy(timeout=60)
            await fleet.replace(fleet.instances[0].id, elsewhere=True)
            await until(lambda: bool(there.events("elsewhere.failed")))
            assert "nodeName" in there.events("elsewhere.failed")[0].reasons[0]["text"]
            assert len(there.pods.created) == SIZE

    on(plane, test)


# ------------------------------------------------------------------------------------------------ meanwhile


async def _scaled(fleet: Fleet) -> int:
    await fleet.scale(SIZE - 1)
    return SIZE - 1


async def _upgraded(fleet: Fleet) -> int:
    await fleet.upgrade("2", wait=False)
    return SIZE


async def _stopped(fleet: Fleet) -> int:
    await fleet.stop(timeout=60)
    return 0


async def _deleted(fleet: Fleet) -> int:
    await fleet.delete(timeout=60)
    return 0


@pytest.mark.parametrize("act", [_scaled, _upgraded, _stopped, _deleted])
def test_what_is_wanted_otherwise_meanwhile_leaves_nothing(
    plane: ControlPlane, act: Callable[[Fleet], Awaitable[int]]
) -> None:
    async def test(there: Faulty) -> None:
        async with there.fleet(wanted(AT_ONCE)) as fleet:
            await fleet.deploy(timeout=60)
            sick = fleet.instances[0].id
            await there.kubelet.image("agent:1", Behaviour(start=60.0))
            await sicken(there, fleet, sick)
            made = (await stand_in(there))["metadata"]["name"]
            size = await act(fleet)
            await none_left(there, size=size, without=(made, sick))
            assert not there.events("action.failed")

    on(plane, test)


def test_a_stand_in_that_changes_all_the_time_is_ended_all_the_same(plane: ControlPlane) -> None:
    """A deletion is meant for the version that was seen, so it is tried on those that come."""

    async def test(there: Faulty) -> None:
        async with there.fleet(wanted(AT_ONCE)) as fleet, anyio.create_task_group() as tasks:
            await fleet.deploy(timeout=60)
            await there.kubelet.image("agent:1", Behaviour(start=60.0))
            await sicken(there, fleet, fleet.instances[0].id)
            made = (await stand_in(there))["metadata"]

            async def change() -> None:
                with suppress(ApiRefused):  # it is gone
                    for number in range(1000):
                        notes = {"metadata": {"annotations": {"number": str(number)}}}
                        await there.plane.api.patch(PODS.path(there.namespace, made["name"]), notes)
                        await anyio.sleep(0.05)

            tasks.start_soon(change)
            await fleet.upgrade("2", wait=False)
            await until(lambda: made["uid"] in there.pods.deleted)
            tasks.cancel_scope.cancel()
            assert not there.events("action.failed")

    on(plane, test)


def test_an_instance_that_is_gone_needs_none(plane: ControlPlane) -> None:
    async def test(there: Faulty) -> None:
        async with there.fleet(wanted(AT_ONCE)) as fleet:
            await fleet.deploy(timeout=60)
            sick = fleet.instances[0].id
            await there.kubelet.image("agent:*", Behaviour(start=5.0))
            await sicken(there, fleet, sick)
            made = (await stand_in(there))["metadata"]["name"]
            await there.plane.api.delete(PODS.path(there.namespace, sick), {"gracePeriodSeconds": 0})
            await until(lambda: bool(there.events("elsewhere.called_off")))
            await until(lambda: len(fleet.endpoints()) == SIZE)
            assert made not in await none_left(there)

    on(plane, test)


def test_a_stand_in_that_somebody_deletes(plane: ControlPlane) -> None:
    async def test(there: Faulty) -> None:
        async with there.fleet(wanted(AT_ONCE)) as fleet:
            await fleet.deploy(timeout=60)
            sick = fleet.instances[0].id
            await there.kubelet.image("agent:*", Behaviour(start=3.0))
            await sicken(there, fleet, sick)
            made = (await stand_in(there))["metadata"]["name"]
            await there.plane.api.delete(PODS.path(there.namespace, made), {"gracePeriodSeconds": 0})
            await until(lambda: bool(there.events("elsewhere.failed")))
            await until(lambda: sick not in fleet.view.members and len(fleet.endpoints()) == SIZE)
            await none_left(there)

    on(plane, test)


# ------------------------------------------------------------------------------------------------ managers


async def killed(there: Faulty, *, when: Callable[[Fleet], Awaitable[None]]) -> str:
    """A manager that ends amid it, without a word; returns whom it wanted to replace."""
    ids: list[str] = []
    async with anyio.create_task_group() as tasks:

        async def live() -> None:
            async with there.fleet(wanted(AT_ONCE)) as fleet:
                await fleet.deploy(timeout=60)
                ids.append(fleet.instances[0].id)
                await there.kubelet.image("agent:*", Behaviour(start=3.0))
                await sicken(there, fleet, ids[0])
                await when(fleet)
                tasks.cancel_scope.cancel()

        tasks.start_soon(live)
    return ids[0]


def test_what_a_killed_manager_leaves_the_next_one_ends(plane: ControlPlane) -> None:
    async def test(there: Faulty) -> None:
        async def made(_: Fleet) -> None:
            await stand_in(there)

        sick = await killed(there, when=made)
        left = (await stand_in(there))["metadata"]["name"]
        async with there.fleet(wanted(AT_ONCE)) as fleet:
            await until(lambda: len(fleet.endpoints()) == SIZE and sick not in fleet.view.members, 120)
            assert left not in await none_left(there)

    on(plane, test)


@pytest.mark.parametrize("done", [True, False])
def test_a_manager_that_ends_amid_the_exchange(plane: ControlPlane, done: bool) -> None:
    """Before the stand-in is in its place, or between that and the end of the other."""

    async def test(there: Faulty) -> None:
        async def exchanging(_: Fleet) -> None:
            hit = there.proxy.inject(NoAnswer(done=done), method="PATCH", path=r"/pods/[^/]+(\?|$)")
            await hit.struck(timeout=120)

        sick = await killed(there, when=exchanging)
        async with there.fleet(wanted(AT_ONCE)) as fleet:
            await until(lambda: len(fleet.endpoints()) == SIZE and sick not in fleet.view.members, 120)
            await none_left(there)

    on(plane, test)


@asynccontextmanager
async def deposed(there: Faulty) -> AsyncIterator[tuple[KubernetesBackend, str, str]]:
    """A manager's hands, an instance, and a stand-in that it has made. Another leads since and has said so."""
    await there.kubelet.image("agent:*", Behaviour(stop=60.0))  # what ends is there for a while
    async with there.fleet(wanted(AT_ONCE)) as fleet:
        await fleet.deploy(timeout=60)
        id = fleet.instances[0].id
    async with KubernetesBackend(there.connection, namespace=there.namespace) as backend:
        await backend._seen.wait_synced()
        backend.fenced("agents", Passing(1))  # as of a process that was stopped after its last check
        await backend.stand_in("agents", id, away_from="node-0")
        made = (await stand_in(there))["metadata"]["name"]
        await until(lambda: (pod := backend._seen.pod(made)) is not None and pod.ready)
        await Guard(there.connection, there.namespace, "agents", Passing(2)).check()
        yield backend, id, made


def test_a_deposed_manager_exchanges_nothing(plane: ControlPlane) -> None:
    """Nor does it make another stand-in. The one that it has made waits until the next leader ends it."""

    async def test(there: Faulty) -> None:
        async with deposed(there) as (backend, id, made):
            with pytest.raises(NotLeader, match="in epoch 2 by now"):
                await backend.exchange("agents", id, made, grace=1.0)
            with pytest.raises(NotLeader, match="in epoch 2 by now"):
                await backend.stand_in("agents", id, away_from="node-0")
            assert set(await pods(there, STAND_INS)) == {made}
            assert id in await pods(there)
        async with there.fleet(wanted(AT_ONCE)) as fleet:
            assert made not in await none_left(there)
            assert id in fleet.view.members

    on(plane, test)


def test_a_manager_that_was_stopped_amid_the_exchange_finds_the_stand_in_ended(plane: ControlPlane) -> None:
    """The late write comes upon another version, so it is asked who leads."""

    async def test(there: Faulty) -> None:
        async with deposed(there) as (backend, id, made):
            pod, seen = backend._found("agents", id), backend._found("agents", made)
            owner = standins._replica_set(pod)
            await there.plane.api.delete(PODS.path(there.namespace, made))  # as the next leader does
            late = Guard(there.connection, there.namespace, "agents", Passing(1), pod={made: seen}.get)
            late._known = dict.fromkeys(late._parts.values())  # it has not looked since
            with pytest.raises(NotLeader, match="in epoch 2 by now"):
                await standins._take_place(late, pod, seen, backend._selector("agents"), owner)
            found = await there.plane.api.get(PODS.path(there.namespace, made))
            assert naming.STAND_IN in found["metadata"]["labels"]
            assert found["metadata"]["ownerReferences"][0]["kind"] == "Deployment"

    on(plane, test)


def test_a_stand_in_that_comes_late_is_ended_by_who_leads(plane: ControlPlane) -> None:
    """The request of a manager that was stopped is carried out while the next one leads."""

    async def test(there: Faulty) -> None:
        async with there.fleet(wanted(AT_ONCE)) as fleet:
            await fleet.deploy(timeout=60)
            await there.backend.stand_in("agents", fleet.instances[0].id, away_from="node-0")
            await until(lambda: len(there.pods.created) == SIZE + 1)
            await none_left(there)
            assert len(fleet.endpoints()) == SIZE

    on(plane, test)
