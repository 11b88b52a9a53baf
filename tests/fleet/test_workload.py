"""A fleet whose engine keeps size and revision by itself: told once, judged, shrunk with care, never fought over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from tests.fleet.world import HEALTH, spec

from agentfleet import (
    Event,
    Fleet,
    FleetSpec,
    HealthPolicy,
    HttpCheck,
    MemoryBackend,
    MemoryJournal,
    QueueTarget,
    RolloutFailed,
    RolloutPolicy,
    ScalingPolicy,
)
from agentfleet.backends.memory import Load, MemoryDeployments
from agentfleet.testing import virtual


class Engine:
    """A simulated cluster with Deployments, and the managers that come and go."""

    def __init__(self, wanted: FleetSpec) -> None:
        self.spec = wanted
        self.cluster = MemoryBackend(seed=1, start_delay=(1.0, 2.0))
        self.backend = MemoryDeployments(self.cluster)
        self.journal = MemoryJournal()

    def fleet(self) -> Fleet:
        return Fleet(self.spec, backend=self.backend, journal=self.journal, seed=1)

    @asynccontextmanager
    async def deployed(self) -> AsyncIterator[Fleet]:
        async with self.fleet() as fleet:
            await fleet.deploy(timeout=120)
            yield fleet

    def events(self, kind: str) -> list[Event]:
        return [event for event in self.journal.read(fleet=self.spec.name) if event.kind == kind]

    def by_somebody(self, replicas: int) -> None:
        self.backend.kept(self.spec.name).scale(replicas, by="kubectl")


@virtual
async def test_a_fleet_lives_on_an_engine_that_keeps_it_by_itself() -> None:
    """Deploy, scale, upgrade, roll back, stop, start, delete: each is one order or a few, and the end is as wanted."""
    engine = Engine(spec(6))
    async with engine.deployed() as fleet:
        assert [(order.replicas, order.revision) for order in engine.backend.orders] == [(6, 1)]
        assert sorted(member.instance.slot for member in fleet.view.members.values()) == list(range(6))
        await fleet.scale(9)
        await fleet.ready(timeout=60)
        assert len(fleet.instances) == 9
        await fleet.upgrade("2", timeout=300)
        await anyio.sleep(60)
        assert {instance.version for instance in fleet.instances} == {"2"}
        await fleet.rollback(timeout=300)
        await anyio.sleep(60)
        assert {instance.revision for instance in fleet.instances} == {1}
        await fleet.scale(3)
        await anyio.sleep(60)
        await fleet.ready(timeout=60)
        assert len(fleet.instances) == 3
        await fleet.stop(timeout=120)
        assert not fleet.view.members
        await fleet.start(timeout=120)
        assert len(fleet.instances) == 3
        await fleet.delete(timeout=120)
        assert engine.backend.kept(engine.spec.name).ordered().replicas == 0


@virtual
async def test_the_idle_go_first_when_it_shrinks() -> None:
    """Half the fleet goes: none of those that work."""
    checks = HealthPolicy(checks=(HttpCheck(path="/status", period=5.0),))
    engine = Engine(spec(12, health=checks))
    async with engine.deployed() as fleet:
        busy = sorted(instance.id for instance in fleet.instances)[::2]
        for id in busy:
            engine.cluster.load(Load(in_flight=1), id=id)
        await anyio.sleep(60)
        assert fleet.status()["busy"] == 6
        await fleet.scale(6)
        await anyio.sleep(120)
        assert sorted(instance.id for instance in fleet.instances) == busy
        removing = {event.instance for event in engine.events("instance.removing")}
        assert len(removing) == 6
        assert removing.isdisjoint(busy)


@virtual
async def test_nobody_is_named_when_the_engine_chooses_who_goes() -> None:
    """Instances that say nothing of their work are all alike: the size is told, and no single one."""
    engine = Engine(spec(12, health=HealthPolicy(checks=(HttpCheck(path="/health", period=5.0),))))
    async with engine.deployed() as fleet:
        await fleet.scale(6)
        await anyio.sleep(120)
        assert len(fleet.instances) == 6
        assert not engine.events("instance.removing")
        assert len(engine.events("instance.removed")) == 6


@virtual
async def test_a_sick_one_is_replaced_and_its_history_goes_on() -> None:
    """A hung instance is ended, the engine fills its place, and the newcomer inherits slot and history."""
    engine = Engine(spec(5, health=HEALTH))
    async with engine.deployed() as fleet:
        sick = fleet.instances[2]
        engine.cluster.faults.hang(sick.id, sticky=True)
        await anyio.sleep(60)
        await fleet.ready(timeout=60)
        assert sick.id not in fleet.view.members
        (recovered,) = engine.events("instance.recovered")
        assert recovered.data["slot"] == sick.slot
        assert len(fleet.instances) == 5


@virtual
async def test_a_bad_revision_is_undone() -> None:
    """An upgrade that crashes is judged by its failures, told back to the last good revision, and the user is told."""
    engine = Engine(spec(8, rollout=RolloutPolicy(max_failed=2)))
    async with engine.deployed() as fleet:
        engine.cluster.behave(version="2", crash_after=1.0)
        with pytest.raises(RolloutFailed):
            await fleet.upgrade("2", timeout=600)
        await anyio.sleep(60)
        await fleet.ready(timeout=120)
        assert {instance.version for instance in fleet.instances} == {"1"}
        assert engine.backend.orders[-1].revision == 1


@virtual
async def test_another_hand_is_respected_and_explained() -> None:
    """Somebody scales the engine's object: the fleet adopts the size, says who it was, and orders nothing else."""
    engine = Engine(spec(4))
    async with engine.deployed() as fleet:
        before = len(engine.backend.orders)
        engine.by_somebody(7)
        await anyio.sleep(60)
        await fleet.ready(timeout=60)
        assert len(fleet.instances) == 7
        assert fleet.state is not None
        assert fleet.state.replicas == 7
        assert engine.backend.orders[before:] == []
        (seen,) = engine.events("fleet.foreign_change")
        assert (seen.data["by"], seen.data["now"]) == ("kubectl", 7)


