"""Events that never came, came twice or late, and a control plane that stops: the level counts, not the edges.

A leader whose lease cannot be renewed for long enough ends its term, and with it what its callers wait for. So where
the whole control plane is away for that long, the manager is one that has no lease.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

pytest.importorskip("kubernetes_asyncio")

from tests.kube.faulty import LEAST, SIZE, Faulty, impatient, on, resized, until, upgraded
from tests.kube.world import spec

from agentfleet import Fleet, RolloutPolicy
from agentfleet.testing.kube import (
    ControlPlane,
    PlaneOptions,
    drop_event,
    duplicate_event,
    expired_event,
    swap_events,
)

pytestmark = [pytest.mark.slow]  # not `integration`: a restarted API server is a new child process


@pytest.fixture
def plane(mortal_plane: ControlPlane) -> ControlPlane:
    """The control plane that may be hurt."""
    return mortal_plane


@pytest.fixture
def hasty_plane(kube_assets: Path) -> Iterator[ControlPlane]:
    """One that takes nodes for lost when it has not heard of them for 8 s, also after it was away itself."""
    made = ControlPlane(PlaneOptions(node_grace=8), assets=kube_assets)
    anyio.run(made.start)
    try:
        yield made
    finally:
        anyio.run(made.stop)


def test_a_watch_that_is_silent_is_noticed_and_what_it_hid_is_found(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenarios 14, 18: pods came and went behind a dead connection; they are found, nobody overreacts."""
    impatient(monkeypatch, silence=4.0)

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            there.proxy.half_open()
            listed = await plane.api.get(f"/api/v1/namespaces/{there.namespace}/pods")
            for name in [each["metadata"]["name"] for each in listed["items"]][:3]:
                await plane.api.delete(f"/api/v1/namespaces/{there.namespace}/pods/{name}")
            await until(lambda: len(there.pods.good) == SIZE and len(there.pods.created) == SIZE + 3)
            assert fleet.status()["good"] >= LEAST - 1, "what is not seen is not dead"
            await there.proxy.heal()
            await fleet.upgrade("2", timeout=90)
            await there.ends_as_without_faults(spare=3)

    on(plane, test, like=upgraded)


def test_of_several_wishes_that_could_not_be_told_the_last_one_counts(plane: ControlPlane) -> None:
    """Scenario 15: 8, 12, 10 and versions 2 and 3 while the server was out of reach: the last of each counts."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE)) as fleet:
            await fleet.deploy(timeout=60)
            await there.proxy.refuse()
            there.proxy.cut()
            await fleet.scale(SIZE + 4)
            await fleet.upgrade("2", wait=False)
            await anyio.sleep(0.5)
            await fleet.scale(SIZE + 2)
            await fleet.upgrade("3", wait=False)
            await there.proxy.accept()
            await until(lambda: {each.version for each in fleet.instances} == {"3"}, 90)
            await until(lambda: len(fleet.instances) == SIZE + 2)
            await fleet.ready(timeout=60)
            state = await there.outcome()
            assert (state.end.sizes, state.end.ready) == ((SIZE + 2,), SIZE + 2)
            assert '"agent:3"' in state.end.template
            each_told_once = SIZE + 4 + 2 * (SIZE + 4)  # 12 of version 1, and then 12 of versions 2 and 3
            assert state.created <= each_told_once, "what was overtaken, if it was told, was told once"

    on(plane, test)


def test_events_that_come_twice_late_or_never_change_nothing(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenarios 16, 17, 19: in one upgrade events are dropped, doubled, swapped, and watches expire."""
    impatient(monkeypatch, relist_every=5.0)

    async def test(there: Faulty) -> None:
        async def confuse(fleet: Fleet) -> None:
            del fleet
            there.proxy.inject(duplicate_event(), path="/pods", times=20)
            there.proxy.inject(swap_events(), path="/pods", times=20, skip=20)
            there.proxy.inject(drop_event(), path="/pods", times=10, skip=5)
            there.proxy.inject(drop_event(), path="/deployments", times=5, skip=3)
            there.proxy.inject(expired_event(), path="/(pods|deployments)", times=2, skip=30)

        await upgraded(there, confuse)
        await there.ends_as_without_faults()
        assert there.pods.least >= LEAST

    on(plane, test, like=upgraded)


def test_a_history_that_is_compacted_away_is_listed_anew(plane: ControlPlane) -> None:
    """Scenario 19: the manager was cut off, etcd was compacted and the API server restarted meanwhile (410)."""

    async def test(there: Faulty) -> None:
        async def compact(fleet: Fleet) -> None:
            del fleet
            await there.proxy.refuse()
            there.proxy.cut()
            await plane.compact(forget=True)
            await there.proxy.accept()

        await upgraded(there, compact)
        await there.ends_as_without_faults()
        assert there.pods.least >= LEAST

    on(plane, test, leases=False, like=upgraded)


def test_an_etcd_that_stops_for_a_while_costs_no_instance(plane: ControlPlane) -> None:
    """Scenarios 13, 18: no heartbeat and no event for 20 s, in which everything looks expired; nothing is replaced."""

    async def test(there: Faulty) -> None:
        async def freeze(fleet: Fleet) -> None:
            plane.freeze_etcd()
            try:
                await anyio.sleep(20)
                assert fleet.status()["good"] == SIZE
                assert not there.events("instance.lost")
            finally:
                plane.thaw_etcd()

        await resized(there, freeze)
        assert not there.events("instance.lost")
        await there.ends_as_without_faults()

    on(plane, test, leases=False, like=resized)


async def _believed_in(plane: ControlPlane) -> list[str]:
    """The nodes that the control plane takes for ready."""
    nodes = (await plane.api.get("/api/v1/nodes"))["items"]
    ready = {"type": "Ready", "status": "True"}
    return [
        each["metadata"]["name"]
        for each in nodes
        if any(ready.items() <= condition.items() for condition in each["status"].get("conditions", []))
    ]


def test_nodes_that_an_outage_made_look_lost_cost_no_instance(hasty_plane: ControlPlane) -> None:
    """Scenario 13: an outage that is longer than nodes may be silent; the control plane, back, takes all for lost."""

    async def test(there: Faulty) -> None:
        async with there.fleet(spec(SIZE, rollout=RolloutPolicy(progress_deadline=10.0))) as fleet:
            await fleet.deploy(timeout=60)
            nodes, pods = list(there.kubelet.nodes.by_name), there.pods_of(fleet)
            hasty_plane.kill_apiserver()
            for node in nodes:  # else a lease may be renewed before anybody looks at it
                await there.kubelet.node_gone(node)
            await anyio.sleep(12)
            await hasty_plane.restart_apiserver()
            with anyio.fail_after(60):
                while await _believed_in(hasty_plane):  # noqa: ASYNC110 - it has no event
                    await anyio.sleep(0.2)
            await there.kubelet.unready(*pods[:2])  # of all at once nobody would believe it
            for node in nodes:
                await there.kubelet.node_back(node)
            await until(lambda: fleet.status()["good"] == SIZE - 2)
            await anyio.sleep(5)  # a node's lease is there at once, its word about each pod takes longer
            await there.kubelet.heal(*pods[:2])
            await fleet.ready(timeout=60)
            await anyio.sleep(5)
            state = await there.outcome()
            assert (state.created, state.end.ready) == (SIZE, SIZE), "all were left alone"

    on(hasty_plane, test, leases=False)
