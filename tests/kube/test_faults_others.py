"""What others do behind a manager's back, and an API server that answers all sorts of things."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.faulty import LEAST, SIZE, WRITES, WRITING, Faulty, deployed, on, until
from tests.kube.oracle import comes_to
from tests.kube.world import spec

from agentfleet import Fleet, MemoryJournal, RolloutFailed, RolloutPolicy
from agentfleet.errors import DeadlineExceeded
from agentfleet.signals.http import HttpClient, Response
from agentfleet.testing.kube import (
    ControlPlane,
    Fault,
    NoAnswer,
    Reset,
    SlowBody,
    TruncatedBody,
    html_502,
    status_answer,
)
from agentfleet.testing.kube.client import STRATEGIC

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ANSWERS: tuple[Fault, ...] = (
    html_502(),
    status_answer(429, retry_after=1),
    status_answer(409),
    status_answer(500),
    status_answer(503, retry_after=1),
    status_answer(503, done=True),
    SlowBody(size=400, pause=0.02),
    TruncatedBody(size=50),
    NoAnswer(done=True),
    NoAnswer(),
    Reset(),
)


def serving(fleet: Fleet) -> set[str]:
    """Who gets work."""
    return {member.instance.id for member in fleet.view.serving()}


async def all_run(fleet: Fleet, version: str) -> None:
    """All instances are of that version and good."""
    await until(lambda: {each.version for each in fleet.instances} == {version} and fleet.status()["good"] == SIZE)


def test_whatever_the_server_answers_the_upgrade_ends_once(plane: ControlPlane) -> None:
    """Scenarios 7, 21: web pages, 409, 429, 5xx, slow, broken and missing answers to writes, one upgrade each."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            there.pods.begin()
            for turn, fault in enumerate(ANSWERS, start=2):
                hit = there.proxy.inject(fault, method=WRITING, path=WRITES, times=2)
                await fleet.upgrade(str(turn), timeout=60)
                await all_run(fleet, str(turn))
                assert hit.hits == 2, fault
                assert len(there.pods.created) == SIZE * turn, fault
            assert there.pods.least >= LEAST

    on(plane, test)


def test_watches_and_lists_that_get_bad_answers_begin_again(plane: ControlPlane) -> None:
    """Scenario 21: all watches are cut, and the next attempts get web pages, 429, 500 and half a list."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            there.pods.begin()
            for fault in (html_502(), status_answer(429, retry_after=1), status_answer(410), TruncatedBody(100)):
                there.proxy.inject(fault, method="GET", path="/(pods|deployments)", times=2)
            there.proxy.cut()
            await fleet.upgrade("2", timeout=90)
            await all_run(fleet, "2")
            assert len(there.pods.created) == 2 * SIZE
            assert there.pods.least >= LEAST

    on(plane, test)


def test_a_server_that_refuses_everything_is_not_hammered(plane: ControlPlane) -> None:
    """Scenario 21: ten seconds of 500 to every write cost a few attempts, and then the wish is still known."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            there.proxy.forget_requests()
            trouble = there.proxy.inject(status_answer(500), method=WRITING, path=WRITES, times=None)
            await fleet.upgrade("2", wait=False)
            await anyio.sleep(10)
            assert 1 <= trouble.hits <= 40
            trouble.cancel()
            await all_run(fleet, "2")
            assert len(there.pods.created) == 2 * SIZE

    on(plane, test)


def test_a_full_quota_stops_a_rollout_and_harms_nobody(plane: ControlPlane) -> None:
    """Scenario 22: admission refuses the new pods; all old ones stay, the fleet returns, and later it works."""

    async def test(there: Faulty) -> None:
        policy = RolloutPolicy(progress_deadline=6.0, max_surge=2, max_unavailable=0)
        async with there.fleet(spec(SIZE, rollout=policy)) as fleet:
            await fleet.deploy(timeout=60)
            path = f"/api/v1/namespaces/{there.namespace}/resourcequotas"
            await plane.api.post(path, {"metadata": {"name": "full"}, "spec": {"hard": {"pods": str(SIZE)}}})
            await plane.api.wait(f"{path}/full", lambda seen: seen["status"].get("used", {}).get("pods") == str(SIZE))
            there.pods.begin()
            with pytest.raises(RolloutFailed):
                await fleet.upgrade("2", timeout=90)
            await all_run(fleet, "1")
            assert there.pods.least == SIZE
            assert len(there.pods.created) == SIZE
            await plane.api.delete(f"{path}/full")
            await fleet.upgrade("3", timeout=90)
            await all_run(fleet, "3")

    on(plane, test)