@virtual
async def test_another_hand_is_respected_while_nobody_manages() -> None:
    """What somebody did between two managers is adopted by the second, too."""
    engine = Engine(spec(4))
    async with engine.deployed():
        pass
    async with engine.backend:
        engine.by_somebody(7)
        await anyio.sleep(1)
    async with engine.fleet() as fleet:
        await anyio.sleep(60)
        assert len(fleet.instances) == 7
        assert engine.events("fleet.foreign_change")


@virtual
async def test_the_next_manager_goes_on_without_a_twitch() -> None:
    """A new manager finds the fleet as it should be and orders nothing that changes it."""
    engine = Engine(spec(5))
    async with engine.deployed() as fleet:
        known = {instance.id for instance in fleet.instances}
    before = engine.backend.orders[-1]
    async with engine.fleet() as fleet:
        await fleet.ready(timeout=60)
        await anyio.sleep(60)
        assert {instance.id for instance in fleet.instances} == known
        assert all(order == before for order in engine.backend.orders)


@virtual
async def test_an_engine_out_of_reach_is_told_later() -> None:
    """While the engine cannot be reached nothing is lost: the last word counts once it is back."""
    engine = Engine(spec(4))
    async with engine.deployed() as fleet:
        engine.cluster.faults.unavailable(seconds=200.0)
        await fleet.scale(6)
        await fleet.scale(8)
        await anyio.sleep(150)
        assert len(fleet.instances) == 4
        assert engine.events("action.failed")
        await anyio.sleep(400)
        await fleet.ready(timeout=120)
        assert len(fleet.instances) == 8


@virtual
async def test_an_upgrade_waits_for_a_size_that_was_not_seen_yet() -> None:
    """Somebody scales while nothing is seen: the upgrade is not told in the old size, and comes in the new one."""
    engine = Engine(spec(5))
    async with engine.deployed() as fleet:
        kept = engine.backend.kept(fleet.name)
        watchers, kept.watchers[:] = list(kept.watchers), []
        kept.scale(8, by="ann")
        await fleet.upgrade("2", wait=False)
        await anyio.sleep(30)
        assert engine.backend.orders[-1].revision == 1
        failed = engine.events("action.failed")
        assert {each.data["error"] for each in failed} == {"Outdated"}
        assert len(failed) < 10, "told again after a wait, longer each time, and never at once"
        for watcher in watchers:
            kept.subscribe(watcher)
        await fleet.ready(timeout=120)
        await anyio.sleep(120)
        assert [each.version for each in fleet.instances] == ["2"] * 8


@virtual
async def test_an_autoscaler_that_somebody_else_fights_yields_and_comes_back() -> None:
    """Another scaler takes back each size that ours sets: after a few rounds ours holds still, and says why, once."""
    policy = ScalingPolicy(min_replicas=2, max_replicas=20, targets=(QueueTarget(length=5),), period=10.0)
    engine = Engine(spec(4, scaling=policy))
    queue = 50.0
    async with Fleet(
        engine.spec, backend=engine.backend, journal=engine.journal, seed=1, metrics={"queue": lambda: queue}
    ) as fleet:
        await fleet.deploy(timeout=120)
        kept = engine.backend.kept(fleet.name)
        for _ in range(8):  # the other one wants 6, whatever ours says
            await anyio.sleep(25)
            if kept.ordered().replicas != 6:
                kept.scale(6, by="hpa")
        (contested,) = engine.events("scaling.contested")
        assert contested.data["by"] == "hpa"
        assert "Let one of the two scale" in contested.reasons[0]["text"]
        assert fleet.status()["desired"] == 6
        orders, decided = len(engine.backend.orders), len(engine.events("scaling.decision"))
        await anyio.sleep(300)
        assert len(engine.events("scaling.decision")) == decided, "nothing is decided that is not done"
        assert len(engine.backend.orders) == orders, "nobody writes against anybody"
        await fleet.scale(8)  # a person's word counts all the same
        await anyio.sleep(30)
        assert fleet.status()["desired"] == 8
        await anyio.sleep(600)  # the other one has been taken away
        assert len(engine.events("scaling.uncontested")) == 1
        assert fleet.status()["desired"] == 10, "what the queue asks for"