def test_a_replica_set_that_somebody_deletes_is_made_again(plane: ControlPlane) -> None:
    """Scenario 23: with its pods; the fleet is whole again, and nobody is blamed or replaced twice."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            sets = f"/apis/apps/v1/namespaces/{there.namespace}/replicasets"
            (name,) = (await there.objects("replicasets"))["replicasets"]
            await plane.api.delete(f"{sets}/{name}")
            await until(lambda: len(there.pods.deleted) == SIZE)
            await fleet.ready(timeout=60)
            await there.ends_as_without_faults(spare=SIZE)
            assert len(there.pods.created) == 2 * SIZE

    on(plane, test, like=deployed)


def test_a_deployment_that_somebody_deletes_is_made_again(plane: ControlPlane) -> None:
    """Scenarios 8, 23: the spec still wants the fleet, so it comes back, under the same name, with all its objects."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            assert there.wanted is not None
            await plane.api.delete(f"/apis/apps/v1/namespaces/{there.namespace}/deployments/agents")
            await until(lambda: len(there.pods.deleted) == SIZE)
            await comes_to(plane, there.namespace, there.wanted.end, seconds=20)
            await anyio.sleep(2)  # the garbage collector takes what names an owner that is gone
            await there.ends_as_without_faults(spare=SIZE)

    on(plane, test, like=deployed)


async def hotfix(there: Faulty) -> Any:
    """What `kubectl set image` does."""
    await anyio.sleep(1.1)  # the server dates writers in whole seconds
    path = f"/apis/apps/v1/namespaces/{there.namespace}/deployments/agents?fieldManager=kubectl"
    edit = {"spec": {"template": {"spec": {"containers": [{"name": "agent", "image": "agent:hotfix"}]}}}}
    return await there.plane.api.patch(path, edit, kind=STRATEGIC)


def test_a_template_that_somebody_edits_is_left_until_the_next_wish(plane: ControlPlane) -> None:
    """Scenario 23: kubectl set image is no tug-of-war: it holds, and the next upgrade wins."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            there.pods.begin()
            await hotfix(there)
            await until(lambda: len(there.pods.created) == 2 * SIZE and len(there.pods.good) == SIZE)
            await anyio.sleep(2)
            assert "agent:hotfix" in (await there.outcome()).end.template
            await fleet.upgrade("2", timeout=90)
            await all_run(fleet, "2")
            assert len(there.pods.created) == 3 * SIZE
            assert there.pods.least >= LEAST

    on(plane, test)


def test_a_template_that_somebody_edits_is_told(plane: ControlPlane) -> None:
    """Scenario 23: the journal says who has changed the template."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            await hotfix(there)
            await until(lambda: len(there.pods.created) == 2 * SIZE and len(there.pods.good) == SIZE)
            await anyio.sleep(2)
            (seen,) = there.events("fleet.foreign_change")
            assert (seen.data["by"], seen.data["what"]) == ("kubectl", "template")

    on(plane, test)


def test_two_managers_with_different_wishes_do_not_fight(plane: ControlPlane) -> None:
    """Scenarios 23, 31: a second manager, by mistake and with a journal of its own, wants another size."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as first:
            await first.deploy(timeout=60)
            there.journal, kept = MemoryJournal(), there.journal
            async with there.fleet(spec(SIZE + 2)) as second:
                await second.deploy(timeout=60)
                await until(lambda: first.status()["desired"] == SIZE + 2)
                there.proxy.forget_requests()
                await anyio.sleep(5)
                assert len(there.proxy.requests("PATCH", WRITES)) <= 2, "nobody writes against anybody"
                assert second.status()["desired"] == first.status()["desired"] == SIZE + 2
            there.journal = kept
            assert there.events("fleet.foreign_change")
            assert len(there.pods.created) == SIZE + 2

    on(plane, test, leases=False)


def test_a_node_that_comes_back_with_its_old_pods_changes_nothing(plane: ControlPlane) -> None:
    """Scenarios 20, 40: its pods were replaced meanwhile; the old ones end, and the fleet keeps its size and slots."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            node = fleet.instances[0].node
            assert node is not None
            old = {each.id for each in fleet.instances if each.node == node}
            await there.kubelet.node_gone(node, answering=True)
            await until(lambda: fleet.status()["good"] == SIZE and not old & serving(fleet), 90)
            await there.kubelet.node_back(node)
            await until(lambda: not old & {each.id for each in fleet.instances}, 60)
            await fleet.ready(timeout=60)
            slots = {member.instance.slot for member in fleet.view.members.values()}
            assert len(slots) == SIZE, "each has a slot of its own; the newcomers' may be above those of the old"
            assert there.wanted is not None
            await comes_to(plane, there.namespace, there.wanted.end)
            assert len(there.pods.created) - SIZE <= len(old) + 1

    on(plane, test, nodes=4, like=deployed)


def test_a_manager_that_reaches_no_agent_ends_hardly_any(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenario 29, the reverse: the API server is there and all pods are ready, but no agent answers this manager."""
    cut, request = [False], HttpClient.request

    async def asks(*arguments: Any, timeout: float, **options: Any) -> Response:
        if cut[0]:
            await anyio.sleep(timeout)
            raise DeadlineExceeded("no answer")
        return await request(*arguments, timeout=timeout, **options)

    monkeypatch.setattr(HttpClient, "request", asks)

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            there.pods.begin()
            cut[0] = True
            await until(lambda: bool(there.events("governor.frozen")))
            await anyio.sleep(15)
            assert len(there.pods.deleted) <= SIZE - LEAST, "at most the budget, before it is clear what is the matter"
            assert there.pods.least >= LEAST
            cut[0] = False
            await fleet.ready(timeout=90)
            await there.ends_as_without_faults(spare=SIZE - LEAST)

    on(plane, test, like=deployed)
